"""The rule with fakes: sinks, then checkpoint, then PostgreSQL; what happens when one of them fails; the drain."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from msgspec import structs

from replicator import pipeline as pipelines
from replicator.contracts.enricher import ContentChanges, Enriched, Enricher, History, Page
from replicator.contracts.errors import (
    CheckpointBackward,
    CheckpointUnavailable,
    Overtaken,
    SinkEmptied,
    SinkUnusable,
    SourceUnavailable,
    SourceUnusable,
    StreamGap,
    TablesChanged,
    TablesUnfit,
    TablesUnsettled,
)
from replicator.contracts.events import (
    Checkpoint,
    DeadLetter,
    Event,
    LetterCounts,
    Lsn,
    Mark,
    Pause,
    Position,
    Refusal,
    Row,
    SinkPosition,
)
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Sink
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.tables import verification
from replicator.pipeline import Pipeline
from replicator.source.server import Identity
from replicator.source.slot import SlotState
from replicator.source.stream import Source
from replicator.source.wal2json import DecodedChunk
from sinks.testing import MemorySink
from tests.support.fakes import STATE

START: Lsn = 5
SETTINGS = {
    "slot": "s",
    "checkpoint_interval_seconds": 0.01,
    "retry_max_seconds": 0.01,
    "feedback_interval_seconds": 60,
    "drain_timeout_seconds": 1,
}
FRESH = structs.replace(STATE, restart_lsn=1, confirmed_lsn=START)


class World:
    """A source, an enricher, a store and sinks that write down what happens, in order."""

    def __init__(self, *sinks: str) -> None:
        self.log: list[tuple[str, object]] = []
        self.chunks: asyncio.Queue[DecodedChunk | Exception] = asyncio.Queue()
        self.stored: Checkpoint | None = None
        self.timeline = 1
        self.branch: Lsn = 0
        """Where the second timeline left the first."""
        self.failures: list[Exception] = []
        """What the store's next saves raise."""
        self.lost_answers = 0
        """How many of the next saves succeed and look as if they had not; those after them fail."""
        self.starts: list[Lsn] = []
        self.task: asyncio.Task[None] | None = None
        self.sinks = [NotingSink(name, self) for name in sinks]
        self.verified: Lsn = 1_000
        self.while_looking: list[Lsn] = []
        """What is committed, and reaches the sink, during a look at the tables."""
        """What the enricher says of the tables; it may raise `looks` first."""
        self.looks: list[Exception] = []
        self.missed: History | None = None
        self.records = 0
        """How often what was seen was kept."""
        self.unfit: list[Exception] = []
        """What the enricher's first looks raise."""
        self.look_ups: list[Exception] = []
        """What the enricher's next calls raise."""
        self.store = FakeStore(self)
        fakes = cast("Any", FakeSource(self)), cast("Any", FakeEnricher(self)), self.sinks, cast("Any", self.store)
        settings = CoreSettings.model_validate(SETTINGS)
        self.pipeline = Pipeline(settings, *cast("tuple[Source, Enricher, list[Sink], CheckpointStore]", fakes))

    def commit(self, commit_lsn: Lsn) -> None:
        """A transaction with one row."""
        row = Row("I", "public", "t", commit_lsn=commit_lsn, ordinal=1)
        self.chunks.put_nowait(DecodedChunk([], [row], Mark(Position(commit_lsn, 1), commit_lsn + 1)))

    def commit_both(self, commit_lsn: Lsn, *, refused: bool = False) -> None:
        """A transaction of an event that is made already, and a row behind it."""
        event = Event(commit_lsn, 1, commit_lsn, 1, 0, b"{}")
        row = Row("I", "public", "t", commit_lsn=66 if refused else commit_lsn + 1, ordinal=2)
        self.chunks.put_nowait(DecodedChunk([event], [row], Mark(Position(commit_lsn + 1, 2), commit_lsn + 2)))

    def told(self, what: str) -> list[object]:
        """Everything of one kind that has happened."""
        return [value for kind, value in self.log if kind == what]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        async with asyncio.timeout(10):
            while not condition():
                if self.task is not None and self.task.done():
                    await self.task  # raises what has ended it
                await asyncio.sleep(0.001)

    async def run(self, scene: Callable[[], Awaitable[None]]) -> None:
        """All of it."""
        async with self.running():
            await scene()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The pipeline at work; it is stopped, and has to end, at the end."""
        self.task = asyncio.create_task(self.pipeline.run())
        yield
        self.pipeline.stop()
        await asyncio.wait_for(self.task, 10)


class FakeSource:
    """Gives the world's chunks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.connected = False
        self.confirmed = START
        self.received = START
        self.hears = True
        self.patience_seconds = math.inf

    async def connect(self) -> tuple[Identity, SlotState | None]:
        """Always there."""
        return Identity(system_identifier="7", timeline=self.world.timeline), FRESH

    async def branches(self, _timeline: int) -> dict[int, Lsn]:
        """The standby had received so much."""
        return {1: self.world.branch}

    async def was_read(self) -> bool:
        """By nobody yet."""
        return False

    async def start(self, end_lsn: Lsn, tables: Sequence[tuple[str, str]], shortcut: object) -> None:
        """Notes from where."""
        assert tables == (("public", "t"),)
        assert shortcut == self.world.pipeline.enricher.shortcut
        self.world.starts.append(end_lsn)

    async def read(self) -> DecodedChunk:
        """The next chunk, or trouble."""
        chunk = await self.world.chunks.get()
        if isinstance(chunk, Exception):
            raise chunk
        self.received = max(self.received, chunk.mark.end_lsn)
        return chunk

    def send_feedback(self, flush_lsn: Lsn | None = None, *, ask: bool = False) -> None:
        """Notes a position."""
        assert flush_lsn is not None, ask
        self.world.log.append(("confirm", flush_lsn))

    async def finish(self) -> bool:
        """Notes the goodbye."""
        self.world.log.append(("goodbye", None))
        return self.hears

    def close(self) -> None:
        """Nothing to release."""


