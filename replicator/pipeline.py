"""The loop from the slot to the sinks, and `commit`: the rule that keeps anything from being lost.

`source/` reads and says where to begin, an `Enricher` makes events, `delivery/` brings them to the sinks. This module
connects them, and it alone saves checkpoints and confirms positions to PostgreSQL.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TypeVar

from msgspec import structs

from replicator.contracts.enricher import Enriched, Enricher
from replicator.contracts.errors import (
    CheckpointBackward,
    CheckpointUnavailable,
    Overtaken,
    SinkResumed,
    SourceUnavailable,
    TablesChanged,
    TablesUnsettled,
    TimelineChanged,
    command,
)
from replicator.contracts.events import Checkpoint, Lsn, Pause, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Sink
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.retry import RETRYABLE, Trouble, retry, wait
from replicator.delivery.tables.catch_up import CatchUp
from replicator.delivery.tables.verification import PAUSE_SECONDS, Verification
from replicator.source.stream import Source
from replicator.source.takeover import Beginning, Takeover, keep_pause
from replicator.source.wal2json import DecodedChunk

LAST_SAVE_SECONDS = 8.0
"""For the checkpoint after the drain: longer than a save waits for a lock, and within the container's grace period. It
also gets what the drain has left of its time: 200,000 changes of `content` take 5 s in PostgreSQL, if it is idle."""

SIGNS_OF_LIFE = 3
"""In the time that PostgreSQL waits for one: a lost message or a busy moment ends no stream."""

STARTING = "starting"
MADE = "made slot %s; %s says how to bring older rows"

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
        self.pauses: dict[str, Pause] = {}
        """Of sinks that get nothing, as they are on disk: nothing that they lack is confirmed."""
        self.trouble = Trouble(message=STARTING)
        """Why nothing is read."""
        self.saving = Trouble()
        """Why no checkpoint is saved."""
        catch_up = CatchUp(self.fan_out, DeadLetters(store, settings, "backfill"), settings.retry_max_seconds)
        self.verification = Verification(enricher, store, self.fan_out, catch_up, self.letters.keep)
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
        self._stopping = False
        self._opened = asyncio.Event()
        self._resumed = asyncio.Event()
        self._pausing = asyncio.Lock()
        self._saved_at = 0.0  # time.monotonic()
        self._stopped_at = math.inf  # likewise

    # -- the rule ------------------------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Sinks, then checkpoint, then PostgreSQL. Nothing else saves a position or confirms one.

        confirmed ≤ checkpoint ≤ min(written by the slowest sink, verified) ≤ received
        """
        if self.checkpoint is None:
            return
        # 1. Sinks: what each of them holds, durably, as far as the tables were seen to be what the stream assumes. The
        #    slowest one counts. If it was removed from the settings, every other one may be past `received`.
        written = {lane.name: self.verification.part(lane) for lane in self.fan_out.every}
        end_lsn = min(self.source.received, *(reached.end_lsn for reached in written.values()))
        # 2. Checkpoint: on disk before PostgreSQL is told. The store refuses to go backward.
        contents, changes = self.enricher.changed(end_lsn)
        if (written, end_lsn, contents) != (self.checkpoint.sinks, self.checkpoint.end_lsn, self.checkpoint.contents):
            committed_at = self.fan_out.committed_at or self.checkpoint.committed_at
            moment = {"committed_at": committed_at, "updated_at": time.time()}
            checkpoint = structs.replace(self.checkpoint, end_lsn=end_lsn, sinks=written, contents=contents, **moment)
            self._offers.append(checkpoint)
            await asyncio.to_thread(self._store.save, checkpoint, changes, self.checkpoint)
            self._saved(checkpoint)
        self.fan_out.saved(self.checkpoint.sinks)
        # 3. PostgreSQL: it may forget everything up to here.
        self.source.send_feedback(flush_lsn=self.checkpoint.end_lsn)

    def _saved(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._saved_at = checkpoint, time.monotonic()
        self._offers.clear()
        self.enricher.saved(checkpoint.end_lsn)

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
        self._stopping = True
        self._stopped_at = time.monotonic()
        self.fan_out.stop()

    async def run(self) -> None:
        """Replicate until `stop`. Raises errors that are not retried, after saving what is written."""
        try:
            while not self._stopping:
                await self._run()
        finally:
            self.source.close()

    async def _run(self) -> None:
        """Until `stop`, or until tables, timeline or pauses have changed: it begins again with what is on disk."""
        work = self._read_forever(), self._commit_forever(), self._feedback_forever(), self._catch_up()
        failure = await self.fan_out.run(*work, self._resume_in_time())
        changed = isinstance(failure, (TablesChanged, TimelineChanged))
        again = changed or isinstance(failure, SinkResumed)
        try:
            await self._finish(verify=not changed, last=not again)
        except CheckpointUnavailable as exc:
            if not again:
                raise
            log.warning("%s", exc)  # what was not saved comes again
        finally:
            if failure and not again:  # it comes first: what the last commit meets after it is its consequence
                raise failure
        if not again:
            self._stopping = True
            return
        log.warning("%s", failure)
        self.trouble.message = str(failure)
        self.saving.clear()  # whoever met it was cancelled
        self.checkpoint = None
        self._offers.clear()
        self._opened.clear()
        self.fan_out.again()

    async def _finish(self, *, verify: bool, last: bool) -> None:
        if verify and self.checkpoint is not None:
            await self.verification.verify_last()
        drained = max(0.0, time.monotonic() - self._stopped_at)
        seconds = LAST_SAVE_SECONDS + max(0.0, self._settings.drain_timeout_seconds - drained)
        try:
            async with asyncio.timeout(seconds):
                if self.checkpoint is not None:
                    await self._beginning.remember()
                await self._commit_unless_overtaken()
                if verify and self.checkpoint is not None:
                    await self.verification.keep(now=True)
        except TimeoutError as exc:  # saved after all or not, it is not confirmed
            raise CheckpointUnavailable(detail=f"no answer for {seconds:.0f} s") from exc
        told = await self.source.finish()
        if last and self.checkpoint is not None:
            saved = format_lsn(self.checkpoint.end_lsn)
            end = "is written and confirmed" if told else "is written and saved, but not confirmed to PostgreSQL"
            log.info("stopped; everything up to %s %s", saved, end, extra={"lsn": saved})

    async def _commit_forever(self) -> None:
        await self._opened.wait()
        longest, copied = self._settings.retry_max_seconds, self.enricher.changed(0).contents
        moved = self.checkpoint is not None and self.checkpoint.contents != copied  # nothing knows of a new copy yet
        while True:
            moved |= await self.fan_out.progress(PAUSE_SECONDS)
            await retry(self._beginning.remember, self.saving, longest)
            await self.verification.verify_in_time()
            if moved and self._worth_saving():
                await retry(self._commit_unless_overtaken, self.saving, longest)
                moved = self.verification.behind()
            await retry(self.verification.keep, self.saving, longest)
            await self.fan_out.checkpoint_wanted(self._settings.checkpoint_interval_seconds)

    async def _catch_up(self) -> None:
        await self._opened.wait()
        await self.verification.catch_up.run()
        await asyncio.Event().wait()  # a task that ends would end them all

    def _worth_saving(self) -> bool:
        """A sink has rows that the checkpoint lacks, or nothing was saved for a feedback interval.

        A save is WAL where the checkpoint is kept in the source's PostgreSQL, and WAL is something new to save.
        """
        saved = self.checkpoint.sinks if self.checkpoint else {}
        idle = all(
            lane.name in saved and lane.mark.position == saved[lane.name].position for lane in self.fan_out.every
        )
        if self.fan_out.awaiting_checkpoint or not idle:
            return True
        return time.monotonic() - self._saved_at >= self._settings.feedback_interval_seconds

    async def _feedback_forever(self) -> None:
        # PostgreSQL asks for it when it needs it, but while nobody reads, nobody hears that.
        while True:
            patience = self.source.patience_seconds / SIGNS_OF_LIFE
            await asyncio.sleep(min(self._settings.feedback_interval_seconds, patience))
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
        taken = await self._beginning.take(fit=self.enricher.fit)
        end_lsn = taken.checkpoint.end_lsn
        if taken.created_slot:
            log.warning(MADE, self._settings.slot, command("init"), extra={"code": "R314"})
        if self.checkpoint is None:
            await self.verification.look(taken.checkpoint)
        else:
            self._stay_on_timeline(self.checkpoint, taken)
            await self._verify_again()
        await self.source.start(end_lsn, self.enricher.tables, self.enricher.shortcut)
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
                    self.fan_out.saved(known.sinks)
                    return
            self._give_up(format_lsn(stored.end_lsn))
        if stored.end_lsn != started_at:
            problem, moved = "the checkpoint moved while the slot changed hands", format_lsn(stored.end_lsn)
            raise SourceUnavailable(problem=problem, detail=moved, cure="`run` starts again from there")
        # Not before: what it loads now has to be as new as the stream's beginning.
        await self.enricher.open(self._store, stored)
        starts = self._beginning.starts(stored)
        await self._beginning.recall()
        async with self._pausing:
            self.pauses = await self._beginning.pauses()
            if len(self.pauses) == len(self._sinks):
                problem, detail = "every sink is paused", "nothing is read"
                raise SourceUnavailable(problem=problem, detail=detail, cure=f"{command('resume SINK')} ends a pause")
            self.fan_out.open(self._sinks, starts, self.pauses)
        for lane in self.fan_out.paused:
            paused = self.pauses[lane.name].describe(lane.name, lane.reached)
            log.warning("%s", paused, extra={"sink": lane.name, "code": "R512"})
        self.verification.open(starts, complete=not self.pauses)
        self.checkpoint = stored
        self._opened.set()

    # -- pauses --------------------------------------------------------------------------------------------------

    async def pause(self, sink: str, pause: Pause) -> None:
        """This sink gets nothing from now on, over restarts too. Raises CheckpointError: then nothing has changed."""
        async with self._pausing:
            await asyncio.to_thread(keep_pause, self._store, self._settings.slot, sink, pause)
            self.pauses[sink] = pause
            log.warning("%s", pause.describe(sink, None), extra={"sink": sink, "code": "R512"})
            if any(lane.name == sink for lane in self.fan_out.lanes):
                self.verification.leave()
                await self.fan_out.pause(sink)

    async def resume(self, sink: str) -> None:
        """It gets everything from where it is. Raises CheckpointError: then it is still paused."""
        async with self._pausing:
            await asyncio.to_thread(keep_pause, self._store, self._settings.slot, sink, None)
            self.pauses.pop(sink, None)
        self._resumed.set()

    async def _resume_in_time(self) -> None:
        """Raise SinkResumed as soon as a pause is over: what the sink lacks has to be read from the slot again."""
        await self._opened.wait()
        while True:
            self._resumed.clear()
            for lane in self.fan_out.paused:
                if lane.name not in self.pauses or self.pauses[lane.name].is_over(time.time()):
                    raise SinkResumed(sink=lane.name)
            await wait(self._resumed, PAUSE_SECONDS)

    def _stay_on_timeline(self, mine: Checkpoint, taken: Takeover) -> None:
        """After a reconnect: the lanes hold what a promoted standby may lack. Raises StreamGap, TimelineChanged."""
        if taken.checkpoint.timeline == mine.timeline:
            return
        held = structs.replace(mine, sinks=mine.sinks | {lane.name: lane.reached for lane in self.fan_out.every})
        structs.replace(taken.found, checkpoint=held).verify()
        raise TimelineChanged(timeline=taken.checkpoint.timeline)

    async def _verify_again(self) -> None:
        """After a reconnect: what the lanes hold was made of the tables as they were. Raises TablesChanged."""
        with suppress(TablesUnsettled):
            await self.verification.verify()

    async def _verify_past(self, lsn: Lsn) -> None:
        """Before rows are refused: it is about them only if the tables are what the stream assumes."""
        if self.verification.lsn < lsn:
            await self.verification.verify()
        if self.verification.lsn < lsn:
            raise SourceUnavailable(detail=f"the server that is asked for the tables is behind {format_lsn(lsn)}")

    async def _carry_chunk(self) -> None:
        chunk = await self.source.read()
        events, refused = await self._enrich(chunk)
        if refused:
            newest = chunk.mark.position.commit_lsn
            await self._retry(lambda: self._verify_past(newest))
            # kept before their position counts; while there is no room for them, nothing is read
            await self._retry(lambda: self.letters.keep(refused))
            self.dead_letters += len(refused)
        self.rows += len(chunk.events) + len(chunk.rows)
        self.fan_out.put(events, chunk.mark)
        await asyncio.sleep(0)  # the lanes' turn: nothing above has to wait while there is plenty to read

    async def _enrich(self, chunk: DecodedChunk) -> Enriched:
        if not chunk.events and not chunk.rows:
            return Enriched([], [])
        return await self._retry(lambda: self.enricher.enrich(chunk.rows, chunk.events))

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        return await retry(call, self.trouble, self._settings.retry_max_seconds)
