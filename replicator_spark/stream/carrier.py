"""A sink of the driver's, whose writes the cluster carries out. All else is the sink's own work.

The lane sees no difference: what a write returns and raises is what the sink on the node returned and raised. So
checkpoint and confirmation are the product's, and a node that is lost is a write that failed: the lane repeats it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import cast
from zlib import crc32

from replicator.contracts.errors import BatchRefused, SinkBroken, SinkError, SinkUnavailable
from replicator.contracts.events import Event, Id, Refusal, RowChange
from replicator.contracts.sink import Sink
from replicator.delivery.queue import weigh
from replicator_spark.nodes import meant_by_sink
from replicator_spark.session import PATIENCE_SECONDS
from replicator_spark.stream import wire
from replicator_spark.stream.desk import CARRIED_BYTES, Desk
from replicator_spark.stream.wire import Errand, Report, Told

PART_EVENTS = 10_000
"""A larger write is cut, so that several cores shape it. ClickHouse likes inserts of this size, too."""

REQUESTS = 4
"""So many requests of the longest time-out a write may take: a sink that is opened for it asks some things first."""

log = logging.getLogger("replicator.spark")


def on_cluster(sink: Sink, desk: Desk) -> Sink:
    """The same sink; its writes are carried out on the cluster from now on."""
    sink.write = Carrier(sink, desk).write  # type: ignore[method-assign]  # nothing else of it changes
    return sink


class Carrier:
    """The writes of one sink."""

    def __init__(self, sink: Sink, desk: Desk) -> None:
        self.name = sink.name
        self._sink = sink
        self._write_here = sink.write
        self._desk = desk
        self._meant = meant_by_sink(sink.name, secrets.token_bytes(32))
        self._age = 0
        self._bugs: set[str] = set()

    @property
    def patience_seconds(self) -> float:
        """What takes longer has hung: the sink's own time-outs end a write before."""
        timeouts = [value for name, value in self._sink.settings if name.endswith("timeout_seconds")]
        return PATIENCE_SECONDS + REQUESTS * max(timeouts, default=0.0)

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """As `Sink.write`."""
        await self._write_here([])  # raises what the driver's own sink knows that hinders it
        if weigh(events) > CARRIED_BYTES:
            return await self._write_here(events)
        # What sees repeats gets a write whole: of parts, those that were taken would come again with the others.
        parts = [events] if self._sink.max_repeats is not None else cut(events)
        answers = await asyncio.gather(*(self._desk.carry(self, part) for part in parts))
        if errors := [wire.error(self.name, answer.error) for answer in answers if answer.error]:
            raise _first(errors)
        pairs = zip(parts, answers, strict=True)
        refusals = [refusal for part, answer in pairs for refusal in wire.refusals(part, answer)]
        unfit = {refusal.event.id for refusal in refusals}
        await self._sink.carried([event for event in events if event.id not in unfit] if unfit else events)
        return refusals

    def errand(self, writes: Sequence[Sequence[Event]]) -> Errand:
        """For a task."""
        sent = cast("list[list[RowChange]]", [[*events] for events in writes])
        return Errand(sink=self.name, meant=self._meant, age=self._age, writes=sent)

    def hear(self, errand: Errand, report: Report) -> None:
        """What the task says beside its answers."""
        if report.new:
            self._sink.new_events = (self._sink.new_events or 0) + report.new
        found = [answer.error for answer in report.answers if answer.error]
        for each in found:
            self._tell(each, report.node)
        # What is wrong may be what the sink remembers: a password, or how the table was. All processes forget it.
        if any(not issubclass(wire.KINDS[each.kind], PASSING) for each in found):
            self._age = max(self._age, errand.age + 1)

    def _tell(self, found: Told, node: str) -> None:
        """A bug, once: the driver has no traceback of its own."""
        if found.frames and found.frames not in self._bugs:
            self._bugs.add(found.frames)
            message = "sink %s raised %s on node %s\n%s"
            fields = {"sink": self.name, "code": SinkBroken.code}
            log.error(message, self.name, found.facts["detail"], node, found.frames, extra=fields)


PASSING = (SinkUnavailable, BatchRefused)
"""Errors that are not about what a sink remembers."""


def cut(events: Sequence[Event]) -> list[Sequence[Event]]:
    """Parts for several cores; what a content has stays together and in order.

    It follows from the events alone. Were it to follow from the cores of the moment, a write that is repeated would
    have other parts.
    """
    parts = -(-len(events) // PART_EVENTS)
    if parts <= 1:
        return [events]
    cut_up: list[list[Event]] = [[] for _ in range(parts)]
    for event in events:
        cut_up[_number(event.key) % parts].append(event)
    return [part for part in cut_up if part]


def _first(errors: Sequence[SinkError]) -> SinkError:
    """What the lane hears. A refusal comes last: of the parts that failed for another reason it says nothing."""
    return min(errors, key=lambda error: isinstance(error, BatchRefused))


def _number(key: Id) -> int:
    """The same in every process."""
    return key if isinstance(key, int) else crc32(key.encode())
