"""Lanes: order of positions, retries, dead letters, what is left out after a restart, and the memory bound."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from msgspec import structs

from replicator.contracts.errors import DeadLettersFull, SinkMisconfigured, SinkUnavailable, SinkUnusable
from replicator.contracts.events import Batch, DeadLetter, Event, Finding, Position, Refusal, SinkPosition
from replicator.contracts.sink import Sink
from replicator.delivery import lane
from replicator.delivery.fan_out import FanOut
from replicator.delivery.lane import EVENT_OVERHEAD_BYTES, WRITE_MAX_BYTES, Lane, backoff, weigh

START = SinkPosition(position=Position(0, 0), end_lsn=5)


class FakeSink(Sink):
    """Does what the test says; a real server does not fail on a particular write."""

    name = "fake"
    linger_seconds = 0.0

    def __init__(self, max_events: int = 100, concurrency: int = 1, max_repeats: int | None = None) -> None:
        self.max_events = max_events
        self.concurrency = concurrency
        self.max_repeats = max_repeats
        self.taken: list[list[int]] = []
        self.script: list[Callable[[Sequence[Event]], Awaitable[Sequence[Refusal]]]] = []

    async def create(self) -> list[str]:
        """Nothing to make."""
        return []

    async def check(self) -> list[Finding]:
        """Nothing to look at."""
        return []

    async def close(self) -> None:
        """Nothing to release."""

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """Follow the script, then take everything."""
        refused: Sequence[Refusal] = await self.script.pop(0)(events) if self.script else ()
        self.taken.append([event.id for event in events])
        return refused


class Harness:
    """A lane on a fake sink, with what came out of it."""

    def __init__(self, sink: FakeSink, start: SinkPosition = START, limit_bytes: int = 1_000_000) -> None:
        self.letters: list[DeadLetter] = []
        self.moved = asyncio.Event()
        self.held_back = asyncio.Event()
        self.fan_out = FanOut(limit_bytes)
        self.lane = Lane(
            sink,
            start,
            retry_max_seconds=0.001,
            dead_letter=self._keep,
            on_progress=self.moved.set,
            on_release=self.fan_out.release,
            on_held_back=self.held_back.set,
        )
        self.fan_out.lanes.append(self.lane)

    async def _keep(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters

    async def until(self, end_lsn: int) -> None:
        """Wait until the lane has come this far."""
        await self._until(lambda: self.lane.done.end_lsn >= end_lsn)

    async def until_row(self, ordinal: int) -> None:
        """Wait until the lane has this row of its transaction."""
        await self._until(lambda: self.lane.done.position.ordinal >= ordinal)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.moved.clear()
                await self.moved.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The lane at work; it stops at the end."""
        task = asyncio.create_task(self.lane.run())
        yield
        self.lane.stop()
        await task


def batch(commit_lsn: int, count: int, end_lsn: int | None = None, size: int = 10) -> Batch:
    """`count` events of one transaction; their ids are its commit LSN and the ordinal, e.g. 1001, 1002."""
    events = [Event(commit_lsn, n, commit_lsn * 100 + n, 1, 0, b"{}") for n in range(1, count + 1)]
    end = commit_lsn + 5 if end_lsn is None else end_lsn
    return Batch(events=events, position=Position(commit_lsn, count), end_lsn=end, size=size, committed_at=0.0)


async def test_a_batch_is_written_in_pieces_and_the_end_counts_with_the_last() -> None:
    """A piece moves the position to its last event; the transaction's end counts once all of it is written."""
    sink = FakeSink(max_events=2)
    harness = Harness(sink)
    third = asyncio.Event()
    gate = asyncio.Event()

    async def passes(_: Sequence[Event]) -> Sequence[Refusal]:
        return ()

    async def waits(_: Sequence[Event]) -> Sequence[Refusal]:
        third.set()
        await gate.wait()
        return ()

    sink.script = [passes, passes, waits]
    async with harness.running():
        harness.fan_out.put(batch(10, 5))
        await third.wait()
        assert harness.lane.done == SinkPosition(position=Position(10, 4), end_lsn=5)
        gate.set()
        await harness.until(15)
    assert sink.taken == [[1001, 1002], [1003, 1004], [1005]]


