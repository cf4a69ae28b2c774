"""The embedded engine (chdb), driven by clickhouse-connect, with the methods of `http.HttpServer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import clickhouse_connect
from clickhouse_connect.driver.exceptions import ClickHouseError

from sinks.clickhouse.errors import Errors, failed
from sinks.clickhouse.http import Receipt
from sinks.threads import BlockingCalls

CLOSE_SECONDS = 10  # a running insert takes some 0.2 s; it ends cleanly after that

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """One process may open a directory at a time."""

    def __init__(self, errors: Errors, directory: str) -> None:
        self._errors = errors
        self._directory = directory
        self._client: Any = None
        self._calls = BlockingCalls("chdb")

    async def ask(self, statement: str, settings: Mapping[str, object], seconds: float) -> bytes:
        """Run a statement; what it prints."""
        return bytes(await self._run(lambda: self._open().raw_query(statement, settings=dict(settings)), seconds))

    async def insert(
        self, table: str, columns: Sequence[str], data: Sequence[bytes], settings: Mapping[str, object], seconds: float
    ) -> Receipt:
        """Insert JSON lines, in pieces."""

        def insert() -> int:
            summary = self._open().raw_insert(table, list(columns), b"".join(data), dict(settings), "JSONEachRow")
            return int(summary.written_rows)

        return Receipt(await self._run(insert, seconds))

    async def close(self) -> None:
        """Wait for a running call, then free the directory."""
        if self._client is None and not self._calls.begun:
            return
        try:
            await self._run(self._close, CLOSE_SECONDS)
        except TimeoutError:  # the write was cancelled, so nothing counts as written
            message = "the embedded ClickHouse still works after %d s; the program ends without it"
            _log.warning(message, CLOSE_SECONDS, extra={"code": "R519"})

    def _open(self) -> Any:
        if self._client is None:  # loads the engine, and the tables in the directory
            self._client = clickhouse_connect.get_client(interface="chdb", path=self._directory)
        return self._client

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    async def _run(self, call: Callable[[], Any], seconds: float) -> Any:
        try:
            return await self._calls.run(call, seconds)
        except ClickHouseError as exc:
            code = getattr(exc, "code", None)
            if code is None:
                raise self._errors.unopened(self._directory, exc) from None
            raise failed(int(code), str(exc).encode()) from None
