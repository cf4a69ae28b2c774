"""The ranking of the last 10 minutes, `top:content:10m`, slid once a second so that it is right when nothing arrives.

`lua/slide.lua` moves it, `keys.py` says which buckets belong to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from replicator.contracts.errors import SinkError, SinkMisconfigured
from sinks.redis.client import RedisClient, script
from sinks.redis.keys import WINDOW, slide_call

SLIDE_INTERVAL_SECONDS = 1.0  # on the full second: a bucket enters the window as it begins

_log = logging.getLogger(__name__)


class Window:
    """The window in `redis`, at the time of `clock` (Unix seconds)."""

    def __init__(self, redis: RedisClient, clock: Callable[[], float]) -> None:
        self.failure: SinkError | None = None
        """Why the last slide failed."""
        self._redis = redis
        self._clock = clock
        self.script = script("slide")
        self._task: asyncio.Task[None] | None = None

    async def slide(self) -> None:
        """Bring the window to the present."""
        try:
            await self._redis.run(self.script, slide_call(self._clock()))
        except SinkError as exc:
            self.failure = exc
            raise
        self.failure = None

    def keep(self, after_slide: Callable[[], Awaitable[None]], turned_away: Callable[[], Awaitable[None]]) -> None:
        """Slide once a second from now on, and call `after_slide` each time, `turned_away` when Redis refuses us."""
        self._task = self._task or asyncio.create_task(self._keep(after_slide, turned_away), name="redis window")

    def raise_bug(self) -> None:
        """Raise what ended the task, if it has ended: only a bug does that."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Slide no more: the window expires. Raises what ended the task before."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def _keep(
        self, after_slide: Callable[[], Awaitable[None]], turned_away: Callable[[], Awaitable[None]]
    ) -> None:
        """A failure is logged when it begins; the next write meets it as well."""
        # `stop` cancels, but redis-py sends within asyncio.wait_for, which can lose that (before 3.12; bpo-37658).
        logged = False  # not `failure`: a write slides, too, and may be the first to see it right again
        while self._task is not None:
            await asyncio.sleep(SLIDE_INTERVAL_SECONDS - self._clock() % SLIDE_INTERVAL_SECONDS)
            try:
                await self.slide()
            except SinkError as exc:
                if not logged:
                    logged = True
                    _log.warning("%s can't be kept right and will expire: %s", WINDOW, exc, extra={"code": "R517"})
                if isinstance(exc, SinkMisconfigured):
                    await turned_away()
            else:
                if logged:
                    logged = False
                    _log.info("%s is kept right again", WINDOW)
                with suppress(SinkError):  # the next write meets it as well
                    await after_slide()
