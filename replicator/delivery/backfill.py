"""From a history's pages through the lanes to the sinks: what `backfill.py` runs, beside the stream or without it.

`lane.py` batches, retries and dead-letters as for the stream. Neither slot nor checkpoint is touched; what is kept
is the place behind which nothing is left to write, so that `--resume` goes on there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from math import ceil

import msgspec
from msgspec import structs

from replicator.contracts.errors import CheckpointUnavailable, SourceUnavailable
from replicator.contracts.events import Batch, DeadLetter, Origin, Position, SinkPosition
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Mode, Sink
from replicator.contracts.stores import CheckpointStore
from replicator.contracts.stream import History, Page
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.lane import Lane, backoff, single, weigh

log = logging.getLogger(__name__)

SAVE_INTERVAL_SECONDS = 1.0
"""How much is written again after a kill, at most, beside what was in flight."""
HELD_MB = 24
"""What events waiting for sinks may hold: two of the largest writes. The table keeps the rest better than we do."""
START = Position(0, 0)


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """How far a backfill is."""

    place: str
    """Where the next page begins; see `stream.History`."""
    events: int
    """Events before it."""
    total: int
    """Events in the whole range, counted when it began."""


class Backfill:
    """One range of history, from `stage` to its end. `run` once."""

    def __init__(
        self,
        settings: CoreSettings,
        history: History,
        sinks: Sequence[Sink],
        store: CheckpointStore,
        *,
        task: str,
        stage: Stage,
        page_rows: int,
        rate: float | None,
    ) -> None:
        self.written = stage
        """Every sink has everything before this place."""
        self.fan_out = FanOut(min(settings.memory_limit_mb, HELD_MB) * 1_000_000)
        self.rows_refused = 0
        """Rows that no event could be made of."""
        self._settings = settings
        self._history = history
        self._store = store
        self._letters = DeadLetters(store, settings)
        self._task = task
        self._page_rows = min(page_rows, ceil(rate)) if rate else page_rows  # at most a second's worth at once
        self._rate = rate
        self._reached = stage
        self._saved: Stage | None = None
        self._pages: deque[tuple[Position, Stage]] = deque()
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()
        self.fan_out.lanes += [self._lane(sink) for sink in sinks]

    def stop(self) -> None:
        """Read no more, finish the writes in flight, save the place; `run` then returns."""
        self._stopping.set()

    async def run(self) -> bool:
        """Write it all; whether that was done, or `stop` came first. Raises what trying again can't mend."""
        failure: BaseException | None = None
        done = False
        try:
            done = await self._run()
        except BaseExceptionGroup as exc:
            failure = single(exc)
        await self._save()
        if failure:
            raise failure
        if done:
            await asyncio.to_thread(self._store.save_progress, self._settings.slot, self._task, None)
        return done

    async def _run(self) -> bool:
        async with asyncio.TaskGroup() as tasks:
            lanes = [tasks.create_task(lane.run()) for lane in self.fan_out.lanes]
            saving = tasks.create_task(self._save_forever())
            work = tasks.create_task(self._work())
            work.add_done_callback(lambda _: self.stop())
            await self._stopping.wait()
            done = work.done()
            work.cancel()
            await self._drain(lanes)
            saving.cancel()
        return done

    def _lane(self, sink: Sink) -> Lane:
        return Lane(
            sink,
            SinkPosition(position=START, end_lsn=0),
            retry_max_seconds=self._settings.retry_max_seconds,
            dead_letter=self._keep,
            on_progress=self._settle,
            on_release=self.fan_out.release,
            mode=Mode.BACKFILL,
        )

    async def _drain(self, lanes: Sequence[asyncio.Task[None]]) -> None:
        for lane in self.fan_out.lanes:
            lane.stop()
        _, late = await asyncio.wait(lanes, timeout=self._settings.drain_timeout_seconds)
        for task in late:
            task.cancel()

    # -- from the history to the lanes ---------------------------------------------------------------------------

    async def _work(self) -> None:
        """Read all pages, and wait until every lane has written them."""
        behind, before = START, self._reached.events
        began = due = time.monotonic()
        while page := await self._read(behind):
            behind = page.position
            await self._put(page)
            if self._rate:
                # From where this page began: time that was lost is not made up for, or the rate would be no limit.
                due = max(due, began) + (self._reached.events - before) / self._rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            began, before = time.monotonic(), self._reached.events
        while self._pages:
            self._settled.clear()
            await self._settled.wait()

    async def _read(self, behind: Position) -> Page | None:
        await self.fan_out.room()
        for attempt in itertools.count():
            try:
                return await self._history.read(self._reached.place, behind, self._page_rows)
            except SourceUnavailable as exc:
                log.warning("%s", exc)
                await asyncio.sleep(backoff(attempt, self._settings.retry_max_seconds))
        raise AssertionError  # count() has no end

    async def _put(self, page: Page) -> None:
        events, refused = page.enriched
        if refused:
            await self._keep(refused)
            self.rows_refused += len(refused)
        read = self._reached.events + len(events) + len(refused)
        self._reached = structs.replace(self._reached, place=page.place, events=read)
        self._pages.append((page.position, self._reached))
        batch = Batch(
            events=events,
            position=page.position,
            end_lsn=page.position.commit_lsn,
            size=weigh(events),
            committed_at=0.0,
        )
        self.fan_out.put(batch)
        await asyncio.sleep(0)  # the lanes' turn

    # -- how far it is -------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Move over the pages that every lane has written."""
        reached = min(lane.done.position for lane in self.fan_out.lanes)
        while self._pages and self._pages[0][0] <= reached:
            _, self.written = self._pages.popleft()
        self._settled.set()

    async def _save_forever(self) -> None:
        while True:
            await self._save()
            await asyncio.sleep(SAVE_INTERVAL_SECONDS)

    async def _save(self) -> None:
        """Keep the place, if that is possible now: without it, more would be written again."""
        stage = self.written
        if stage is self._saved:
            return
        told = msgspec.json.encode(stage).decode()
        try:
            await asyncio.to_thread(self._store.save_progress, self._settings.slot, self._task, told)
        except CheckpointUnavailable as exc:
            log.error("%s", exc)
        else:
            self._saved = stage

    async def _keep(self, letters: Sequence[DeadLetter]) -> None:
        await self._letters.keep([_of_event(letter) for letter in letters])


def _of_event(letter: DeadLetter) -> DeadLetter:
    """The letter without the page's position: its event's id tells it from others.

    So an event is kept once, however often it is backfilled and refused, and replaying it replaces no newer version.
    """
    position = letter.position if letter.event_id is None else None
    return structs.replace(letter, origin=Origin.BACKFILL, position=position)
