"""A read-only connection to the source database: queries in transactions that nothing else's settings change.

`replicator/source/connection.py` makes it. The replication stream has one of its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import psycopg
from psycopg import IsolationLevel, sql

from replicator.contracts.errors import SourceUnavailable, SourceUnusable, command
from replicator.source.connection import SESSION, Connection, Dsn, connect, guards, parts
from replicator.source.refusals import translated

QUERY_TIMEOUT_SECONDS = 30
"""Look-ups go by primary key: one that takes this long waits for a lock or a dead network."""

ANSWER_GRACE_SECONDS = 5
"""How much longer than the server the client waits: by then no report of the timeout will come."""

POLICIES = re.compile(r"row[-_]security\s*=\s*(on|true|yes|1)\b", re.IGNORECASE)
"""With row_security=off PostgreSQL fails loudly instead of hiding rows. It can't tell whether a policy hides any: if
yours hide nothing, set `options=-c row_security=on` in the DSN, which wins."""


class Database:
    """Connects when it is first needed, and again after a failure. One task uses it.

    A query is a transaction that can only read, with the guards set in it: a pooler gives each to another session.
    """

    def __init__(
        self,
        dsn: Dsn,
        *,
        timeout_seconds: int = QUERY_TIMEOUT_SECONDS,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`settings` are set for each query."""
        self._dsn = dsn
        self._settings = {**SESSION, **settings, "statement_timeout": f"{timeout_seconds}s"}
        self._guards = sql.Composed([])
        self._patience_seconds = timeout_seconds + ANSWER_GRACE_SECONDS
        self._connection: Connection | None = None

    async def rows(self, query: str, parameters: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """The result of one query. Raises SourceUnavailable (try again) or SourceUnusable (an operator is needed)."""
        [found] = await self.each((query, parameters))
        return found

    async def each(self, *queries: tuple[str, Mapping[str, object] | None]) -> list[list[tuple[Any, ...]]]:
        """The results of several queries, one after the other, each in a newer snapshot. Raises as `rows`."""
        async with self._translated(), asyncio.timeout(self._patience_seconds), self._reading() as connection:
            # Never without parameters: all queries write a name's % twice.
            return [await (await connection.execute(query, given or {})).fetchall() for query, given in queries]

    async def stream(
        self, query: str, parameters: Mapping[str, object] | None = None
    ) -> AsyncIterator[tuple[Any, ...]]:
        """The rows of one query as they come: memory holds one at a time. Raises as `rows`."""
        async with self._translated(), self._reading() as connection, connection.cursor() as cursor:
            async for row in cursor.stream(query, parameters or {}, binary=True):
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
        except TimeoutError as exc:
            await self.close()
            raise SourceUnavailable(detail="no answer in time") from exc
        except (psycopg.OperationalError, psycopg.InterfaceError) as exc:
            await self.close()
            raise translated(exc) from exc
        except psycopg.Error as exc:
            raise _unusable(exc) from exc

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Connection]:
        connection = await self._connected()
        async with connection.transaction():
            await connection.execute(self._guards)
            yield connection

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            connection = self._connection = await connect(self._dsn, "replicator enrichment")
            await connection.set_read_only(True)
            await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)  # each statement sees what is committed
            security = "on" if POLICIES.search(str(parts(self._dsn).get("options", ""))) else "off"
            settings = {**self._settings, "row_security": security}
            self._guards = guards(settings, connection.info.server_version, local=True)
        return self._connection


def _unusable(exc: psycopg.Error) -> SourceUnusable:
    """Class 42 (names, rights) speaks of tables and columns; the text of other classes may quote values."""
    sqlstate = exc.sqlstate or ""
    text = exc.diag.message_primary if sqlstate.startswith("42") else None
    problem = f"{text} ({type(exc).__name__})" if text else f"{type(exc).__name__} (SQLSTATE {sqlstate})"
    return SourceUnusable(problem=problem, cure=f"{command('check')} says what the tables need")
