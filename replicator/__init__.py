"""Reads a PostgreSQL logical replication slot and fans its rows out to sinks; see `replicator --help`."""

__version__ = "0.1.0"