class FakeEnricher:
    """An event a row."""

    tables = (("public", "t"),)

    def __init__(self, world: World) -> None:
        self.ignored: dict[str, int] = {}
        self.world = world

    async def fit(self) -> None:
        """They are."""

    async def look(self, record: str | None, after: Lsn, _: object) -> History | None:
        """As the world says."""
        assert record in {None, "seen"}
        assert after >= START
        if self.world.unfit:
            raise self.world.unfit.pop(0)
        return self.world.missed

    async def verify(self) -> Lsn:
        """As the world says."""
        if self.world.looks:
            raise self.world.looks.pop(0)
        verified = self.world.verified
        if self.world.while_looking:
            commit_lsn = self.world.while_looking.pop(0)
            self.world.commit(commit_lsn)
            await self.world.until(lambda: [commit_lsn] in self.world.told("write a"))
        return verified

    def accept(self) -> None:
        """Nothing to do."""

    def record(self) -> str:
        """One word."""
        return "seen"

    async def open(self, *_: object) -> None:
        """Nothing to connect to."""

    def changed(self, _: Lsn) -> ContentChanges:
        """No content is kept."""
        return ContentChanges(None, [])

    def saved(self, end_lsn: Lsn) -> None:
        """Nothing to keep."""

    def shortcut(self) -> None:
        """There is none: the world says what is read."""

    async def enrich(self, rows: Sequence[Row], before: Sequence[Event] = ()) -> Enriched:
        """Rows of commit LSN 66 make no event."""
        if self.world.look_ups:
            raise self.world.look_ups.pop(0)
        good = [Event(row.commit_lsn, row.ordinal, row.commit_lsn, 1, 0, b"{}") for row in rows if row.commit_lsn != 66]
        bad = [
            DeadLetter(sink=None, position=Position(66, 1), event_id=None, reason="no", payload=b"")
            for row in rows
            if row.commit_lsn == 66
        ]
        return Enriched([*before, *good], bad)


