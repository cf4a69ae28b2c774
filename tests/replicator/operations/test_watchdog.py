"""The watchdog: never ready over a slot that stands still while there is something to read."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from replicator.contracts.errors import SinkMisconfigured, SlotInUse, SourceUnavailable, SourceUnusable
from replicator.contracts.events import Checkpoint, LetterCounts, Mark, Pause, Position, SinkPosition
from replicator.contracts.settings import CoreSettings
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.lane import Lane
from replicator.delivery.retry import Trouble, cancel
from replicator.operations.notices.rule import PATIENCE_SECONDS
from replicator.operations.status.collect import STALL_SECONDS
from replicator.operations.status.form import CheckpointStatus, SlotStatus, Status
from replicator.operations.watchdog import TROUBLE_SECONDS, Answers, Watchdog
from replicator.pipeline import Pipeline
from replicator.source import slot as slots
from replicator.source.breaks import Breaks
from replicator.source.slot import SlotState
from tests.support.fakes import CHECKPOINT, STATE

SLOT = structs.replace(STATE, active_pid=1, server_lsn=100)


class FakeTrouble(Trouble):
    """Lasts as long as the test says."""

    def __init__(self, message: str = "", lasting: float = 0.0, *, needs_operator: bool = False) -> None:
        super().__init__(message=message)
        self.lasting, self.needs_operator = lasting, needs_operator

    def seconds(self) -> float:
        """As long as the test says."""
        return self.lasting


class FakeLane:
    """The slowest lane."""

    name = "http"
    waiting = 7
    unanswered_for = 0.0

    def unanswered_seconds(self) -> float:
        """As long as the test says."""
        return self.unanswered_for

    def __init__(self) -> None:
        self.trouble: Trouble = Trouble()
        self.mark = Mark(Position(90, 1), 80)

    @property
    def reached(self) -> SinkPosition:
        """As `Lane` has it."""
        return SinkPosition(position=self.mark.position, end_lsn=self.mark.end_lsn)


class FakeSource:
    """A connection on which nothing comes."""

    received = 80
    silent_seconds = 45.0

    def __init__(self) -> None:
        self.breaks = Breaks()

    async def is_refused(self) -> bool:
        """The server is there for others, too."""
        return False


class FakeVerification:
    """All is verified."""

    def __init__(self) -> None:
        self.trouble = Trouble()
        self.catch_up = self
        self.reason = ""


class FakePipeline:
    """A pipeline that reads, with one sink."""

    def __init__(self) -> None:
        self.trouble = Trouble()
        self.saving = Trouble()
        self.verification = FakeVerification()
        self.letters = SimpleNamespace(trouble=Trouble(), stored=LetterCounts(), limit=10)
        self.saves = True
        """A checkpoint is saved between two looks."""
        self.checkpoint: Checkpoint | None = Checkpoint(
            slot="s", system_identifier="7", timeline=1, end_lsn=80, sinks={}
        )
        self.source = FakeSource()
        self.fan_out = self
        self.paused: list[Lane | FakeLane] = []
        self.pauses: dict[str, Pause] = {}
        self.on_disk: Checkpoint | None = self.checkpoint
        self.lanes: list[Lane | FakeLane] = [FakeLane()]

    async def stored(self) -> Checkpoint | None:
        """As the database has it."""
        return self.on_disk

    @property
    def every(self) -> list[Lane | FakeLane]:
        """As `FanOut` has them."""
        return [*self.lanes, *self.paused]

    @property
    def slowest(self) -> Lane | FakeLane:
        """As `FanOut` chooses it."""
        return min(self.lanes, key=lambda lane: (lane.mark.end_lsn, lane.mark.position))


class FakeStore:
    """A database whose answer comes when the test says."""

    def __init__(self) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()

    def save(self, _: Checkpoint) -> None:
        """Hangs."""
        self.asked.set()
        self.answers.wait()


class Looking(Watchdog):
    """A watchdog that looks when the test says, at a slot and a clock of the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.database = FakeStore()
        self.answers = Answers(cast("CheckpointStore", self.database))
        pipeline, settings = cast("Pipeline", FakePipeline()), CoreSettings.model_validate({"slot": "s"})
        super().__init__(pipeline, "", settings, self.answers, {})
        self.trouble = ""

    def look(self, seconds_later: float = 0.0, **changes: object) -> list[str]:
        """Why it is not ready once time has passed and the slot has changed so."""
        self.now += seconds_later
        self.slot = structs.replace(self.slot or SLOT, **changes)
        pipeline = cast("FakePipeline", self.pipeline)
        if pipeline.saves and pipeline.checkpoint:
            pipeline.checkpoint = structs.replace(pipeline.checkpoint)
        self._watch()
        return self.reasons()


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> Looking:
    """It has seen the slot once, with nothing to read."""
    looking = Looking(monkeypatch)
    assert [] == looking.look()
    return looking


