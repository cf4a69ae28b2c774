"""Calls that block, one at a time, each in a daemon thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class BlockingCalls:
    """Daemons, because a call that never returns must not keep the program from ending, as an executor's would."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: asyncio.Future[Any] | None = None

    @property
    def begun(self) -> bool:
        """Whether there ever was a call."""
        return self._running is not None

    async def run(self, call: Callable[[], Any], seconds: float) -> Any:
        """What `call` returns or raises; TimeoutError after so many seconds.

        A call goes on when nobody waits for it any more. The next begins when it has ended.
        """
        async with asyncio.timeout(seconds):
            while self._running is not None and not self._running.done():
                await asyncio.wait([self._running])
            result: Future[Any] = Future()

            def work() -> None:
                try:
                    result.set_result(call())
                except BaseException as exc:  # noqa: BLE001  the caller raises it
                    result.set_exception(exc)

            threading.Thread(target=work, name=self._name, daemon=True).start()
            self._running = asyncio.wrap_future(result)
            return await asyncio.shield(self._running)
