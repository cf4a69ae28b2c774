"""Whose fault a refusal is: dead letters need evidence, a destination that refuses everything costs nothing."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import cast

import pytest

from replicator.contracts.errors import BatchRefused, SinkUnavailable
from replicator.contracts.events import DeadLetter, Event, LetterCounts, Mark, Position, Refusal, SinkPosition
from replicator.contracts.settings import CoreSettings
from replicator.contracts.stores import DeadLetterBox
from replicator.delivery import evidence, writer
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.queue import Room
from sinks.testing import MemorySink

START = SinkPosition(position=Position(0, 0), end_lsn=0)
SETTINGS = CoreSettings.model_validate({"retry_max_seconds": 0.01})
GOOD = range(1, 101)


class Box:
    """Keeps dead letters."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def add_dead_letters(self, _slot: str, letters: Sequence[DeadLetter], _most: int) -> LetterCounts:
        """Always room."""
        self.letters += letters
        return LetterCounts()


class World:
    """One lane; events are numbered from 1, each a transaction."""

    def __init__(self, sink: MemorySink) -> None:
        self.sink = sink
        self.box = Box()
        self.fan_out = FanOut(SETTINGS, DeadLetters(cast("DeadLetterBox", self.box), SETTINGS), limit_bytes=100_000_000)
        self.fan_out.open([sink], {sink.name: START})
        [self.lane] = self.fan_out.lanes
        self.put_up_to = 0

    @property
    def letters(self) -> list[int]:
        """The events that are dead letters, in order."""
        return sorted(letter.event_id or 0 for letter in self.box.letters)

    def put(self, count: int) -> None:
        """So many events more, in one batch."""
        first = self.put_up_to + 1
        self.put_up_to += count
        events = [Event(number, 1, number, 1, 0, b"{}") for number in range(first, self.put_up_to + 1)]
        self.fan_out.put(events, Mark(Position(self.put_up_to, 1), self.put_up_to))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  a test may look
                await asyncio.sleep(0.001)

    async def until_done(self) -> None:
        """Wait until the lane has everything."""
        await self.until(lambda: self.lane.mark.end_lsn == self.put_up_to)

    def assert_exact(self, *bad: int) -> None:
        """These and no others are dead letters, all others are there."""
        assert self.letters == sorted(bad)
        assert sorted(self.sink.events) == [number for number in range(1, self.put_up_to + 1) if number not in bad]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The lane at work."""
        task = asyncio.create_task(self.fan_out.run())
        yield
        self.fan_out.stop()
        assert await task is None


async def refuse(_: Sequence[Event]) -> Sequence[Refusal]:
    """Whatever it is."""
    raise BatchRefused(sink="memory", detail="400")


def refusing_all(sink: MemorySink) -> None:
    """From now on nothing is taken."""
    sink.steps = [refuse] * 100_000


async def test_one_bad_event_among_good_ones_is_a_dead_letter_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is sent twice; the destination's words are in the letter and not in the log, which says start and end."""
    caplog.set_level(logging.INFO)
    world = World(MemorySink(refused=[37]))
    world.put(100)
    async with world.running():
        await world.until_done()
    world.assert_exact(37)
    assert len(world.sink.taken) == 99
    assert world.box.letters[0].reason == "no: it is in my words"
    assert "in my words" not in caplog.text
    assert "sink memory refuses 100 events at once (no)" in caplog.text
    assert "sink memory took 99 of those 100 events in parts; dead letters: 1" in caplog.text
    assert not world.lane.trouble


@pytest.mark.parametrize("max_events", [1, 10, 100])
@pytest.mark.parametrize("concurrency", [1, 16])
async def test_many_bad_events_in_a_row(max_events: int, concurrency: int) -> None:
    """All of them are dead letters, and what is around them is taken."""
    bad = range(51, 351)
    world = World(MemorySink(refused=bad, max_events=max_events, concurrency=concurrency))
    world.put(400)
    async with world.running():
        await world.until_done()
    world.assert_exact(*bad)


@pytest.mark.parametrize("max_events", [1, 100])
@pytest.mark.parametrize("concurrency", [1, 16])
async def test_a_destination_that_refuses_everything_from_the_start(max_events: int, concurrency: int) -> None:
    """No dead letter; told as trouble that needs somebody; few requests; it goes on by itself."""
    sink = MemorySink(max_events=max_events, concurrency=concurrency)
    refusing_all(sink)
    world = World(sink)
    world.put(2_000)
    async with world.running():
        await world.until(lambda: bool(world.lane.trouble))
        assert "refuses everything: 400" in world.lane.trouble.message
        assert world.lane.trouble.needs_operator
        asked = len(sink.steps)
        await world.until(lambda: world.lane.trouble.failures > 10)
        assert asked - len(sink.steps) <= 2 * 16 + world.lane.trouble.failures, "one request a pause"
        assert world.letters == []
        sink.steps = []
        await world.until_done()
    world.assert_exact()
    assert not world.lane.trouble