@pytest.fixture
def pipeline(watchdog: Looking) -> Pipeline:
    """What it watches."""
    return watchdog.pipeline


def test_a_slot_that_stands_still_is_not_ready(watchdog: Looking) -> None:
    """Something to read and no movement: ready for a minute, then not, with the sink that is to blame."""
    assert [] == watchdog.look(1, server_lsn=300)
    assert [] == watchdog.look(STALL_SECONDS - 2)
    [reason] = watchdog.look(2)
    assert (
        "the slot has not moved for 61 s while 200 bytes of WAL wait: sink http is the slowest, with 7 events waiting"
        in reason
    )


def test_a_cause_that_is_told_is_not_told_again(watchdog: Looking, pipeline: Pipeline) -> None:
    """A slot that stands still because a sink takes nothing: the sink's words are enough."""
    [lane] = cast("FakePipeline", pipeline).lanes
    lane.trouble = FakeTrouble("Sink http did not take the batch", lasting=70.0)
    watchdog.look(1, server_lsn=300)
    assert ["Sink http did not take the batch"] == watchdog.look(2 * STALL_SECONDS)
    lane.trouble = FakeTrouble("Sink http did not take the batch", lasting=0.0)
    [reason] = watchdog.reasons()
    assert reason.startswith("the slot has not moved for 121 s")


def test_a_slot_that_can_not_be_seen_is_not_said_to_stand_still(watchdog: Looking) -> None:
    """What the last look saw is no news: the stream may go on, and the walsender is not to be called hanging."""
    watchdog.look(1, server_lsn=300)
    watchdog.trouble = "PostgreSQL refuses the connection"
    assert ["PostgreSQL refuses the connection"] == watchdog.look(2 * STALL_SECONDS)
    watchdog.trouble = ""
    assert [] == watchdog.look(1, server_lsn=400, confirmed_lsn=400)


