"""A fake for tests of what is around a sink: it fails as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import chain
from typing import TypeAlias

from replicator.contracts.errors import BatchRefused, BatchTooLarge, SinkUnavailable
from replicator.contracts.events import Event, Finding, Id, Refusal, unfolded
from replicator.contracts.fields import BIGINT, TIMESTAMPTZ, Field, Role, Stream
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Sink, SinkContext

Step: TypeAlias = Exception | asyncio.Event | Callable[[Sequence[Event]], Awaitable[Sequence[Refusal] | None]]
"""What one `write` does first: raise this, wait for that, or call this, whose refusals are then the write's."""


NUMBERED = Stream(
    "memory",
    "public.memory",
    (
        Field("id", BIGINT, role=Role.IDENTITY),
        Field("key", BIGINT, role=Role.KEY),
        Field("time", TIMESTAMPTZ, role=Role.TIME),
    ),
)


class MemorySink(Sink):
    """Keeps events in memory.

    Each of the next writes takes one of `steps`. Events with ids in `unfit` it knows never to fit; writes with one in
    `refused` are refused, those of more than `room` events are too large. While `down` is set, `write` raises
    SinkUnavailable.
    """

    name = "memory"
    takes_any_stream = True
    max_events = 100

    def __init__(
        self,
        settings: Settings | None = None,
        context: SinkContext | None = None,
        *,
        name: str = name,
        max_events: int = max_events,
        concurrency: int = 1,
        max_repeats: int | None = None,
        steps: Iterable[Step] = (),
        unfit: Iterable[Id] = (),
        refused: Iterable[Id] = (),
        room: int | None = None,
    ) -> None:
        self.name = name
        super().__init__(settings or Settings(), context or SinkContext(NUMBERED))
        self.max_events, self.concurrency, self.max_repeats = max_events, concurrency, max_repeats
        self.steps, self.unfit, self.refused, self.room = list(steps), {*unfit}, {*refused}, room
        self.down = False
        self.events: dict[Id, Event] = {}
        """What it has, by id; of rows that change the last version of each, also of those that are gone."""
        self.writes: list[list[Id]] = []
        """The ids that each write took, in the order in which the writes ended."""
        self.called = asyncio.Event()
        """Set when a write begins."""
        self._changed = asyncio.Condition()

    @property
    def taken(self) -> list[Id]:
        """The ids of all writes."""
        return [*chain(*self.writes)]

    async def until_written(self, writes: int) -> None:
        """Wait until so many writes have ended well."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: len(self.writes) >= writes)

    async def check(self) -> list[Finding]:
        return [Finding(not self.down, "memory", "Set `down` to False" if self.down else "")]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        self.called.set()
        if self.down:
            raise SinkUnavailable(sink=self.name, detail="it is down")
        if self.room is not None and len(events) > self.room:
            raise BatchTooLarge(sink=self.name, detail=f"more than {self.room}")
        if any(event.id in self.refused for event in events):
            raise BatchRefused(sink=self.name, detail="no", reason="no: it is in my words")
        refusals = [Refusal(event, "no") for event in events if event.id in self.unfit]
        if self.steps:
            refusals += await self._take(self.steps.pop(0), events)
        refused = {refusal.event.id for refusal in refusals}
        taken = {event.id: event for event in events if event.id not in refused}
        self._keep([event for event in events if event.id not in refused])
        self.writes.append(list(taken))
        async with self._changed:
            self._changed.notify_all()
        return refusals

    def _keep(self, events: Sequence[Event]) -> None:
        if not self.stream.follows:
            self.events |= {event.id: event for event in events}
            return
        for event in unfolded(events, self.stream.identity.name):
            known = self.events.get(event.id)
            if known is None or known.version <= event.version:
                self.events[event.id] = event

    async def _take(self, step: Step, events: Sequence[Event]) -> Sequence[Refusal]:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, asyncio.Event):
            await step.wait()
            return ()
        return await step(events) or ()