class FakeStore:
    """Keeps the last checkpoint."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.kept: dict[str, str | None] = {}

    def create(self) -> list[str]:
        """Nothing to make."""
        return []

    def load(self, slot: str) -> Checkpoint | None:
        """The last one."""
        assert slot == "s"
        return self.world.stored

    def save(self, checkpoint: Checkpoint, *_: object) -> None:
        """Follow the script, then keep it."""
        if self.world.failures:
            self.world.log.append(("save failed", checkpoint.end_lsn))
            raise self.world.failures.pop(0)
        self.world.stored = checkpoint
        self.world.log.append(("save", checkpoint.end_lsn))
        if self.world.lost_answers:
            self.world.lost_answers -= 1
            self.world.failures = [CheckpointUnavailable(detail="away")] * 100_000
            raise CheckpointUnavailable(detail="the answer was lost")

    def load_progress(self, slot: str, task: str) -> str | None:
        """What was kept last."""
        assert slot == "s"
        return self.kept.get(task)

    def save_progress(self, slot: str, task: str, progress: str | None) -> None:
        """Keep it."""
        assert slot == "s"
        self.kept[task] = progress
        self.world.records += task == "tables of 7"

    def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter], _most: int) -> LetterCounts:
        """Notes where they were."""
        self.world.log.append(("dead letter", (slot, letters[0].replay_position.commit_lsn)))
        return LetterCounts()


class NotingSink(MemorySink):
    """Notes in the world what is durable now."""

    def __init__(self, name: str, world: World) -> None:
        super().__init__(name=name)
        self.world = world
        self.memory = ""

    def remember(self) -> str:
        """What the test says."""
        return self.memory

    def recall(self, memory: str) -> None:
        """What was kept."""
        self.memory = memory

    def look(self) -> None:
        """It has lost what it had if it remembers that."""
        if self.memory == "lost":
            raise SinkEmptied(sink=self.name, detail="it is empty", cure="Fill it")

    async def create(self) -> list[str]:
        """Notes it."""
        self.world.log.append(("create", self.name))
        return []

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """Notes what is durable now."""
        refused = await super().write(events)
        self.world.log.append((f"write {self.name}", [event.id for event in events]))
        return refused


async def test_sinks_then_checkpoint_then_postgresql() -> None:
    """For every position, in this order."""
    world = World("a", "b")
    async with world.running():
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
    order = [world.log.index(step) for step in (("save", 11), ("confirm", 11))]
    written = [world.log.index((f"write {name}", [10])) for name in "ab"]
    assert max(written) < order[0] < order[1]


async def test_the_slowest_sink_counts() -> None:
    """No checkpoint and no confirmation passes what it holds; how far the others are is saved."""
    world = World("slow", "fast")
    gate = asyncio.Event()
    world.sinks[0].steps = [gate]
    async with world.running():
        world.commit(10)
        await world.until(lambda: world.stored is not None and world.stored.sinks.get("fast") == at(10))
        await world.until(lambda: bool(world.told("confirm")))
        assert {START} == set(world.told("save")) == set(world.told("confirm"))
        gate.set()
        await world.until(lambda: 11 in world.told("confirm"))


def at(commit_lsn: Lsn) -> SinkPosition:
    """Everything up to this transaction written."""
    return SinkPosition(position=Position(commit_lsn, 1), end_lsn=commit_lsn + 1)


async def test_what_could_not_be_saved_is_not_confirmed_but_tried_again() -> None:
    """The database is full for a while; sinks go on, PostgreSQL keeps everything."""
    world = World("a")
    async with world.running():
        await world.until(lambda: world.pipeline.checkpoint is not None)
        world.failures = [CheckpointUnavailable(detail="the disk is full")] * 3
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
    assert [("save failed", 11)] * 3 == [entry for entry in world.log if entry[0] == "save failed"]
    assert world.log.index(("save", 11)) < world.log.index(("confirm", 11))


async def test_a_first_start_makes_what_the_sinks_need_and_a_second_does_not() -> None:
    """As `init` does; once a sink wrote something, a missing table is an error, not something to make anew."""
    world = World("a", "b")
    world.commit(10)
    async with world.running():
        await world.until(lambda: world.stored is not None and world.stored.end_lsn == 11)
    again = World("a", "b")
    again.stored = world.stored
    async with again.running():
        await again.until(lambda: again.pipeline.checkpoint is not None)
    assert (["a", "b"], []) == (world.told("create"), again.told("create"))


async def test_a_sink_that_can_not_go_on_stops_alone() -> None:
    """Its own position stays, the others write and are saved, nothing is confirmed; mended, it goes on by itself."""
    world = World("broken", "good")
    world.sinks[0].steps = [SinkUnusable(sink="broken", detail="no table", cure="init") for _ in range(10_000)]
    world.commit(10)
    async with world.running():
        await world.until(lambda: world.stored is not None and world.stored.sinks.get("good") == at(10))
        assert "no table" in world.pipeline.fan_out.lanes[0].trouble.message
        assert world.stored is not None
        assert START == world.stored.end_lsn == max(cast("list[int]", world.told("confirm")), default=START)
        world.sinks[0].steps = []
        await world.until(lambda: world.pipeline.fan_out.lanes[0].reached == at(10))


async def test_the_first_failure_is_raised_when_the_drain_fails_too() -> None:
    """The source's error is the cause; that the checkpoint can't be saved either must not hide it."""
    world = World("a")
    world.failures = [CheckpointUnavailable(detail="gone")] * 9
    world.look_ups = [SourceUnusable(problem="no table", cure="Make it")]
    world.commit(10)
    world.commit(20)
    with pytest.raises(SourceUnusable):
        await asyncio.wait_for(world.pipeline.run(), 10)


async def test_a_drain_finishes_what_is_in_flight_and_begins_nothing() -> None:
    """Then it saves, confirms and says goodbye, in this order."""
    world = World("a")
    writing = asyncio.Event()

    async def slow(_: Sequence[Event]) -> None:
        writing.set()
        world.commit(20)
        await asyncio.sleep(0.05)

    world.sinks[0].steps = [slow]
    async with world.running():
        world.commit(10)
        await writing.wait()
    assert [[10]] == world.told("write a")
    assert [("save", 11), ("confirm", 11), ("goodbye", None)] == world.log[-3:]


@pytest.mark.parametrize("hears", [True, False])
async def test_the_last_line_says_whether_postgresql_knows(caplog: pytest.LogCaptureFixture, *, hears: bool) -> None:
    """While it is away, everything is saved and nothing confirmed: it sends that again."""
    caplog.set_level("INFO")
    world = World("a")
    cast("FakeSource", world.pipeline.source).hears = hears
    async with world.running():
        world.commit(10)
        await world.until(lambda: [11] == world.told("confirm")[-1:])
    end = "is written and confirmed" if hears else "is written and saved, but not confirmed to PostgreSQL"
    assert caplog.messages[-1] == f"stopped; everything up to 0/B {end}"


async def test_a_write_that_hangs_does_not_hold_the_drain_for_ever() -> None:
    """Its events count as not written."""
    world = World("a")
    writing = asyncio.Event()

    async def hangs(_: Sequence[Event]) -> None:
        writing.set()
        await asyncio.Event().wait()

    world.sinks[0].steps = [hangs]
    async with world.running():
        world.commit(10)
        await writing.wait()
    assert START == max(cast("list[int]", world.told("confirm")))
    assert ("goodbye", None) == world.log[-1]


async def test_a_row_that_makes_no_event_is_kept_before_its_position_counts() -> None:
    """Durable as a dead letter first."""
    world = World("a")
    async with world.running():
        world.commit(66)
        await world.until(lambda: 67 in world.told("confirm"))
    assert world.log.index(("dead letter", ("s", 66))) < world.log.index(("save", 67))


async def test_a_reconnect_begins_after_the_checkpoint_and_repeats_nothing() -> None:
    """The stream gives the transaction again; the sink has it."""
    world = World("a")
    async with world.running():
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
        world.chunks.put_nowait(SourceUnavailable(detail="cut off"))
        await world.until(lambda: len(world.starts) == 2)
        world.commit(10)
        world.commit(20)
        await world.until(lambda: 21 in world.told("confirm"))
    assert [START, 11] == world.starts
    assert [[10], [20]] == world.told("write a")


async def test_a_reconnect_sees_that_another_one_moved_a_sink_on() -> None:
    """Inside a huge transaction the end stays where it was, and only a sink's position tells."""
    world = World("a")
    ahead = SinkPosition(position=Position(20, 7), end_lsn=11)

    async def is_overtaken() -> None:
        await world.until(lambda: 11 in world.told("confirm"))
        assert world.stored is not None
        world.stored = structs.replace(world.stored, sinks={"a": ahead})
        world.chunks.put_nowait(SourceUnavailable(detail="cut off"))
        await world.until(lambda: False)

    world.commit(10)
    with pytest.raises(Overtaken):
        await world.run(is_overtaken)
    assert [START, 11] == world.starts
    assert world.stored is not None
    assert {"a": ahead} == world.stored.sinks