async def test_waiting_batches_are_written_together() -> None:
    """A lane takes everything that waits, up to the sink's limit."""
    sink = FakeSink(max_events=100)
    harness = Harness(sink)
    for lsn in (10, 20, 30):
        harness.fan_out.put(batch(lsn, 2))
    async with harness.running():
        await harness.until(35)
    assert sink.taken == [[1001, 1002, 2001, 2002, 3001, 3002]]


async def test_the_position_waits_for_the_oldest_of_concurrent_writes() -> None:
    """With writes side by side, what is done behind one that is not must not count."""
    sink = FakeSink(max_events=1, concurrency=3)
    harness = Harness(sink)
    gate = asyncio.Event()

    async def waits(_: Sequence[Event]) -> Sequence[Refusal]:
        await gate.wait()
        return ()

    sink.script = [waits]
    async with harness.running():
        for lsn in (10, 20, 30):
            harness.fan_out.put(batch(lsn, 1))
        async with asyncio.timeout(10):
            while len(sink.taken) < 2:  # noqa: ASYNC110  the fake has no event to wait for
                await asyncio.sleep(0.001)
        assert harness.lane.done == START
        gate.set()
        await harness.until(35)
    assert sink.taken == [[2001], [3001], [1001]]


async def test_what_the_sink_has_is_left_out() -> None:
    """After a restart inside a transaction only the rest of it is written."""
    sink = FakeSink()
    harness = Harness(sink, SinkPosition(position=Position(20, 2), end_lsn=15))
    async with harness.running():
        harness.fan_out.put(batch(10, 3))
        harness.fan_out.put(batch(20, 4))
        await harness.until(25)
    assert [event for events in sink.taken for event in events] == [2003, 2004]


async def test_a_reconnect_repeats_nothing_and_never_moves_back() -> None:
    """The stream gives batches again that the lane has or that wait in it."""
    sink = FakeSink()
    harness = Harness(sink)
    async with harness.running():
        for lsn in (10, 20, 10, 20, 30):
            harness.fan_out.put(batch(lsn, 1))
        await harness.until(35)
    assert [event for events in sink.taken for event in events] == [1001, 2001, 3001]
    assert harness.lane.done == SinkPosition(position=Position(30, 1), end_lsn=35)


async def test_an_empty_batch_moves_an_idle_lane_at_once() -> None:
    """Transactions without our tables move the position, without a write."""
    harness = Harness(FakeSink())
    harness.fan_out.put(batch(10, 0, end_lsn=77))
    assert harness.lane.done.end_lsn == 77


async def test_an_empty_batch_waits_for_what_is_before_it() -> None:
    """Nothing in flight may be passed, and a dead sink does not collect empty batches."""
    harness = Harness(FakeSink())
    harness.fan_out.put(batch(10, 1))
    for end in range(20, 1000):
        harness.fan_out.put(batch(10, 0, end_lsn=end))
    assert harness.lane.done == START
    assert len(harness.lane._queue) == 2  # noqa: SLF001  the bound is not visible from outside
    async with harness.running():
        await harness.until(999)


async def test_an_unavailable_sink_is_tried_until_it_takes_the_same_events() -> None:
    """The very same events again; said once, and that it is over."""
    sink = FakeSink()
    harness = Harness(sink)
    seen: list[list[int]] = []

    async def fails(events: Sequence[Event]) -> Sequence[Refusal]:
        seen.append([event.id for event in events])
        raise SinkUnavailable(sink="fake", detail="down")

    sink.script = [fails, fails, fails]
    async with harness.running():
        harness.fan_out.put(batch(10, 2))
        await harness.until(15)
    assert seen == [[1001, 1002]] * 3
    assert sink.taken == [[1001, 1002]]
    assert (harness.lane.trouble, harness.lane.progress.retries) == ("", 3)


