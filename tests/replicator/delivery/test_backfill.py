"""Backfill without servers: how far it is, what is kept of it, dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from replicator.contracts.enricher import Enriched, Page
from replicator.contracts.errors import (
    CheckpointUnavailable,
    CheckpointUnusable,
    SinkUnavailable,
    SinkUnusable,
    SourceUnavailable,
)
from replicator.contracts.events import DeadLetter, Event, LetterCounts, Position
from replicator.contracts.settings import CoreSettings, load
from replicator.delivery.backfill import Backfill, BackfillProgress
from sinks.testing import MemorySink

TASK = "backfill test"


class FakeHistory:
    """Pages of ids; the place is the number of the next page."""

    def __init__(self, *pages: list[int], refused: Sequence[DeadLetter] = ()) -> None:
        self.pages = pages
        self.refused = refused
        self.failures: list[Exception] = []
        self.read_places: list[str] = []
        self.page_rows = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.reading = asyncio.Event()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def begin(self) -> tuple[str, int]:
        """The first page."""
        return "0", sum(map(len, self.pages))

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        """The page of this number."""
        self.page_rows = rows
        self.read_places.append(place)
        self.reading.set()
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        if int(place) == len(self.pages):
            return None
        ids = self.pages[int(place)]
        events = [Event(7, after.ordinal + n, id_, 1, 0, b"{}") for n, id_ in enumerate(ids, 1)]
        refused = list(self.refused) if place == "0" else []
        return Page(Enriched(events, refused), Position(7, after.ordinal + len(ids)), str(int(place) + 1))

    async def close(self) -> None:
        """Nothing to release."""


def sink_of(name: str = "fake", failures: Sequence[Exception] = (), unfit: Sequence[int] = ()) -> MemorySink:
    """Takes everything else. Its bound on repeats is of no consequence: a backfill saves no checkpoint."""
    return MemorySink(name=name, max_events=2, max_repeats=2, steps=failures, unfit=unfit)


class Store:
    """The checkpoint store's part that a backfill uses; anything else would be an AttributeError."""

    def __init__(self) -> None:
        self.progress: list[str | None] = []
        self.letters: list[DeadLetter] = []
        self.failure: Exception | None = None

    def save_progress(self, _slot: str, task: str, progress: str | None) -> None:
        """Remember it."""
        assert TASK == task
        if self.failure:
            raise self.failure
        self.progress.append(progress)

    def add_dead_letters(self, _slot: str, letters: Sequence[DeadLetter], _most: int) -> LetterCounts:
        """Remember them."""
        self.letters += letters
        return LetterCounts()


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> CoreSettings:
    """Retries without waiting."""
    monkeypatch.setenv("REPLICATOR_RETRY_MAX_SECONDS", "0.01")
    return load(CoreSettings)


def run_of(
    settings: CoreSettings,
    past: FakeHistory,
    store: Store,
    *sinks: MemorySink,
    place: str = "0",
    rate: float | None = None,
) -> Backfill:
    """A backfill of all that `past` has."""
    start = BackfillProgress(place=place, events=0, total=sum(map(len, past.pages)))
    return Backfill(
        settings,
        past,
        sinks,
        store,  # type: ignore[arg-type]  # only what it may touch
        task=TASK,
        start=start,
        page_rows=100,
        rate=rate,
    )


async def test_everything_arrives_and_nothing_is_left_to_resume(settings: CoreSettings) -> None:
    """Pages of any size, empty ones among them; errors that pass are tried again; the place is forgotten at the end."""
    past, store = FakeHistory([1, 2, 3], [], [4], [], []), Store()
    past.failures = [SourceUnavailable(detail="gone for a moment")]
    one, other = sink_of("one", [SinkUnavailable(sink="one", detail="busy")]), sink_of("other")
    run = run_of(settings, past, store, one, other)
    assert await run.run()
    assert ([1, 2, 3, 4], [1, 2, 3, 4]) == (one.taken, other.taken)
    assert (BackfillProgress(place="5", events=4, total=4), None) == (run.written, store.progress[-1])


async def test_its_end_does_not_linger(settings: CoreSettings) -> None:
    """No more events come that a write could gather."""
    sink = sink_of()
    sink.linger_seconds = 60
    assert await asyncio.wait_for(run_of(settings, FakeHistory([1]), Store(), sink).run(), 10)
    assert [1] == sink.taken


async def test_a_place_that_can_not_be_forgotten_is_no_failure(settings: CoreSettings) -> None:
    """Everything is written."""
    store = Store()

    def refuses(_slot: str, _task: str, progress: str | None) -> None:
        if progress is None:
            raise CheckpointUnavailable(detail="the disk is full")

    store.save_progress = refuses  # type: ignore[assignment, method-assign]  # the end alone fails
    assert await run_of(settings, FakeHistory([1, 2]), store, sink_of()).run()


async def test_an_empty_range_is_done_at_once(settings: CoreSettings) -> None:
    """No page at all."""
    run = run_of(settings, FakeHistory(), Store(), sink_of())
    assert await run.run()
    assert 0 == run.written.events


