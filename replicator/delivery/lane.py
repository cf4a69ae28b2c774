"""One lane a sink: writes what its queue holds, in order, and knows how far the sink is.

`queue.py` makes the writes, `writer.py` brings them to the sink, `fan_out.py` runs the lanes side by side.

Live, a lane writes what there is. In a backlog it gathers a full write first (`GATHER_SECONDS`), and its end does not
linger: that made the drain of a backlog 18 % faster, and ClickHouse's last rows visible after 0.1 s instead of 0.8.
"""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

from replicator.contracts.events import DeadLetter, Event, Mark, Position, Refusal, SinkPosition, change
from replicator.contracts.sink import Mode, Sink
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.queue import WRITE_MAX_BYTES, Batch, Flow, Queue, Room, Write
from replicator.delivery.retry import Stopped, Trouble, wait
from replicator.delivery.writer import Writer

LATENCY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
"""Upper ends of the latency histogram: from Redis at its best to an hour's backlog."""

GATHER_SECONDS = 0.5
"""In a backlog a lane waits so long for a full write. Redis pays a content once a write, and most of what it pays."""
QUIET_SECONDS = 0.05
"""When nothing came for so long, the backlog is over. On a busy machine the reader itself may pause for 0.02 s."""
LOOK_SECONDS = 5.0
"""How often an idle sink is looked at, in memory: well within what trouble may last before it is a reason."""

Tap: TypeAlias = Callable[[str, Sequence[Event]], None]
"""Is shown events: those of the stream as sink "", then those that each sink has written. It never waits."""


