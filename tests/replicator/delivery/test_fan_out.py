"""Lanes: order of positions, dead letters, what is left out after a restart, the memory bound; and retries."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from replicator.contracts.errors import (
    CheckpointUnavailable,
    DeadLettersFull,
    SinkBroken,
    SinkEmptied,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    SinkUnusable,
    SlotInUse,
    SourceUnavailable,
)
from replicator.contracts.events import DeadLetter, Event, LetterCounts, Mark, Position, Refusal, SinkPosition
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Mode
from replicator.contracts.stores import DeadLetterBox
from replicator.delivery import fan_out, lane, queue, retry, writer
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import STOPPED_SHARE, FanOut, Stops
from replicator.delivery.queue import BACKLOG_EVENTS, EVENT_OVERHEAD_BYTES, FLOW_SECONDS, WRITE_MAX_BYTES
from replicator.delivery.retry import Trouble, backoff
from sinks.testing import MemorySink

START = SinkPosition(position=Position(0, 0), end_lsn=5)


SETTINGS = CoreSettings.model_validate({"retry_max_seconds": 0.01})


class Box:
    """Keeps dead letters."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def add_dead_letters(self, _slot: str, letters: Sequence[DeadLetter], _most: int) -> LetterCounts:
        """Always room."""
        self.letters += letters
        return LetterCounts()


class Clock:
    """Time, in one module, that passes when the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


class Harness:
    """A fan-out with one lane, on a sink that does what the test says."""

    def __init__(
        self,
        sink: MemorySink,
        start: SinkPosition = START,
        limit_bytes: int = 1_000_000,
        *,
        box: Box | None = None,
        mode: Mode = Mode.LIVE,
    ) -> None:
        self.box = box or Box()
        letters = DeadLetters(cast("DeadLetterBox", self.box), SETTINGS)
        self.fan_out = FanOut(SETTINGS, letters, limit_bytes=limit_bytes, mode=mode)
        self.fan_out.open([sink], {sink.name: start})
        [self.lane] = self.fan_out.lanes

    def put(self, commit_lsn: int, count: int, end_lsn: int | None = None, committed_at: float = 0.0) -> None:
        """`count` events of one transaction; their ids are its commit LSN and the ordinal, e.g. 1001, 1002."""
        self.put_heavy(commit_lsn, *[2] * count, end_lsn=end_lsn, committed_at=committed_at)

    def put_heavy(
        self, commit_lsn: int, *json_bytes: int, end_lsn: int | None = None, committed_at: float = 0.0
    ) -> None:
        """One transaction of events with so much JSON."""
        events = [Event(commit_lsn, n, commit_lsn * 100 + n, 1, 0, b"x" * size) for n, size in enumerate(json_bytes, 1)]
        end = commit_lsn + 5 if end_lsn is None else end_lsn
        self.fan_out.put(events, Mark(Position(commit_lsn, len(events)), end, committed_at))

    async def until(self, end_lsn: int) -> None:
        """Wait until the lane has come this far."""
        await self._until(lambda: self.lane.mark.end_lsn >= end_lsn)

    async def until_row(self, ordinal: int) -> None:
        """Wait until the lane has this row of its transaction."""
        await self._until(lambda: self.lane.mark.position.ordinal >= ordinal)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await self.fan_out.progress()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The lane at work; it stops, without a failure, at the end."""
        task = asyncio.create_task(self.fan_out.run())
        yield
        self.fan_out.stop()
        assert await task is None


async def test_a_batch_is_written_in_pieces_and_the_end_counts_with_the_last() -> None:
    """A piece moves the position to its last event; the transaction's end counts once all of it is written."""
    sink = MemorySink(max_events=2)
    harness = Harness(sink)
    third = asyncio.Event()
    gate = asyncio.Event()

    async def waits(_: Sequence[Event]) -> Sequence[Refusal]:
        third.set()
        await gate.wait()
        return ()

    passes = asyncio.Event()
    passes.set()
    sink.steps = [passes, passes, waits]
    async with harness.running():
        harness.put(10, 5)
        await third.wait()
        assert harness.lane.reached == SinkPosition(position=Position(10, 4), end_lsn=5)
        gate.set()
        await harness.until(15)
    assert sink.writes == [[1001, 1002], [1003, 1004], [1005]]


async def test_waiting_batches_are_written_together() -> None:
    """A lane takes everything that waits, up to the sink's limit."""
    sink = MemorySink(max_events=100)
    harness = Harness(sink)
    for lsn in (10, 20, 30):
        harness.put(lsn, 2)
    async with harness.running():
        await harness.until(35)
    assert sink.writes == [[1001, 1002, 2001, 2002, 3001, 3002]]


