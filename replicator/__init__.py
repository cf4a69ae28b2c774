"""Reads a PostgreSQL logical replication slot and fans its rows out to sinks; see `replicator --help`.

What stands in `__all__` is for other programs: docs/streams/library.md says what each is, and what stays.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from replicator.contracts.fields import (
    BIGINT,
    BOOLEAN,
    BYTEA,
    DATE,
    DOUBLE,
    JSON,
    JSONB,
    REAL,
    TEXT,
    TIMESTAMP,
    TIMESTAMPTZ,
    UUID,
    Derived,
    Dimension,
    Field,
    Role,
    Stream,
    StreamUnusable,
    Type,
    Where,
    as_text,
    numeric,
)

if TYPE_CHECKING:
    from replicator.app.library import Replicator
    from replicator.contracts.errors import (
        BatchRefused,
        BatchTooLarge,
        ReplicatorError,
        SettingsError,
        SinkEmptied,
        SinkError,
        SinkMisconfigured,
        SinkUnavailable,
        SinkUnusable,
        cited,
    )
    from replicator.contracts.events import Event, Finding, Refusal, SinkPosition, format_lsn, unfolded
    from replicator.contracts.settings import PostgresDsn, Settings
    from replicator.contracts.sink import Mode, Sink, SinkContext
    from replicator.operations.status.form import Status
else:

    def __getattr__(name: str) -> object:
        """When somebody asks: whoever imports a part of it, such as the command line, waits for no other."""
        if name == "Replicator":
            import_module("replicator.cli.packages").require_own()
        if name in _ELSEWHERE:
            return getattr(import_module(_ELSEWHERE[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_ELSEWHERE = {
    "BatchRefused": "replicator.contracts.errors",
    "BatchTooLarge": "replicator.contracts.errors",
    "Event": "replicator.contracts.events",
    "Finding": "replicator.contracts.events",
    "Mode": "replicator.contracts.sink",
    "PostgresDsn": "replicator.contracts.settings",
    "Refusal": "replicator.contracts.events",
    "Replicator": "replicator.app.library",
    "ReplicatorError": "replicator.contracts.errors",
    "Settings": "replicator.contracts.settings",
    "SettingsError": "replicator.contracts.errors",
    "Sink": "replicator.contracts.sink",
    "SinkContext": "replicator.contracts.sink",
    "SinkEmptied": "replicator.contracts.errors",
    "SinkError": "replicator.contracts.errors",
    "SinkMisconfigured": "replicator.contracts.errors",
    "SinkPosition": "replicator.contracts.events",
    "SinkUnavailable": "replicator.contracts.errors",
    "SinkUnusable": "replicator.contracts.errors",
    "Status": "replicator.operations.status.form",
    "cited": "replicator.contracts.errors",
    "format_lsn": "replicator.contracts.events",
    "unfolded": "replicator.contracts.events",
}

__all__ = [
    "BIGINT",
    "BOOLEAN",
    "BYTEA",
    "DATE",
    "DOUBLE",
    "JSON",
    "JSONB",
    "REAL",
    "TEXT",
    "TIMESTAMP",
    "TIMESTAMPTZ",
    "UUID",
    "BatchRefused",
    "BatchTooLarge",
    "Derived",
    "Dimension",
    "Event",
    "Field",
    "Finding",
    "Mode",
    "PostgresDsn",
    "Refusal",
    "Replicator",
    "ReplicatorError",
    "Role",
    "Settings",
    "SettingsError",
    "Sink",
    "SinkContext",
    "SinkEmptied",
    "SinkError",
    "SinkMisconfigured",
    "SinkPosition",
    "SinkUnavailable",
    "SinkUnusable",
    "Status",
    "Stream",
    "StreamUnusable",
    "Type",
    "Where",
    "as_text",
    "cited",
    "format_lsn",
    "numeric",
    "unfolded",
]

__version__ = "0.1.0"
