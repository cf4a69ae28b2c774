"""One read-only connection to the source database, and the border where psycopg's errors become ours.

`content.py` looks content up through it, `preflight.py` the catalog. The replication stream has its own connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from replicator.contracts.errors import SettingsError, SourceUnavailable, SourceUnusable

CONNECT_TIMEOUT_SECONDS = 10
"""For each address of the DSN; a server that is there answers in milliseconds. The DSN's own connect_timeout wins."""

QUERY_TIMEOUT_SECONDS = 30
"""Look-ups go by primary key: one that takes this long is stuck behind a lock or on a dead network."""

ANSWER_GRACE_SECONDS = 5
"""How much longer than the server we wait: past this it is not going to tell us about the timeout itself."""


ALL_ROWS = "-c row_security=off"
"""Rows that a policy hides would be missing without a word: off, it is an error that says so. PostgreSQL can't tell a
policy that hides from one that does not: who has such ones may say `row_security=on` in the DSN's options, which win.
"""


class Database:
    """Connects when it is first needed, and again after trouble. One task uses it."""

    def __init__(self, dsn: str, *, timeout_seconds: int = QUERY_TIMEOUT_SECONDS, options: str = "") -> None:
        self._conninfo = _conninfo(dsn, timeout_seconds, options)
        self._patience_seconds = timeout_seconds + ANSWER_GRACE_SECONDS
        self._connection: psycopg.AsyncConnection[tuple[Any, ...]] | None = None

    async def rows(self, query: str, parameters: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """The result of one query. Raises SourceUnavailable (try again) or SourceUnusable (an operator is needed)."""
        async with self._translated(), asyncio.timeout(self._patience_seconds):
            connection = await self._connected()
            cursor = await connection.execute(query, parameters)
            return await cursor.fetchall()

    async def stream(
        self, query: str, parameters: Mapping[str, object] | None = None
    ) -> AsyncIterator[tuple[Any, ...]]:
        """The rows of one query as they come, so that memory holds one at a time. Raises as `rows`."""
        async with self._translated(), (await self._connected()).cursor() as cursor:
            async for row in cursor.stream(query, parameters, binary=True):
                yield row

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except TimeoutError as exc:
            await self.close()
            raise SourceUnavailable(detail="no answer in time") from exc
        except (psycopg.OperationalError, psycopg.InterfaceError) as exc:
            await self.close()
            raise SourceUnavailable(detail=_first_line(exc)) from exc
        except psycopg.Error as exc:
            raise _unusable(exc) from exc

    async def close(self) -> None:
        """Give the connection back. Safe to call twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connected(self) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            self._connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True)
        return self._connection


def _conninfo(dsn: str, timeout_seconds: int, more: str) -> str:
    """What the DSN says, and what keeps us harmless and bounded."""
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.Error:
        # libpq's message quotes the DSN, and with it the password
        expected = "a postgresql:// URL or libpq keywords (sslmode and the like included)"
        raise SettingsError(name="REPLICATOR_POSTGRES_DSN", problem="libpq can't read it", expected=expected) from None
    options = f"-c default_transaction_read_only=on -c statement_timeout={timeout_seconds}s {more}"
    ours = {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "fallback_application_name": "replicator enrichment",
        **given,
        "client_encoding": "UTF8",
        "options": f"{ALL_ROWS} {given.get('options', '')} {options}",
    }
    return make_conninfo("", **ours)


def _unusable(exc: psycopg.Error) -> SourceUnusable:
    """Class 42 (names, rights) speaks of tables and columns; what others say may quote values."""
    sqlstate = exc.sqlstate or ""
    said = exc.diag.message_primary if sqlstate.startswith("42") else None
    problem = f"{said} ({type(exc).__name__})" if said else f"{type(exc).__name__} (SQLSTATE {sqlstate})"
    cure = "`python -m replicator check` says what the tables need"
    return SourceUnusable(problem=problem, cure=cure)


def _first_line(exc: psycopg.Error) -> str:
    return str(exc).partition("\n")[0] or type(exc).__name__