async def test_the_position_waits_for_the_oldest_of_concurrent_writes() -> None:
    """With writes side by side, what is done after one that is not must not count."""
    sink = MemorySink(max_events=1, concurrency=3)
    harness = Harness(sink)
    gate = asyncio.Event()

    sink.steps = [gate]
    async with harness.running():
        for lsn in (10, 20, 30):
            harness.put(lsn, 1)
        await sink.until_written(2)
        assert harness.lane.reached == START
        gate.set()
        await harness.until(35)
    assert sink.writes == [[2001], [3001], [1001]]


async def test_what_the_sink_has_is_left_out() -> None:
    """After a restart inside a transaction only the rest of it is written."""
    sink = MemorySink()
    harness = Harness(sink, SinkPosition(position=Position(20, 2), end_lsn=15))
    async with harness.running():
        harness.put(10, 3)
        harness.put(20, 4)
        await harness.until(25)
    assert sink.taken == [2003, 2004]


async def test_a_reconnect_repeats_nothing_and_never_moves_back() -> None:
    """The stream gives batches again that the lane has or that wait in it."""
    sink = MemorySink()
    harness = Harness(sink)
    async with harness.running():
        for lsn in (10, 20, 10, 20, 30):
            harness.put(lsn, 1)
        await harness.until(35)
    assert sink.taken == [1001, 2001, 3001]
    assert harness.lane.reached == SinkPosition(position=Position(30, 1), end_lsn=35)


async def test_a_sink_is_paused_between_two_streams() -> None:
    """Nothing is written then: there is nothing to wait for."""
    world = Harness(MemorySink())
    async with world.running():
        pass
    world.fan_out.again()
    await world.fan_out.pause(world.lane.name)
    assert [world.lane] == list(world.fan_out.paused)


async def test_an_empty_batch_moves_an_idle_lane_at_once() -> None:
    """Transactions without our tables move the position, without a write."""
    harness = Harness(MemorySink())
    harness.put(10, 0, end_lsn=77)
    assert harness.lane.reached.end_lsn == 77


async def test_an_empty_batch_waits_for_what_is_before_it() -> None:
    """Nothing in flight may be passed, and a dead sink does not collect empty batches."""
    harness = Harness(MemorySink())
    harness.put(10, 1)
    for end in range(20, 1000):
        harness.put(10, 0, end_lsn=end)
    assert harness.lane.reached == START
    assert len(harness.lane.queue._entries) == 1  # noqa: SLF001  the bound is not visible from outside
    async with harness.running():
        await harness.until(999)


@pytest.mark.parametrize("in_flight", [0, 1])
async def test_rows_of_a_catch_up_do_not_move_the_mark_back(in_flight: int) -> None:
    """Written in pieces, after batches without events that moved the mark past the last write's."""
    sink = MemorySink(max_events=2)
    gate = asyncio.Event()
    sink.steps = [gate]
    harness = Harness(sink)
    async with harness.running():
        harness.put(10, in_flight)
        await asyncio.sleep(0)
        harness.put(20, 0, end_lsn=77)
        harness.fan_out.put([Event(0, 0, -number, 1, 0, b"{}") for number in range(5)], None)
        gate.set()
        async with asyncio.timeout(10):
            while harness.lane.stats.events < in_flight + 5:
                await harness.fan_out.progress()
    assert harness.lane.reached == SinkPosition(position=Position(20, 0), end_lsn=77)


async def test_an_unavailable_sink_is_tried_until_it_takes_the_same_events() -> None:
    """The very same events again; said once, and that it is over."""
    sink = MemorySink()
    harness = Harness(sink)
    seen: list[list[int]] = []

    async def fails(events: Sequence[Event]) -> Sequence[Refusal]:
        seen.append([event.id for event in events])
        raise SinkUnavailable(sink="memory", detail="down")

    sink.steps = [fails, fails, fails]
    async with harness.running():
        harness.put(10, 2)
        await harness.until(15)
    assert seen == [[1001, 1002]] * 3
    assert sink.writes == [[1001, 1002]]
    assert (harness.lane.trouble.message, harness.lane.trouble.failures) == ("", 3)


