"""What PostgreSQL's errors mean, by SQLSTATE: the border where psycopg's exceptions become SourceErrors.

Their texts come in the server's language, so they are shown and never read.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, LiteralString, NamedTuple

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

LEVEL_CURE = "ALTER SYSTEM SET wal_level = logical, then restart PostgreSQL"
_RETRIES = "`run` retries by itself"

_IN_USE = "55006"  # object_in_use
_STATE = ("55000", "0A000")  # object_not_in_prerequisite_state, feature_not_supported
_RIGHTS = "42501"  # insufficient_privilege
_VANISHED = "42704"  # undefined_object: the slot was dropped a moment ago, which the next look finds
_REFUSED = "42"  # class: syntax error or access rule violation, as from a pooler

_CURES = {
    "58P01": "Install wal2json for this version of PostgreSQL (Debian: postgresql-NN-wal2json)",  # undefined_file
    "53400": "Raise max_replication_slots and restart PostgreSQL, or drop a slot that is not in use",
}
"""What only an operator can change, so that the program stops."""

_REFUSALS = {
    "28": "Check user and password in REPLICATOR_POSTGRES_DSN, and pg_hba.conf",
    "3D": "Check the database's name in REPLICATOR_POSTGRES_DSN",
    "53300": "Raise max_connections or the role's or database's CONNECTION LIMIT, or close other connections",
    "57P03": f"It starts up or shuts down: {_RETRIES}",
}
_PASSING = {
    "57": "PostgreSQL ended the connection or the query",
    "55P03": "PostgreSQL waits for a lock",
    "25": "PostgreSQL ended the transaction",
}
"""What a retry may find changed, by SQLSTATE or its class: the cure of those, the problem of these."""


class _Facts(NamedTuple):
    """What the server says of itself."""

    wal_level: str = "logical"
    standby: bool = False


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
    facts = await _asked(connection, _FACTS) if exc.sqlstate in _STATE else None
    return translated(exc, slot, _Facts(*facts) if facts else None)


async def _asked(connection: psycopg.AsyncConnection[Any] | None, query: LiteralString) -> Sequence[Any] | None:
    """A row; None: it can't be had."""
    if connection is None:
        return None
    with suppress(psycopg.Error, TimeoutError):
        async with asyncio.timeout(_FACTS_SECONDS):
            return await (await connection.execute(query)).fetchone()
    return None


def translated(exc: psycopg.Error, slot: str = "", facts: _Facts | None = None) -> SourceError:
    """The same, as far as it can be known without asking. What is not known is retried."""
    sqlstate, message = exc.sqlstate or "", exc.diag.message_primary or ""
    if not sqlstate:
        return unconnected(exc)
    if sqlstate == _IN_USE:
        numbers = re.findall(r"\d+", message.replace(slot, ""))
        return SlotInUse(slot=slot, pid=numbers[-1] if numbers else "?")
    if facts and facts.standby and sqlstate in _STATE:
        return SourceStandby()
    if cure := _cure(sqlstate, facts):
        return SourceUnusable(problem=message, cure=cure)
    if way_in := _REFUSALS.get(sqlstate) or _REFUSALS.get(sqlstate[:2]):
        return SourceRefuses(detail=message, cure=way_in)
    problem = _PASSING.get(sqlstate) or _PASSING.get(sqlstate[:2]) or "PostgreSQL does not do what it is asked to"
    return SourceUnavailable(problem=problem, detail=message, cure=_RETRIES)


def _cure(sqlstate: str, facts: _Facts | None) -> str:
    """What an operator has to do; empty where a retry may do."""
    if sqlstate in _STATE:  # with the level right, the slot was lost a moment ago, which the next look finds
        return LEVEL_CURE if facts and facts.wal_level != "logical" else ""
    if sqlstate == _RIGHTS:
        return replication_cure()
    if sqlstate.startswith(_REFUSED) and sqlstate != _VANISHED:
        return "Connect to PostgreSQL itself, not to a pooler, in version 14 or newer"
    return _CURES.get(sqlstate, "")


def replication_cure(role: str = "…") -> str:
    """Managed services have no superuser, and each its own way."""
    name = f'"{role}"'
    return (
        f"let the role replicate: `ALTER ROLE {name} REPLICATION` (Amazon RDS: `GRANT rds_replication TO {name}`;"
        f" Google Cloud SQL and Azure: the same ALTER ROLE as the administrator that the service gave you)"
    )


def allow_plugin(current: str = "") -> str:
    """The statement that adds ours to the list: without the others, other replication would end."""
    names = ", ".join(f"'{name}'" for name in dict.fromkeys([*_names(current or _PLUGINS_BY_DEFAULT), PLUGIN]))
    statement = f"`ALTER SYSTEM SET output_plugin_libraries = {names}; SELECT pg_reload_conf();`"
    if current:
        return f"{statement} adds it to the list"
    return f"{statement} adds it to the default; put in what else a superuser sees in `SHOW output_plugin_libraries`"


def _names(listed: str) -> list[str]:
    """Of a list of libraries. Commas end a name even inside quotes: a whole list in quotes is a common mistake."""
    return [name for name in re.split(r'[",\s]+', listed) if name]


def unconnected(exc: psycopg.Error) -> SourceUnavailable:
    """No connection, or no more. libpq keeps no SQLSTATE then, but it shows who speaks and which names they say."""
    first, _, rest = str(exc).strip().partition("\n")
    several = re.findall(r"^- .*?: (connection .*)$", rest, re.MULTILINE)
    texts = [_shorter(text) for text in several] or [_shorter(first)]
    answers = [answer[1] for text in texts if (answer := re.search(r"[^\s:]+:  (.*)", text))]  # "FATAL:  message"
    if not answers:
        return SourceUnavailable(detail="; ".join(dict.fromkeys(texts)))
    detail = answers[-1]
    return SourceRefuses(detail=detail, cure=_cure_of(detail, exc))


def _shorter(text: str) -> str:
    return text.removeprefix("connection failed: ").removeprefix("connection is bad: ")


def _cure_of(text: str, exc: psycopg.Error) -> str:
    """By the names that stand in it, which are the same in every language."""
    given = exc.pgconn
    user, database = ((name or b"").decode(errors="replace") for name in (given.user, given.db)) if given else ("", "")
    named = {what for what, name in (("user", user), ("database", database)) if name and _stands(name, text)}
    if "pg_hba.conf" in text:
        return "Allow it in pg_hba.conf (a replication connection needs the database's line, too), then reload"
    if named == {"database"} and user != database:
        return "Check the database's name in REPLICATOR_POSTGRES_DSN, and that the role may connect to it"
    if named:
        return "Check user, password and database in REPLICATOR_POSTGRES_DSN, and that the role may log in"
    replicates = given and any(option.keyword == b"replication" and option.val for option in given.info)
    right = f". Otherwise connect to it directly, not through a pooler, and {replication_cure(user)}"
    return f"If it starts up, shuts down or is full, {_RETRIES}{right if replicates else ''}"


def _stands(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
