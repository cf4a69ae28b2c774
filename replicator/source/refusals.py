"""What PostgreSQL's errors mean, by SQLSTATE: the border where psycopg's exceptions become SourceErrors.

Their texts come in the server's language, so they are shown and never read.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, LiteralString

import psycopg

from replicator.contracts.errors import (
    SlotInUse,
    SourceError,
    SourceRefuses,
    SourceStandby,
    SourceUnavailable,
    SourceUnusable,
)
from replicator.source.wal2json import PLUGIN

_RETRIES = "`run` retries by itself"

_IN_USE = "55006"  # object_in_use
_STATE = ("55000", "0A000")  # object_not_in_prerequisite_state, feature_not_supported
_RIGHTS = "42501"  # insufficient_privilege
_VANISHED = "42704"  # undefined_object: the slot was dropped a moment ago, which the next look finds

_CURES = {
    "42": "Connect to PostgreSQL itself, not to a pooler, in version 14 or newer",  # class: syntax or access rule
    "58P01": "Install wal2json for this version of PostgreSQL (Debian: postgresql-NN-wal2json)",  # undefined_file
    "53400": "Raise max_replication_slots and restart PostgreSQL, or drop a slot that is not in use",
}
"""What only an operator can change, so that the program stops, by SQLSTATE or its class."""
_REFUSALS = {
    "28": "Check user and password in REPLICATOR_POSTGRES_DSN, and pg_hba.conf",
    "3D": "Check the database's name in REPLICATOR_POSTGRES_DSN",
    "53300": "Raise max_connections or the role's or database's CONNECTION LIMIT, or close other connections",
    "57P03": f"It is starting or shutting down: {_RETRIES}",
}
_PASSING = {
    "57": "PostgreSQL ended the connection or the query",
    "55P03": "PostgreSQL waits for a lock",
    "25": "PostgreSQL ended the transaction",
}
"""What a retry may find changed: the cure of those, the problem of these."""

_FACTS = "SELECT current_setting('wal_level'), pg_is_in_recovery()"
# PostgreSQL 15.19, 16.15, 17.11, 18.6 and later (CVE-2026-6471). It takes pg_read_all_settings to look.
_PLUGINS = "SELECT current_setting('output_plugin_libraries', true)"
_PLUGINS_BY_DEFAULT = "pgoutput, test_decoding"
_FACTS_SECONDS = 5.0


async def explained(
    exc: psycopg.Error, slot: str = "", connection: psycopg.AsyncConnection[Any] | None = None
) -> SourceError:
    """What a refusal means. One SQLSTATE has several reasons, so the server is asked which one it is."""
    message = exc.diag.message_primary or ""
    if exc.sqlstate == _RIGHTS and PLUGIN in message:
        [plugins] = await _asked(connection, _PLUGINS) or [""]
        return SourceUnusable(problem=message, cure=allow_plugin(plugins or ""))
    if exc.sqlstate in _STATE:  # neither: the slot was lost a moment ago, which the next look finds
        wal_level, standby = await _asked(connection, _FACTS) or ("logical", False)
        if standby:
            return SourceStandby()
        if wal_level != "logical":
            cure = "ALTER SYSTEM SET wal_level = logical, then restart PostgreSQL"
            return SourceUnusable(problem=message, cure=cure)
    return translated(exc, slot)


async def _asked(connection: psycopg.AsyncConnection[Any] | None, query: LiteralString) -> Sequence[Any] | None:
    """A row; None: it can't be had."""
    if connection is None:
        return None
    with suppress(psycopg.Error, TimeoutError):
        async with asyncio.timeout(_FACTS_SECONDS):
            return await (await connection.execute(query)).fetchone()
    return None


