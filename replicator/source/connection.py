"""Connections for the slot and its stream, and the border where psycopg's errors become SourceErrors.

`enrichment` has connections of its own, for the tables.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from psycopg import conninfo

from replicator.contracts.errors import SlotInUse, SourceError, SourceUnavailable, SourceUnusable

PLUGIN = "wal2json"

CONNECT_TIMEOUT_SECONDS = 10
ANSWER_TIMEOUT_SECONDS = 30.0
"""For what a living server answers in milliseconds; one that is frozen must not hold the replicator."""

_IN_USE = "55006"  # object_in_use
_VANISHED = "42704"  # undefined_object: the slot was dropped a moment ago, which the next look finds
_REFUSED = "42"  # class: syntax error or access rule violation, as from a pooler
_CURES = {
    "55000": "Set wal_level = logical in postgresql.conf and restart PostgreSQL",  # object_not_in_prerequisite_state
    "58P01": "Install wal2json for this version of PostgreSQL (Debian: postgresql-NN-wal2json)",  # undefined_file
    "42501": "Give the role its rights: ALTER ROLE … REPLICATION (see sql/roles.sql)",  # insufficient_privilege
    "53400": "Raise max_replication_slots and restart PostgreSQL, or drop a slot that is not in use",
    "0A000": "See PostgreSQL's log",  # feature_not_supported
}


async def connect(dsn: str, name: str, **parameters: str) -> psycopg.AsyncConnection:
    """Connect as application `name`; time-outs that the DSN sets win. Raises psycopg.Error."""
    defaults = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "keepalives_idle": 30, "tcp_user_timeout": 60_000}
    given = conninfo.conninfo_to_dict(dsn)
    missing = {key: value for key, value in defaults.items() if key not in given}
    info = conninfo.make_conninfo(dsn, **missing, application_name=name, **parameters)
    return await psycopg.AsyncConnection.connect(info, autocommit=True)


@asynccontextmanager
async def answering(slot: str, seconds: float | None = ANSWER_TIMEOUT_SECONDS) -> AsyncIterator[None]:
    """Around calls to PostgreSQL. Raises SourceUnavailable (also after so long), SlotInUse, SourceUnusable."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise SourceUnavailable(detail=f"no answer in {seconds:.0f} s") from exc
    except psycopg.Error as exc:
        raise translated(exc, slot) from exc


def translated(exc: psycopg.Error, slot: str = "") -> SourceError:
    """What a refusal means. One that is not known is retried."""
    message = exc.diag.message_primary or str(exc).strip().partition("\n")[0]
    sqlstate = exc.sqlstate or ""
    if sqlstate == _IN_USE:
        return SlotInUse(slot=slot, pid=message.rpartition(" ")[2])  # the message ends with the process
    if "output plugin" in message:  # PostgreSQL 15.19, 16.15, 17.11, 18.6 and later: CVE-2026-6471
        cure = f"ALTER SYSTEM SET output_plugin_libraries = '{PLUGIN}', then reload"
    elif sqlstate == _VANISHED or not (sqlstate in _CURES or sqlstate.startswith(_REFUSED)):
        return SourceUnavailable(detail=message)
    elif "recovery" in message:
        cure = "Connect to the primary: this server is a standby"
    else:
        cure = _CURES.get(sqlstate, "Connect to PostgreSQL itself, not to a pooler, in version 14 or newer")
    return SourceUnusable(problem=message, cure=cure)
