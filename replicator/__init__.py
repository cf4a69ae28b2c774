"""Reads a PostgreSQL logical replication slot and fans its rows out to sinks; see `replicator --help`."""

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
    Where,
    as_text,
    numeric,
)

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
    "Derived",
    "Dimension",
    "Field",
    "Role",
    "Stream",
    "Where",
    "as_text",
    "numeric",
]

__version__ = "0.1.0"
