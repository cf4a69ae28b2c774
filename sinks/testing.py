"""For tests of sinks: `SinkConformance` is what every sink must do, `MemorySink` does what a test says."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from itertools import chain, groupby
from typing import Any, TypeAlias

import msgspec
import pytest

from replicator.contracts.errors import BatchRefused, BatchTooLarge, SinkUnavailable
from replicator.contracts.events import Event, Finding, Position, Refusal, SinkPosition
from replicator.contracts.fields import INT64_MAX, INT64_MIN, Contract, Role
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Mode, Sink

WRITTEN = SinkPosition(position=Position(100, 1), end_lsn=101)
SAMPLE_TIME = datetime(2026, 1, 8, 14, 21, 52, 123_456, tzinfo=UTC)

Step: TypeAlias = Exception | asyncio.Event | Callable[[Sequence[Event]], Awaitable[Sequence[Refusal] | None]]
"""What one `write` does first: raise this, wait for that, or call this, whose refusals are then the write's."""

decode: Callable[[bytes | str], dict[str, Any]] = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode
"""An event's JSON, with numbers as exact as there."""


class MemorySink(Sink):
    """Keeps events in memory.

    Each of the next writes takes one of `steps`. Events with ids in `unfit` it knows never to fit; writes with one in
    `refused` are refused, those of more than `room` events are too large. While `down` is set, `write` raises
    SinkUnavailable.
    """

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
        unfit: Iterable[int] = (),
        refused: Iterable[int] = (),
        room: int | None = None,
    ) -> None:
        super().__init__(settings or Settings(), contract or Contract(()))
        self.name, self.max_events, self.concurrency, self.max_repeats = name, max_events, concurrency, max_repeats
        self.steps, self.unfit, self.refused, self.room = list(steps), {*unfit}, {*refused}, room
        self.down = False
        self.events: dict[int, Event] = {}
        """What it has, by id."""
        self.writes: list[list[int]] = []
        """The ids that each write took, in the order in which the writes ended."""
        self.called = asyncio.Event()
        """Set when a write begins."""
        self._changed = asyncio.Condition()

    @property
    def taken(self) -> list[int]:
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
        self.events |= taken
        self.writes.append(list(taken))
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


def sample(contract: Contract, number: int, time: datetime | None = SAMPLE_TIME) -> Event:
    """Event `number`, of its own key: text in Unicode and numbers of 64 bits; every other one has nulls.

    Without a time, `event_ts` is infinity.
    """
    values: dict[str, Any] = {}
    sources = {name for field in contract.fields if field.derived for name in field.derived.of}
    for field in contract.fields:
        if field.derived:
            values[field.name] = field.derived.function(*(values[name] for name in field.derived.of))
        elif field.role is Role.TIME:
            values[field.name] = time.isoformat().replace("+00:00", "Z") if time else "infinity"
        elif field.role:
            values[field.name] = number
        elif field.type.optional and number % 2:
            values[field.name] = None
        elif field.type.python is str:
            values[field.name] = 'ü "two"\\\n\t日本 🎬'
        else:
            values[field.name] = 7_000 if field.name in sources else INT64_MIN + number % 2
    ts_us = int(time.timestamp()) * 1_000_000 + time.microsecond if time else None
    return Event(commit_lsn=100, ordinal=1, id=number, key=number, ts_us=ts_us, json=msgspec.json.encode(values))


class Destination(ABC):
    """Where a sink writes, as the suite sees it."""

    keeps_repeats = False
    """Whether an event that is written twice may be there twice, as at an HTTP API."""

    def __init__(self, contract: Contract) -> None:
        numbers = [INT64_MIN, INT64_MAX, *range(1, 8)]
        self.samples = [sample(contract, number) for number in numbers]
        self.refused: Event | None = sample(contract, 100, None)
        """An event that it can't hold, if there is one."""
        self.contract = contract

    @abstractmethod
    def sink(self) -> Sink:
        """A new sink that writes here, neither created nor open."""

    @abstractmethod
    def read(self) -> Iterable[dict[str, Any]]:
        """All events that are there, in any order, each as often as it is there. Fractions are exact (Decimal)."""

    @abstractmethod
    def outage(self) -> AbstractContextManager[None]:
        """Makes it unreachable until the end."""

    def refusal(self, event: Event) -> AbstractContextManager[None] | None:  # noqa: ARG002  for subclasses
        """Makes it refuse writes with this event until the end; None: it never refuses an event."""
        return None

    @asynccontextmanager
    async def opened(self, mode: Mode = Mode.LIVE, start: SinkPosition | None = None) -> AsyncIterator[Sink]:
        """A sink as a lane has it."""
        sink = self.sink()
        try:
            await sink.create()
            await sink.open(start, mode)
            yield sink
        finally:
            await sink.close()

    def assert_holds(self, events: Sequence[Event]) -> None:
        """These events and no others are there, in every field."""
        identity = self.contract.field(Role.IDENTITY).name
        there = sorted(self.read(), key=lambda event: int(event[identity]))
        if self.keeps_repeats:
            there = [event for event, _ in groupby(there)]
        assert there == [decode(event.json) for event in sorted(events, key=lambda event: event.id)]