@pytest.mark.parametrize("max_events", [1, 100])
async def test_a_destination_that_breaks_at_three_in_the_morning(max_events: int) -> None:
    """In the midst of bad events and good ones: none of the good ones is lost to the breakdown."""
    bad = range(7, 3_000, 50)
    sink = MemorySink(max_events=max_events, concurrency=16, refused=bad)
    world = World(sink)
    async with world.running():
        for _ in range(10):
            world.put(100)
            await asyncio.sleep(0.001)
        refusing_all(sink)
        for _ in range(10):
            world.put(100)
            await asyncio.sleep(0.001)
        await world.until(lambda: world.lane.trouble.failures > 20)
        assert set(world.letters) <= set(bad)
        sink.steps = []
        world.put(100)
        await world.until_done()
    world.assert_exact(*[number for number in bad if number <= world.put_up_to])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("max_events", [1, 20])
async def test_a_destination_that_refuses_at_random(
    monkeypatch: pytest.MonkeyPatch, share: float, max_events: int
) -> None:
    """Whatever is good is taken in the end; what is bad is a dead letter once it is calm again."""
    monkeypatch.setattr(evidence, "DOUBT_SECONDS", 1.0)  # a busy machine may stand still for 0.3 s
    seed = random.randrange(10**9)  # noqa: S311  a test's
    print(f"seed {seed}")  # noqa: T201  shown when it fails
    chance = random.Random(seed)  # noqa: S311

    async def perhaps(events: Sequence[Event]) -> Sequence[Refusal]:
        return await refuse(events) if chance.random() < share else ()

    sink = MemorySink(max_events=max_events, concurrency=16, refused=[50, 150])
    world = World(sink)
    world.put(20)
    async with world.running():
        await world.until_done()
        sink.steps = [perhaps] * 1_000_000
        world.put(300)
        await asyncio.sleep(0.5)
        assert {*world.letters} <= {50, 150}
        sink.steps = []
        await world.until_done()
    world.assert_exact(50, 150)


async def test_servers_in_turn_of_which_one_is_broken() -> None:
    """Every second request is refused, whatever it is: a good event is taken by the other one."""
    sink = MemorySink(max_events=1)
    world = World(sink)
    sink.steps = [step for _ in range(10_000) for step in (refuse, lambda _: asyncio.sleep(0, ()))]
    world.put(50)
    async with world.running():
        await world.until_done()
    world.assert_exact()


async def test_a_lone_bad_event_on_a_quiet_stream() -> None:
    """What it took last is asked again: that it takes it, and not the bad one, is the evidence."""
    sink = MemorySink(refused=[2])
    world = World(sink)
    async with world.running():
        world.put(1)
        await world.until_done()
        world.put(1)
        await world.until_done()
    world.assert_exact(2)
    assert sink.taken == [1, 1]


async def test_a_lone_bad_event_before_anything_was_taken() -> None:
    """Nothing proves that the event is at fault. The next good one does."""
    sink = MemorySink(refused=[1])
    world = World(sink)
    async with world.running():
        world.put(1)
        await world.until(lambda: world.lane.trouble.failures > 3)
        assert world.letters == []
        world.put(1)
        await world.until_done()
    world.assert_exact(1)


async def test_what_it_took_before_is_refused_now_and_new_events_are_taken() -> None:
    """It is not asked about old events for ever: what waits is asked in turn."""
    sink = MemorySink(max_events=10)
    world = World(sink)
    async with world.running():
        world.put(10)
        await world.until_done()
        sink.refused = {*range(1, 12)}
        world.put(20)
        await world.until_done()
    assert world.letters == [11]


async def test_an_outage_in_between_costs_no_part_twice() -> None:
    """What was taken of a refused batch is not sent again when another part is tried again."""
    sink = MemorySink(refused=[37])
    world = World(sink)
    chance = random.Random(7)  # noqa: S311  a test's

    async def flaky(_: Sequence[Event]) -> Sequence[Refusal]:
        if chance.random() < 0.5:
            raise SinkUnavailable(sink="memory", detail="away", retry_after=0)
        return ()

    sink.steps = [flaky] * 1_000
    world.put(99)
    async with world.running():
        await world.until_done()
    world.assert_exact(37)
    assert len(sink.taken) == 98


