"""The loop from the slot to the sinks, and `commit`: the rule that keeps anything from being lost.

`source/` reads and says where to begin, an `Enricher` makes events, `delivery/` brings them to the sinks. This module
connects them, and it alone saves checkpoints and confirms positions to PostgreSQL.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TypeVar

from msgspec import structs

from replicator.contracts.errors import CheckpointBackward, CheckpointUnavailable, Overtaken, SourceUnavailable, command
from replicator.contracts.events import Checkpoint, Lsn, Row, SinkPosition, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Sink
from replicator.contracts.stores import CheckpointStore
from replicator.contracts.stream import Enriched, Enricher
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.retry import RETRYABLE, Trouble, retry
from replicator.source.stream import Source
from replicator.source.takeover import Beginning

LAST_SAVE_SECONDS = 8.0
"""For the checkpoint after the drain: longer than a save waits for a lock, and within the container's grace period."""

PAUSED = "sink %s is paused (REPLICATOR_PAUSED_SINKS): PostgreSQL keeps the WAL after %s for it"

log = logging.getLogger(__name__)

T = TypeVar("T")


class Pipeline:
    """One slot, its sinks, its checkpoint. `run` once."""

    def __init__(
        self, settings: CoreSettings, source: Source, enricher: Enricher, sinks: Sequence[Sink], store: CheckpointStore
    ) -> None:
        self.source = source
        self.enricher = enricher
        self.letters = DeadLetters(store, settings)
        self.fan_out = FanOut(settings, self.letters, limit_bytes=settings.memory_limit_mb * 1_000_000)
        self.checkpoint: Checkpoint | None = None
        """What is on disk; None until the slot is taken for the first time, and once another replicator has it."""
        self.paused: dict[str, SinkPosition] = {}
        """Sinks that get nothing, each where it is: nothing past it is confirmed."""
        self.trouble = Trouble(message="starting")
        """Why nothing is read."""
        self.saving = Trouble()
        """Why no checkpoint is saved."""
        self.rows = 0
        """Read from the slot."""
        self.dead_letters = 0
        """Rows that no event could be made of."""
        # Checkpoints whose save failed. One may be on disk: perhaps only the answer was lost. There is one for each
        # failed try, and tries are up to `retry_max_seconds` apart: a day makes some thousands, a few MB.
        self._offers: list[Checkpoint] = []
        self._settings = settings
        self._sinks = sinks
        self._store = store
        self._beginning = Beginning(source, store, settings.slot, sinks, self.trouble.say)
        self._created = False
        self._saved_at = 0.0  # time.monotonic()

    # -- the rule ------------------------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Sinks, then checkpoint, then PostgreSQL. Nothing else saves a position or confirms one.

        confirmed ≤ checkpoint ≤ written by the slowest sink ≤ received
        """
        if self.checkpoint is None:
            return
        # 1. Sinks: what each of them holds, durably; the slowest one counts. If the slowest sink was removed from the
        #    settings, every other sink may be ahead of `received`.
        written = self.paused | {lane.name: lane.reached for lane in self.fan_out.lanes}
        end_lsn = min(self.source.received, *(reached.end_lsn for reached in written.values()))
        # 2. Checkpoint: on disk before PostgreSQL is told. The store refuses to go backward.
        if (written, end_lsn) != (self.checkpoint.sinks, self.checkpoint.end_lsn):
            committed_at = max(self.checkpoint.committed_at, 0.0 if self.paused else self.fan_out.committed_at)
            checkpoint = structs.replace(self.checkpoint, end_lsn=end_lsn, sinks=written, committed_at=committed_at)
            self._offers.append(checkpoint)
            await asyncio.to_thread(self._store.save, checkpoint)
            self._saved(checkpoint)
        # 3. PostgreSQL: it may forget everything up to here.
        self.source.send_feedback(flush_lsn=self.checkpoint.end_lsn)

    def _saved(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._saved_at = checkpoint, time.monotonic()
        self._offers.clear()
        self.fan_out.saved(checkpoint.sinks)

    async def _commit_unless_overtaken(self) -> None:
        async with self._beginning.saving:
            try:
                await self.commit()
            except CheckpointBackward as exc:
                self._give_up(exc.stored)

    def _give_up(self, stored: str) -> NoReturn:
        """Another replicator moved the checkpoint to `stored`: this one saves and confirms nothing more."""
        mine, self.checkpoint = self.checkpoint, None
        raise Overtaken(checkpoint=format_lsn(mine.end_lsn) if mine else "nothing", stored=stored)

    async def stored(self) -> Checkpoint | None:
        """What is on disk now: a standby's is its predecessor's. Raises CheckpointError."""
        return await self._beginning.load()

    # -- from start to stop --------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain: read no more, finish the writes in flight, save, confirm; `run` then returns."""
        self.fan_out.stop()

    async def run(self) -> None:
        """Replicate until `stop`. Raises errors that are not retried, after saving what is written."""
        try:
            failure = await self.fan_out.run(self._read_forever(), self._commit_forever(), self._feedback_forever())
            try:
                await self._finish()
            finally:
                if failure:  # it comes first: what the last commit meets after it is its consequence
                    raise failure
        finally:
            self.source.close()

    async def _finish(self) -> None:
        try:
            async with asyncio.timeout(LAST_SAVE_SECONDS):
                await self._commit_unless_overtaken()
        except TimeoutError as exc:  # saved after all or not, it is not confirmed
            raise CheckpointUnavailable(detail=f"no answer for {LAST_SAVE_SECONDS:.0f} s") from exc
        await self.source.finish()
        if self.checkpoint is not None:
            confirmed = format_lsn(self.source.confirmed)
            log.info("stopped; everything up to %s is written and confirmed", confirmed, extra={"lsn": confirmed})

    async def _commit_forever(self) -> None:
        while True:
            await self.fan_out.progress()
            while not self._worth_saving():
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.checkpoint_interval_seconds):
                        await self.fan_out.progress()
            await retry(self._commit_unless_overtaken, self.saving, self._settings.retry_max_seconds)
            await self.fan_out.checkpoint_wanted(self._settings.checkpoint_interval_seconds)

    def _worth_saving(self) -> bool:
        """A sink has rows that the checkpoint lacks, or nothing was saved for a feedback interval.

        A save is WAL where the checkpoint is kept in the source's PostgreSQL, and WAL is something new to save.
        """
        saved = self.checkpoint.sinks if self.checkpoint else {}
        idle = all(
            lane.name in saved and lane.mark.position == saved[lane.name].position for lane in self.fan_out.lanes
        )
        return not idle or time.monotonic() - self._saved_at >= self._settings.feedback_interval_seconds

    async def _feedback_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.feedback_interval_seconds)
            self.source.send_feedback(ask=True)

    # -- from the slot to the lanes ------------------------------------------------------------------------------

    async def _read_forever(self) -> None:
        # A stream that breaks as soon as it runs is no better than none: only a longer one makes the pauses short.
        longest = self._settings.retry_max_seconds
        await retry(self._read, self.trouble, longest, fresh_after=longest)

    async def _read(self) -> None:
        try:
            await self._begin()
            while True:
                await self.fan_out.room()
                await self._carry_chunk()
        except RETRYABLE:
            self.source.close()
            raise

    async def _begin(self) -> None:
        """Take the slot and start the stream after the durable checkpoint, if the two fit together."""
        if not self._created:
            await asyncio.to_thread(self._store.create)
            self._created = True
        taken = await self._beginning.take()
        end_lsn = taken.checkpoint.end_lsn
        if taken.created_slot:
            log.warning("made slot %s; %s says how to bring older rows", self._settings.slot, command("init"))
        await self.source.start(end_lsn)
        # From here on no other replicator reads the slot. The former reader may have saved once more before that.
        stored = await self._beginning.load() or taken.checkpoint
        await self._open(end_lsn, structs.replace(stored, timeline=taken.checkpoint.timeline))
        self.trouble.clear()
        at = format_lsn(end_lsn)
        log.info("reading slot %s from %s", self._settings.slot, at, extra={"lsn": at})

    async def _open(self, started_at: Lsn, stored: Checkpoint) -> None:
        """Open enricher and lanes; after a reconnect, check that no other replicator has moved the checkpoint."""
        if self.checkpoint is not None:
            for known in (self.checkpoint, *self._offers):
                if (known.end_lsn, known.sinks) == (stored.end_lsn, stored.sinks):
                    self._saved(structs.replace(known, timeline=stored.timeline))
                    return
            self._give_up(format_lsn(stored.end_lsn))
        if stored.end_lsn != started_at:
            problem, moved = "the checkpoint moved while the slot changed hands", format_lsn(stored.end_lsn)
            raise SourceUnavailable(problem=problem, detail=moved, cure="`run` begins again from there")
        await self.enricher.open()  # not before: what it loads has to be as new as the stream's beginning
        starts = self._beginning.starts(stored)
        self.paused = {name: starts[name] for name in self._settings.paused_sinks}
        for name, at in self.paused.items():
            log.warning(PAUSED, name, format_lsn(at.end_lsn), extra={"sink": name})
        self.fan_out.open([sink for sink in self._sinks if sink.name not in self.paused], starts)
        self.checkpoint = stored

    async def _carry_chunk(self) -> None:
        chunk = await self.source.read()
        events, refused = await self._enrich(chunk.rows)
        if refused:  # kept before their position counts; while there is no room for them, nothing is read
            await self._retry(lambda: self.letters.keep(refused))
            self.dead_letters += len(refused)
        self.rows += len(chunk.rows)
        self.fan_out.put(events, chunk.mark)
        await asyncio.sleep(0)  # the lanes' turn: nothing above has to wait while there is plenty to read

    async def _enrich(self, rows: Sequence[Row]) -> Enriched:
        return await self._retry(lambda: self.enricher.enrich(rows)) if rows else Enriched([], [])

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        return await retry(call, self.trouble, self._settings.retry_max_seconds)