async def test_trouble_is_told_with_its_cure(caplog: pytest.LogCaptureFixture) -> None:
    """A destination that turns us away loses nothing and is loud about it."""
    sink = FakeSink()
    harness = Harness(sink)

    async def turns_away(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkMisconfigured(sink="fake", detail="401", cure="Set the token")

    sink.script = [turns_away]
    with caplog.at_level(logging.ERROR):
        async with harness.running():
            harness.fan_out.put(batch(10, 1))
            await harness.until(15)
    assert "Set the token" in caplog.text
    assert (sink.taken, harness.letters) == ([[1001]], [])


async def test_trouble_lasts_until_no_write_is_turned_away() -> None:
    """Of two writes side by side one succeeds: the other is still in trouble, and that is not told anew each time."""
    sink = FakeSink(max_events=1, concurrency=2)
    harness = Harness(sink)
    gate = asyncio.Event()

    async def fails(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkUnavailable(sink="fake", detail="overloaded", retry_after=0)

    async def waits(_: Sequence[Event]) -> Sequence[Refusal]:
        await gate.wait()
        return ()

    async def passes(_: Sequence[Event]) -> Sequence[Refusal]:
        return ()

    sink.script = [fails, fails, waits, passes]
    async with harness.running():
        harness.fan_out.put(batch(10, 1))
        harness.fan_out.put(batch(20, 1))
        async with asyncio.timeout(10):
            while not sink.taken:  # noqa: ASYNC110  the fake has no event to wait for
                await asyncio.sleep(0.001)
        assert "overloaded" in harness.lane.trouble
        gate.set()
        await harness.until(25)
    assert harness.lane.trouble == ""


async def test_lag_is_the_age_of_the_oldest_commit_that_is_not_written() -> None:
    """Queued or in flight; how long nothing happened before that does not count."""
    sink = FakeSink(max_events=1)
    harness = Harness(sink)
    gate = asyncio.Event()

    async def waits(_: Sequence[Event]) -> Sequence[Refusal]:
        await gate.wait()
        return ()

    now = time.time()
    harness.fan_out.put(structs.replace(batch(10, 0), committed_at=now - 3600))
    assert harness.lane.lag_seconds() == 0.0
    for lsn, age in ((20, 100), (30, 50)):
        harness.fan_out.put(structs.replace(batch(lsn, 1), committed_at=now - age))
    assert 100 <= harness.lane.lag_seconds() < 1000
    sink.script = [waits]
    async with harness.running():
        await asyncio.sleep(0.01)
        assert 100 <= harness.lane.lag_seconds() < 1000
        gate.set()
        await harness.until(35)
    assert harness.lane.lag_seconds() == 0.0


async def test_a_write_without_an_answer_has_an_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest one's; what was answered has none, also while it waits for one before it or for its dead letters."""
    now = 1_000.0
    monkeypatch.setattr(lane, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    harness = Harness(sink := FakeSink(max_events=1, concurrency=2))
    asked = [asyncio.Event(), asyncio.Event()]
    answer = [asyncio.Event(), asyncio.Event()]
    storing, stored = asyncio.Event(), asyncio.Event()

    async def hangs(events: Sequence[Event]) -> Sequence[Refusal]:
        number = events[0].commit_lsn // 10 - 1
        asked[number].set()
        await answer[number].wait()
        return [Refusal(events[0], "no")] if number == 0 else []

    async def stores(_: Sequence[DeadLetter]) -> None:
        storing.set()
        await stored.wait()

    sink.script = [hangs, hangs]
    harness.lane._dead_letter = stores  # noqa: SLF001  a store that takes its time
    async with harness.running(), asyncio.timeout(10):
        for number in (0, 1):
            assert number * 5.0 == harness.lane.unanswered_seconds()
            harness.fan_out.put(batch(10 * number + 10, 1))
            await asked[number].wait()
            now += 5
        assert harness.lane.unanswered_seconds() == 10.0
        answer[0].set()
        await storing.wait()
        assert harness.lane.unanswered_seconds() == 5.0
        answer[1].set()
        while len(sink.taken) < 2:  # noqa: ASYNC110  the fake has no event to wait for
            await asyncio.sleep(0.001)
        assert (2, 0.0) == (harness.lane.waiting, harness.lane.unanswered_seconds())
        stored.set()
        await harness.until(25)


async def test_retry_after_is_honoured() -> None:
    """The destination named a time: no earlier."""
    sink = FakeSink()
    harness = Harness(sink)
    times: list[float] = []

    async def later(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        raise SinkUnavailable(sink="fake", detail="429", retry_after=0.2)

    async def notes(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        return ()

    sink.script = [later, notes]
    async with harness.running():
        harness.fan_out.put(batch(10, 1))
        await harness.until(15)
    assert times[1] - times[0] >= 0.2


async def test_a_named_time_that_has_passed_is_no_leave_to_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Retry-After: 0`, or a date by a clock that is behind ours: the ordinary pauses are the least."""
    pauses = iter([0.05, 0.1])
    monkeypatch.setattr(lane, "backoff", lambda _attempt, _longest: next(pauses))
    sink = FakeSink()
    harness = Harness(sink)
    times: list[float] = []

    async def overloaded(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        raise SinkUnavailable(sink="fake", detail="503", retry_after=0.0)

    async def takes(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        return ()

    sink.script = [overloaded, overloaded, takes]
    async with harness.running():
        harness.fan_out.put(batch(10, 1))
        await harness.until(15)
    first, second, third = times
    assert second - first >= 0.05
    assert third - second >= 0.1


async def test_a_refused_event_is_kept_before_its_position_counts() -> None:
    """The dead letter carries position, reason and payload."""
    sink = FakeSink()
    harness = Harness(sink)

    async def refuses(events: Sequence[Event]) -> Sequence[Refusal]:
        assert harness.lane.done == START
        return [Refusal(events[1], "no")]

    sink.script = [refuses]
    async with harness.running():
        harness.fan_out.put(batch(10, 3))
        await harness.until(15)
    assert harness.letters == [
        DeadLetter(sink="fake", position=Position(10, 2), event_id=1002, reason="no", payload=b"{}")
    ]


async def test_an_error_nobody_names_ends_the_lane() -> None:
    """It is not retried, and its position stays."""
    sink = FakeSink()
    harness = Harness(sink)

    async def breaks(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkUnusable(sink="fake", detail="no table", cure="init")

    sink.script = [breaks]
    harness.fan_out.put(batch(10, 1))
    with pytest.raises(ExceptionGroup) as caught:
        await harness.lane.run()
    assert caught.group_contains(SinkUnusable)
    assert harness.lane.done == START


async def test_stopping_waits_for_a_write_in_flight_but_not_for_a_retry() -> None:
    """What is being written is finished and counts; what is being retried stays unwritten."""
    sink = FakeSink(max_events=1, concurrency=2)
    harness = Harness(sink)
    begun = asyncio.Event()

    async def slow(_: Sequence[Event]) -> Sequence[Refusal]:
        begun.set()
        await asyncio.sleep(0.05)
        return ()

    async def fails(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkUnavailable(sink="fake", detail="down", retry_after=3600)

    sink.script = [slow, fails]
    async with harness.running():
        harness.fan_out.put(batch(10, 1))
        harness.fan_out.put(batch(20, 1))
        await begun.wait()
    assert sink.taken == [[1001]]
    assert harness.lane.done == SinkPosition(position=Position(10, 1), end_lsn=15)


async def test_reading_stops_at_the_memory_limit_and_goes_on_below_it() -> None:
    """Bytes are held until the last lane that needs them is done."""
    sink = FakeSink()
    harness = Harness(sink, limit_bytes=100)
    harness.fan_out.put(batch(10, 1, size=60))
    await asyncio.wait_for(harness.fan_out.room(), 1)
    harness.fan_out.put(batch(20, 1, size=60))
    assert harness.fan_out.full
    async with harness.running():
        await asyncio.wait_for(harness.fan_out.room(), 10)
    assert harness.fan_out.held_bytes == 0


def test_backoff_is_full_jitter_below_a_doubling_limit() -> None:
    """Anything from 0 to the limit; never above the longest pause."""
    for attempt in (0, 1, 5, 10_000):
        pauses = [backoff(attempt, 3.0) for _ in range(200)]
        assert min(pauses) >= 0
        assert max(pauses) <= min(3.0, 0.1 * 2**attempt if attempt < 20 else 3.0)


async def test_no_more_is_written_past_the_checkpoint_than_may_be_repeated() -> None:
    """What is written or in flight counts until a checkpoint has it, to the row; then as much again is written."""
    sink = FakeSink(max_events=2, concurrency=8, max_repeats=5)
    harness = Harness(sink)
    async with harness.running():
        harness.fan_out.put(batch(10, 9))
        async with asyncio.timeout(10):
            await harness.held_back.wait()
        await harness.until_row(4)
        assert harness.lane.held_back
        assert sink.taken == [[1001, 1002], [1003, 1004]], "a third write could make it 6 repeats"
        harness.lane.saved(Position(10, 3))  # a checkpoint that was made before the second write was done
        await harness.until_row(6)
        assert sink.taken[2:] == [[1005, 1006]]
        assert harness.lane.held_back
        harness.lane.saved(harness.lane.done.position)
        await harness.until(15)
    assert sink.taken[3:] == [[1007, 1008], [1009]]


async def test_where_repeats_do_no_harm_nothing_is_held_back() -> None:
    """Without a bound a lane does not wait for checkpoints."""
    harness = Harness(FakeSink(max_events=1))
    async with harness.running():
        harness.fan_out.put(batch(10, 500))
        await harness.until(15)
    assert not harness.held_back.is_set()


# -- bounds ----------------------------------------------------------------------------------------------------------


def heavy(commit_lsn: int, *sizes: int) -> Batch:
    """One transaction of events that weigh so much."""
    made = batch(commit_lsn, len(sizes))
    events = [
        structs.replace(event, json=b"x" * (size - EVENT_OVERHEAD_BYTES))
        for event, size in zip(made.events, sizes, strict=True)
    ]
    return structs.replace(made, events=events, size=weigh(events))


async def test_a_write_is_bounded_in_bytes() -> None:
    """Large events go in several writes, one that is larger than the bound alone; no position is skipped."""
    third = WRITE_MAX_BYTES // 3
    sink = FakeSink()
    harness = Harness(sink)
    for made in (heavy(10, third, third), heavy(20, third, third, 9), heavy(30, 2 * WRITE_MAX_BYTES), heavy(40, 9)):
        harness.fan_out.put(made)
    async with harness.running():
        await harness.until(45)
    assert [[1001, 1002, 2001], [2002, 2003], [3001], [4001]] == sink.taken
    assert 0 == harness.fan_out.held_bytes


async def test_enough_bytes_end_the_wait_for_more() -> None:
    """What fills a write does not linger."""
    sink = FakeSink()
    sink.linger_seconds = 60
    harness = Harness(sink)
    harness.fan_out.put(heavy(10, WRITE_MAX_BYTES))
    async with harness.running():
        await harness.until(15)
    assert [[1001]] == sink.taken


async def test_a_lane_waits_for_room_for_its_dead_letters(caplog: pytest.LogCaptureFixture) -> None:
    """Loudly; the refused event is not sent again meanwhile, and its position does not count."""
    sink = FakeSink(max_events=1)
    harness = Harness(sink)
    full = asyncio.Event()
    keep, room = harness.lane._dead_letter, asyncio.Event()  # noqa: SLF001  as it was given

    async def refuses(events: Sequence[Event]) -> Sequence[Refusal]:
        return [Refusal(events[0], "no")]

    async def keeps_when_there_is_room(letters: Sequence[DeadLetter]) -> None:
        if not room.is_set():
            full.set()
            raise DeadLettersFull(sink="fake", stored=1, count=1, limit=1)
        await keep(letters)

    sink.script = [refuses]
    harness.lane._dead_letter = keeps_when_there_is_room  # noqa: SLF001  a store that is full
    harness.fan_out.put(batch(10, 1))
    async with harness.running():
        await full.wait()
        await asyncio.sleep(0.01)
        assert START == harness.lane.done
        assert harness.lane.needs_somebody
        assert "would pass the limit of 1" in harness.lane.trouble
        room.set()
        await harness.until(15)
    assert "" == harness.lane.trouble
    assert [1001] == [letter.event_id for letter in harness.letters]
    assert [[1001]] == sink.taken
    assert "`python -m replicator dead-letters drop --sink fake`" in caplog.text
