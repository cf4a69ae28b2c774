"""The embedded engine (chdb) as a `client.Client`: `chdb://` URLs, to try the sink without a server.

The engine only has blocking calls, so they run one by one in a thread. It is a daemon: a call that never returns can't
keep the program from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import clickhouse_connect
from clickhouse_connect.driver import Client as BlockingClient

from sinks.clickhouse.client import INSERT_FORMAT, QUERY_FORMAT, QUERY_SETTINGS, decode_rows
from sinks.clickhouse.errors import engine_missing, translated

_CLOSE_SECONDS = 10  # a running insert takes some 0.2 s; the engine ends cleanly after it

T = TypeVar("T")


class EmbeddedClient:
    """Owns the engine's directory, which one process may hold at a time."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._client: BlockingClient | None = None
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def query(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[list[Any]]:
        words = dict(parameters or {})
        return decode_rows(await self._call(lambda client: client.raw_query(sql, words, QUERY_SETTINGS, QUERY_FORMAT)))

    async def command(self, sql: str) -> None:
        await self._call(lambda client: client.command(sql))

    async def insert(self, table: str, columns: Sequence[str], body: bytes, settings: Mapping[str, object]) -> int:
        def insert(client: BlockingClient) -> int:
            return client.raw_insert(table, list(columns), body, dict(settings), INSERT_FORMAT).written_rows

        return await self._call(insert)

    async def close(self) -> None:
        """Wait for a running call, then free the directory."""
        if self._client is None:
            return
        async with asyncio.timeout(_CLOSE_SECONDS):
            await self._run(self._close)

    async def _call(self, question: Callable[[BlockingClient], T]) -> T:
        with translated(f"chdb://{self._directory}"):
            return await self._run(lambda: question(self._connected()))

    def _connected(self) -> BlockingClient:
        if self._client is None:
            try:
                self._client = clickhouse_connect.get_client(interface="chdb", path=self._directory)
            except ImportError as exc:
                raise engine_missing() from exc
        return self._client

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    async def _run(self, job: Callable[[], T]) -> T:
        """In the thread."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as exc:  # noqa: BLE001  raised again by the caller
                    future.set_exception(exc)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="chdb", daemon=True)
            self._thread.start()
        self._jobs.put(run)
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            self._jobs.get()()
