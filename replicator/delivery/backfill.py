"""History to the sinks: reads its pages, delivers them as the stream's batches, and saves how far it is.

What `backfill` runs, beside the replicator or without it. Slot and checkpoint are not touched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from math import ceil

import msgspec
from msgspec import structs

from replicator.contracts.enricher import History, Page
from replicator.contracts.errors import CheckpointUnavailable
from replicator.contracts.events import Mark, Position, SinkPosition
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Mode, Sink
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.retry import Trouble, retry

log = logging.getLogger(__name__)

SAVE_INTERVAL_SECONDS = 1.0
"""How much is written again after a kill, at most, beside what was in flight."""
HELD_MB = 44
"""What events waiting for sinks may hold: two of the largest writes. The table keeps the rest better than we do."""


class BackfillProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a backfill is."""

    place: str
    """Where the next page begins; see `stream.History`."""
    events: int
    """Events before it."""
    total: int
    """Events in the whole range, counted when it began."""


class Backfill:
    """One range of history, from `start` to its end. `run` once."""

    def __init__(
        self,
        settings: CoreSettings,
        history: History,
        sinks: Sequence[Sink],
        store: CheckpointStore,
        *,
        task: str,
        start: BackfillProgress,
        page_rows: int,
        rate: float | None,
    ) -> None:
        """`task` is what an interrupted run is found by; `rate` bounds the events a second."""
        self.written = start
        """Every sink has everything before this place."""
        self.rows_refused = 0
        """Rows that no event could be made of."""
        limit_bytes = min(settings.memory_limit_mb, HELD_MB) * 1_000_000
        self._letters = DeadLetters(store, settings, "backfill")
        self.fan_out = FanOut(settings, self._letters, limit_bytes=limit_bytes, mode=Mode.BACKFILL)
        self._settings = settings
        self._history = history
        self._sinks = sinks
        self._store = store
        self._task = task
        self._page_rows = min(page_rows, ceil(rate)) if rate else page_rows  # at most a second's worth at once
        self._rate = rate
        self._reached = start
        self._saved: BackfillProgress | None = None
        self._pages: deque[tuple[Position, BackfillProgress]] = deque()
        self.trouble = Trouble()
        """Why nothing is read."""
        self._enough = False
        self._done = False

    def stop(self) -> None:
        """Read no more, finish the writes in flight, save the place; `run` then returns."""
        self.fan_out.stop()

    def finish(self) -> None:
        """Read no more, write all that was read; `run` then returns."""
        self._enough = True

    async def run(self) -> bool:
        """Write everything. False: `stop` or `finish` came first. Raises what a retry can't help."""
        start = SinkPosition(position=Position(0, 0), end_lsn=0)
        self.fan_out.open(self._sinks, {sink.name: start for sink in self._sinks})
        failure = await self.fan_out.run(self._work(), self._save_forever())
        try:
            await self._save()
        finally:
            if failure:
                raise failure
        if self._done:
            await self._keep(None)  # if it stays, `--resume` finds that nothing is left
        return self._done

    async def _work(self) -> None:
        """Read all pages, and wait until every lane has written them."""
        after, before = Position(0, 0), self._reached.events
        began = due = time.monotonic()
        while not self._enough and (page := await self._read(after)):
            after = page.position
            await self._put(page)
            if self._rate:
                # Measured from the start of this page: lost time is not made up, so the rate stays a hard limit.
                due = max(due, began) + (self._reached.events - before) / self._rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            began, before = time.monotonic(), self._reached.events
        self.fan_out.end()
        while self._pages:
            await self.fan_out.progress()
            self._settle()
        self._done = not self._enough

    async def _read(self, after: Position) -> Page | None:
        await self.fan_out.room()
        place, rows = self._reached.place, self._page_rows
        return await retry(
            lambda: self._history.read(place, after, rows), self.trouble, self._settings.retry_max_seconds
        )

    async def _put(self, page: Page) -> None:
        events, refused = page.enriched
        if refused:
            await retry(lambda: self._letters.keep(refused), self.trouble, self._settings.retry_max_seconds)
            self.rows_refused += len(refused)
        read = self._reached.events + len(events) + len(refused)
        self._reached = structs.replace(self._reached, place=page.place, events=read)
        self._pages.append((page.position, self._reached))
        self.fan_out.put(events, Mark(page.position, page.position.commit_lsn))
        self._settle()
        await asyncio.sleep(0)  # the lanes' turn

    def _settle(self) -> None:
        """Move over the pages that every lane has written."""
        reached = min(lane.mark.position for lane in self.fan_out.lanes)
        while self._pages and self._pages[0][0] <= reached:
            _, self.written = self._pages.popleft()

    async def _save_forever(self) -> None:
        while True:
            await self._save()
            await asyncio.sleep(SAVE_INTERVAL_SECONDS)

    async def _save(self) -> None:
        """Save the place, if that is possible now: without it, more would be written again."""
        self._settle()
        if self.written is self._saved:
            return
        progress = self.written
        if await self._keep(msgspec.json.encode(progress).decode()):
            self._saved = progress

    async def _keep(self, progress: str | None) -> bool:
        try:
            await asyncio.to_thread(self._store.save_progress, self._settings.slot, self._task, progress)
        except CheckpointUnavailable as exc:
            log.error("%s", exc)
            return False
        return True
