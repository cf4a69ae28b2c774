"""Checkpoints, sink positions and dead letters, durably, in any database that SQLAlchemy knows.

`store` is the contract's methods, `schema` the tables and their versions, `database` the connection and its errors.
"""

from checkpoint_store.store import SqlCheckpointStore

__all__ = ["SqlCheckpointStore"]