async def test_a_save_that_would_go_back_ends_the_one_that_was_overtaken() -> None:
    """Another one has moved on and this one has not reconnected yet: it saves and confirms nothing more."""
    world = World("a")

    async def is_overtaken() -> None:
        await world.until(lambda: world.pipeline.checkpoint is not None)
        world.failures = [CheckpointBackward(slot="s", stored="0/99", offered="0/B")]
        world.commit(10)
        await world.until(lambda: False)

    with pytest.raises(Overtaken, match="to 0/99"):
        await world.run(is_overtaken)
    assert [11] == world.told("save failed")
    assert 11 not in world.told("confirm")


@pytest.mark.parametrize("meanwhile", [0, 1], ids=["nothing else is written", "the sink goes on"])
async def test_a_save_whose_answer_is_lost_is_its_own(meanwhile: int) -> None:
    """The database had it: after a reconnect nobody takes it for another replicator's, and the stream goes on.

    Also a lane that waits for the next checkpoint because a crash would repeat too much.
    """
    world = World("a")
    world.sinks[0].max_events, world.sinks[0].max_repeats = 1, 1 + meanwhile
    async with world.running():
        await world.until(lambda: world.pipeline.checkpoint is not None)
        world.lost_answers = 1
        world.commit(10)
        await world.until(lambda: world.stored is not None and 11 == world.stored.end_lsn)
        world.commit(20)
        if meanwhile:
            await world.until(lambda: 21 in world.told("save failed"))
        world.chunks.put_nowait(SourceUnavailable(detail="cut off"))
        await world.until(lambda: 2 == len(world.starts))
        world.failures = []
        world.commit(20)
        world.commit(30)
        await world.until(lambda: 31 in world.told("confirm"))
    assert [START, 11] == world.starts
    assert [[10], [20], [30]] == world.told("write a")


