"""The one way to PostgreSQL: every connection is made here, with a session that nobody else's settings change.

A role, a database, a service file, the environment or a pooler may set timeouts, encodings and formats, or drop what a
connection asks for at its start. So the session's guards are set once it stands, and read back. `refusals.py` says what
PostgreSQL's errors mean; `enrichment/database.py` asks for rows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg import conninfo, sql

from replicator.contracts.errors import SettingsError, SourceUnavailable, SourceUnusable
from replicator.source.refusals import explained

Dsn: TypeAlias = str | Callable[[], str]
"""A connection string, or what gives the one of this moment: its file may have changed since the start."""
Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]

CONNECT_TIMEOUT_SECONDS = 5
"""For each address of the DSN; a server that is there answers in milliseconds. Two have to fit into a look at the slot.
The DSN's own connect_timeout wins."""
ANSWER_TIMEOUT_SECONDS = 30.0
"""For what a living server answers in milliseconds; one that is frozen must not hold the replicator."""

SESSION: Mapping[str, str] = {
    "client_encoding": "UTF8",
    "DateStyle": "ISO",  # wal2json prints timestamps as the session says
    "TimeZone": "UTC",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",  # wal2json takes it for that, whatever it is
    "extra_float_digits": "1",  # all digits that a float has
    # PostgreSQL ends nothing of ours: a stream lasts for ever, and a new slot waits for the transactions that run.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "synchronous_commit": "local",  # a standby that is down must not hold what we read
}
"""The guards of every session. `Database` has more for its queries."""
SINCE = {"transaction_timeout": 170_000}
"""Guards that older servers do not know."""

_answered: dict[tuple[str, str], float] = {}
"""Hosts and ports of primaries, and when each was last connected to."""


async def connect(dsn: Dsn, name: str, **parameters: str) -> Connection:
    """Connect as application `name`; the DSN's own time-outs win. Raises psycopg.Error, SettingsError, SourceUnusable.

    Commits each statement, prepares none (a pooler may stand between), and has the guards.
    """
    given = parts(dsn)
    given.pop("replication", None)  # whether a connection is one is ours to say
    defaults: dict[str, int | str] = {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "keepalives_idle": 30,
        "tcp_user_timeout": 60_000,
    }
    if "," in f"{given.get('host')}{given.get('hostaddr')}" and "PGTARGETSESSIONATTRS" not in os.environ:
        defaults["target_session_attrs"] = "primary"  # of several hosts: else a standby may be the first that answers
    ours = {"application_name": name, "client_encoding": "UTF8", **parameters}
    info = conninfo.make_conninfo(**_living_first(defaults | given | ours))
    connection = await psycopg.AsyncConnection.connect(info, autocommit=True, prepare_threshold=None)
    _answered[connection.info.host, str(connection.info.port)] = time.monotonic()
    try:
        await _guard(connection)
    except BaseException:
        await connection.close()
        raise
    return connection


def _living_first(given: dict[str, Any]) -> dict[str, Any]:
    """The same with the host first that was the primary lately: one that is switched off costs a time-out each time.

    If it is the primary no more, the others are asked. Where any server does, the order is the user's choice.
    """
    lists = {name: str(given[name]).split(",") for name in ("host", "hostaddr", "port") if given.get(name)}
    names = lists.get("host") or lists.get("hostaddr") or []
    if given.get("target_session_attrs") not in ("primary", "read-write"):
        return given
    ports = lists.get("port", [""])
    places = [*zip(names, ports * len(names) if len(ports) == 1 else ports, strict=False)]
    order = sorted(range(len(places)), key=lambda at: -_answered.get((places[at][0], places[at][1] or "5432"), 0.0))
    turned = {name: ",".join(values[at] for at in order) for name, values in lists.items() if len(values) == len(order)}
    return given | turned


def parts(dsn: Dsn) -> dict[str, Any]:
    """The DSN's keywords, as of this moment. Raises SettingsError."""
    try:
        return conninfo.conninfo_to_dict(dsn if isinstance(dsn, str) else dsn())
    except psycopg.Error:
        # libpq's message quotes the DSN, and with it the password
        expected = "a postgresql:// URL or libpq keywords (sslmode and the like included)"
        raise SettingsError(name="REPLICATOR_POSTGRES_DSN", problem="libpq can't read it", expected=expected) from None


def guards(settings: Mapping[str, str], server_version: int, *, local: bool = False) -> sql.Composed:
    """The statement that sets them for the session, or until the transaction ends (`local`).

    In literals, not parameters: a replication connection speaks only the simple query protocol.
    """
    known = {name: value for name, value in settings.items() if server_version >= SINCE.get(name, 0)}
    call = sql.SQL("set_config({}, {}, {})")
    calls = [call.format(sql.Literal(name), sql.Literal(value), sql.Literal(local)) for name, value in known.items()]
    return sql.SQL("SELECT {}").format(sql.SQL(", ").join(calls))


async def _guard(connection: Connection) -> None:
    """Set the session's guards, and see in another statement that they stay."""
    version = connection.info.server_version
    wanted = await (await connection.execute(guards(SESSION, version))).fetchone()
    names = [name for name in SESSION if version >= SINCE.get(name, 0)]
    looks = sql.SQL(", ").join(sql.SQL("current_setting({})").format(sql.Literal(name)) for name in names)
    found = await (await connection.execute(sql.SQL("SELECT {}").format(looks))).fetchone()
    if found != wanted:
        lost = [name for name, ours, theirs in zip(names, wanted or (), found or (), strict=True) if ours != theirs]
        problem = f"settings of the session do not stay as they were set ({', '.join(lost)})"
        raise SourceUnusable(problem=problem, cure="Connect to PostgreSQL itself, not to a pooler")


@asynccontextmanager
async def answering(
    slot: str, seconds: float | None = ANSWER_TIMEOUT_SECONDS, connection: Connection | None = None
) -> AsyncIterator[None]:
    """Around calls to PostgreSQL. Raises SourceError, SourceUnavailable also after so long.

    What a refusal means the server can be asked, over the same connection.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise SourceUnavailable(detail=f"no answer in {seconds:.0f} s") from exc
    except psycopg.Error as exc:
        raise await explained(exc, slot, connection) from exc
