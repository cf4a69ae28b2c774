"""What the page shows and the process does not know by itself: top content and backfills, asked while somebody looks.

One question at a time for all who look. An answer that fails or hangs holds up nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from replicator.contracts.errors import ReplicatorError
from replicator.contracts.events import Id
from replicator.contracts.fields import Stream
from replicator.contracts.sink import Ranks
from replicator.contracts.stores import Task, TaskProgress
from replicator.delivery.backfill import BackfillProgress
from replicator.delivery.lane import Lane
from replicator.operations.watchdog import Watchdog

ASK_SECONDS = 2.0
"""A backfill saves its place once a second; the bar still moves."""
FIRST_SECONDS = 0.5
"""How long somebody who has just come waits for the first answer."""
TOP = 10
IDLE_SECONDS = 10.0
"""A backfill that runs has moved since."""
FORGOTTEN_SECONDS = 86_400.0
"""One that was stopped longer ago is nobody's any more."""

log = logging.getLogger(__name__)

T = TypeVar("T")


class Asked(Generic[T]):
    """The newest answer to a question."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self.value: T | None = None
        self.trouble = ""
        """Why there is no newer one."""
        self._ask = ask
        self._asked_at = -math.inf
        self._task: asyncio.Task[None] | None = None

    def renew(self) -> None:
        """Ask again, if the last answer is old and nobody waits for one."""
        if time.monotonic() - self._asked_at >= ASK_SECONDS and (self._task is None or self._task.done()):
            self._asked_at = time.monotonic()
            self._task = asyncio.create_task(self._renew())

    async def settle(self) -> None:
        """Wait a little for the answer that is asked for."""
        if self._task:
            await asyncio.wait([self._task], timeout=FIRST_SECONDS)

    def stop(self) -> None:
        """Nobody needs the answer."""
        if self._task:
            self._task.cancel()

    async def _renew(self) -> None:
        try:
            self.value, self.trouble = await self._ask(), ""
        except ReplicatorError as exc:
            self.value, self.trouble = None, str(exc)
        except Exception as exc:  # a sink of another package may raise anything
            log.debug("the page's question failed", exc_info=True)
            self.value, self.trouble = None, f"It can't be asked ({type(exc).__name__})."


class Running(NamedTuple):
    """A backfill, or a rebuild, of another process."""

    name: str
    span: str
    """The range of time; empty: all of it."""
    events: int
    total: int
    idle: float | None
    """Seconds without progress; None while it moves."""

    @property
    def percent(self) -> int:
        """Of its events."""
        return min(100, 100 * self.events // max(1, self.total))


class Beside:
    """Both questions."""

    def __init__(self, watchdog: Watchdog, store: TaskProgress, slot: str) -> None:
        self._watchdog = watchdog
        self._store = store
        self._slot = slot
        self.top = Asked(self._top)
        """Contents and their events in the last 10 minutes."""
        self.backfills = Asked(self._backfills)
        """Those that run, or were stopped before their end."""

    def renew(self) -> None:
        """Somebody looks."""
        self.top.renew()
        self.backfills.renew()

    async def settle(self) -> None:
        """Wait a little for both answers."""
        await asyncio.gather(self.top.settle(), self.backfills.settle())

    def stop(self) -> None:
        """Nobody looks any more."""
        self.top.stop()
        self.backfills.stop()

    @property
    def ranked(self) -> Stream | None:
        """Whose keys are the top ones; of several streams the first."""
        return next((lane.sink.stream for lane in self._lanes if isinstance(lane.sink, Ranks)), None)

    async def _top(self) -> list[tuple[Id, int]] | None:
        ranking = next((lane.sink for lane in self._lanes if isinstance(lane.sink, Ranks)), None)
        return await ranking.top(TOP) if ranking else None

    @property
    def _lanes(self) -> Sequence[Lane]:
        return self._watchdog.pipeline.fan_out.lanes

    async def _backfills(self) -> list[Running]:
        return [*running(await asyncio.to_thread(self._store.tasks, self._slot), time.time())]


def running(tasks: Sequence[Task], now: float) -> Iterator[Running]:
    """Those tasks that are a backfill; the stream keeps notes of its own beside them."""
    for task in tasks:
        try:
            at = msgspec.json.decode(task.progress, type=BackfillProgress)
        except (msgspec.DecodeError, ValueError):
            continue
        idle = now - task.updated_at
        if idle < FORGOTTEN_SECONDS:
            name, span = _titles(task.name.split(" "))
            yield Running(name, span, at.events, at.total, idle if idle >= IDLE_SECONDS else None)


def _titles(task: Sequence[str]) -> tuple[str, str]:
    """A task's name for people: `backfill START END SINKS`, perhaps `spark` before it, or `rebuild-redis …`."""
    if "backfill" in task[:-3]:
        *name, start, end, sinks = task
        return f"{' '.join(name)} into {sinks}", f"{start} to {end}"
    return task[0], ""