class Shared:
    """What the lanes of one fan-out share."""

    def __init__(
        self, letters: DeadLetters, mode: Mode, limit_bytes: int, retry_max_seconds: float, taps: Sequence[Tap] = ()
    ) -> None:
        self.letters = letters
        self.mode = mode
        self.retry_max_seconds = retry_max_seconds
        self.taps = taps
        self.progress = asyncio.Event()
        """Some lane has moved on."""
        self.checkpoint_wanted = asyncio.Event()
        """Some lane may not write before the next checkpoint."""
        self.room = asyncio.Event()
        """Batches hold less than the limit."""
        self.flow = Flow()
        # One in flight and one that gathers have room: reader and lane never wait for each other.
        self.write_max_bytes = min(WRITE_MAX_BYTES, limit_bytes // 2)
        self.held_bytes = 0
        self._limit_bytes = limit_bytes
        self.hold(0)

    def hold(self, size: int) -> None:
        """So many bytes more, or less."""
        self.held_bytes += size
        if self.held_bytes < self._limit_bytes:
            self.room.set()
        else:
            self.room.clear()

    def release(self, batch: Batch) -> None:
        """One lane is done with it; its memory is free once all are."""
        batch.holders -= 1
        if not batch.holders:
            self.hold(-batch.size)


class LaneStats:
    """What happened in a lane since the program began; only ever grows. Metrics and `status` read it."""

    def __init__(self) -> None:
        self.events = 0
        self.writes = 0
        self.dead_letters = 0
        self.latency_counts = [0] * (len(LATENCY_BUCKETS_SECONDS) + 1)
        """Batches by seconds from commit to written; the last is for all that took longer."""
        self.latency_sum_seconds = 0.0

    def count(self, batch: Batch) -> None:
        """A batch is written."""
        if batch.mark.committed_at:
            seconds = max(0.0, time.time() - batch.mark.committed_at)
            self.latency_counts[bisect_left(LATENCY_BUCKETS_SECONDS, seconds)] += 1
            self.latency_sum_seconds += seconds


class RepeatBudget:
    """Limits how many events a crash makes a sink see again.

    Those are the ones written after its position in the saved checkpoint.
    """

    def __init__(self, limit: int | None, most_at_once: int) -> None:
        self._allowed = None if limit is None else limit - most_at_once
        self._events = 0
        self._written: deque[tuple[Position, int]] = deque()

    @property
    def spent(self) -> bool:
        """One more write could take it past its limit."""
        return self._allowed is not None and self._events > self._allowed

    def begin(self, events: int) -> None:
        """So many go to the sink."""
        self._events += events

    def written(self, position: Position, events: int) -> None:
        """The sink has so many more of them; up to this position it has all."""
        if self._allowed is not None:
            self._written.append((position, events))

    def saved(self, position: Position) -> None:
        """The checkpoint on disk has this position of the sink."""
        while self._written and self._written[0][0] <= position:
            self._events -= self._written.popleft()[1]


class Lane:
    """Carries batches to one sink; independent of every other lane."""

    def __init__(self, sink: Sink, start: SinkPosition, shared: Shared, stats: LaneStats | None = None) -> None:
        self.sink = sink
        self.name = sink.name
        self.stream = sink.stream.name
        """Whose events it takes."""
        self.mark = Mark(start.position, start.end_lsn)
        """How far the sink is."""
        self.stats = stats or LaneStats()
        self.trouble = Trouble(over=self._over, sink=sink.name)
        self.queue = Queue(self.mark)
        self._start = start if start.position > Position(0, 0) else None
        self._shared = shared
        # A backfill saves no position of a sink: no checkpoint would ever renew the budget.
        self._budget = RepeatBudget(sink.max_repeats if shared.mode is Mode.LIVE else None, sink.max_events)
        self._in_flight: deque[Write] = deque()
        self._was_full = False  # the newest write: what waits is the rest of a backlog, or more of it
        self._ended = False
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._writer = Writer(
            sink,
            Room(sink.name, sink.max_events, shared.write_max_bytes),
            self.trouble,
            self._stopping,
            mode=shared.mode,
            longest=shared.retry_max_seconds,
            scout=self._any,
        )

    @property
    def room(self) -> Room:
        """How large one write may be at present."""
        return self._writer.room

    @property
    def reached(self) -> SinkPosition:
        """How far the sink is, as the checkpoint keeps it."""
        return SinkPosition(position=self.mark.position, end_lsn=self.mark.end_lsn)

    @property
    def waiting(self) -> int:
        """Events that are queued or in flight."""
        return self.queue.events + self.in_flight

    @property
    def in_flight(self) -> int:
        """Events that are on their way to the sink, or that it has before others that it lacks."""
        return sum(len(write.events) for write in self._in_flight)

    @property
    def writing(self) -> bool:
        """A write is in flight: a stop waits for it."""
        return bool(self._in_flight)

    @property
    def awaiting_checkpoint(self) -> bool:
        """It may not write before `saved` has moved on."""
        return self._budget.spent

    @property
    def _occupied(self) -> bool:
        """It may not begin a write, however much waits."""
        return len(self._in_flight) >= self.sink.concurrency or self._budget.spent

    def unanswered_seconds(self) -> float:
        """How long what the sink was asked first has gone without an answer; 0.0 when there is nothing."""
        asked = [at for at in (self._writer.opening_since, *(write.asked_at for write in self._in_flight)) if at]
        return time.monotonic() - min(asked) if asked else 0.0

    def lag_seconds(self) -> float:
        """How long ago the oldest batch that is not written was committed; 0.0 when there is none."""
        since = self._in_flight[0].since if self._in_flight else self.queue.since()
        return max(0.0, time.time() - since) if since else 0.0

    def saved(self, position: Position) -> None:
        """The checkpoint on disk has this position of the sink."""
        self._budget.saved(position)
        self._changed.set()

    def put(self, batch: Batch) -> None:
        """Queue a batch; what the sink has, after a restart or a reconnect, is left out by its position."""
        waiting = self.queue.events
        if self.queue.put(batch):
            # The first one sets the alarm, and the one that fills a write rings it: to wake the lane costs 20 µs.
            if not waiting or (self.queue.full(self.room) and not self._occupied):
                self._changed.set()
            return
        self._shared.release(batch)
        # Nothing to write: the mark moves with what is queued (`queue.put` has done that), in flight, or at once.
        if not self.queue.events:
            if self._in_flight:
                self._in_flight[-1].mark = self.queue.end
            else:
                self._move(self.queue.end)

    async def run(self) -> None:
        """Write until stopped. What a destination says ends only a backfill's lane.

        A write's error comes in the ExceptionGroup of a TaskGroup, which `FanOut.run` takes off.
        """
        with suppress(Stopped):
            await self._writer.open(self._start)
            async with asyncio.TaskGroup() as writes:
                while await self._ready():
                    self._was_full = self.queue.full(self.room)
                    write = self.queue.take(self.room)
                    self._in_flight.append(write)
                    self._budget.begin(len(write.events))
                    if self.awaiting_checkpoint:
                        self._shared.checkpoint_wanted.set()
                    writes.create_task(self._carry(write))

    def end(self) -> None:
        """Nothing more comes: wait for nothing."""
        self._ended = True
        self._changed.set()

    def stop(self) -> None:
        """Begin no further writes; `run` returns when those in flight are done."""
        self._stopping.set()
        self._changed.set()

    def leave(self) -> None:
        """Stop, and give up what no write has taken: the sink is paused, and gets it from the stream later."""
        self.stop()
        for batch in self.queue.clear():
            self._shared.release(batch)

    async def left(self) -> None:
        """Its writes have ended: give up those that were not done, and leave the destination alone."""
        for write in self._in_flight:
            for batch in write.finished:
                self._shared.release(batch)
        self._in_flight.clear()
        self.trouble.clear()
        if lost := self._writer.lost:  # a pause does not bring it back
            self.trouble.say(lost)
        await self._writer.close()

    def look(self) -> None:
        """Tell what its sink has to say of itself."""
        self._writer.look()

    def hurry(self) -> bool:
        """Try again at once; whether it waits for its next try."""
        if waits := bool(self.trouble) and not self._stopping.is_set():
            self._stopping.set()  # whoever waits wakes up, and then sees that it is no stop
            self._stopping.clear()
        return waits

    async def _ready(self) -> bool:
        """Wait until the next write should begin; False when stopped."""
        while not self._stopping.is_set():
            self._writer.look()
            self._changed.clear()
            patience = self._patience()
            if patience == 0:
                return True
            await wait(self._changed, LOOK_SECONDS if patience is None else patience)
        return False

    def _patience(self) -> float | None:
        """Seconds until a write is due; None while only a change can make one due."""
        if not self.queue.events or self._occupied:
            return None
        if self._ended or self.queue.full(self.room):
            return 0.0
        waited, quiet = self.queue.waited_seconds(), self._shared.flow.quiet_seconds()
        patience = self.sink.linger_seconds - waited
        if self._shared.flow.backlog():
            patience = max(patience, min(GATHER_SECONDS - waited, QUIET_SECONDS - quiet))
        if self._was_full:  # at most one small write for each full one
            patience = min(patience, QUIET_SECONDS - quiet)
        return max(patience, 0.0)

    async def _carry(self, write: Write) -> None:
        with suppress(Stopped):
            refusals = await self._writer.write(write)
            if refusals:
                letters = [_dead_letter(self.sink, refusal) for refusal in refusals]
                details = [refusal.detail for refusal in refusals]
                await self._writer.retry(lambda: self._shared.letters.keep(letters, details))
                self.stats.dead_letters += len(letters)
            self.stats.writes += 1
            self.stats.events += len(write.events)
            write.done = True
            for tap in self._shared.taps:
                tap(self.name, write.events)
            self._settle()

    def _any(self) -> list[Event]:
        """An event that the sink lacks; only called while there is one."""
        return self.queue.any() or [random.choice(random.choice(self._in_flight).events)]  # noqa: S311  not a secret

    def _over(self, seconds: float) -> str:
        return f"sink {self.name} takes events again after {seconds:.0f} s; {self.waiting} wait"

    def _settle(self) -> None:
        """Move over all writes that are done and have none undone before them."""
        while self._in_flight and self._in_flight[0].done:
            write = self._in_flight.popleft()
            self._move(write.mark)
            self._budget.written(write.mark.position, len(write.events))
            for batch in write.finished:
                self.stats.count(batch)
                self._shared.release(batch)
        self._changed.set()

    def _move(self, mark: Mark) -> None:
        if mark.position < self.mark.position:
            raise ValueError(f"lane {self.name} would go back from {self.mark.position} to {mark.position}")
        self.mark = self.mark.later(mark)
        self._shared.progress.set()


def _dead_letter(sink: Sink, refusal: Refusal) -> DeadLetter:
    event = refusal.event
    return DeadLetter(
        sink=sink.name,
        position=Position(event.commit_lsn, event.ordinal),
        event_id=event.id,
        reason=refusal.reason,
        payload=change(event) if sink.stream.follows else event.json,
    )
