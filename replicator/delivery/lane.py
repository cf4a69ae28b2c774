"""One lane a sink: its queue, linger, retries, dead letters, and how far it is.

`fan_out.py` puts every batch into all lanes, `pipeline.py` reads their `done` positions; a sink (protocols.py) only
writes.
What an error means is the sink's to say, what to do about it is decided here: SinkUnavailable is tried again with full
jitter, SinkMisconfigured and DeadLettersFull slowly and loudly, everything else stops the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from replicator.contracts.errors import DeadLettersFull, SinkError, SinkMisconfigured, SinkUnavailable
from replicator.contracts.events import Batch, DeadLetter, Event, Lsn, Position, Refusal, SinkPosition, format_lsn
from replicator.contracts.sink import Mode, Sink

log = logging.getLogger(__name__)

RETRY_BASE_SECONDS = 0.1
"""Upper end of the first pause; it doubles up to the setting's maximum (AWS, "Exponential Backoff And Jitter")."""
OPERATOR_SECONDS = 30.0
"""Pause while a destination turns us away: only an operator can mend it, and it should not look like an attack."""
RETRY_AFTER_MAX_SECONDS = 900.0
"""A destination may name a time, but a broken one must not silence its lane for days."""
COMPLAINT_SECONDS = 30.0
"""A lane in trouble says so when it begins and then once in this time."""

EVENT_OVERHEAD_BYTES = 250
"""What an event holds beside its JSON: the struct, its integers, list slots (measured with sys.getsizeof)."""

WRITE_MAX_BYTES = 16_000_000
"""The most that one write weighs, unless a single event is more: 20,000 events of 3 MB would be one insert of 60 GB."""

DeadLetterWriter = Callable[[Sequence[DeadLetter]], Awaitable[None]]


LATENCY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
"""Upper ends of the latency histogram: from Redis at its best to an hour's backlog."""


class Progress:
    """What happened in a lane since the program began; only ever grows. Metrics and `status` read it."""

    def __init__(self) -> None:
        self.events = 0
        self.writes = 0
        self.retries = 0
        self.dead_letters = 0
        self.committed_at = 0.0
        """Commit time of the newest transaction written, Unix seconds by PostgreSQL's clock."""
        self.latency_counts = [0] * (len(LATENCY_BUCKETS_SECONDS) + 1)
        """Batches by seconds from commit to written; the last is for all that took longer."""
        self.latency_sum_seconds = 0.0

    def note(self, batch: Batch) -> None:
        """A batch is written."""
        if batch.committed_at:
            seconds = max(0.0, time.time() - batch.committed_at)
            self.latency_counts[bisect_left(LATENCY_BUCKETS_SECONDS, seconds)] += 1
            self.latency_sum_seconds += seconds


class _Entry(msgspec.Struct):
    """A batch as it waits in one lane."""

    events: list[Event]
    position: Position
    end_lsn: Lsn
    committed_at: float
    arrived: float  # time.monotonic()
    size: int  # what its events weigh at most
    batch: Batch | None  # None: an empty stretch, nothing to release


class _Write(msgspec.Struct):
    """One `Sink.write` and where the lane stands once it, and all before it, are done."""

    events: list[Event]
    position: Position
    end_lsn: Lsn
    committed_at: float
    since: float
    """Commit time of its oldest batch."""
    finished: list[Batch]
    refused: Sequence[Refusal] = ()
    asked_at: float = 0.0
    """When the sink was given it, time.monotonic(); 0.0 before that and once it has answered."""
    done: bool = False


class _Exposed:
    """What a crash would make a sink see again: events given to it past its position in the checkpoint on disk."""

    def __init__(self, limit: int | None, most_at_once: int) -> None:
        self._allowed = None if limit is None else limit - most_at_once
        self._events = 0
        self._written: deque[tuple[Position, int]] = deque()

    @property
    def full(self) -> bool:
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
        """The checkpoint on disk says that the sink has everything up to this position."""
        while self._written and self._written[0][0] <= position:
            self._events -= self._written.popleft()[1]


def weigh(events: Sequence[Event]) -> int:
    """The memory that events hold, bytes, estimated: a batch's size."""
    return sum(len(event.json) + EVENT_OVERHEAD_BYTES for event in events)


def backoff(attempt: int, longest: float) -> float:
    """Full jitter: anything between 0 and a limit that doubles with each attempt (0, 1, 2 …), seconds."""
    return random.uniform(0, min(longest, RETRY_BASE_SECONDS * 2 ** min(attempt, 30)))  # noqa: S311  not a secret