async def test_a_stretch_without_rows_is_saved_at_the_feedback_interval() -> None:
    """Each save may be WAL and so another such stretch. A row is saved at once, and what came before it with it."""
    world = World("a")
    async with world.running():
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
        for end_lsn in range(12, 40):
            world.chunks.put_nowait(DecodedChunk([], [], Mark(Position(10, 1), end_lsn)))
            await asyncio.sleep(0.005)
        assert [START, 11] == world.told("save")
        world.commit(50)
        await world.until(lambda: 51 in world.told("confirm"))
        assert [START, 11, 51] == world.told("save")
        world.pipeline._saved_at -= 60  # noqa: SLF001  the feedback interval
        world.chunks.put_nowait(DecodedChunk([], [], Mark(Position(50, 1), 60)))
        await world.until(lambda: 60 in world.told("confirm"))


async def test_trouble_with_a_look_up_passes() -> None:
    """The same rows are given again, and we are ready again afterwards."""
    world = World("a")
    world.look_ups = [SourceUnavailable(detail="cut off")] * 2
    async with world.running():
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
        assert world.pipeline.trouble.message == ""


async def test_a_stop_before_anything_is_connected_ends_at_once() -> None:
    """While PostgreSQL or the checkpoint database is away: nothing to save, nothing to confirm."""
    world = World("a")
    world.failures = [CheckpointUnavailable(detail="away")] * 100_000
    async with world.running():
        await world.until(lambda: "away" in world.pipeline.trouble.message)
    assert world.told("confirm") == []


async def test_a_lane_that_awaits_a_checkpoint_does_not_wait_for_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the next checkpoint at once, and so goes on however long the pause between two of them is."""
    monkeypatch.setitem(SETTINGS, "checkpoint_interval_seconds", 60)
    world = World("a")
    [sink] = world.sinks
    sink.max_events, sink.max_repeats = 1, 2
    async with world.running():
        for commit_lsn in range(10, 100, 10):
            world.commit(commit_lsn)
        await world.until(lambda: 9 == len(world.told("write a")))
    assert 4 <= len(world.told("save"))


async def test_a_last_save_that_gets_no_answer_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program ends with the reason, and confirms nothing of it."""
    monkeypatch.setattr(pipelines, "LAST_SAVE_SECONDS", 0.2)
    world, answer, asked = World("one"), threading.Event(), threading.Event()

    def save(_: Checkpoint) -> None:
        asked.set()
        answer.wait()

    async with asyncio.timeout(10):
        running = asyncio.create_task(world.pipeline.run())
        await world.until(lambda: bool(world.starts))
        monkeypatch.setattr(FakeStore, "save", lambda _, checkpoint, *__: save(checkpoint))
        world.commit(10)
        await asyncio.to_thread(asked.wait)
        world.pipeline.stop()
        with pytest.raises(CheckpointUnavailable, match=r"no answer for 1 s"):
            await running
        answer.set()
    assert {START} >= {*world.told("confirm")}


async def test_a_slow_last_save_has_the_time_that_the_drain_did_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure of the database, and within the time that a stop may take."""
    monkeypatch.setattr(pipelines, "LAST_SAVE_SECONDS", 0.0)
    world, save = World("one"), FakeStore.save

    def slowly(store: FakeStore, checkpoint: Checkpoint, *others: object) -> None:
        time.sleep(0.1)
        save(store, checkpoint, *others)

    monkeypatch.setattr(FakeStore, "save", slowly)
    async with world.running():
        world.commit(10)
        await world.until(lambda: [10] in world.told("write one"))
    assert 11 in world.told("confirm")


# -- the tables ----------------------------------------------------------------------------------------------------


async def test_nothing_is_saved_or_confirmed_past_what_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink has it; that counts once the tables were seen, past it, to be what the stream assumes."""
    monkeypatch.setattr(verification, "PAUSE_SECONDS", 0.01)
    world = World("a")
    world.verified = 15
    async with world.running():
        world.commit(10)
        world.commit(20)
        await world.until(lambda: [[10], [20]] == world.told("write a") or [[10, 20]] == world.told("write a"))
        await asyncio.sleep(0.1)
        assert 21 not in {*world.told("save"), *world.told("confirm")}
        assert world.stored is not None
        assert at(20) != world.stored.sinks.get("a")
        world.verified = 1_000
        await world.until(lambda: 21 in world.told("confirm"))


