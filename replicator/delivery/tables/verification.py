"""How far the tables were seen to be what the stream assumes, and what it could not show because they were not.

An `Enricher` looks. What the sinks hold counts up to the position of the last look (`pipeline.py` has the rule).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from replicator.contracts.enricher import Enricher, Tell
from replicator.contracts.errors import SourceError, TablesChanged
from replicator.contracts.events import Checkpoint, Lsn, Position, SinkPosition
from replicator.contracts.stores import TaskProgress
from replicator.delivery.fan_out import FanOut
from replicator.delivery.lane import Lane
from replicator.delivery.retry import RETRYABLE, Trouble, cancel
from replicator.delivery.tables.catch_up import CatchUp

PAUSE_SECONDS = 1.0
"""Between two looks while events come: three small queries, a thousandth of a core on either side."""
SHARE = 20
"""A look takes at most one part in so many of the time: with a thousand partitions it takes 0.1 s of PostgreSQL's."""
IDLE_SECONDS = 5.0
"""The same while nothing comes: what happened to the tables is told within seconds."""
PATIENCE_SECONDS = 10.0
"""A look may fail this long before it is said: most changes of a table take less."""
LAST_SECONDS = 2.0
"""For the look before the end; without it, what came since the last one comes again after the next start."""
RECORD_SECONDS = 60.0
"""Between two records while events come. An older one only makes a catch-up larger."""

log = logging.getLogger(__name__)


class Verification:
    """Of one stream, and of the one after it."""

    def __init__(self, enricher: Enricher, store: TaskProgress, fan_out: FanOut, catch_up: CatchUp, tell: Tell) -> None:
        """`tell` keeps what is lost in the tables."""
        self.lsn: Lsn = 0
        """Verified up to here."""
        self.trouble = Trouble()
        """Why it has not moved for a while."""
        self.catch_up = catch_up
        self._enricher = enricher
        self._store = store
        self._fan_out = fan_out
        self._tell = tell
        self._looking = asyncio.Lock()  # the reader looks, too, when a row does not fit
        self._looked_at = self._seen_at = self._recorded_at = self._took_seconds = 0.0
        self._counted: dict[str, SinkPosition] = {}
        self._waiting: dict[str, SinkPosition] = {}
        """What a sink had when a look began that has not verified it."""
        self._key = ("", "")
        self._accepted = self._complete = False
        self._recorded: dict[str, Position] | None = None

    @property
    def seconds(self) -> float:
        """How old it is."""
        return time.monotonic() - self._seen_at

    async def look(self, checkpoint: Checkpoint) -> None:
        """See what the tables are, before a stream begins after the checkpoint. Raises TablesUnfit, DeadLettersFull."""
        # Of this cluster: in a restored one all numbers differ, and its gap has other cures.
        self._key = checkpoint.slot, f"tables of {checkpoint.system_identifier}"
        record = await asyncio.to_thread(self._store.load_progress, *self._key)
        try:
            self.catch_up.begin(await self._enricher.look(record, checkpoint.end_lsn, self._tell))
        except SourceError:
            await self._remember(record)
            raise
        await self._remember(record)
        self.lsn, self._looked_at, self._seen_at, self._recorded_at = 0, 0.0, time.monotonic(), 0.0
        self._accepted, self._recorded = False, None

    async def _remember(self, record: str | None) -> None:
        """Keep what a look has found, if that is not on disk yet."""
        if (seen := self._enricher.record()) and seen != record:
            await asyncio.to_thread(self._store.save_progress, *self._key, seen)

    def open(self, starts: Mapping[str, SinkPosition], *, complete: bool) -> None:
        """Where the sinks begin; not `complete`: some are paused, and what is brought now they will not have."""
        self._counted, self._waiting = dict(starts), {}
        self._complete = complete or self.catch_up.done

    def leave(self) -> None:
        """A sink is paused: what is brought now it will not have, so that it is brought again with the next stream."""
        self._complete &= self.catch_up.done

    def covers(self, at: SinkPosition) -> bool:
        """Whether a sink's position is verified."""
        return max(at.position.commit_lsn, at.end_lsn) <= self.lsn

    def part(self, lane: Lane) -> SinkPosition:
        """How far the sink is; while that is not verified, where it was when it was."""
        self._count(lane.name, lane.reached)
        return self._counted[lane.name]

    def _count(self, name: str, at: SinkPosition) -> None:
        known = self._counted[name]
        if self.covers(at) and (at.position, at.end_lsn) >= (known.position, known.end_lsn):
            self._counted[name] = at

    def behind(self) -> bool:
        """Some sink has what is not verified."""
        return not all(self.covers(lane.reached) for lane in self._fan_out.every)

    async def verify(self) -> None:
        """Look now. Raises TablesChanged when the stream has to begin again, RETRYABLE when nobody knows."""
        async with self._looking:
            self._looked_at = time.monotonic()
            # What the sinks have now was in the WAL before the look: under load they are past it when the look is over,
            # or when a later look verifies this one's position.
            reached = {lane.name: lane.reached for lane in self._fan_out.every}
            self._waiting = reached | {name: at for name, at in self._waiting.items() if not self.covers(at)}
            self.lsn = max(self.lsn, await self._enricher.verify())
            for name, now in reached.items():
                if self.covers(before := self._waiting[name]):
                    self._count(name, now if self.covers(now) else before)
                    self._waiting[name] = now
            self._seen_at = time.monotonic()
            self._took_seconds = self._seen_at - self._looked_at
            self.trouble.clear()
            if self.catch_up.done and self._complete:
                self._enricher.accept()
                self._accepted = True

    async def verify_in_time(self) -> None:
        """Look if some sink has what is not verified, but not more often than needed, or if it is time. As `verify`."""
        behind = self.behind() or (self.catch_up.done and self._complete and not self._accepted)
        pause = max(PAUSE_SECONDS, SHARE * self._took_seconds) if behind else IDLE_SECONDS
        if behind and self._fan_out.awaiting_checkpoint:
            pause = self._took_seconds
        if time.monotonic() - self._looked_at < pause:
            return
        try:
            await self.verify()
        except RETRYABLE as exc:
            if self.seconds >= PATIENCE_SECONDS:
                self.trouble.say(exc)

    async def verify_last(self) -> None:
        """Look if some sink has what is not verified, and there is time; never raises for what it sees."""
        if not self.behind():
            return
        looking = asyncio.create_task(self.verify())
        await asyncio.wait({looking}, timeout=LAST_SECONDS)
        await cancel([looking])
        try:
            looking.result()
        except (asyncio.CancelledError, TablesChanged, *RETRYABLE) as exc:
            log.info("the latest events come again after the next start: %s", str(exc) or "no answer in time")

    async def keep(self, *, now: bool = False) -> None:
        """Keep the record if rows came since and it is time, or `now`: by it, changes while nothing runs are found."""
        due = now or time.monotonic() - self._recorded_at >= RECORD_SECONDS
        rows = {name: at.position for name, at in self._counted.items()}
        if due and self._accepted and rows != self._recorded:
            await asyncio.to_thread(self._store.save_progress, *self._key, self._enricher.record())
            self._recorded, self._recorded_at = rows, time.monotonic()