class Lane:
    """Carries batches to one sink; independent of every other lane."""

    def __init__(
        self,
        sink: Sink,
        start: SinkPosition,
        *,
        retry_max_seconds: float,
        dead_letter: DeadLetterWriter,
        on_progress: Callable[[], None],
        on_release: Callable[[Batch], None],
        mode: Mode = Mode.LIVE,
        on_held_back: Callable[[], None] = lambda: None,
    ) -> None:
        self.sink = sink
        self.name = sink.name
        self.done = start
        """How far the sink is; `pipeline.commit` makes it durable."""
        self.progress = Progress()
        self.trouble = ""
        """Why the sink takes nothing at the moment, in words; empty while it does."""
        self.needs_somebody = False
        """Nothing but an operator ends the trouble."""
        self._start = start if start.position > Position(0, 0) else None
        self._mode = mode
        self._accepted = start.position
        self._retry_max_seconds = retry_max_seconds
        self._dead_letter = dead_letter
        self._on_progress = on_progress
        self._on_release = on_release
        self._on_held_back = on_held_back
        self._exposed = _Exposed(sink.max_repeats if mode is Mode.LIVE else None, sink.max_events)
        self._queue: deque[_Entry] = deque()
        self._head = 0  # events of the queue's first entry that are taken already
        self._waiting = 0
        self._waiting_bytes = 0  # of whole entries: what is taken of the first one still counts
        self._in_flight: deque[_Write] = deque()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._failing = 0  # calls that are being tried again
        self._troubled_at = 0.0
        self._complained = 0.0

    @property
    def waiting(self) -> int:
        """Events that are queued or in flight."""
        return self._waiting + sum(len(write.events) for write in self._in_flight)

    @property
    def held_back(self) -> bool:
        """It may write no more until `saved` says that the checkpoint has moved on."""
        return self._exposed.full

    def trouble_seconds(self) -> float:
        """How long the sink has taken nothing; 0.0 while it does."""
        return time.monotonic() - self._troubled_at if self.trouble else 0.0

    def unanswered_seconds(self) -> float:
        """How long the oldest write in flight has gone without an answer; 0.0 when there is none."""
        asked = [write.asked_at for write in self._in_flight if write.asked_at]
        return time.monotonic() - min(asked) if asked else 0.0

    def saved(self, position: Position) -> None:
        """The checkpoint on disk has this position of the sink."""
        self._exposed.saved(position)
        self._changed.set()

    def oldest_seconds(self) -> float:
        """How long the oldest queued event has waited; 0.0 when there is none."""
        return time.monotonic() - self._queue[0].arrived if self._waiting else 0.0

    def lag_seconds(self) -> float:
        """How long ago the oldest batch that is not written was committed; 0.0 when there is none."""
        if not self.waiting:
            return 0.0
        since = self._in_flight[0].since if self._in_flight else self._queue[0].committed_at
        return max(0.0, time.time() - since) if since else 0.0

    def put(self, batch: Batch) -> None:
        """Queue a batch. What the lane had before (after a restart or a reconnect) is left out by its position."""
        events = batch.events
        if events and (events[0].commit_lsn, events[0].ordinal) <= self._accepted:
            events = [event for event in events if (event.commit_lsn, event.ordinal) > self._accepted]
        self._accepted = max(self._accepted, batch.position)
        entry = _Entry(
            events=events,
            position=max(self._accepted, batch.position),
            end_lsn=batch.end_lsn,
            committed_at=batch.committed_at,
            arrived=time.monotonic(),
            size=batch.size if events else 0,
            batch=batch if events else None,
        )
        if not events:
            self._on_release(batch)
            if self._queue and not self._queue[-1].events:
                self._queue.pop()  # the newer of two empty stretches says it all: a dead sink must not collect them
        self._queue.append(entry)
        self._waiting += len(events)
        self._waiting_bytes += entry.size
        if not self._waiting and not self._in_flight:
            self._pass_empty()
        self._changed.set()

    def _pass_empty(self) -> None:
        """Nothing to write: the position moves at once."""
        while self._queue:
            entry = self._queue.popleft()
            self._move(entry.position, entry.end_lsn, entry.committed_at)
        self._on_progress()

    def stop(self) -> None:
        """Begin no further writes; `run` returns when those in flight are done."""
        self._stopping.set()
        self._changed.set()

    async def run(self) -> None:
        """Write until stopped. Raises what the sink raises, except what is tried again."""
        async with asyncio.TaskGroup() as writes:
            opened = await self._persist(lambda: self.sink.open(self._start, self._mode))
            while opened and await self._ready():
                write = self._take()
                self._in_flight.append(write)
                self._exposed.begin(len(write.events))
                if self.held_back:
                    self._on_held_back()
                writes.create_task(self._carry(write))

    async def _ready(self) -> bool:
        """Wait until the next write should begin; False when stopped."""
        while not self._stopping.is_set():
            self._changed.clear()
            patience = self._patience()
            if patience is not None and patience <= 0:
                return True
            await wait(self._changed, patience)
        return False

    def _patience(self) -> float | None:
        """Seconds until a write is due; None while only a change can make one due."""
        if not self._waiting or len(self._in_flight) >= self.sink.concurrency or self.held_back:
            return None
        if self._waiting >= self.sink.max_events or self._waiting_bytes >= WRITE_MAX_BYTES:
            return 0.0
        return self.sink.linger_seconds - self.oldest_seconds()

    def _take(self) -> _Write:
        """The next events, as many as the sink takes at once, and what their being written means."""
        events: list[Event] = []
        finished: list[Batch] = []
        end_lsn, committed_at = self.done.end_lsn, 0.0
        position = self.done.position
        since = self._queue[0].committed_at
        size = 0
        while self._queue and len(events) < self.sink.max_events:
            entry = self._queue[0]
            piece = entry.events[self._head : self._head + self.sink.max_events - len(events)]
            if size + entry.size > WRITE_MAX_BYTES:
                piece = _fitting(piece, WRITE_MAX_BYTES - size) or ([] if events else piece[:1])
            size += entry.size
            events += piece
            self._head += len(piece)
            if self._head < len(entry.events):
                if piece:
                    position = Position(piece[-1].commit_lsn, piece[-1].ordinal)
                break
            position, end_lsn, committed_at = entry.position, entry.end_lsn, entry.committed_at
            if entry.batch is not None:
                finished.append(entry.batch)
            self._queue.popleft()
            self._waiting_bytes -= entry.size
            self._head = 0
        self._waiting -= len(events)
        return _Write(events, position, end_lsn, committed_at, since, finished)

    async def _carry(self, write: _Write) -> None:
        if not await self._persist(lambda: self._attempt(write)):
            return
        if write.refused:
            letters = [_dead_letter(self.name, refusal) for refusal in write.refused]
            if not await self._persist(lambda: self._dead_letter(letters)):
                return
            self.progress.dead_letters += len(write.refused)
        self.progress.writes += 1
        self.progress.events += len(write.events)
        write.done = True
        self._settle()

    async def _attempt(self, write: _Write) -> None:
        write.asked_at = time.monotonic()
        write.refused = await self.sink.write(write.events)
        write.asked_at = 0.0

    def _settle(self) -> None:
        """Move the position over all writes that are done and have none undone before them."""
        while self._in_flight and self._in_flight[0].done:
            write = self._in_flight.popleft()
            self._move(write.position, write.end_lsn, write.committed_at)
            self._exposed.written(write.position, len(write.events))
            for batch in write.finished:
                self.progress.note(batch)
                self._on_release(batch)
        if not self._waiting and not self._in_flight:
            self._pass_empty()
        self._changed.set()
        self._on_progress()

    def _move(self, position: Position, end_lsn: Lsn, committed_at: float) -> None:
        if position < self.done.position:
            raise ValueError(f"lane {self.name} would go back from {self.done.position} to {position}")
        # After a reconnect the stream repeats what this lane has: its end LSN is then behind for a while.
        self.done = SinkPosition(position=position, end_lsn=max(end_lsn, self.done.end_lsn))
        self.progress.committed_at = max(committed_at, self.progress.committed_at)

    async def _persist(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Make the call until it succeeds; only errors named retryable are retried. False: stopped before that."""
        for attempt in itertools.count():
            try:
                await call()
            except SinkUnavailable as exc:
                # A time that is named is the least: 0, or a date that has passed, must not become a storm.
                named = min(exc.retry_after or 0.0, RETRY_AFTER_MAX_SECONDS)
                pause = max(named, backoff(attempt, self._retry_max_seconds))
                self._complain(exc)
            except (SinkMisconfigured, DeadLettersFull) as exc:
                pause = min(OPERATOR_SECONDS, self._retry_max_seconds)
                self._complain(exc)
            else:
                if attempt:
                    self._recover()
                return True
            self._failing += not attempt
            self.progress.retries += 1
            await wait(self._stopping, pause)
            if self._stopping.is_set():
                return False
        raise AssertionError  # count() has no end

    def _complain(self, exc: SinkError) -> None:
        if not self.trouble or time.monotonic() - self._complained > COMPLAINT_SECONDS:
            log.error("%s (written up to %s, %d events wait)", exc, format_lsn(self.done.end_lsn), self.waiting)
            self._complained = time.monotonic()
        if not self.trouble:
            self._troubled_at = time.monotonic()
        self.trouble = str(exc)
        self.needs_somebody = not isinstance(exc, SinkUnavailable)

    def _recover(self) -> None:
        self._failing -= 1
        if not self._failing:  # of several writes side by side one may still be turned away
            log.info("sink %s takes events again", self.name)
            self.trouble = ""
            self.needs_somebody = False


def _fitting(events: list[Event], room_bytes: int) -> list[Event]:
    """The first of them, as many as weigh no more than that."""
    for number, event in enumerate(events):
        room_bytes -= len(event.json) + EVENT_OVERHEAD_BYTES
        if room_bytes < 0:
            return events[:number]
    return events


def _dead_letter(sink: str, refusal: Refusal) -> DeadLetter:
    event = refusal.event
    return DeadLetter(
        sink=sink,
        position=Position(event.commit_lsn, event.ordinal),
        event_id=event.id,
        reason=refusal.reason,
        payload=event.json,
    )


async def wait(event: asyncio.Event, seconds: float | None) -> None:
    """Return when it is set, or after so many seconds (None: only then)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def single(failure: BaseException) -> BaseException:
    """The first of what a TaskGroup collected."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