async def test_a_sink_that_is_always_past_the_look_counts_as_far_as_it_was_before_it() -> None:
    """Under load every look is over after the sink has gone on: the checkpoint has to move all the same."""
    world = World("a")
    world.verified, world.while_looking = 15, [20]
    async with world.running():
        world.commit(10)
        await world.until(lambda: at(10) == (world.stored and world.stored.sinks.get("a")))
        assert [[10], [20]] == world.told("write a")


async def test_other_tables_begin_the_stream_again_after_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process, with everything that the lanes have written since: the sink sees that again."""
    monkeypatch.setattr(verification, "PAUSE_SECONDS", 0.01)
    world = World("a")
    world.verified = 15
    async with world.running():
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
        world.looks = [TablesChanged(what="t is new")]
        world.commit(20)
        await world.until(lambda: 2 == len(world.starts))
        world.verified = 1_000
        world.commit(20)
        await world.until(lambda: 21 in world.told("confirm"))
    assert [START, 11] == world.starts
    assert [[10], [20], [20]] == world.told("write a")


async def test_after_a_failover_nothing_of_the_old_timeline_is_taken_for_the_new_one() -> None:
    """The sink has more than was saved. Other events may stand there on the new timeline: they are not skipped."""
    world = World("a")
    world.verified = 15  # nothing past it is saved
    async with world.running():
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
        world.commit(20)
        await world.until(lambda: [20] in world.told("write a"))
        world.timeline, world.branch, world.looks = 2, 21, [TablesUnsettled(holder="process 7")] * 100
        world.chunks.put_nowait(SourceUnavailable(detail="failed over"))
        await world.until(lambda: 2 == len(world.starts))
        world.verified, world.looks = 1_000, []
        world.commit(20)
        await world.until(lambda: 21 in world.told("confirm"))
    assert [START, 11] == world.starts
    assert [[10], [20], [20]] == world.told("write a")
    assert world.stored
    assert 2 == world.stored.timeline


@pytest.mark.parametrize("branch", [10, 20])
async def test_a_failover_that_lost_what_a_sink_has_is_a_gap(branch: Lsn) -> None:
    """Whether that was saved or not: an operator has to know, and a restart finds the same."""
    world = World("a")
    world.verified = 15
    task = asyncio.create_task(world.pipeline.run())
    world.commit(10)
    await world.until(lambda: 11 in world.told("confirm"))
    world.commit(20)
    await world.until(lambda: [20] in world.told("write a"))
    world.timeline, world.branch, world.verified = 2, branch, 1_000
    world.chunks.put_nowait(SourceUnavailable(detail="failed over"))
    with pytest.raises(StreamGap, match="no longer in PostgreSQL"):
        await asyncio.wait_for(task, 10)
    assert world.stored
    assert (1, 20) == (world.stored.timeline, world.stored.sinks["a"].position.commit_lsn)


async def test_unfit_tables_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read, the reason is said, and it goes on by itself."""
    monkeypatch.setattr(verification, "PAUSE_SECONDS", 0.01)
    world = World("a")
    world.unfit = [TablesUnfit(problem="t is a view", cure="x")] * 3
    async with world.running():
        world.commit(10)
        await world.until(lambda: "T is a view" in world.pipeline.trouble.message)
        assert [] == world.starts
        await world.until(lambda: 11 in world.told("confirm"))
        assert not world.pipeline.trouble


async def test_a_row_is_refused_only_where_the_tables_are_verified() -> None:
    """Before that it may be their fault: here a transaction changes them, and they are no longer what they were."""
    world = World("a")
    async with world.running():
        await world.until(lambda: world.pipeline.checkpoint is not None)
        await world.until(lambda: world.pipeline.verification.lsn > 0)
        world.pipeline.verification.lsn = 0
        world.looks = [TablesUnsettled(holder="process 7"), TablesChanged(what="t is new")]
        world.commit(66)
        await world.until(lambda: 2 == len(world.starts))
        assert [] == world.told("dead letter")


async def test_finished_events_come_before_rows_and_count_as_they_do() -> None:
    """A look-up that fails is made again: the events wait for it, and come once."""
    world = World("a")
    async with world.running():
        world.look_ups = [SourceUnavailable(detail="away")] * 3
        world.commit_both(10)
        await world.until(lambda: 12 in world.told("confirm"))
        world.chunks.put_nowait(DecodedChunk([Event(20, 1, 20, 1, 0, b"{}")], [], Mark(Position(20, 1), 21)))
        await world.until(lambda: 21 in world.told("confirm"))
    assert [10, 11, 20] == [event for write in world.told("write a") for event in cast("list[int]", write)]
    assert 3 == world.pipeline.rows


