"""All lanes together: every batch goes into each of them (`lane.py`), and the memory that they hold has a bound."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from replicator.contracts.events import Batch, SinkPosition
from replicator.delivery.lane import COMPLAINT_SECONDS, Lane, wait

log = logging.getLogger(__name__)


class FanOut:
    """Puts every batch into all lanes and bounds the memory that they hold together."""

    def __init__(self, limit_bytes: int) -> None:
        self.lanes: list[Lane] = []
        self.held_bytes = 0
        """What batches that some lane still needs hold."""
        self._limit_bytes = limit_bytes
        self._room = asyncio.Event()
        self._room.set()

    @property
    def full(self) -> bool:
        """Reading has stopped because the slowest lane holds too much."""
        return not self._room.is_set()

    @property
    def committed_at(self) -> float:
        """Commit time of the newest transaction that every lane has written since the program began; 0.0: none."""
        return min((lane.progress.committed_at for lane in self.lanes), default=0.0)

    @property
    def held_back(self) -> bool:
        """A lane waits for the next checkpoint."""
        return any(lane.held_back for lane in self.lanes)

    @property
    def slowest(self) -> Lane:
        """The lane that is furthest behind."""
        return min(self.lanes, key=lambda lane: (lane.done.end_lsn, lane.done.position))

    def saved(self, sinks: Mapping[str, SinkPosition]) -> None:
        """These positions are on disk."""
        for lane in self.lanes:
            if (at := sinks.get(lane.name)) is not None:  # one that is new has no position yet
                lane.saved(at.position)

    def put(self, batch: Batch) -> None:
        """Give the batch to every lane."""
        batch.holders = len(self.lanes)
        self.held_bytes += batch.size
        if self.held_bytes >= self._limit_bytes:
            self._room.clear()
        for lane in self.lanes:
            lane.put(batch)

    def release(self, batch: Batch) -> None:
        """One lane is done with it."""
        batch.holders -= 1
        if not batch.holders:
            self.held_bytes -= batch.size
            if self.held_bytes < self._limit_bytes:
                self._room.set()

    async def room(self) -> None:
        """Wait until the lanes hold less than the limit; says so when that takes long."""
        if self.full:
            await wait(self._room, COMPLAINT_SECONDS / 3)
        while self.full:
            lane = self.slowest
            told = "reading has stopped: %d bytes wait for sink %s (%s)"
            log.warning(told, self.held_bytes, lane.name, lane.trouble or "slow")
            await wait(self._room, COMPLAINT_SECONDS)
