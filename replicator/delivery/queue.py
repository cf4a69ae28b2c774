"""What waits for one sink, what its next write takes, and how fast more comes. `lane.py` decides when to write.

`Flow` tells a backlog from live traffic, because the size of a write decides its price: an event costs Redis 5.9 µs in
a call of 500 and 0.9 in a write of 16,000, and ClickHouse 4.5 µs in an insert of 20,000 and 3.5 in one of 40,000. Lanes
share the events; none of them copies one.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from replicator.contracts.errors import BatchTooLarge
from replicator.contracts.events import Event, Mark, Position

EVENT_OVERHEAD_BYTES = 250
"""What an event holds beside its JSON: the struct, its integers, list slots (measured with sys.getsizeof)."""
WRITE_MAX_BYTES = 32_000_000
"""The most that one write weighs, unless a single event is more: 58,000 ordinary events, but not 58,000 of 3 MB."""

BACKLOG_EVENTS = 2_000
"""So many within `FLOW_SECONDS` are a backlog: 10,000 a second, while one is drained at 50,000 and more."""
FLOW_SECONDS = 0.2

GROW_SECONDS = 1.0
"""A smaller size is kept at least this long, or as long as the refusal took, and twice as long each time that the
larger one is refused again. So what was only a fault for a while is over in about the time that it lasted."""
GROW_MAX_SECONDS = 3600.0

log = logging.getLogger(__name__)


class Room:
    """How large one write may be at present: the sink's limits, or less where the destination found that too large."""

    def __init__(self, sink: str, max_events: int, max_bytes: int) -> None:
        self.events = self._most = max_events
        self.bytes = self._most_bytes = max_bytes
        self._sink = sink
        self._patience_seconds = GROW_SECONDS
        self._changed_at = self._said_at = -GROW_MAX_SECONDS
        self._taken = 0  # the most events that one write had, since the last one that was too large
        self._falling = False

    def shrink(self, events: int, size: int, seconds: float = 0.0) -> None:
        """A write like this was too large, which took so long. Its parts count as one with it until one is taken."""
        now = time.monotonic()
        if now - self._said_at >= GROW_MAX_SECONDS:
            message = "sink %s: a write of %d events is too large for it; writes get smaller, and grow again slowly"
            log.warning(message, self._sink, events, extra={"sink": self._sink, "code": BatchTooLarge.code})
            self._said_at = now
        if not self._falling:
            self._wait_longer(events, seconds, now)
        self._falling = True
        self.events, self.bytes = max(1, min(self.events, events // 2)), max(1, min(self.bytes, size // 2))
        self._changed_at = now

    def _wait_longer(self, events: int, seconds: float, now: float) -> None:
        known = events <= self._taken  # it took as much before: something else was wrong, such as a lack of memory
        if known or (self._most == self.events and now - self._changed_at >= GROW_MAX_SECONDS):
            self._patience_seconds = GROW_SECONDS
        elif events <= self.events:
            self._patience_seconds *= 2
        self._patience_seconds = min(max(self._patience_seconds, seconds), GROW_MAX_SECONDS)
        self._taken = 0

    def grow(self, events: int) -> None:
        """A write of so many events was taken."""
        self._falling, self._taken = False, max(self._taken, events)
        if self.events >= self._most and self.bytes >= self._most_bytes:
            return
        now = time.monotonic()
        if now - self._changed_at >= self._patience_seconds:
            self.events, self.bytes = min(2 * self.events, self._most), min(2 * self.bytes, self._most_bytes)
            self._changed_at = now


class Flow:
    """How fast events come in. It compares no clocks: the commit times are another machine's."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[float, int]] = deque()
        self._events = 0
        self._last = -math.inf

    def add(self, events: int) -> None:
        """So many have come; a stretch without any is silence, too."""
        if not events:
            return
        self._last = time.monotonic()
        self._arrived.append((self._last, events))
        self._events += events
        self._forget()  # perhaps nobody asks

    def backlog(self) -> bool:
        """The stream has more than it can have live."""
        self._forget()
        return self._events >= BACKLOG_EVENTS

    def quiet_seconds(self) -> float:
        """How long nothing has come."""
        return time.monotonic() - self._last

    def _forget(self) -> None:
        since = time.monotonic() - FLOW_SECONDS
        while self._arrived and self._arrived[0][0] < since:
            self._events -= self._arrived.popleft()[1]


class Batch(msgspec.Struct):
    """Events in stream order, shared by all lanes, and the mark that a lane has reached once they are written."""

    events: list[Event]
    mark: Mark
    size: int
    """Memory it holds, bytes, estimated."""
    holders: int = 0
    """Lanes that still need it."""
    beside: bool = False
    """Its events are not the stream's: they have no place in its order, and no mark is reached with them."""


class Write(msgspec.Struct):
    """The events of one `Sink.write`."""

    events: list[Event]
    mark: Mark
    """Where the lane is once this write, and all before it, are done."""
    since: float
    """Commit time of its oldest batch."""
    finished: list[Batch]
    """Batches whose last events these are."""
    asked_at: float = 0.0
    """When the sink was given it, time.monotonic(); 0.0 before that and once it has answered."""
    done: bool = False


class _Entry(msgspec.Struct):
    """A batch in one queue: the events that this sink does not have yet."""

    events: list[Event]
    mark: Mark
    arrived: float  # time.monotonic()
    batch: Batch


class Queue:
    """Batches that no write has taken yet; the first one may be taken in part."""

    def __init__(self, start: Mark) -> None:
        self.end = start
        """The mark of everything that was ever put in."""
        self.events = 0
        self.bytes = 0
        """Of whole batches: what is taken of the first one still counts."""
        self._entries: deque[_Entry] = deque()
        self._taken = start
        """The mark of the newest write, and of what came after it without an event."""
        self._head = 0  # events of the first entry that are taken already

    def put(self, batch: Batch) -> bool:
        """Queue what the sink does not have; whether that is anything.

        An empty batch only moves the mark of what is before it, so a dead sink does not collect them.
        """
        events, after = batch.events, self.end.position
        repeated = events and (events[0].commit_lsn, events[0].ordinal) <= after  # after a restart or a reconnect
        if repeated and not batch.beside:
            events = [event for event in events if (event.commit_lsn, event.ordinal) > after]
        self.end = self.end.later(batch.mark)
        if events:
            self._entries.append(_Entry(events, self.end, time.monotonic(), batch))
            self.events += len(events)
            self.bytes += batch.size
        elif self._entries:
            self._entries[-1].mark = self.end
        else:
            self._taken = self.end
        return bool(events)

    def waited_seconds(self) -> float:
        """How long the oldest event has waited; 0.0 when there is none."""
        return time.monotonic() - self._entries[0].arrived if self._entries else 0.0

    def since(self) -> float:
        """Commit time of the oldest batch; 0.0 when unknown or none."""
        return self._entries[0].batch.mark.committed_at if self._entries else 0.0

    def full(self, room: Room) -> bool:
        """There is enough for a write."""
        return self.events >= room.events or self.bytes >= room.bytes

    def any(self) -> list[Event]:
        """One event of those that wait, at random; empty when there is none."""
        if not self._entries:
            return []
        number = random.randrange(len(self._entries))  # noqa: S311  not a secret
        entry = self._entries[number]
        return [random.choice(entry.events[self._head :] if number == 0 else entry.events)]  # noqa: S311

    def clear(self) -> list[Batch]:
        """Give up everything; the batches that this was."""
        batches = [entry.batch for entry in self._entries]
        self._entries.clear()
        self.events = self.bytes = self._head = 0
        return batches

    def take(self, room: Room) -> Write:
        """The next events, at most so many and so heavy."""
        write = Write([], self._taken, self.since(), [])
        size = 0
        while self._entries and len(write.events) < room.events:
            entry = self._entries[0]
            piece = entry.events[self._head : self._head + room.events - len(write.events)]
            if size + entry.batch.size > room.bytes:
                piece = _fitting(piece, room.bytes - size) or ([] if write.events else piece[:1])
            size += entry.batch.size
            write.events += piece
            self._head += len(piece)
            if self._head < len(entry.events):
                if piece and not entry.batch.beside:
                    last = Position(piece[-1].commit_lsn, piece[-1].ordinal)
                    write.mark = Mark(last, write.mark.end_lsn, write.mark.committed_at)
                break
            write.mark = entry.mark
            write.finished.append(entry.batch)
            self._entries.popleft()
            self.bytes -= entry.batch.size
            self._head = 0
        self._taken = write.mark
        self.events -= len(write.events)
        return write


def weigh(events: Sequence[Event]) -> int:
    """The memory that events hold, bytes, estimated."""
    return sum([len(event.json) for event in events]) + EVENT_OVERHEAD_BYTES * len(events)


def _fitting(events: list[Event], room_bytes: int) -> list[Event]:
    """The first of them, as many as weigh no more than that."""
    for number, event in enumerate(events):
        room_bytes -= len(event.json) + EVENT_OVERHEAD_BYTES
        if room_bytes < 0:
            return events[:number]
    return events