async def test_the_place_is_after_what_every_sink_has(settings: CoreSettings) -> None:
    """One sink that can't be written to holds the place back, whatever the other has; the error comes out."""
    past, store = FakeHistory([1, 2], [3], [4]), Store()
    broken = sink_of("broken", [SinkUnusable(sink="broken", detail="no table", cure="Make it")])
    fine = sink_of("fine")
    run = run_of(settings, past, store, fine, broken)
    with pytest.raises(SinkUnusable, match="no table"):
        await run.run()
    assert BackfillProgress(place="0", events=0, total=4) == run.written
    kept = store.progress[-1]
    assert kept is not None
    assert run.written == msgspec.json.decode(kept, type=BackfillProgress)


async def test_finish_writes_what_was_read(settings: CoreSettings) -> None:
    """And nothing more is read: it ends between two pages, with no event in flight that would come again."""
    past, sink = FakeHistory([1, 2], [3], [4]), sink_of()
    sink.linger_seconds = 60
    run = run_of(settings, past, Store(), sink, rate=1000)
    past.gate.clear()
    running = asyncio.create_task(run.run())
    await past.reading.wait()
    run.finish()
    past.gate.set()
    assert not await asyncio.wait_for(running, 10)
    assert ([1, 2], BackfillProgress(place="1", events=2, total=4)) == (sink.taken, run.written)
    assert await run_of(settings, past, Store(), sink, place=run.written.place).run()
    assert [1, 2, 3, 4] == sink.taken


async def test_it_goes_on_at_a_place(settings: CoreSettings) -> None:
    """What is before it is neither read nor written."""
    past, sink = FakeHistory([1, 2], [3], [4]), sink_of()
    assert await run_of(settings, past, Store(), sink, place="1").run()
    assert (["1", "2", "3"], [3, 4]) == (past.read_places, sink.taken)


async def test_stopped_it_finishes_what_is_in_flight_and_keeps_the_place(settings: CoreSettings) -> None:
    """`stop` while it waits for a page: what was read is written, and `run` says that it is not all."""
    past, store, sink = FakeHistory([1, 2], [3, 4]), Store(), sink_of()
    run = run_of(settings, past, store, sink)
    running = asyncio.create_task(run.run())
    async with asyncio.timeout(10):
        await sink.called.wait()
        past.gate.clear()
        run.stop()
        assert not await running
    kept = store.progress[-1]
    assert kept is not None
    stage = msgspec.json.decode(kept, type=BackfillProgress)
    assert len(sink.taken) == stage.events == 2 * int(stage.place)


async def test_stopped_while_a_sink_is_away(settings: CoreSettings) -> None:
    """It does not wait for the sink to come back."""
    away = sink_of("away", [SinkUnavailable(sink="away", detail="down")] * 1000)
    run = run_of(settings, FakeHistory([1]), Store(), away)
    running = asyncio.create_task(run.run())
    async with asyncio.timeout(10):
        await away.called.wait()
        run.stop()
        assert not await running


async def test_a_refused_event_is_kept_under_its_id(settings: CoreSettings) -> None:
    """So the store keeps it once over any number of backfills, whatever the position of the page."""
    letter = DeadLetter(sink=None, position=Position(7, 1), event_id=9, reason="no type", payload=b"{}")
    past, store = FakeHistory([1, 2], [3], refused=[letter]), Store()
    run = run_of(settings, past, store, sink_of(unfit=[2]))
    assert await run.run()
    kept = {(kept.sink, kept.origin, kept.position, kept.event_id) for kept in store.letters}
    assert {(None, "backfill", None, 9), ("fake", "backfill", None, 2)} == kept
    assert (1, 4) == (run.rows_refused, run.written.events)


async def test_the_sinks_failure_is_raised_when_the_place_can_not_be_saved_either(settings: CoreSettings) -> None:
    """It is the cause, what the last save meets is not."""
    store, taken, failing = Store(), asyncio.Event(), sink_of()
    taken.set()

    async def breaks(_: Sequence[Event]) -> None:
        store.failure = CheckpointUnusable(problem="it is damaged", cure="")
        raise SinkUnusable(sink="broken", detail="no table", cure="init")

    failing.steps = [taken, breaks]
    with pytest.raises(SinkUnusable):
        await run_of(settings, FakeHistory([1, 2], [3, 4]), store, failing).run()


async def test_it_reads_no_faster_than_the_rate(settings: CoreSettings) -> None:
    """A second's worth of events is the most that is read at once, and then the second is waited for."""
    past = FakeHistory([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert await run_of(settings, past, Store(), sink_of(), rate=50).run()
    assert 50 == past.page_rows
    assert loop.time() - started >= 0.19


async def test_lost_time_is_not_made_up_for(settings: CoreSettings) -> None:
    """After the source was away it goes on at the rate, not at full speed until the average is right again."""
    loop = asyncio.get_running_loop()
    past = FakeHistory(*([n] * 5 for n in range(1, 5)))
    past.gate.clear()
    started = loop.time()
    loop.call_later(0.4, past.gate.set)
    assert await run_of(settings, past, Store(), sink_of(), rate=50).run()
    assert loop.time() - started >= 0.69, "the first page at once, then a tenth of a second each"
