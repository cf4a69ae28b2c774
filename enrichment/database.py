"""A read-only connection to the source database, where psycopg's errors become the product's.

The replication stream has a connection of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from replicator.contracts.errors import SettingsError, SourceUnavailable, SourceUnusable, command

CONNECT_TIMEOUT_SECONDS = 10
"""For each address of the DSN; a server that is there answers in milliseconds. The DSN's own connect_timeout wins."""

QUERY_TIMEOUT_SECONDS = 30
"""Look-ups go by primary key: one that takes this long waits for a lock or a dead network."""

ANSWER_GRACE_SECONDS = 5
"""How much longer than the server the client waits: by then no report of the timeout will come."""

ALL_ROWS = "-c row_security=off"
"""With row_security=off PostgreSQL fails loudly instead of hiding rows. It can't tell whether a policy hides any: if
yours hide nothing, set `options=-c row_security=on` in the DSN, which wins."""


class Database:
    """Connects when it is first needed, and again after a failure. One task uses it."""

    def __init__(self, dsn: str, *, timeout_seconds: int = QUERY_TIMEOUT_SECONDS, options: str = "") -> None:
        self._conninfo = _conninfo(dsn, timeout_seconds, options)
        self._patience_seconds = timeout_seconds + ANSWER_GRACE_SECONDS
        self._connection: psycopg.AsyncConnection[tuple[Any, ...]] | None = None

    async def rows(self, query: str, parameters: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """The result of one query. Raises SourceUnavailable (try again) or SourceUnusable (an operator is needed)."""
        async with self._translated(), asyncio.timeout(self._patience_seconds):
            return await (await (await self._connected()).execute(query, parameters)).fetchall()

    async def stream(
        self, query: str, parameters: Mapping[str, object] | None = None
    ) -> AsyncIterator[tuple[Any, ...]]:
        """The rows of one query as they come: memory holds one at a time. Raises as `rows`."""
        async with self._translated(), (await self._connected()).cursor() as cursor:
            async for row in cursor.stream(query, parameters, binary=True):
                yield row

    async def close(self) -> None:
        """Release the connection. Safe to call twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except (TimeoutError, psycopg.OperationalError, psycopg.InterfaceError) as exc:
            await self.close()
            timed_out = isinstance(exc, TimeoutError)
            detail = "no answer in time" if timed_out else str(exc).partition("\n")[0] or type(exc).__name__
            raise SourceUnavailable(detail=detail) from exc
        except psycopg.Error as exc:
            raise _unusable(exc) from exc

    async def _connected(self) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            self._connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True)
        return self._connection


def _conninfo(dsn: str, timeout_seconds: int, options: str) -> str:
    """The DSN, and what keeps this connection harmless and bounded."""
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.Error:
        # libpq's message quotes the DSN, and with it the password
        expected = "a postgresql:// URL or libpq keywords (sslmode and the like included)"
        raise SettingsError(name="REPLICATOR_POSTGRES_DSN", problem="libpq can't read it", expected=expected) from None
    ours = f"-c default_transaction_read_only=on -c statement_timeout={timeout_seconds}s {options}"
    parameters = {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "fallback_application_name": "replicator enrichment",
        **given,
        "client_encoding": "UTF8",
        "options": f"{ALL_ROWS} {given.get('options', '')} {ours}",
    }
    return make_conninfo("", **parameters)


def _unusable(exc: psycopg.Error) -> SourceUnusable:
    """Class 42 (names, rights) speaks of tables and columns; the text of other classes may quote values."""
    sqlstate = exc.sqlstate or ""
    text = exc.diag.message_primary if sqlstate.startswith("42") else None
    problem = f"{text} ({type(exc).__name__})" if text else f"{type(exc).__name__} (SQLSTATE {sqlstate})"
    return SourceUnusable(problem=problem, cure=f"{command('check')} says what the tables need")
