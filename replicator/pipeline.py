"""The loop from the slot to the sinks, and `commit`: the rule that nothing is lost by.

`source.py` reads, an `Enricher` makes events, `fan_out.py` carries them; this module connects them, decides where to
begin, and alone tells the checkpoint store and PostgreSQL how far everything is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import NoReturn

from msgspec import structs

from replicator.contracts.errors import (
    CheckpointBackward,
    CheckpointUnavailable,
    DeadLettersFull,
    Overtaken,
    SinkMisconfigured,
    SinkUnavailable,
    SlotInUse,
    SourceUnavailable,
    command,
)
from replicator.contracts.events import Batch, Checkpoint, DeadLetter, Lsn, Position, Row, SinkPosition, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Sink
from replicator.contracts.stores import CheckpointStore
from replicator.contracts.stream import Enriched, Enricher
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.lane import OPERATOR_SECONDS, Lane, backoff, single, wait, weigh
from replicator.source.stream import Source
from replicator.source.takeover import Beginning

log = logging.getLogger(__name__)

STANDBY_SECONDS = 1.0
"""How often a standby asks for the slot."""
COMPLAINT_SECONDS = 30.0
"""Trouble that lasts is told when it begins and then once in this time."""


class Pipeline:
    """One slot, its sinks, its checkpoint. `run` once."""

    def __init__(
        self, settings: CoreSettings, source: Source, enricher: Enricher, sinks: Sequence[Sink], store: CheckpointStore
    ) -> None:
        self.source = source
        self.enricher = enricher
        self.fan_out = FanOut(settings.memory_limit_mb * 1_000_000)
        self.checkpoint: Checkpoint | None = None
        """What is on disk; None until the slot is ours for the first time."""
        self._offers: list[Checkpoint] = []
        """What may be on disk instead: a save fails, too, when only its answer is lost."""
        self.trouble = "starting"
        """Why nothing is read, in words; empty while the stream runs."""
        self.rows = 0
        self.letters = DeadLetters(store, settings)
        self.dead_letters = 0
        """Rows that no event could be made of."""
        self._settings = settings
        self._sinks = sinks
        self._store = store
        self._created = False
        self._complained = 0.0
        self._beginning = Beginning(source, store, settings.slot, sinks)
        self._progress = asyncio.Event()
        self._held_back = asyncio.Event()
        self._stopping = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.Task[None]] = []

    # -- the rule ------------------------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Sinks, then checkpoint, then PostgreSQL. Nothing else saves a position or confirms one.

        confirmed ≤ checkpoint ≤ written by the slowest sink ≤ received
        """
        if self.checkpoint is None:
            return
        # 1. Sinks: what each of them holds, durably; the slowest one counts. All of them may be ahead of the stream
        #    where the one that held it up was taken out.
        written = {lane.name: lane.done for lane in self.fan_out.lanes}
        end_lsn = min(self.source.received, *(done.end_lsn for done in written.values()))
        # 2. Checkpoint: on disk before anybody is told. The store refuses to go backward.
        if (written, end_lsn) != (self.checkpoint.sinks, self.checkpoint.end_lsn):
            known = max(self.checkpoint.committed_at, self.fan_out.committed_at)
            checkpoint = structs.replace(self.checkpoint, end_lsn=end_lsn, sinks=written, committed_at=known)
            self._offers.append(checkpoint)
            await asyncio.to_thread(self._store.save, checkpoint)
            self._saved(checkpoint)
        # 3. PostgreSQL: it may forget everything up to here.
        self.source.send_feedback(flush_lsn=self.checkpoint.end_lsn)

    def _saved(self, checkpoint: Checkpoint) -> None:
        """It is on disk."""
        self.checkpoint = checkpoint
        self._offers.clear()
        self.fan_out.saved(checkpoint.sinks)

    async def _commit_unless_overtaken(self) -> None:
        try:
            await self.commit()
        except CheckpointBackward as exc:
            self._give_up(exc.stored)

    # -- from start to stop --------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain: read no more, finish the writes in flight, save, confirm; `run` then returns."""
        self._stopping.set()

    async def run(self) -> None:
        """Replicate until `stop`. Raises what trying again can't mend, after saving what is written."""
        for work in (self._read_forever(), self._commit_forever(), self._feedback_forever()):
            self._workers.append(self._begin_task(work))
        try:
            await self._stopping.wait()
        finally:
            await _cancel(self._workers)
            try:
                await self._drain()
            finally:
                self._raise_failure()  # it comes first: what a drain meets after it is its consequence

    def _raise_failure(self) -> None:
        for task in (*self._writers, *self._workers):
            if not task.cancelled() and (failure := task.exception()):
                raise single(failure)

    def _begin_task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._stopping.set())  # none of them ends by itself unless it failed
        return task

    async def _drain(self) -> None:
        """Let the writes in flight finish within the bound, commit a last time, say goodbye to PostgreSQL."""
        for lane in self.fan_out.lanes:
            lane.stop()
        if self._writers:
            await asyncio.wait(self._writers, timeout=self._settings.drain_timeout_seconds)
            await _cancel(self._writers)
        try:
            await self._commit_unless_overtaken()
            await self.source.finish()
            if self.checkpoint is not None:
                told = format_lsn(self.source.confirmed)
                log.info("stopped; PostgreSQL was told that everything up to %s is written", told)
        finally:
            self.source.close()

    async def _commit_forever(self) -> None:
        attempt = 0
        while True:
            await self._progress.wait()
            self._progress.clear()
            try:
                async with self._beginning.saving:
                    await self._commit_unless_overtaken()
            except CheckpointUnavailable as exc:  # a full disk, a database that restarts: nothing was confirmed
                log.error("%s", exc)
                self._progress.set()
                attempt += 1
                await asyncio.sleep(backoff(attempt, self._settings.retry_max_seconds))
            else:
                attempt = 0
                await self._pause()

    async def _pause(self) -> None:
        """From one commit to the next; shorter when a lane may write no more before it."""
        self._held_back.clear()
        if not self.fan_out.held_back:
            await wait(self._held_back, self._settings.checkpoint_interval_seconds)

    async def _feedback_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.feedback_interval_seconds)
            self.source.send_feedback(ask=True)

    # -- from the slot to the lanes ------------------------------------------------------------------------------

    async def _read_forever(self) -> None:
        attempt = 0
        while True:
            began = time.monotonic()
            try:
                await self._begin()
                await self._follow()
            except SlotInUse as exc:
                self._say(exc, again=False)  # a standby's ordinary life
                pause = STANDBY_SECONDS
            except (SourceUnavailable, CheckpointUnavailable, SinkUnavailable, SinkMisconfigured) as exc:
                self._say(exc)
                # A stream that breaks as soon as it runs is no better than none.
                attempt = attempt + 1 if time.monotonic() - began < self._settings.retry_max_seconds else 0
                pause = backoff(attempt, self._settings.retry_max_seconds)
            self.source.close()
            await asyncio.sleep(pause)

    def _say(self, exc: Exception, *, again: bool = True) -> None:
        now = time.monotonic()
        if self.trouble != str(exc) or (again and now - self._complained > COMPLAINT_SECONDS):
            log.warning("%s", exc)
            self._complained = now
        self.trouble = str(exc)

    async def _create(self) -> None:
        """The checkpoint's tables; on the very first start also what the sinks need. As `init` does."""
        await asyncio.to_thread(self._store.create)
        if await self._beginning.load() is None:
            for sink in self._sinks:
                for line in await sink.create():
                    log.info("%s", line)
        self._created = True

    async def _begin(self) -> None:
        """Take the slot and start the stream behind the durable checkpoint, if the two fit together."""
        if not self._created:
            await self._create()
        taken = await self._beginning.take()
        end_lsn = taken.checkpoint.end_lsn
        if taken.created_slot:
            log.warning("made slot %s; %s says how to bring older rows", self._settings.slot, command("init"))
        await self.source.start(end_lsn)
        # The slot is ours from here on. Whoever had it may have saved once more before that.
        await self._open(end_lsn, await self._beginning.load() or taken.checkpoint)
        self.trouble = ""
        log.info("reading slot %s from %s", self._settings.slot, format_lsn(end_lsn))

    async def _open(self, started_at: Lsn, stored: Checkpoint) -> None:
        """Open everything behind the source, or, after a reconnect, see that nobody else moved on meanwhile."""
        if self.checkpoint is not None:
            known = (known for known in (self.checkpoint, *self._offers) if _same_place(stored, known))
            if (ours := next(known, None)) is None:
                self._give_up(format_lsn(stored.end_lsn))
            self._saved(ours)
            return
        if stored.end_lsn != started_at:
            raise SourceUnavailable(detail="the checkpoint moved while the slot changed hands")
        await self.enricher.open()  # not before: what it loads has to be as new as the stream's beginning
        self._open_lanes(stored)

    def _give_up(self, stored: str) -> NoReturn:
        """Somebody else moved the checkpoint to `stored`: nothing of ours is saved or confirmed any more."""
        mine, self.checkpoint = self.checkpoint, None
        raise Overtaken(checkpoint=format_lsn(mine.end_lsn) if mine else "nothing", stored=stored)

    def _open_lanes(self, checkpoint: Checkpoint) -> None:
        for sink in self._sinks:
            start = checkpoint.sinks.get(sink.name)
            if start is None:
                log.info(
                    "sink %s is new: it gets what is committed after %s", sink.name, format_lsn(checkpoint.end_lsn)
                )
                start = SinkPosition(position=Position(0, 0), end_lsn=checkpoint.end_lsn)
            lane = Lane(
                sink,
                start,
                retry_max_seconds=self._settings.retry_max_seconds,
                dead_letter=self.letters.keep,
                on_progress=self._progress.set,
                on_release=self.fan_out.release,
                on_held_back=self._held_back.set,
            )
            self.fan_out.lanes.append(lane)
            self._writers.append(self._begin_task(lane.run()))
        self.checkpoint = checkpoint

    async def _follow(self) -> None:
        while True:
            await self.fan_out.room()
            stretch = await self.source.read()
            enriched = await self._enrich(stretch.rows)
            if enriched.refused:
                await self._keep_rows(enriched.refused)
                self.dead_letters += len(enriched.refused)
            self.rows += len(stretch.rows)
            self.fan_out.put(
                Batch(
                    events=enriched.events,
                    position=stretch.position,
                    end_lsn=stretch.end_lsn,
                    size=weigh(enriched.events),
                    committed_at=stretch.committed_at,
                )
            )
            await asyncio.sleep(0)  # the lanes' turn: nothing above has to wait while there is plenty to read

    async def _enrich(self, rows: Sequence[Row]) -> Enriched:
        if not rows:
            return Enriched([], [])
        for attempt in itertools.count():
            try:
                enriched = await self.enricher.enrich(rows)
            except SourceUnavailable as exc:
                self._say(exc)
                await asyncio.sleep(backoff(attempt, self._settings.retry_max_seconds))
            else:
                self.trouble = ""
                return enriched
        raise AssertionError  # count() has no end

    async def _keep_rows(self, letters: Sequence[DeadLetter]) -> None:
        """Keep what no event can be made of; while there is no more room for it, nothing is read."""
        while True:
            try:
                await self.letters.keep(letters)
            except DeadLettersFull as exc:
                self._say(exc)
                await asyncio.sleep(min(OPERATOR_SECONDS, self._settings.retry_max_seconds))
            else:
                self.trouble = ""
                return


def _same_place(one: Checkpoint, other: Checkpoint) -> bool:
    return (one.end_lsn, one.sinks) == (other.end_lsn, other.sinks)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