def test_a_line_a_minute_while_something_comes(
    watchdog: Looking, pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Rate and lag of each sink, for people and as fields; nothing while nothing comes and nothing waits."""
    stats, lag = SimpleNamespace(events=1_200), [0.25]
    lane = SimpleNamespace(name="http", stats=stats, waiting=7, lag_seconds=lambda: lag[0])
    pipeline.fan_out.lanes = [lane]  # type: ignore[list-item]  # as much of one as it needs
    caplog.set_level("INFO")
    for seconds in (59, 1, 30, 30, 60):
        watchdog.now += seconds
        watchdog._beat()  # noqa: SLF001  as `run` does, without a server
        if len(caplog.records) == 2:
            lag[0] = 0.0
    first, second = caplog.records
    assert first.getMessage() == "the last minute: http 20.0 events/s, 0.2 s behind"
    assert {"http": {"events_per_second": 0.0, "lag_seconds": 0.2}} == vars(second)["sinks"]


def test_any_movement_counts(watchdog: Looking) -> None:
    """A slot that moves is slow, not stalled, however much there is to read."""
    for confirmed in range(101, 110):
        assert [] == watchdog.look(STALL_SECONDS - 1, confirmed_lsn=confirmed, server_lsn=10**9)


def test_an_idle_server_is_no_stall(watchdog: Looking) -> None:
    """Nothing to read: time passes and it stays ready; the minute begins when there is something."""
    assert [] == watchdog.look(10 * STALL_SECONDS)
    assert [] == watchdog.look(5, server_lsn=300)
    assert [] == watchdog.look(STALL_SECONDS - 6, server_lsn=400)


def test_the_slot_moves_again(watchdog: Looking) -> None:
    """Ready again as soon as the slot has moved."""
    watchdog.look(1, server_lsn=300)
    assert [] != watchdog.look(2 * STALL_SECONDS)
    assert [] == watchdog.look(1, confirmed_lsn=150)


def test_it_says_what_the_sink_says(watchdog: Looking) -> None:
    """A sink in trouble is the reason, in its own words."""
    lane = watchdog.pipeline.fan_out.slowest
    lane.trouble = FakeTrouble("sink http answered 500")
    watchdog.look(1, server_lsn=300)
    [reason] = watchdog.look(2 * STALL_SECONDS)
    assert reason.endswith(": sink http answered 500")


@pytest.mark.parametrize(
    ("active_pid", "words"),
    [(4711, "process 4711 decodes a large transaction or hangs"), (None, "no process of it reads the slot")],
)
def test_a_sink_that_nothing_waits_for_is_not_blamed(watchdog: Looking, active_pid: int | None, words: str) -> None:
    """All that was read is written: PostgreSQL is the one to look at, by its process."""
    cast("FakeLane", watchdog.pipeline.fan_out.lanes[0]).waiting = 0
    watchdog.look(1, server_lsn=300, active_pid=active_pid)
    [reason] = watchdog.look(2 * STALL_SECONDS)
    assert reason.endswith(f"200 bytes of WAL wait: PostgreSQL has sent nothing for 45 s, {words}")


def test_a_standby_that_is_away_is_blamed(watchdog: Looking) -> None:
    """PostgreSQL sends nothing that it has not received, and nothing hangs."""
    cast("FakeLane", watchdog.pipeline.fan_out.lanes[0]).waiting = 0
    watchdog.look(1, server_lsn=300, away="standby1")
    [reason] = watchdog.look(2 * STALL_SECONDS)
    assert reason.endswith("process 1 waits for standby1, which synchronized_standby_slots names and no standby reads")


def test_the_sink_that_something_waits_for_is_blamed(watchdog: Looking, pipeline: Pipeline) -> None:
    """Also while its position is ahead of that of a sink which has all that was read."""
    idle, busy = FakeLane(), FakeLane()
    idle.name, idle.waiting, idle.trouble = "redis", 0, FakeTrouble("sink redis is away")
    busy.mark = Mark(Position(90, 1), 100)
    pipeline.fan_out.lanes[:] = [cast("Lane", idle), cast("Lane", busy)]
    watchdog.look(1, server_lsn=300)
    [reason] = watchdog.look(2 * STALL_SECONDS)
    assert reason.endswith(": sink http is the slowest, with 7 events waiting")


def test_a_checkpoint_that_is_not_saved_is_nobody_elses_fault(watchdog: Looking, pipeline: Pipeline) -> None:
    """The sinks have what was read, and PostgreSQL sent it."""
    cast("FakeLane", pipeline.fan_out.lanes[0]).waiting = 0
    pipeline.checkpoint = Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=70, sinks={})
    watchdog.look(1, server_lsn=300)
    [reason] = watchdog.look(2 * STALL_SECONDS)
    assert reason.endswith(": the checkpoint is not saved; the log says why")


def test_a_sink_that_does_not_answer_is_a_reason(watchdog: Looking) -> None:
    """Without an error as well, once it has lasted, and on until it takes something: a timeout is no answer."""
    lane = cast("FakeLane", watchdog.pipeline.fan_out.lanes[0])
    lane.unanswered_for = TROUBLE_SECONDS - 1
    assert [] == watchdog.look()
    lane.unanswered_for = TROUBLE_SECONDS + 2
    assert ["sink http has not answered for 12 s"] == watchdog.look()
    lane.unanswered_for, lane.trouble = 0.0, FakeTrouble("sink http timed out", 1.0)
    assert ["sink http timed out"] == watchdog.look()
    lane.trouble = Trouble()
    assert [] == watchdog.look()
    lane.trouble = FakeTrouble("sink http answered 500", 1.0)
    assert [] == watchdog.look(), "other trouble has its own time"


def test_trouble_is_a_reason_at_once(watchdog: Looking, pipeline: Pipeline) -> None:
    """The pipeline's and the look's own trouble need no minute."""
    pipeline.trouble.message = "held by process 7"
    watchdog.trouble = "no such slot"
    assert ["held by process 7", "no such slot"] == watchdog.look()


def test_a_sink_that_takes_nothing_is_a_reason(watchdog: Looking) -> None:
    """At once where only an operator can help, else when it has lasted; not for a hiccup."""
    lane = cast("FakeLane", watchdog.pipeline.fan_out.lanes[0])
    lane.trouble = FakeTrouble("sink http answered 500", TROUBLE_SECONDS - 1)
    assert [] == watchdog.look()
    lane.trouble = FakeTrouble("sink http answered 500", TROUBLE_SECONDS)
    assert ["sink http answered 500"] == watchdog.look()
    lane.trouble = FakeTrouble("sink http turns us away", needs_operator=True)
    assert ["sink http turns us away"] == watchdog.look()


@pytest.mark.parametrize("wal_status", ["unreserved", "lost"])
def test_a_slot_in_danger_is_not_ready(watchdog: Looking, wal_status: str) -> None:
    """PostgreSQL is about to throw away what the slot needs, or has."""
    [reason] = watchdog.look(wal_status=wal_status)
    assert f"the slot's WAL is {wal_status}" in reason
    assert ("drop-slot" in reason) == (wal_status == "lost")


def test_a_synchronous_standby_is_not_ready(watchdog: Looking, caplog: pytest.LogCaptureFixture) -> None:
    """Commits of every application wait for the slowest sink: nobody would look for that here."""
    [reason] = watchdog.look(commits_wait=True)
    assert "commits in PostgreSQL wait for the sinks" in reason
    watchdog.take_notice()
    assert reason in caplog.text
    assert [] == watchdog.look(commits_wait=False)


@pytest.mark.parametrize(("seconds", "told"), [(10.4, "10 s ahead of"), (-3600.0, "3600 s behind")])
def test_clocks_that_differ_are_not_ready(watchdog: Looking, seconds: float, told: str) -> None:
    """The window in Redis has the last 10 minutes of a clock, and events have the time of another one."""
    problem = f"this machine's clock is {told} that of PostgreSQL: the window in Redis, lags and `--last` go by it"
    assert [f"{problem}. Set both by NTP"] == watchdog.look(clock_ahead_seconds=seconds)
    assert [] == watchdog.look(clock_ahead_seconds=seconds / 1000)


def test_a_sink_that_gets_on_inside_a_long_transaction_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot moves at a transaction's end; until then the slowest sink's rows count."""
    watchdog = Looking(monkeypatch)
    lane = watchdog.pipeline.fan_out.slowest
    assert [] == watchdog.look(server_lsn=200)
    for row in range(2, 6):
        lane.mark = Mark(Position(90, row), 80)
        assert [] == watchdog.look(seconds_later=STALL_SECONDS - 1)
    assert [] != watchdog.look(seconds_later=STALL_SECONDS + 1)


def test_a_stall_is_logged_once_in_a_while(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Every look would fill the log of the night in which it matters."""
    watchdog = Looking(monkeypatch)
    watchdog.look(server_lsn=200)
    for _ in range(12):
        watchdog.look(seconds_later=STALL_SECONDS / 4)
        watchdog.take_notice()
    assert len(caplog.records) == 3


async def test_nothing_that_the_slot_answers_ends_the_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replicator stops without it: a server that refuses for now is trouble, not the end."""
    seen = asyncio.Event()

    async def refuses(*_: object) -> SlotState:
        raise SourceUnusable(problem="permission denied", cure="Give the role its rights")

    async def letters() -> None:
        seen.set()

    monkeypatch.setattr(slots, "look", refuses)
    watchdog = Looking(monkeypatch)
    monkeypatch.setattr(watchdog.pipeline, "letters", SimpleNamespace(look=letters, trouble=Trouble()))
    running = asyncio.create_task(watchdog.run())
    await seen.wait()
    await asyncio.sleep(0)
    assert not running.done()
    assert "permission denied" in watchdog.trouble
    running.cancel()


def test_a_checkpoint_that_fails_is_not_ready(watchdog: Looking, pipeline: Pipeline) -> None:
    """The sinks move on, the slot does not: the save's own words, after a hiccup."""
    pipeline.saving = FakeTrouble("the disk is full", lasting=9.0)
    assert [] == watchdog.look(5.0)
    pipeline.saving = FakeTrouble("the disk is full", lasting=10.0)
    assert ["the disk is full"] == watchdog.look(5.0)


async def test_a_save_that_hangs_is_not_ready(watchdog: Looking) -> None:
    """No error is logged, and nothing else need stand still: longer than a lock may take."""
    saving = asyncio.create_task(asyncio.to_thread(watchdog.answers.store.save, CHECKPOINT))
    await asyncio.to_thread(watchdog.database.asked.wait)
    assert [] == watchdog.look(9.0)
    assert ["the checkpoint database has not answered for 11 s; nothing is confirmed meanwhile"] == watchdog.look(2.0)
    watchdog.database.answers.set()
    await saving
    assert [] == watchdog.look(5.0)


def test_a_checkpoint_database_that_fails_while_nothing_comes_is_not_ready(
    watchdog: Looking, pipeline: Pipeline
) -> None:
    """Nothing is saved then, and it would show only with the next event."""
    pipeline.letters.trouble = FakeTrouble("no such table", lasting=9.0)
    assert [] == watchdog.look(5.0)
    pipeline.letters.trouble = FakeTrouble("no such table", lasting=10.0)
    assert ["no such table"] == watchdog.look(5.0)


def test_sinks_that_move_on_unsaved_are_not_ready(watchdog: Looking, pipeline: Pipeline) -> None:
    """Whatever holds the save up, the sinks' movement hides it from the stall."""
    lane, fake = pipeline.fan_out.lanes[0], cast("FakePipeline", pipeline)
    fake.saves = False
    for number in range(7):
        lane.mark = Mark(Position(91 + number, 1), 81 + number)
        assert [] == watchdog.look(5.0 if number else 0.0, server_lsn=200)
    lane.mark = Mark(Position(200, 1), 190)
    assert ["no checkpoint has been saved for 35 s"] == watchdog.look(5.0)
    fake.saves = True
    assert [] == watchdog.look(5.0)


def test_a_look_that_hangs_is_not_ready(watchdog: Looking) -> None:
    """What was seen half a minute ago says nothing of now."""
    watchdog.now += 29.0
    assert [] == watchdog.reasons()
    watchdog.now += 1.0
    assert ["slot and checkpoint database were last seen 30 s ago"] == watchdog.reasons()


async def test_a_standby_is_not_ready_and_nothing_is_wrong(watchdog: Looking, pipeline: Pipeline) -> None:
    """Whoever reads the slot saves the checkpoint before it confirms: then all is well."""
    fake = cast("FakePipeline", pipeline)
    fake.checkpoint, fake.lanes[:] = None, []
    pipeline.trouble.say(SlotInUse(slot="s", pid=7))
    assert "held by process 7" in watchdog.standby
    assert [] == watchdog.look(confirmed_lsn=80)
    assert "" == await watchdog.foreign_holder()


@pytest.mark.parametrize("behind", [True, False])
async def test_a_standby_for_another_program_is_not_well(watchdog: Looking, pipeline: Pipeline, behind: bool) -> None:
    """The slot moves, and this checkpoint database does not know: what is confirmed there may be in no sink of ours."""
    fake = cast("FakePipeline", pipeline)
    fake.on_disk = structs.replace(CHECKPOINT, end_lsn=99) if behind else None
    watchdog.slot = structs.replace(SLOT, active_pid=7, confirmed_lsn=100)
    found = await watchdog.foreign_holder()
    assert "process 7 reads replication slot s, and the checkpoint database does not follow" in found


def test_a_standby_whose_slot_stands_still_is_not_well(watchdog: Looking, pipeline: Pipeline) -> None:
    """It can't take over from one that hangs: somebody has to be told."""
    fake = cast("FakePipeline", pipeline)
    fake.checkpoint, fake.lanes[:] = None, []
    pipeline.trouble.say(SlotInUse(slot="s", pid=7))
    watchdog.look(1, server_lsn=300)
    [reason] = watchdog.look(2 * STALL_SECONDS)
    assert "the slot has not moved for" in reason


def test_who_has_read_is_no_standby(watchdog: Looking, pipeline: Pipeline) -> None:
    """After a cut PostgreSQL may hold the slot for the process that was cut off: nobody reads."""
    pipeline.trouble.say(SlotInUse(slot="s", pid=7))
    assert "" == watchdog.standby
    [reason] = watchdog.look()
    assert "held by process 7" in reason


def test_a_stream_that_breaks_again_and_again_is_not_ready(watchdog: Looking, pipeline: Pipeline) -> None:
    """Between two breaks nothing is wrong, and there may be nothing to read."""
    source = cast("FakeSource", pipeline.source)
    for breaks in range(3):
        assert [] == watchdog.look(5)
        source.breaks.count = breaks + 1
    assert ["the stream broke 3 times in a minute; the log says why"] == watchdog.look(5)
    assert [] == watchdog.look(STALL_SECONDS)


def test_a_stream_that_comes_no_further_is_not_ready(watchdog: Looking, pipeline: Pipeline) -> None:
    """Connected again and again, and nothing moves; on an idle server there is nothing to come to."""
    pipeline.source.breaks.stuck = "no progress"
    assert ["no progress"] == watchdog.look(5.0, server_lsn=300)
    assert [] == watchdog.look(5.0, server_lsn=100)


def test_an_outage_is_no_restless_stream(watchdog: Looking, pipeline: Pipeline) -> None:
    """However often it was tried: it broke once."""
    pipeline.trouble.failures = 40
    pipeline.source.breaks.count = 1
    assert [] == watchdog.look(5)


def test_a_trouble_is_told_once(watchdog: Looking, pipeline: Pipeline) -> None:
    """The stream and the look at the slot meet the same server."""
    pipeline.trouble.message = watchdog.trouble = "PostgreSQL is not reachable"
    assert ["PostgreSQL is not reachable"] == watchdog.look()


def test_a_paused_sink_is_no_stall(watchdog: Looking, pipeline: Pipeline) -> None:
    """It stands still because somebody wants it to: that is said. What can be read and is not is still a stall."""
    lane = FakeLane()
    lane.name, lane.mark = "clickhouse", Mark(Position(9, 1), 16)
    cast("FakePipeline", pipeline).paused.append(lane)
    pipeline.pauses["clickhouse"] = Pause()
    pipeline.source.received = 300  # type: ignore[misc]  # of the fake
    watchdog.look(1, server_lsn=300)
    assert [] == watchdog.look(2 * STALL_SECONDS)
    said = "sink clickhouse is paused until somebody resumes it; PostgreSQL keeps the WAL after 0/10 for it"
    assert [said] == watchdog.pauses()
    watchdog.look(1, server_lsn=400)
    [reason] = watchdog.look(2 * STALL_SECONDS)
    assert "the slot has not moved" in reason


def test_a_pause_that_loses_the_slot_is_a_reason(watchdog: Looking, pipeline: Pipeline) -> None:
    """At the rate of the moment, before the pause ends; without an end, soon."""
    lost = structs.replace(SLOT, wal_status="lost", restart_lsn=None)
    watchdog.slot = lost
    for until, said in ((None, True), (time.time() + 60, True), (time.time() - 1, False)):
        pipeline.pauses["clickhouse"] = Pause(until=until)
        told = [
            reason
            for reason in watchdog.reasons()
            if "sink clickhouse is paused, and the slot is no longer safe" in reason
        ]
        assert said == bool(told)


def test_tables_that_can_not_be_seen_are_a_reason(watchdog: Looking, pipeline: Pipeline) -> None:
    """The sinks go on, and nothing is confirmed: it is told before anything stands still."""
    pipeline.verification.trouble.say("the tables are locked")
    assert ["the tables are locked"] == watchdog.look()


def test_each_reason_says_what_it_is_about(watchdog: Looking, pipeline: Pipeline) -> None:
    """So that a trouble is known again whatever its words, and its cure has a place of its own."""
    pipeline.fan_out.lanes[0].trouble.say(SinkMisconfigured(sink="http", detail="it answered 401", cure="check it"))
    pipeline.trouble.say(SourceUnavailable(detail="no route"))
    watchdog.slot = structs.replace(SLOT, wal_status="lost")
    stream, sink, wal = watchdog.found()
    assert ("stream", "s", True) == (stream.kind, stream.subject, stream.problem.endswith("no route."))
    assert "retries until it answers" in stream.cure
    assert ("sink", "http", "Check it.") == (sink.kind, sink.subject, sink.cure)
    assert ("wal", "s", True) == (wal.kind, wal.subject, wal.cure.startswith("Raise that setting"))
    assert [stream.text, sink.text, wal.text] == watchdog.reasons()


def test_dead_letters_near_their_bound_are_a_warning(watchdog: Looking, pipeline: Pipeline) -> None:
    """There is time left, so it is ready."""
    letters = cast("Any", pipeline.letters)
    letters.limit, letters.stored = 10, LetterCounts(sinks={"redis": 7, "http": 8})
    [warning] = watchdog.warnings()
    assert ("dead letters", "http") == (warning.kind, warning.subject)
    assert "8 dead letters: at 10 sink http waits until some are replayed or dropped." == warning.problem
    assert "dead-letters list --sink http" in warning.cure
    letters.stored = LetterCounts(rows=9)
    [warning] = watchdog.warnings()
    assert "dead-letters list --stage row" in warning.cure
    assert [] == watchdog.reasons()


async def _turns() -> None:
    """Some turns of the loop, whose clock stands still."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def noticing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Looking]:
    """A watchdog that notices at each turn of the loop, and waits for nothing before it says so."""
    watchdog = Looking(monkeypatch)
    monkeypatch.setattr("replicator.operations.watchdog.NOTICE_SECONDS", 0.0)
    monkeypatch.setitem(PATIENCE_SECONDS, "slot", 0.0)
    task = asyncio.create_task(watchdog.notice())
    yield watchdog
    await cancel([task])


async def test_notices_follow_the_reasons(noticing: Looking) -> None:
    """A trouble that begins and ends; that it starts is no trouble."""
    noticing.pipeline.trouble.message = "starting"
    await asyncio.sleep(0)
    assert ["starting"] == noticing.reasons()
    assert not noticing.notices.ring
    noticing.pipeline.trouble.clear()
    noticing.trouble = "no such slot"
    await _turns()
    [notice] = noticing.notices.ring
    assert ("slot", "no such slot", None) == (notice.kind, notice.text, notice.ended_at)
    noticing.trouble = ""
    await _turns()
    assert notice.ended_at


async def test_the_log_has_every_reason(noticing: Looking, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and its end; a warning as one. What a part has logged itself is not logged again."""
    caplog.set_level("INFO")
    noticing.pipeline.trouble.say("PostgreSQL is away")
    noticing.trouble = "no such slot"
    cast("Any", noticing.pipeline.letters).stored = LetterCounts(sinks={"http": 9})
    await _turns()
    noticing.trouble = ""
    await _turns()
    assert [
        ("ERROR", "PostgreSQL is away", None),
        ("ERROR", "no such slot", "R309"),
        ("WARNING", "9 dead letters: at 10 sink http waits until some are replayed or dropped.", "R513"),
        ("INFO", "over after 0 s: no such slot", "R309"),
    ] == [
        (line.levelname, line.getMessage().partition(" `")[0], getattr(line, "code", None)) for line in caplog.records
    ]


def test_what_was_read_since_the_last_look_is_written_wal(watchdog: Looking, pipeline: Pipeline) -> None:
    """A sink with events in flight is not 0 bytes behind, and nothing is past the server's end."""
    watchdog.look(1, server_lsn=300)
    for received, end in ((80, 300), (400, 400)):
        pipeline.source.received = received  # type: ignore[misc]  # of the fake
        seen = watchdog.slot_now()
        assert seen
        assert end == seen.server_lsn


def test_the_debug_log_has_the_status(watchdog: Looking, caplog: pytest.LogCaptureFixture) -> None:
    """Once a look."""
    caplog.set_level("DEBUG", "replicator.operations.watchdog")
    shown = Status(
        reasons=[],
        replicator=None,
        slot=SlotStatus(name="s"),
        checkpoint=CheckpointStatus(),
        sinks={},
        dead_letters=None,
    )
    watchdog.status = lambda: shown  # type: ignore[method-assign]  # the fake pipeline has less than it shows
    watchdog.look()
    assert '"reasons":[]' in caplog.text