async def test_trouble_is_told_with_its_cure(caplog: pytest.LogCaptureFixture) -> None:
    """A destination that turns us away loses nothing and is loud about it."""
    sink = MemorySink()
    harness = Harness(sink)

    async def turns_away(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkMisconfigured(sink="memory", detail="401", cure="Set the token")

    sink.steps = [turns_away]
    with caplog.at_level(logging.ERROR):
        async with harness.running():
            harness.put(10, 1)
            await harness.until(15)
    assert "Set the token" in caplog.text
    assert (sink.writes, harness.box.letters) == ([[1001]], [])


async def test_trouble_lasts_until_no_write_is_turned_away() -> None:
    """Of two writes side by side one succeeds: the other is still in trouble, and that is not told anew each time."""
    sink = MemorySink(max_events=1, concurrency=2)
    harness = Harness(sink)
    gate = asyncio.Event()

    async def fails(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkUnavailable(sink="memory", detail="overloaded", retry_after=0)

    sink.steps = [fails, fails, gate]
    async with harness.running():
        harness.put(10, 1)
        harness.put(20, 1)
        await sink.until_written(1)
        assert "overloaded" in harness.lane.trouble.message
        gate.set()
        await harness.until(25)
    assert not harness.lane.trouble


async def test_a_sink_that_is_unwell_though_nothing_is_written_is_in_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told without an event, and over without one; a write that goes well does not end it."""
    monkeypatch.setattr(lane, "LOOK_SECONDS", 0.01)
    sink = Unwell()
    harness = Harness(sink)
    async with harness.running():
        while not harness.lane.trouble:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.01)
        assert "its keys belong to another" in harness.lane.trouble.message
        assert harness.lane.trouble.needs_operator
        harness.put(10, 1)
        await harness.until(15)
        assert harness.lane.trouble
        sink.wrong = False
        while harness.lane.trouble:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("lost", [True, False])
async def test_a_pause_brings_nothing_back(monkeypatch: pytest.MonkeyPatch, *, lost: bool) -> None:
    """What is gone stays a trouble of a sink that is paused; what it only refuses is none of its any more."""
    monkeypatch.setattr(lane, "LOOK_SECONDS", 0.01)
    sink = Unwell()
    if lost:
        sink.error = SinkEmptied(sink="memory", detail="its keys are gone", cure="Fill it")
    harness = Harness(sink)
    async with harness.running():
        while not harness.lane.trouble:  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.01)
        await harness.fan_out.pause("memory")
        assert lost == bool(harness.lane.trouble) == ("its keys are gone" in harness.lane.trouble.message)


class Unwell(MemorySink):
    """One that looks at itself."""

    wrong = True
    error: SinkError = SinkUnusable(sink="memory", detail="its keys belong to another", cure="Give each its own")

    def look(self) -> None:
        """As long as the test says."""
        if self.wrong:
            raise self.error


async def test_lag_is_the_age_of_the_oldest_commit_that_is_not_written() -> None:
    """Queued or in flight; how long nothing happened before that does not count."""
    sink = MemorySink(max_events=1)
    harness = Harness(sink)
    gate = asyncio.Event()

    now = time.time()
    harness.put(10, 0, committed_at=now - 3600)
    assert harness.lane.lag_seconds() == 0.0
    for lsn, age in ((20, 100), (30, 50)):
        harness.put(lsn, 1, committed_at=now - age)
    assert 100 <= harness.lane.lag_seconds() < 1000
    sink.steps = [gate]
    async with harness.running():
        await asyncio.sleep(0.01)
        assert 100 <= harness.lane.lag_seconds() < 1000
        gate.set()
        await harness.until(35)
    assert harness.lane.lag_seconds() == 0.0


async def test_a_write_without_an_answer_has_an_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest one's; what was answered has none, also while it waits for one before it or for its dead letters."""
    now = 1_000.0
    for module in (lane, writer):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    harness = Harness(sink := MemorySink(max_events=1, concurrency=2))
    asked = [asyncio.Event(), asyncio.Event()]
    answer = [asyncio.Event(), asyncio.Event()]
    storing, stored = asyncio.Event(), asyncio.Event()

    async def hangs(events: Sequence[Event]) -> Sequence[Refusal]:
        number = events[0].commit_lsn // 10 - 1
        asked[number].set()
        await answer[number].wait()
        return [Refusal(events[0], "no")] if number == 0 else []

    async def stores(_: Sequence[DeadLetter], _details: Sequence[str]) -> None:
        storing.set()
        await stored.wait()

    sink.steps = [hangs, hangs]
    monkeypatch.setattr(
        DeadLetters, "keep", lambda _self, letters, details: stores(letters, details)
    )  # a store that takes its time
    async with harness.running(), asyncio.timeout(10):
        for number in (0, 1):
            assert number * 5.0 == harness.lane.unanswered_seconds()
            harness.put(10 * number + 10, 1)
            await asked[number].wait()
            now += 5
        assert harness.lane.unanswered_seconds() == 10.0
        answer[0].set()
        await storing.wait()
        assert harness.lane.unanswered_seconds() == 5.0
        answer[1].set()
        await sink.until_written(2)
        assert (2, 0.0) == (harness.lane.waiting, harness.lane.unanswered_seconds())
        stored.set()
        await harness.until(25)


async def test_a_sink_that_does_not_open_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written while it opens: that it hangs must not pass for having nothing to do."""
    now = 1_000.0
    for module in (lane, writer):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    asked, answer = asyncio.Event(), asyncio.Event()

    class Opens(MemorySink):
        async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
            """Hang at first."""
            asked.set()
            await answer.wait()
            await super().open(start, mode)

    harness = Harness(Opens())
    async with harness.running(), asyncio.timeout(10):
        harness.put(10, 1)
        await asked.wait()
        now += 11
        assert 11 == harness.lane.unanswered_seconds()
        answer.set()
        await harness.until(15)
        assert 0 == harness.lane.unanswered_seconds()


async def test_retry_after_is_honoured() -> None:
    """The destination named a time: no earlier."""
    sink = MemorySink()
    harness = Harness(sink)
    times: list[float] = []

    async def later(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        raise SinkUnavailable(sink="memory", detail="429", retry_after=0.2)

    async def notes(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        return ()

    sink.steps = [later, notes]
    async with harness.running():
        harness.put(10, 1)
        await harness.until(15)
    assert times[1] - times[0] >= 0.2


async def test_a_named_time_that_has_passed_is_no_leave_to_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Retry-After: 0`, or a date by a clock that is behind ours: the ordinary pauses are the least."""
    pauses = iter([0.05, 0.1])
    monkeypatch.setattr(retry, "backoff", lambda _attempt, _longest: next(pauses))
    sink = MemorySink()
    harness = Harness(sink)
    times: list[float] = []

    async def overloaded(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        raise SinkUnavailable(sink="memory", detail="503", retry_after=0.0)

    async def takes(_: Sequence[Event]) -> Sequence[Refusal]:
        times.append(asyncio.get_running_loop().time())
        return ()

    sink.steps = [overloaded, overloaded, takes]
    async with harness.running():
        harness.put(10, 1)
        await harness.until(15)
    first, second, third = times
    assert second - first >= 0.05
    assert third - second >= 0.1


async def test_a_refused_event_is_kept_before_its_position_counts() -> None:
    """The dead letter carries position, reason and payload."""
    sink = MemorySink()
    harness = Harness(sink)

    async def refuses(events: Sequence[Event]) -> Sequence[Refusal]:
        assert harness.lane.reached == START
        return [Refusal(events[1], "no")]

    sink.steps = [refuses]
    async with harness.running():
        harness.put(10, 3)
        await harness.until(15)
    assert harness.box.letters == [
        DeadLetter(sink="memory", position=Position(10, 2), event_id=1002, reason="no", payload=b"xx")
    ]


@pytest.mark.parametrize(
    "error",
    [
        SinkUnusable(sink="memory", detail="no table", cure="init"),
        SinkBroken(sink="memory", detail="KeyError"),
        KeyError("row 42"),
    ],
)
async def test_what_only_an_operator_mends_holds_the_lane(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Also what the sink's code does not know: told at once, the traceback once and without its message; then on."""
    sink = MemorySink(steps=[error] * 3)
    harness = Harness(sink)
    harness.put(10, 1)
    async with harness.running():
        await harness.until(15)
    assert sink.writes == [[1001]]
    assert harness.lane.trouble.failures == 3
    assert caplog.text.count("in _take") == isinstance(error, KeyError)
    assert "row 42" not in caplog.text
    assert ("no table" if isinstance(error, SinkUnusable) else "in an unexpected way: KeyError") in caplog.text


OF_ANOTHER = Refusal(Event(10, 1, 7, 7, 0, b"{}"), "no")


class Odd(MemorySink):
    """Its first write takes the events and then does something that no sink should do."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self._answer = answer

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """Take them, and say that the first time."""
        refusals = await super().write(events)
        if self.writes[1:]:
            return refusals
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer  # type: ignore[return-value]  # its author has no type checker


@pytest.mark.parametrize("answer", [None, 5, ["no"], [OF_ANOTHER], asyncio.CancelledError()], ids=repr)
async def test_a_write_that_ends_oddly_holds_the_lane(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    """It is a bug like any other of a sink, ends neither the lane nor the replicator, and does not pass for silence."""
    sink = Odd(answer)
    harness = Harness(sink)
    harness.put(10, 1)
    async with harness.running():
        await harness.until(15)
    assert sink.writes == [[1001], [1001]]
    assert [] == harness.box.letters
    name = "CancelledError" if isinstance(answer, BaseException) else "TypeError"
    assert f"in an unexpected way: {name}" in caplog.text


async def test_what_only_an_operator_mends_ends_a_backfill() -> None:
    """It is not retried, and its position stays."""
    for error, raised in (
        (SinkUnusable(sink="memory", detail="no table", cure="init"), SinkUnusable),
        (KeyError("x"), SinkBroken),
    ):
        harness = Harness(MemorySink(steps=[error]), mode=Mode.BACKFILL)
        harness.put(10, 1)
        assert isinstance(await harness.fan_out.run(), raised)
        assert harness.lane.reached == START


async def test_stopping_waits_for_a_write_in_flight_but_not_for_a_retry() -> None:
    """What is being written is finished and counts; what is being retried stays unwritten."""
    sink = MemorySink(max_events=1, concurrency=2)
    harness = Harness(sink)
    begun = asyncio.Event()

    async def slow(_: Sequence[Event]) -> Sequence[Refusal]:
        begun.set()
        await asyncio.sleep(0.05)
        return ()

    async def fails(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkUnavailable(sink="memory", detail="down", retry_after=3600)

    sink.steps = [slow, fails]
    async with harness.running():
        harness.put(10, 1)
        harness.put(20, 1)
        await begun.wait()
    assert sink.writes == [[1001]]
    assert harness.lane.reached == SinkPosition(position=Position(10, 1), end_lsn=15)


async def test_a_retry_that_is_stopped_holds_back_what_was_written_after_it() -> None:
    """Of two writes side by side the first one never succeeded: the sink's position stays before it."""
    sink = MemorySink(max_events=1, concurrency=2)
    harness = Harness(sink)

    async def fails(_: Sequence[Event]) -> Sequence[Refusal]:
        raise SinkUnavailable(sink="memory", detail="down", retry_after=3600)

    sink.steps = [fails]
    async with harness.running():
        harness.put(10, 1)
        harness.put(20, 1)
        harness.fan_out.put([], Mark(Position(30, 0), 35))
        await sink.until_written(1)
    assert ([[2001]], START) == (sink.writes, harness.lane.reached)


def test_a_stop_is_judged_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at once, but after 10 s; a moment of room ends nothing, half a minute of it does."""
    clock = Clock(monkeypatch, fan_out)
    stops = Stops()
    stops.set(True)
    clock.now += 9
    assert stops.share() < STOPPED_SHARE
    clock.now += 1
    assert stops.share() >= STOPPED_SHARE
    clock.now += 60
    stops.set(False)
    clock.now += 5
    assert stops.share() >= STOPPED_SHARE
    clock.now += 25
    assert stops.share() < STOPPED_SHARE


def test_short_stops_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink that makes room every other second is slow: half of the time is not read. A tenth of it is nothing."""
    clock = Clock(monkeypatch, fan_out)
    for stopped_seconds, expected in ((1.0, True), (0.2, False)):
        stops = Stops()
        for _ in range(30):
            stops.set(True)
            clock.now += stopped_seconds
            stops.set(False)
            clock.now += 2.0 - stopped_seconds
        assert expected == (stops.share() >= STOPPED_SHARE)


async def test_a_slow_sink_is_logged_though_it_makes_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reading never stands still for 10 s on end, but for most of them; said once in half a minute."""
    clock = Clock(monkeypatch, fan_out)
    sink = MemorySink()
    harness = Harness(sink, limit_bytes=EVENT_OVERHEAD_BYTES)

    async def slow(_: Sequence[Event]) -> Sequence[Refusal]:
        clock.now += 4
        return ()

    sink.steps = [slow] * 10
    async with harness.running():
        for commit in range(10, 110, 10):
            harness.put_heavy(commit, 0)
            await asyncio.wait_for(harness.fan_out.room(), 10)
    assert [
        f"reading has stopped: {EVENT_OVERHEAD_BYTES} bytes of events wait for sink memory (slow)"
    ] == caplog.messages
    assert not harness.fan_out.reading_stopped, "nothing waits any more"


async def test_reading_stops_at_the_memory_limit_and_goes_on_below_it() -> None:
    """Bytes are held until the last lane that needs them is done."""
    gate = asyncio.Event()
    harness = Harness(MemorySink(steps=[gate]), limit_bytes=2 * EVENT_OVERHEAD_BYTES)
    harness.put_heavy(10, 0)
    await asyncio.wait_for(harness.fan_out.room(), 1)
    harness.put_heavy(20, 0)
    assert harness.fan_out.full
    async with harness.running():
        gate.set()
        await asyncio.wait_for(harness.fan_out.room(), 10)
        await harness.until(25)
    assert harness.fan_out.held_bytes == 0


def test_backoff_is_full_jitter_below_a_doubling_limit() -> None:
    """Anything from 0 to the limit; never above the longest pause."""
    for attempt in (0, 1, 5, 10_000):
        pauses = [backoff(attempt, 3.0) for _ in range(200)]
        assert min(pauses) >= 0
        assert max(pauses) <= min(3.0, 0.1 * 2**attempt if attempt < 20 else 3.0)


async def test_no_more_is_written_past_the_checkpoint_than_may_be_repeated() -> None:
    """What is written or in flight counts until a checkpoint has it, to the row; then as much again is written."""
    sink = MemorySink(max_events=2, concurrency=8, max_repeats=5)
    harness = Harness(sink)
    async with harness.running():
        harness.put(10, 9)
        async with asyncio.timeout(10):
            await harness.fan_out.checkpoint_wanted(10)
        await harness.until_row(4)
        assert harness.lane.awaiting_checkpoint
        assert sink.writes == [[1001, 1002], [1003, 1004]], "a third write could make it 6 repeats"
        harness.lane.saved(Position(10, 3))  # a checkpoint that was made before the second write was done
        await harness.until_row(6)
        assert sink.writes[2:] == [[1005, 1006]]
        assert harness.lane.awaiting_checkpoint
        harness.lane.saved(harness.lane.reached.position)
        await harness.until(15)
    assert sink.writes[3:] == [[1007, 1008], [1009]]


async def test_where_repeats_do_no_harm_nothing_is_held_back() -> None:
    """Without a bound a lane does not wait for checkpoints."""
    harness = Harness(MemorySink(max_events=1))
    async with harness.running():
        harness.put(10, 500)
        await harness.until(15)
    assert not harness.lane.awaiting_checkpoint


# -- bounds ----------------------------------------------------------------------------------------------------------


async def test_a_write_is_bounded_in_bytes() -> None:
    """Large events go in several writes, one that is larger than the bound alone; no position is skipped."""
    third = WRITE_MAX_BYTES // 3 - EVENT_OVERHEAD_BYTES
    sink = MemorySink()
    harness = Harness(sink, limit_bytes=2 * WRITE_MAX_BYTES)
    harness.put_heavy(10, third, third)
    harness.put_heavy(20, third, third, 9)
    harness.put_heavy(30, 2 * WRITE_MAX_BYTES)
    harness.put_heavy(40, 9)
    async with harness.running():
        await harness.until(45)
    assert [[1001, 1002, 2001], [2002, 2003], [3001], [4001]] == sink.writes
    assert 0 == harness.fan_out.held_bytes


async def test_enough_bytes_end_the_wait_for_more() -> None:
    """What fills a write does not linger."""
    sink = MemorySink()
    sink.linger_seconds = 60
    harness = Harness(sink, limit_bytes=1_000_000)
    harness.put_heavy(10, 499_999 - 2 * EVENT_OVERHEAD_BYTES, 1)
    async with harness.running():
        await harness.until(15)
    assert [[1001, 1002]] == sink.writes, "half of the memory limit is enough: the reader may wait for room"


# -- backlogs --------------------------------------------------------------------------------------------------------


async def test_in_a_backlog_a_lane_gathers_a_full_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what happens to be there; a full one goes at once, and a part when it has waited long enough."""
    clock = Clock(monkeypatch, queue)
    sink = MemorySink(max_events=BACKLOG_EVENTS + 10)
    harness = Harness(sink, limit_bytes=10_000_000)
    harness.put(10, BACKLOG_EVENTS)
    async with harness.running():
        await asyncio.sleep(2 * lane.QUIET_SECONDS)
        assert [] == sink.writes
        harness.put(100, 10)
        await harness.until(105)
        assert [BACKLOG_EVENTS + 10] == [len(write) for write in sink.writes]
        harness.put(200, 1)
        clock.now += lane.GATHER_SECONDS
        await harness.until(205)


async def test_live_events_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fewer than a backlog, however often, as long as some time lies between them."""
    clock = Clock(monkeypatch, queue)
    harness = Harness(MemorySink(max_events=10 * BACKLOG_EVENTS), limit_bytes=10_000_000)
    async with harness.running():
        for number in range(1, 4):
            harness.put(10 * number, BACKLOG_EVENTS - 1)
            await harness.until(10 * number + 5)
            clock.now += FLOW_SECONDS + 0.001


async def test_a_backlog_ends_when_nothing_comes() -> None:
    """Then what was gathered is written before its time is up."""
    sink = MemorySink(max_events=10 * BACKLOG_EVENTS)
    harness = Harness(sink, limit_bytes=10_000_000)
    async with harness.running():
        began = time.monotonic()
        harness.put(10, BACKLOG_EVENTS)
        await harness.until(15)
    assert lane.QUIET_SECONDS <= time.monotonic() - began < lane.GATHER_SECONDS


async def test_the_rest_of_a_backlog_does_not_linger() -> None:
    """It goes when nothing more comes, once for each full write: the next events linger again."""
    sink = MemorySink(max_events=3)
    sink.linger_seconds = 60
    harness = Harness(sink)
    async with harness.running():
        harness.put(10, 4)
        await harness.until(15)
        harness.put(20, 1)
        await asyncio.sleep(2 * lane.QUIET_SECONDS)
    assert [[1001, 1002, 1003], [1004]] == sink.writes


async def test_what_comes_meanwhile_wakes_no_lane_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first event sets the alarm, and the one that fills the write rings it: a wake-up costs 20 µs."""
    sink = MemorySink(max_events=100)
    sink.linger_seconds = 60
    harness = Harness(sink)
    looks: list[float | None] = []

    async def counted(event: asyncio.Event, seconds: float | None) -> None:
        looks.append(seconds)
        await retry.wait(event, seconds)

    monkeypatch.setattr(lane, "wait", counted)
    async with harness.running():
        for number in range(1, 101):
            harness.put(10 * number, 1)
            await asyncio.sleep(0)
        await harness.until(1005)
    assert [100] == [len(write) for write in sink.writes]
    assert len(looks) < 10


async def test_a_lane_waits_for_room_for_its_dead_letters(caplog: pytest.LogCaptureFixture) -> None:
    """Loudly; the refused event is not sent again meanwhile, and its position does not count."""
    full, room = threading.Event(), threading.Event()

    class FullBox(Box):
        def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter], most: int) -> LetterCounts:
            if room.is_set():
                return super().add_dead_letters(slot, letters, most)
            full.set()
            raise DeadLettersFull(sink="memory", stored=1, count=1, limit=1)

    sink = MemorySink(max_events=1, unfit=[1001])
    harness = Harness(sink, box=FullBox())
    harness.put(10, 1)
    async with harness.running():
        await asyncio.to_thread(full.wait, 10)
        await asyncio.sleep(0.01)
        assert START == harness.lane.reached
        assert harness.lane.trouble.needs_operator
        assert "would pass the limit of 1" in harness.lane.trouble.message
        room.set()
        await harness.until(15)
    assert not harness.lane.trouble
    assert [1001] == [letter.event_id for letter in harness.box.letters]
    assert [[]] == sink.writes, "it was asked once"
    assert "dead-letters drop --sink memory" in caplog.text


async def test_a_lane_of_a_backfill_that_fails_ends_the_others_in_good_order() -> None:
    """What is in flight elsewhere is finished and counts; the failure is returned, and the work is ended."""
    begun, gate = asyncio.Event(), asyncio.Event()

    async def breaks(_: Sequence[Event]) -> None:
        await begun.wait()
        asyncio.get_running_loop().call_later(0.01, gate.set)
        raise SinkUnusable(sink="broken", detail="no table", cure="init")

    async def slow(_: Sequence[Event]) -> None:
        begun.set()
        await gate.wait()

    sinks = MemorySink(name="broken", steps=[breaks]), MemorySink(name="good", steps=[slow])
    letters = DeadLetters(cast("DeadLetterBox", Box()), SETTINGS)
    fan_out = FanOut(SETTINGS, letters, limit_bytes=1_000_000, mode=Mode.BACKFILL)
    fan_out.open(sinks, {sink.name: START for sink in sinks})
    fan_out.put([Event(10, 1, 1001, 1, 0, b"{}")], Mark(Position(10, 1), 15))
    forever = asyncio.Event()

    async def work() -> None:
        await forever.wait()

    assert isinstance(await asyncio.wait_for(fan_out.run(work()), 10), SinkUnusable)
    assert [5, 15] == [lane.mark.end_lsn for lane in fan_out.lanes]


# -- retries ---------------------------------------------------------------------------------------------------------


def test_trouble_is_logged_when_its_kind_begins_and_twice_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not each time; a standby says once that it waits, however long; the newest message is always there."""
    clock, trouble = Clock(monkeypatch, retry), Trouble()
    assert (False, 0.0) == (bool(trouble), trouble.seconds())
    for second in range(61):
        clock.now = 1_000.0 + second
        trouble.say(SinkUnavailable(sink="s", detail=f"try {second}"))
        trouble.say(SlotInUse(slot="s", pid=second))
    assert 60.0 == trouble.seconds()
    assert "process 60" in trouble.message
    said = [record.getMessage().split(":")[0][:20] for record in caplog.records]
    assert ["Sink s did not take ", "Replication slot s i", "Sink s did not take "] == said
    trouble.clear()
    assert (False, 0.0) == (bool(trouble), trouble.seconds())


@pytest.mark.parametrize(
    ("error", "least", "most"),
    [
        (SlotInUse(slot="s", pid=1), 1.0, 1.0),
        (DeadLettersFull(sink="s", stored=1, count=1, limit=1), 7.0, 7.0),
        (SinkMisconfigured(sink="s", detail="401", cure=""), 7.0, 7.0),
        (SinkUnavailable(sink="s", detail="503", retry_after=60.0), 60.0, 60.0),
        (SinkUnavailable(sink="s", detail="503", retry_after=1e9), 900.0, 900.0),
        (SinkUnavailable(sink="s", detail="503"), 0.0, 0.2),
        (CheckpointUnavailable(detail="full"), 0.0, 0.2),
        (SourceUnavailable(detail="gone"), 0.0, 0.2),
    ],
)
def test_the_error_decides_about_the_pause(error: Exception, least: float, most: float) -> None:
    """A named time is the least, within reason; where an operator is needed the longest pause; else jitter."""
    assert least <= retry.pause_seconds(error, 1, 7.0) <= most


async def test_what_nobody_names_is_not_retried() -> None:
    """It ends the program, at once."""
    calls: list[int] = []

    async def call() -> None:
        calls.append(1)
        raise SinkUnusable(sink="s", detail="no table", cure="init")

    with pytest.raises(SinkUnusable):
        await retry.retry(call, Trouble(), 0.001)
    assert [1] == calls


async def test_a_call_that_did_well_for_a_while_is_retried_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that breaks after an hour is connected again at once, one that breaks at once is not."""
    clock = Clock(monkeypatch, retry)
    attempts: list[int] = []

    def no_pause(attempt: int, _longest: float) -> float:
        attempts.append(attempt)
        return 0.0

    monkeypatch.setattr(retry, "backoff", no_pause)
    lasting = [1, 1, 100, 1]

    async def call() -> str:
        if not lasting:
            return "done"
        clock.now += lasting.pop(0)
        raise SourceUnavailable(detail="cut off")

    assert "done" == await retry.retry(call, Trouble(), 30.0, fresh_after=30.0)
    assert [0, 1, 0, 1] == attempts


async def test_a_standby_takes_over_soon_however_long_it_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the slot is no failure: when the checkpoint moved while the slot changed hands, it looks at once."""
    attempts: list[int] = []

    def no_pause(_exc: Exception, attempt: int, _longest: float) -> float:
        attempts.append(attempt)
        return 0.0

    monkeypatch.setattr(retry, "pause_seconds", no_pause)
    troubles: list[Exception] = [SlotInUse(slot="s", pid=1)] * 9 + [SourceUnavailable(detail="moved")] * 2

    async def call() -> None:
        if troubles:
            raise troubles.pop(0)

    await retry.retry(call, Trouble(), 30.0)
    assert [0] * 10 + [1] == attempts


def test_stretches_that_no_lane_looks_at_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are hundreds a second; those without events, of a database that is busy elsewhere, are silence."""
    seconds = iter(number / 100 for number in range(10_000))
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    flow = queue.Flow()
    for _ in range(1_000):
        flow.add(1)
    assert len(flow._arrived) <= FLOW_SECONDS / 0.01 + 1  # noqa: SLF001
    before = flow.quiet_seconds()
    flow.add(0)
    assert before < flow.quiet_seconds()
