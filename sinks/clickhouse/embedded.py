"""The embedded engine (chdb) with the asynchronous driver's methods that `client.py` uses.

The engine's calls block, so they run one by one in a thread. It is a daemon: a call that never returns can't keep the
program from ending.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import clickhouse_connect
from clickhouse_connect.driver import Client as BlockingClient
from clickhouse_connect.driver.summary import QuerySummary

CLOSE_SECONDS = 10  # a running insert takes some 0.2 s; the engine ends cleanly after it

_log = logging.getLogger(__name__)

T = TypeVar("T")


class EmbeddedEngine:
    """The owner of a directory, which one process may open at a time."""

    def __init__(self) -> None:
        self._client: BlockingClient
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="chdb", daemon=True).start()

    @classmethod
    async def open(cls, directory: str) -> EmbeddedEngine:
        """Load the engine, and the tables in the directory."""
        engine = cls()
        try:
            engine._client = await engine._run(partial(clickhouse_connect.get_client, interface="chdb", path=directory))
        except BaseException:
            engine._calls.put(None)
            raise
        return engine

    async def raw_query(self, *arguments: Any) -> bytes:
        return await self._run(partial(self._client.raw_query, *arguments))

    async def command(self, sql: str) -> object:
        return await self._run(partial(self._client.command, sql))

    async def raw_insert(self, *arguments: Any) -> QuerySummary:
        return await self._run(partial(self._client.raw_insert, *arguments))

    async def close(self) -> None:
        """Wait for a running call, then free the directory."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._run(self._client.close)
        except TimeoutError:  # the write was cancelled, so nothing counts as written
            _log.warning("the embedded ClickHouse still works after %d s; the program ends without it", CLOSE_SECONDS)
        finally:
            self._calls.put(None)

    async def _run(self, call: Callable[[], T]) -> T:
        """In the thread; a call that is cancelled before its turn is left out."""
        future: Future[T] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as exc:  # noqa: BLE001  the caller raises it
                    future.set_exception(exc)

        self._calls.put(answer)
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