async def test_finished_events_wait_for_the_dead_letter_behind_them() -> None:
    """Tables that have changed meanwhile: neither is kept nor written, and the stream begins again."""
    world = World("a")
    async with world.running():
        await world.until(lambda: world.pipeline.verification.lsn > 0)
        world.pipeline.verification.lsn = 0
        world.looks = [TablesUnsettled(holder="process 7"), TablesChanged(what="t is new")]
        world.commit_both(10, refused=True)
        await world.until(lambda: 2 == len(world.starts))
        assert ([], []) == (world.told("dead letter"), world.told("write a"))
        world.commit_both(10)
        await world.until(lambda: 12 in world.told("confirm"))
    assert [10, 11] == [event for write in world.told("write a") for event in cast("list[int]", write)]


async def test_finished_events_of_a_stretch_that_was_given_up_come_again() -> None:
    """Stopped during a look-up: their position does not count, so that the next run reads them."""
    world = World("a")
    world.look_ups = [SourceUnavailable(detail="away")] * 10_000
    async with world.running():
        await world.until(lambda: world.pipeline.checkpoint is not None)
        world.commit_both(10)
        await world.until(lambda: "away" in world.pipeline.trouble.message)
    assert [] == world.told("write a")
    assert world.stored
    assert START == world.stored.end_lsn == world.stored.sinks["a"].end_lsn


class Missed:
    """One page of events that the stream did not show."""

    async def begin(self) -> tuple[str, int]:
        """At the only one."""
        return "first", 0

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        """Two events, later than everything in the stream."""
        assert rows > 1
        assert (place, after) in {("first", Position(0, 0)), ("end", Position(900, 2))}
        if place == "end":
            return None
        events = [Event(900, 1, 1, 1, 0, b"{}"), Event(900, 2, 2, 1, 0, b"{}")]
        return Page(Enriched(events, []), Position(900, 2), "end")

    async def close(self) -> None:
        """Nothing to release."""


class Away(Missed):
    """It can't be read."""

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        """Never."""
        raise SourceUnavailable(detail=f"{rows} rows at {place} after {after}")


async def test_trouble_ends_with_the_stream_that_had_it() -> None:
    """Whoever met it was cancelled when the stream began again, and could not say that it is over."""
    world = World("a")
    world.missed = cast("History", Away())
    async with world.running():
        await world.until(lambda: bool(world.pipeline.verification.catch_up.trouble))
        world.failures = [CheckpointUnavailable(detail="away")] * 100_000
        world.commit(10)
        await world.until(lambda: bool(world.pipeline.saving))
        world.missed, world.timeline, world.branch = None, 2, 1_000
        world.chunks.put_nowait(SourceUnavailable(detail="failed over"))
        await world.until(lambda: 2 == len(world.starts))
        world.failures = []
        world.commit(20)
        await world.until(lambda: 21 in world.told("confirm"))
        assert ("", "") == (world.pipeline.saving.message, world.pipeline.verification.catch_up.reason)


async def test_what_the_stream_missed_comes_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions stay the stream's, and it is remembered as brought only when every sink has it."""
    monkeypatch.setattr(verification, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(verification, "RECORD_SECONDS", 0.0)
    world = World("a", "b")
    world.missed = cast("History", Missed())
    gate = asyncio.Event()
    world.sinks[0].steps = [gate]
    world.sinks[1].max_events = world.sinks[1].max_repeats = 1  # it may repeat one: these are not counted for ever
    async with world.running():
        await world.until(lambda: [[1], [2]] == world.told("write b"))
        world.commit(10)
        await world.until(lambda: world.stored is not None and at(10) == world.stored.sinks.get("b"))
        assert 1 == world.records, "that of the first start"
        gate.set()
        await world.until(lambda: 11 in world.told("confirm") and world.records > 1)
    assert {1, 2, 10} == {event for write in world.told("write a") for event in cast("list[int]", write)}
    assert [[1], [2], [10]] == world.told("write b")


async def test_a_paused_sink_gets_nothing_and_then_everything() -> None:
    """Meanwhile the others go on, and nothing that it lacks is confirmed; then the stream begins where it is."""
    world = World("a", "b")

    async def scene() -> None:
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))
        await world.pipeline.pause("b", Pause())
        world.commit(20)
        await world.until(lambda: [20] in world.told("write a"))
        await world.until(lambda: world.stored is not None and world.stored.sinks["a"].end_lsn == 21)
        assert [[10]] == world.told("write b")
        assert 11 == max(cast("list[int]", world.told("confirm")))
        assert {"b": Pause()} == world.pipeline.pauses
        await world.pipeline.resume("b")
        await world.until(lambda: len(world.starts) == 2)
        world.commit(20)
        await world.until(lambda: 21 in world.told("confirm"))

    await world.run(scene)
    assert [START, 11] == world.starts
    assert [[10], [20]] == world.told("write a") == world.told("write b")