def translated(exc: psycopg.Error, slot: str = "") -> SourceError:
    """The same, as far as it can be known without asking. What is not known is retried."""
    sqlstate, message = exc.sqlstate or "", exc.diag.message_primary or ""
    if not sqlstate:
        return unconnected(exc)
    if sqlstate == _IN_USE:
        numbers = re.findall(r"\d+", message.replace(slot, ""))
        return SlotInUse(slot=slot, pid=numbers[-1] if numbers else "?")
    if sqlstate == _RIGHTS:
        return SourceUnusable(problem=message, cure=replication_cure())
    if sqlstate != _VANISHED and (cure := _found(_CURES, sqlstate)):
        return SourceUnusable(problem=message, cure=cure)
    if way_in := _found(_REFUSALS, sqlstate):
        return SourceRefuses(detail=message, cure=way_in)
    problem = _found(_PASSING, sqlstate) or "PostgreSQL refuses a request"
    return SourceUnavailable(problem=problem, detail=message, cure=_RETRIES)


def _found(texts: Mapping[str, str], sqlstate: str) -> str:
    return texts.get(sqlstate) or texts.get(sqlstate[:2], "")


def replication_cure(role: str = "…") -> str:
    """Managed services have no superuser, and each its own way."""
    name = f'"{role}"'
    return (
        f"let the role replicate: `ALTER ROLE {name} REPLICATION` (Amazon RDS: `GRANT rds_replication TO {name}`;"
        f" Google Cloud SQL and Azure: the same ALTER ROLE as the administrator that the service gave you)"
    )


def allow_plugin(current: str = "") -> str:
    """The statement that adds ours to the list: without the others, other replication would end."""
    # Commas end a name even inside quotes: a whole list in quotes is a common mistake.
    listed = [name for name in re.split(r'[",\s]+', current or _PLUGINS_BY_DEFAULT) if name]
    names = ", ".join(f"'{name}'" for name in dict.fromkeys([*listed, PLUGIN]))
    statement = f"`ALTER SYSTEM SET output_plugin_libraries = {names}; SELECT pg_reload_conf();`"
    if current:
        return f"{statement} adds it to the list"
    return f"{statement} adds it to the default; put in what else a superuser sees in `SHOW output_plugin_libraries`"


def unconnected(exc: psycopg.Error) -> SourceUnavailable:
    """No connection, or no more. libpq keeps no SQLSTATE then, but it shows who speaks and which names they say."""
    first, _, rest = str(exc).strip().partition("\n")
    several = re.findall(r"^- .*?: (connection .*)$", rest, re.MULTILINE)
    texts = [re.sub(r"^(connection (failed|is bad): )+", "", text) for text in several or [first]]
    answers = [answer[1] for text in texts if (answer := re.search(r"[^\s:]+:  (.*)", text))]  # "FATAL:  message"
    if not answers:
        return SourceUnavailable(detail="; ".join(dict.fromkeys(texts)))
    detail = answers[-1]
    return SourceRefuses(detail=detail, cure=_cure_of(detail, exc))


def _cure_of(text: str, exc: psycopg.Error) -> str:
    """By the names that stand in it, which are the same in every language."""
    given = exc.pgconn
    user, database = ((name or b"").decode(errors="replace") for name in (given.user, given.db)) if given else ("", "")
    names = (("user", user), ("database", database))
    named = {what for what, name in names if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)}
    if "pg_hba.conf" in text:
        return "Allow it in pg_hba.conf (a replication connection needs the database's line, too), then reload"
    if named == {"database"} and user != database:
        return "Check the database's name in REPLICATOR_POSTGRES_DSN, and that the role may connect to it"
    if named:
        login = "Check user, password and database in REPLICATOR_POSTGRES_DSN"
        return f"{login}, and that the role may log in and has not reached its CONNECTION LIMIT"
    replicates = given and any(option.keyword == b"replication" and option.val for option in given.info)
    right = f". Otherwise connect to it directly, not through a pooler, and {replication_cure(user)}"
    return f"If it is starting, shutting down or out of connections, {_RETRIES}{right if replicates else ''}"
