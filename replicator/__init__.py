"""Reads a PostgreSQL logical replication slot and fans its rows out to sinks; see `replicator --help`.

What stands in `__all__` is for other programs: docs/streams/library.md says what each is, and what stays.
"""

from importlib import import_module

TYPE_CHECKING = False  # `typing` itself takes 30 ms, in which a Ctrl-C would show a traceback

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
    "BIGINT": "replicator.contracts.fields",
    "BOOLEAN": "replicator.contracts.fields",
    "BYTEA": "replicator.contracts.fields",
    "BatchRefused": "replicator.contracts.errors",
    "BatchTooLarge": "replicator.contracts.errors",
    "DATE": "replicator.contracts.fields",
    "DOUBLE": "replicator.contracts.fields",
    "Derived": "replicator.contracts.fields",
    "Dimension": "replicator.contracts.fields",
    "Event": "replicator.contracts.events",
    "Field": "replicator.contracts.fields",
    "Finding": "replicator.contracts.events",
    "JSON": "replicator.contracts.fields",
    "JSONB": "replicator.contracts.fields",
    "Mode": "replicator.contracts.sink",
    "PostgresDsn": "replicator.contracts.settings",
    "REAL": "replicator.contracts.fields",
    "Refusal": "replicator.contracts.events",
    "Replicator": "replicator.app.library",
    "ReplicatorError": "replicator.contracts.errors",
    "Role": "replicator.contracts.fields",
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
    "Stream": "replicator.contracts.fields",
    "StreamUnusable": "replicator.contracts.fields",
    "TEXT": "replicator.contracts.fields",
    "TIMESTAMP": "replicator.contracts.fields",
    "TIMESTAMPTZ": "replicator.contracts.fields",
    "Type": "replicator.contracts.fields",
    "UUID": "replicator.contracts.fields",
    "Where": "replicator.contracts.fields",
    "as_text": "replicator.contracts.fields",
    "cited": "replicator.contracts.errors",
    "format_lsn": "replicator.contracts.events",
    "numeric": "replicator.contracts.fields",
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
