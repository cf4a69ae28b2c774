"""Looks at the slot from the outside every few seconds, so that a pipeline that stands still can't look healthy.

`pipeline.py` knows what was confirmed, PostgreSQL alone knows how far it is; `admin.py` shows the two side by side.
"""

from __future__ import annotations

import asyncio
import logging
import time

from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Position
from replicator.delivery.lane import Lane
from replicator.pipeline import Pipeline
from replicator.source import slot as slots
from replicator.source.slot import SlotState

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""One cheap query; a third of Prometheus's usual scrape interval."""
LOOK_AGAIN_SECONDS = 1.0
"""While there is nothing to see: a slot that was just made, a server that comes up."""
LOOK_TIMEOUT_SECONDS = 10
"""A server that does not answer in this time is news, too."""
STALL_SECONDS = 60.0
"""The slot may stand still this long while there is something to read; a sink's hiccup is shorter."""
TROUBLE_SECONDS = 10.0
"""A sink may take nothing this long before it is a reason; one that turns us away is one at once."""


class Monitor:
    """What is known of the slot and of the pipeline, together."""

    def __init__(self, pipeline: Pipeline, dsn: str, slot: str) -> None:
        self.pipeline = pipeline
        self.slot: SlotState | None = None
        self.trouble = "not looked at yet"
        """Why the slot can't be looked at; empty when it was."""
        self._dsn = dsn
        self.name = slot
        """The slot's."""
        self._at: tuple[int, Position] = (0, Position(0, 0))
        self._moved_at = time.monotonic()
        self._complained_at = -STALL_SECONDS  # never yet

    async def run(self) -> None:
        """Look for ever; never raises for what it sees."""
        while True:
            try:
                self.slot = await slots.look(self._dsn, self.name, "replicator monitor", LOOK_TIMEOUT_SECONDS)
                self.trouble = "" if self.slot else f"replication slot {self.name} does not exist"
            except SourceUnavailable as exc:
                self.trouble = str(exc)
            await self.pipeline.letters.look()
            self._watch()
            await asyncio.sleep(LOOK_AGAIN_SECONDS if self.trouble else LOOK_SECONDS)

    def _watch(self) -> None:
        at = self._where()
        if at != self._at or not self.lag_bytes():
            self._moved_at = time.monotonic()
        self._at = at
        stalled = self.stalled()
        if stalled and time.monotonic() - self._complained_at >= STALL_SECONDS:
            log.warning("%s", stalled)
            self._complained_at = time.monotonic()

    def _where(self) -> tuple[int, Position]:
        """The slot, and the slowest sink: inside a transaction that takes long the slot can't move, the sink does."""
        confirmed = (self.slot.confirmed_lsn or 0) if self.slot else 0
        lanes = self.pipeline.fan_out.lanes
        return confirmed, self.pipeline.fan_out.slowest.done.position if lanes else Position(0, 0)

    def lag_bytes(self) -> int:
        """WAL that is written and not confirmed, as of the last look."""
        return self.slot.lag_bytes if self.slot else 0

    def stalled(self) -> str:
        """In words, that and why the slot stands still while there is something to read; else empty."""
        seconds = time.monotonic() - self._moved_at
        if seconds < STALL_SECONDS or not self.lag_bytes():
            return ""
        return f"the slot has not moved for {seconds:.0f} s while {self.lag_bytes()} bytes wait: {self._why()}"

    def _why(self) -> str:
        if self.pipeline.trouble:
            return self.pipeline.trouble
        if not self.pipeline.fan_out.lanes:
            return "no sink is open"
        if self._unsaved():
            return "the checkpoint is not saved, the log says why"
        lanes = [lane for lane in self.pipeline.fan_out.lanes if lane.waiting]
        if not lanes:
            return self._silent()
        lane = min(lanes, key=lambda lane: (lane.done.end_lsn, lane.done.position))
        return lane.trouble or f"sink {lane.name} is the slowest, {lane.waiting} events wait for it"

    def _unsaved(self) -> bool:
        """Every sink is past the checkpoint: neither they nor PostgreSQL are to blame."""
        written = min(self.pipeline.source.received, self.pipeline.fan_out.slowest.done.end_lsn)
        return self.pipeline.checkpoint is not None and self.pipeline.checkpoint.end_lsn < written

    def _silent(self) -> str:
        """The sinks have all that was read. No reason to connect again: decoding would begin anew."""
        pid = self.slot.active_pid if self.slot else None
        reader = f"process {pid} decodes a large transaction or hangs" if pid else "no process of it reads the slot"
        return f"PostgreSQL has sent nothing for {self.pipeline.source.silent_seconds:.0f} s, {reader}"

    def _troubled(self) -> list[str]:
        return [_trouble(lane) for lane in self.pipeline.fan_out.lanes]

    def reasons(self) -> list[str]:
        """Why we are not ready; empty when we are."""
        found = [self.pipeline.trouble, self.trouble, *self._troubled(), self.stalled()]
        if self.slot and self.slot.wal_status in ("unreserved", "lost"):
            found.append(
                f"the slot's WAL is {self.slot.wal_status}: PostgreSQL throws it away (max_slot_wal_keep_size)"
            )
        return [reason for reason in found if reason]


def _trouble(lane: Lane) -> str:
    """Why the sink is a reason not to be ready; empty while it is none."""
    if lane.trouble:
        return lane.trouble if lane.needs_somebody or lane.trouble_seconds() >= TROUBLE_SECONDS else ""
    seconds = lane.unanswered_seconds()
    return f"sink {lane.name} has not answered for {seconds:.0f} s" if seconds >= TROUBLE_SECONDS else ""