@pytest.mark.asyncio
class SinkConformance:
    """What every sink must do. A subclass `Test…` has a fixture `destination`, which is empty for each test."""

    @pytest.mark.parametrize("mode", Mode)
    @pytest.mark.parametrize("count", [0, 1, None], ids=["none", "one", "max_events"])
    async def test_what_is_written_is_there_exactly(
        self, destination: Destination, count: int | None, mode: Mode
    ) -> None:
        """Text, nulls and numbers, in the largest batch too; by the replicator or a backfill."""
        async with destination.opened(mode) as sink:
            more = [sample(destination.contract, number) for number in range(8, sink.max_events)]
            events = [*destination.samples, *more][: sink.max_events if count is None else count]
            assert not await sink.write(events)
        destination.assert_holds(events)

    async def test_events_that_come_again_change_nothing(self, destination: Destination) -> None:
        """The same batch, overlapping ones, another cut; and from other sinks: after a restart, and of a backfill."""
        events = destination.samples
        async with destination.opened() as sink:
            for batch in (events[:6], events[:6], events[3:], *([event] for event in events)):
                assert not await sink.write(batch)
        for mode in Mode:
            async with destination.opened(mode, WRITTEN) as sink:
                assert not await sink.write(events)
        destination.assert_holds(events)

    async def test_what_it_can_not_hold_is_refused_alone(self, destination: Destination) -> None:
        """The other events of the batch are written. The same write again refuses the same event."""
        events, refused = destination.samples, destination.refused
        if refused is None:
            pytest.skip("this destination holds everything")
        async with destination.opened() as sink:
            for _ in range(2):
                refusals = await sink.write([*events[:5], refused, *events[5:]])
                assert [refusal.event for refusal in refusals] == [refused]
        destination.assert_holds(events)

    async def test_what_it_refuses_is_raised(self, destination: Destination) -> None:
        """The whole write, and the event alone; the parts without it are taken, and all of it when it is mended."""
        first, bad, *others = destination.samples
        refusal = destination.refusal(bad)
        if refusal is None:
            pytest.skip("this destination refuses no event")
        async with destination.opened() as sink:
            with refusal:
                for events in (destination.samples, [bad]):
                    with pytest.raises(BatchRefused) as caught:
                        await sink.write(events)
                    assert caught.value.detail
                for events in ([first], others):
                    assert not await sink.write(events)
            assert not await sink.write([bad])
        destination.assert_holds(destination.samples)

    @pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16, 32])
    async def test_a_write_may_be_cancelled_anywhere(self, destination: Destination, turns: int) -> None:
        """The same events are then written again."""
        async with destination.opened() as sink:
            write = asyncio.ensure_future(sink.write(destination.samples))
            for _ in range(turns):
                await asyncio.sleep(0)
            write.cancel()
            await asyncio.wait([write])
            assert not await sink.write(destination.samples)
        destination.assert_holds(destination.samples)

    async def test_an_outage_is_unavailable_and_ends(self, destination: Destination) -> None:
        """The lane keeps the sink and tries the same events again. `check` names the outage and a cure."""
        events = destination.samples
        async with destination.opened() as sink:
            assert not await sink.write(events[:3])
            with destination.outage():
                for _ in range(2):
                    with pytest.raises(SinkUnavailable):
                        await sink.write(events)
                assert any(not finding.ok and finding.cure for finding in await sink.check())
            await _write_when_up(sink, events)
        destination.assert_holds(events)

    async def test_open_close_create_and_check_leave_no_trace(self, destination: Destination) -> None:
        """In any order, any number of times. A destination that is well has good findings only."""
        sink = destination.sink()
        await sink.close()
        async with destination.opened() as sink:
            await sink.open(WRITTEN)
            assert await sink.create() == []
            assert all(finding.ok for finding in await sink.check())
            await sink.close()
        destination.assert_holds([])


async def _write_when_up(sink: Sink, events: Sequence[Event]) -> None:
    async with asyncio.timeout(60):
        while True:
            with suppress(SinkUnavailable):
                await sink.write(events)
                return
            await asyncio.sleep(0.05)