async def test_a_held_lane_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop does not wait for the pauses, nor for those who wait for the one that asks."""
    monkeypatch.setattr(writer, "PROBE_SECONDS", 3600.0)
    sink = MemorySink(max_events=1, concurrency=16)
    refusing_all(sink)
    world = World(sink)
    world.lane._writer._longest = 3600.0  # noqa: SLF001  the pauses as they are
    world.put(100)
    async with asyncio.timeout(5), world.running():
        await world.until(lambda: bool(world.lane.trouble))
    assert world.lane.mark.end_lsn == 0


# -- sizes -----------------------------------------------------------------------------------------------------------


async def test_what_is_too_large_gets_smaller_and_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    """The size is remembered for the next writes; said once."""
    sink = MemorySink(max_events=100, room=30)
    world = World(sink)
    world.put(1_000)
    async with world.running():
        await world.until_done()
    world.assert_exact()
    assert len(sink.taken) == 1_000
    assert {len(write) for write in sink.writes} == {25}
    assert caplog.text.count("too large for it") == 1
    assert world.lane.room.events == 25


async def test_it_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowly, to the sink's own limit, when what was in the way is gone."""
    monkeypatch.setattr("replicator.delivery.queue.GROW_SECONDS", 0.01)
    sink = MemorySink(max_events=100, room=10)
    world = World(sink)
    async with world.running():
        world.put(100)
        await world.until_done()
        sink.room = None
        while world.lane.room.events < 100:
            world.put(10)
            await world.until_done()
            await asyncio.sleep(0.01)
    world.assert_exact()


def test_a_fault_for_a_while_is_soon_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is short of memory for a moment refuses any size, down to one event."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    room = Room("s", 100, 1_000_000)
    room.grow(100)
    for events in (100, 50, 25, 12, 6, 3, 1):
        room.shrink(events, 10 * events)
    while room.events < 100 or room.bytes < 1_000_000:
        now[0] += 1
        room.grow(room.events)
    assert now[0] <= 20


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lasted", [18, 300])
def test_an_unsteady_destination_is_soon_forgiven(monkeypatch: pytest.MonkeyPatch, lasted: float, seed: int) -> None:
    """A third of all writes fail, whatever their size: so the sizes fall, and may not stay so for long afterwards."""
    now, chance = [0.0], random.Random(seed)  # noqa: S311  not a secret
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    room = Room("s", 40_000, 22_000_000)
    while now[0] < lasted:
        now[0] += 0.3
        if chance.random() < 0.3:
            room.shrink(room.events, 300 * room.events)
        else:
            room.grow(room.events)
    while room.events < 1_000:
        now[0] += 0.3
        room.grow(room.events)
    assert now[0] < lasted + 60


def test_what_is_always_too_large_is_tried_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never more often than half of the time: a front end that gives up after 30 s holds the lane so long."""
    now, tried, lost = [0.0], 0, 0.0
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    room = Room("s", 40_000, 22_000_000)
    while now[0] < 86_400:
        if room.events > 10_000:
            now[0] += 30
            tried, lost = tried + 1, lost + 30
            room.shrink(room.events, 300 * room.events, 30.0)
        else:
            now[0] += 1
            room.grow(room.events)
        assert lost <= 60 + now[0] / 2
    assert tried < 40


async def test_refused_only_for_its_size() -> None:
    """An API that says 400 to more than so many events is understood as well: all parts of it are taken."""
    sink = MemorySink(max_events=100)
    world = World(sink)

    async def at_most_40(events: Sequence[Event]) -> Sequence[Refusal]:
        return await refuse(events) if len(events) > 40 else ()

    sink.steps = [at_most_40] * 1_000
    world.put(2_000)
    async with world.running():
        await world.until_done()
    world.assert_exact()
    assert [len(write) for write in sink.writes[-10:]] == [25] * 10


async def test_a_single_event_that_is_too_large_is_a_dead_letter() -> None:
    """With evidence, as if it were refused."""
    sink = MemorySink()
    world = World(sink)

    async def weigh(events: Sequence[Event]) -> Sequence[Refusal]:
        return await refuse(events) if any(event.id == 5 for event in events) else ()

    sink.steps = [weigh] * 1_000
    world.put(10)
    async with world.running():
        await world.until_done()
    world.assert_exact(5)


async def test_a_refusal_after_a_failure_leaves_no_trouble_behind(caplog: pytest.LogCaptureFixture) -> None:
    """A gateway answers 502 during a deploy and then 400: once the events are taken, nothing is red any more."""
    caplog.set_level(logging.INFO)
    world = World(MemorySink())

    async def away(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkUnavailable(sink="memory", detail="502")

    world.sink.steps = [away, refuse, away, refuse, refuse]
    world.put(100)
    async with world.running():
        await world.until_done()
    world.assert_exact()
    assert not world.lane.trouble
