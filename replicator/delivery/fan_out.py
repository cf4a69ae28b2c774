"""All lanes together: every batch goes into each of them, and the memory that they hold has a bound.

The stream (`pipeline.py`) and a backfill (`backfill.py`) both deliver with it; a lane (`lane.py`) serves one sink.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Container, Coroutine, Mapping, Sequence
from functools import partial

from replicator.contracts.events import Event, Mark, SinkPosition
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Mode, Sink
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.lane import Lane, Shared, Tap
from replicator.delivery.queue import Batch, weigh
from replicator.delivery.retry import COMPLAINT_SECONDS, cancel, wait

LOOK_SECONDS = 1.0
"""While reading stands still, how often it is judged whether that is worth a line in the log."""
FADE_SECONDS = 24.0
"""After this time a stop counts a third (1/e): one of 10 s makes a third of the time."""
STOPPED_SHARE = 1 / 3

log = logging.getLogger(__name__)


class Stops:
    """How much of the time reading stands still, the last seconds counting most.

    A slow sink makes room now and then, and the next batch takes it: at the instant, reading may go on.
    """

    def __init__(self) -> None:
        self._now = False
        self._share = 0.0
        self._at = time.monotonic()

    def set(self, now: bool) -> None:
        """From here on it stands still, or goes on."""
        self.share()
        self._now = now

    def share(self) -> float:
        """Between 0 and 1."""
        at = time.monotonic()
        fade = math.exp((self._at - at) / FADE_SECONDS)
        self._share, self._at = self._share * fade + (1 - fade) * self._now, at
        return self._share


class FanOut:
    """Puts every batch into all lanes. `run` once."""

    def __init__(
        self, settings: CoreSettings, letters: DeadLetters, *, limit_bytes: int, mode: Mode = Mode.LIVE
    ) -> None:
        self.lanes: list[Lane] = []
        """Those that run, in the order of the sinks; empty until `open`."""
        self.paused: list[Lane] = []
        """Of sinks that get nothing: they hold nothing, and say where their sinks are."""
        self.taps: list[Tap] = []
        """Told of every batch of the stream, and of what each sink has written."""
        self._share = partial(Shared, letters, mode, limit_bytes, settings.retry_max_seconds, self.taps)
        self._shared = self._share()
        self._drain_timeout_seconds = settings.drain_timeout_seconds
        self._stops = Stops()
        self._said_at = -math.inf
        self._ending = asyncio.Event()
        self._writers: dict[str, asyncio.Task[None]] = {}
        """By sink, the writers of those that were paused included."""

    @property
    def held_bytes(self) -> int:
        """What batches that some lane still needs hold."""
        return self._shared.held_bytes

    @property
    def full(self) -> bool:
        """At this instant the slowest lane holds too much to read more."""
        return not self._shared.room.is_set()

    @property
    def reading_stopped(self) -> bool:
        """Reading stands still for much of the time because the slowest lane holds too much."""
        return self.held_bytes > 0 and self._stops.share() >= STOPPED_SHARE

    @property
    def committed_at(self) -> float:
        """Commit time of the newest transaction that every lane has written since the program began; 0.0: none."""
        return min((lane.mark.committed_at for lane in self.every), default=0.0)

    @property
    def slowest(self) -> Lane:
        """The lane that is furthest behind."""
        return min(self.lanes, key=lambda lane: (lane.mark.end_lsn, lane.mark.position))

    @property
    def every(self) -> list[Lane]:
        """The lanes of all sinks: nothing is confirmed that one of them lacks."""
        return [*self.lanes, *self.paused]

    def open(
        self, sinks: Sequence[Sink], starts: Mapping[str, SinkPosition], paused: Container[str] = frozenset()
    ) -> None:
        """Begin a lane a sink, each where its sink is; what is counted goes on. Those that are paused don't run."""
        stats = {lane.name: lane.stats for lane in self.every}
        self._shared = self._share()
        lanes = [Lane(sink, starts[sink.name], self._shared, stats.get(sink.name)) for sink in sinks]
        self.lanes = [lane for lane in lanes if lane.name not in paused]
        self.paused = [lane for lane in lanes if lane.name in paused]
        self._writers = {lane.name: self._begin(lane.run()) for lane in self.lanes}
        for lane in self.paused:  # what is known to be lost stays lost
            lane.look()

    async def pause(self, name: str) -> None:
        """This sink gets nothing from now on; return when its writes in flight have ended, or are given up."""
        [lane] = [lane for lane in self.lanes if lane.name == name]
        # No await in between: every lane is in one of the two, so none is forgotten when a position is confirmed.
        self.lanes.remove(lane)
        self.paused.append(lane)
        lane.leave()
        if writer := self._writers.get(name):  # none between two streams
            await asyncio.wait([writer], timeout=self._drain_timeout_seconds)
            await cancel([writer])
        await lane.left()
        self._shared.progress.set()

    def stop(self) -> None:
        """Let `run` end."""
        self._ending.set()

    def again(self) -> None:
        """After `run` has ended: it may run once more. What the lanes held is given up."""
        self._ending, self._writers, self._shared = asyncio.Event(), {}, self._share()

    async def run(self, *work: Coroutine[None, None, None]) -> BaseException | None:
        """Run `work` until any of it ends, a lane fails or `stop` is called; then end it, and drain the lanes.

        Returns the first failure, a lane's before that of `work`.
        """
        tasks = [self._begin(each) for each in work]
        try:
            await self._ending.wait()
        finally:
            await cancel(tasks)
            await self._drain()
        failures = (task.exception() for task in (*self._writers.values(), *tasks) if not task.cancelled())
        return next((_first(failure) for failure in failures if failure), None)

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What ends by itself ends everything, but the writer of a sink that is paused is meant to."""
        meant = any(self._writers.get(lane.name) is task for lane in self.paused)
        if not meant or not (task.cancelled() or task.exception() is None):
            self.stop()

    async def _drain(self) -> None:
        """Let the writes in flight finish within the bound."""
        for lane in self.lanes:
            lane.stop()
        if writers := self._writers.values():
            await asyncio.wait(writers, timeout=self._drain_timeout_seconds)
            await cancel(writers)

    def put(self, events: list[Event], mark: Mark | None) -> list[Batch]:
        """Give the events to every lane of their stream; without a mark they come from beside it."""
        self._shared.flow.add(len(events))
        for tap in self.taps:
            tap("", events)
        streams = {lane.stream for lane in self.lanes}
        if len(streams) <= 1:
            return [self._put(events, mark, self.lanes)]
        shares = {stream: [event for event in events if event.stream == stream] for stream in streams}
        return [
            self._put(share, mark, [lane for lane in self.lanes if lane.stream == stream])
            for stream, share in shares.items()
        ]

    def _put(self, events: list[Event], mark: Mark | None, lanes: Sequence[Lane]) -> Batch:
        batch = Batch(events, mark or Mark(), weigh(events), holders=len(lanes), beside=mark is None)
        self._shared.hold(batch.size)
        for lane in lanes:
            lane.put(batch)
        return batch

    def end(self) -> None:
        """Nothing more comes: no lane waits for it."""
        for lane in self.lanes:
            lane.end()

    async def room(self) -> None:
        """Wait until the lanes hold less than the limit; the log says so while that takes much of the time."""
        while self.full:
            self._complain()
            self._stops.set(True)
            await wait(self._shared.room, LOOK_SECONDS)
            self._stops.set(False)

    def _complain(self) -> None:
        now = time.monotonic()
        if self.reading_stopped and now - self._said_at >= COMPLAINT_SECONDS:
            self._said_at = now
            message = "reading has stopped: %d bytes of events wait for sink %s (%s)"
            fields = {"sink": self.slowest.name, "code": "R515"}
            log.warning(
                message, self.held_bytes, self.slowest.name, self.slowest.trouble.message or "slow", extra=fields
            )

    async def progress(self, seconds: float | None = None) -> bool:
        """Wait until a lane has moved since the last call, or so long; whether one has."""
        progress = self._shared.progress
        await wait(progress, seconds)
        moved = progress.is_set()
        progress.clear()
        return moved

    @property
    def awaiting_checkpoint(self) -> bool:
        """Some lane may not write before the next checkpoint."""
        return any(lane.awaiting_checkpoint for lane in self.lanes)

    async def checkpoint_wanted(self, seconds: float) -> None:
        """Wait so long, or until a lane may not write before the next checkpoint."""
        self._shared.checkpoint_wanted.clear()
        if not self.awaiting_checkpoint:
            await wait(self._shared.checkpoint_wanted, seconds)

    def saved(self, sinks: Mapping[str, SinkPosition]) -> None:
        """These positions are on disk."""
        for lane in self.lanes:
            if (at := sinks.get(lane.name)) is not None:  # one that is new has no position yet
                lane.saved(at.position)


def _first(failure: BaseException) -> BaseException:
    """The first of what a TaskGroup collected."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