async def test_what_a_sink_remembers_is_kept_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if nothing is written, and one that is paused says that it has lost its data."""
    monkeypatch.setattr("replicator.delivery.lane.LOOK_SECONDS", 0.01)
    world = World("a", "b")
    world.store.kept |= {"remembered: a": "whole", "remembered: b": "lost", "paused: b": "{}"}

    async def scene() -> None:
        await world.until(lambda: world.pipeline.fan_out.lanes != [])
        assert ["whole", "lost"] == [sink.memory for sink in world.sinks]
        [paused] = world.pipeline.fan_out.paused
        assert "has lost what it had" in paused.trouble.message
        world.sinks[0].memory = "lost"
        await world.until(lambda: world.store.kept["remembered: a"] == "lost")
        await world.until(lambda: bool(world.pipeline.fan_out.lanes[0].trouble))
        world.sinks[0].memory = ""
        await world.until(lambda: world.store.kept["remembered: a"] is None)
        world.sinks[0].memory = "at the end"

    await world.run(scene)
    assert "at the end" == world.store.kept["remembered: a"]


async def test_a_sink_that_fails_to_remember_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It may be of another package. It is told once, and the others' memory is kept."""
    world = World("a", "b")
    world.store.kept |= {"remembered: a": "before"}

    def fails(*_: object) -> str:
        raise KeyError("a row")

    world.sinks[0].remember = fails  # type: ignore[method-assign]
    world.sinks[1].memory = "whole"

    async def scene() -> None:
        world.commit(10)
        await world.until(lambda: world.store.kept.get("remembered: b") == "whole" and 11 in world.told("confirm"))

    await world.run(scene)
    assert "before" == world.store.kept["remembered: a"]
    assert 2 == caplog.text.count("sink a can't say what it knows its data by")  # recall and remember
    assert "a row" not in caplog.text


async def test_what_a_paused_sink_waits_for_is_free_again() -> None:
    """A write that hangs is given up after the time of a drain, and what waited holds no memory."""
    world = World("a", "b")
    world.sinks[1].steps.append(asyncio.Event())

    async def scene() -> None:
        world.commit(10)
        await world.until(world.sinks[1].called.is_set)
        world.commit(20)
        await world.until(lambda: [20] in world.told("write a"))
        assert world.pipeline.fan_out.held_bytes
        await world.pipeline.pause("b", Pause())
        assert 0 == world.pipeline.fan_out.held_bytes
        assert START == max(cast("list[int]", world.told("confirm")), default=START)

    await world.run(scene)


async def test_a_pause_that_can_not_be_kept_is_none() -> None:
    """It would end with the process."""
    world = World("a", "b")

    def fail(*_: object) -> None:
        raise CheckpointUnavailable(detail="away")

    async def scene() -> None:
        world.commit(10)
        await world.until(lambda: [10] in world.told("write b"))
        world.store.save_progress = fail  # type: ignore[method-assign, assignment]
        with pytest.raises(CheckpointUnavailable):
            await world.pipeline.pause("b", Pause())
        world.commit(20)
        await world.until(lambda: [20] in world.told("write b"))
        del world.store.save_progress

    await world.run(scene)


async def test_a_pause_ends_by_itself() -> None:
    """Without anybody's help, also one that was kept by a process before."""
    world = World("a", "b")
    soon = time.time() + 0.2
    world.store.kept["paused: b"] = f'{{"until": {soon}}}'

    async def scene() -> None:
        world.commit(10)
        await world.until(lambda: [10] in world.told("write a"))
        assert [] == world.told("write b")
        await world.until(lambda: len(world.starts) == 2)
        assert time.time() >= soon
        world.commit(10)
        await world.until(lambda: 11 in world.told("confirm"))

    await world.run(scene)
    assert [[10]] == world.told("write a") == world.told("write b")


async def test_nothing_is_read_while_every_sink_is_paused() -> None:
    """It says so, and goes on by itself when one is resumed."""
    world = World("a")
    world.store.kept["paused: a"] = "{}"

    async def scene() -> None:
        await world.until(lambda: "Every sink is paused: nothing is read" in world.pipeline.trouble.message)
        await world.pipeline.resume("a")
        world.commit(10)
        await world.until(lambda: [10] in world.told("write a"))

    await world.run(scene)
