"""For tests of sinks, and of programs that have sinks: `MemorySink`, a sink that does what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.events import Event, Finding, Refusal, SinkPosition
from replicator.contracts.fields import Contract
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Mode, Sink

Step: TypeAlias = Exception | asyncio.Event | Callable[[Sequence[Event]], Awaitable[Sequence[Refusal] | None]]
"""What one `write` does first: raise this, wait for that, or call this, whose refusals are then the write's."""


class MemorySink(Sink):
    """Keeps events in memory. A test says what goes wrong: `steps`, `refused`, `down`."""

    name = "memory"
    max_events = 100

    def __init__(
        self,
        settings: Settings | None = None,
        contract: Contract | None = None,
        *,
        name: str = "memory",
        max_events: int = 100,
        concurrency: int = 1,
        max_repeats: int | None = None,
        steps: Iterable[Step] = (),
        refused: Iterable[int] = (),
    ) -> None:
        super().__init__(settings or Settings(), contract)
        self.name, self.max_events, self.concurrency, self.max_repeats = name, max_events, concurrency, max_repeats
        self.steps = list(steps)
        """One for each of the next writes; without one a write takes its events."""
        self.refused = frozenset(refused)
        """Ids of events that it never takes."""
        self.down = False
        """Whether it is away: `open` and `write` raise SinkUnavailable, `check` names it."""
        self.events: dict[int, Event] = {}
        """What it has, by id."""
        self.writes: list[list[int]] = []
        """The ids that each write took, in the order in which the writes ended."""
        self.opened: list[tuple[SinkPosition | None, Mode]] = []
        self.created = 0
        self.called = asyncio.Event()
        """Set when a write begins."""
        self._changed = asyncio.Condition()

    @property
    def taken(self) -> list[int]:
        """The ids of all writes."""
        return [event_id for ids in self.writes for event_id in ids]

    async def until_written(self, writes: int) -> None:
        """Wait until so many writes have ended well."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: len(self.writes) >= writes)

    async def create(self) -> list[str]:
        self.created += 1
        return ["made room in memory"] if self.created == 1 else []

    async def check(self) -> list[Finding]:
        if self.down:
            return [Finding(False, "the memory is away", "Set `down` to False")]
        return [Finding(True, "the memory takes events")]

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
        self._reach()
        self.opened.append((start, mode))

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        self.called.set()
        self._reach()
        refusals = [Refusal(event, "no") for event in events if event.id in self.refused]
        if self.steps:
            refusals += await self._take(self.steps.pop(0), events)
        refused = {refusal.event.id for refusal in refusals}
        taken = [event for event in events if event.id not in refused]
        self.events |= {event.id: event for event in taken}
        self.writes.append([event.id for event in taken])
        async with self._changed:
            self._changed.notify_all()
        return refusals

    async def _take(self, step: Step, events: Sequence[Event]) -> Sequence[Refusal]:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, asyncio.Event):
            await step.wait()
            return ()
        return await step(events) or ()

    def _reach(self) -> None:
        if self.down:
            raise SinkUnavailable(sink=self.name, detail="the memory is away")
