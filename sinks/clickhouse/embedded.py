"""The embedded engine (chdb), with the methods of the asynchronous driver.

Its calls block, so each runs in a thread: a daemon, because a call that never returns can't keep the program from
ending, as the thread of an executor would.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import clickhouse_connect

CLOSE_SECONDS = 10  # a running insert takes some 0.2 s; the engine ends cleanly after it

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """The owner of a directory, which one process may open at a time."""

    def __init__(self) -> None:
        self._client: Any = None
        self._running: asyncio.Future[Any] | None = None

    async def open(self, directory: str) -> EmbeddedEngine:
        """Load the engine, and the tables in the directory."""
        self._client = await self._run(clickhouse_connect.get_client, interface="chdb", path=directory)
        return self

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return partial(self._run, getattr(self._client, name))

    async def close(self) -> None:
        """Wait for a running call, then free the directory."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._run(self._client.close)
        except TimeoutError:  # the write was cancelled, so nothing counts as written
            _log.warning("the embedded ClickHouse still works after %d s; the program ends without it", CLOSE_SECONDS)

    async def _run(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """One call at a time: the next begins when it has ended, not when nobody waits for it any more."""
        while self._running is not None and not self._running.done():
            await asyncio.wait([self._running])
        result: Future[Any] = Future()

        def work() -> None:
            try:
                result.set_result(call(*arguments, **options))
            except BaseException as exc:  # noqa: BLE001  the caller raises it
                result.set_exception(exc)

        threading.Thread(target=work, name="chdb", daemon=True).start()
        self._running = asyncio.wrap_future(result)
        return await asyncio.shield(self._running)
