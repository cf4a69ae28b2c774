"""Gives the sinks' writes to the cluster's cores, a task each, and looks after the cluster.

Small writes that wait for a core go together. A sink that does not answer never holds the last core that others need.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from replicator.contracts.errors import ClusterFailed, SinkUnavailable
from replicator.contracts.events import Event, counted
from replicator.contracts.sink import Carrier
from replicator.delivery.queue import weigh
from replicator_spark.session import Cluster, State, look
from replicator_spark.stream.hands import work
from replicator_spark.stream.wire import Answer, Errand, Report, told

LOOK_SECONDS = 1.0
"""How often the cluster is asked what it has. It costs a millisecond."""
DESERTED_SECONDS = 15.0
"""So long a task waits for an executor. A Worker takes some 5 s to start one."""
ABANDONED_SECONDS = 300.0
"""A standalone cluster whose Master was restarted has forgotten its applications: an executor comes to a new one only.
One that is merely full gives a new one its turn, too."""
TASK_EVENTS = 5_000
"""Fewer are not worth a task of their own where others wait: a task costs 40 ms of CPU, whatever is in it."""
CARRIED_BYTES = 64_000_000
"""Half of what Spark sends in one message (spark.rpc.message.maxSize). Only huge events make a write, or several for
one task, so large."""
GATHER_SECONDS = 0.01
"""So long a write waits for others to come along: a lane that goes on begins several, one after the other."""
DESERTED = (
    "no executor of Spark takes the write: check that the cluster runs, and has a free core and memory for this"
    " application"
)
ABANDONED_CURE = (
    "A restarted Master no longer knows the application. Start the replicator again, as its supervisor does"
)

log = logging.getLogger("replicator.spark")


class Writes(Protocol):
    """One sink's; `carrier.Carrier`."""

    @property
    def name(self) -> str:
        """The sink's."""

    @property
    def patience_seconds(self) -> float:
        """What takes longer has hung."""

    def errand(self, writes: Sequence[Sequence[Event]]) -> Errand:
        """For a task."""

    def hear(self, errand: Errand, report: Report) -> None:
        """What came of it, beside the answers."""


class _Piece(NamedTuple):
    carrier: Writes
    events: Sequence[Event]
    weight: int
    answer: asyncio.Future[Answer]


class Desk:
    """Of one application on the cluster. `watch` has to run beside it."""

    def __init__(self, cluster: Cluster, sinks: Sequence[str]) -> None:
        self.carrier = Carrier(name=f"Spark at {cluster.master}")
        self._cluster = cluster
        self._waiting: dict[str, deque[_Piece]] = {name: deque() for name in sinks}
        self._running = Counter(dict.fromkeys(sinks, 0))
        self._tasks: set[asyncio.Task[None]] = set()
        self._state = State(0, 0)
        self._note(cluster.state())
        self._peopled_at = self._busy_since = time.monotonic()
        self._deserted_at: float | None = None

    async def carry(self, carrier: Writes, events: Sequence[Event]) -> Answer:
        """Have them written by a task."""
        piece = _Piece(carrier, events, weigh(events), asyncio.get_running_loop().create_future())
        self._waiting[carrier.name].append(piece)
        asyncio.get_running_loop().call_later(GATHER_SECONDS, self._give)
        return await piece.answer

    async def watch(self) -> None:
        """Ask the cluster what it has, until cancelled. Raises ClusterFailed once Spark has ended, or forgotten us."""
        while True:
            self._see(await look(self._cluster))
            await asyncio.sleep(LOOK_SECONDS)

    def _see(self, state: State) -> None:
        self._note(state)
        if state.executors:
            self._peopled_at, self._deserted_at = time.monotonic(), None
        elif self._deserted():
            self._end_if_abandoned()
            self._cluster.cancel()
        self._give()

    def _end_if_abandoned(self) -> None:
        self._deserted_at = self._deserted_at or time.monotonic()
        lasts = time.monotonic() - self._deserted_at >= ABANDONED_SECONDS
        if lasts and self._cluster.master.startswith("spark://"):
            raise ClusterFailed(f"Spark has had no executor for {ABANDONED_SECONDS:g} s", ABANDONED_CURE)

    def _note(self, state: State) -> None:
        changed, self._state = state != self._state, state
        self.carrier.executors = state.executors
        self.carrier.cores = state.cores if state.executors else 0
        if changed:
            self._say(counted(self.carrier.executors, "executor"), counted(self.carrier.cores, "core"))

    def _say(self, executors: str, cores: str) -> None:
        log.info("Spark has %s, %s", executors, cores)
        if 0 < self.carrier.cores < len(self._waiting):
            message = "Spark has %s for %d sinks. Give it one for each: a silent sink holds its core"
            log.warning(message, cores, len(self._waiting), extra={"code": "R703"})

    def _deserted(self) -> bool:
        """A task has waited long. Without one, a cluster that grows and shrinks may well have no executor."""
        since = max(self._peopled_at, self._busy_since)
        return self._running.total() > 0 and time.monotonic() - since >= DESERTED_SECONDS

    # -- which write is next -----------------------------------------------------------------------------------------

    def _give(self) -> None:
        """Begin the tasks that there are cores for."""
        while name := self._next():
            pieces = self._take(name)
            if not pieces:
                continue
            if not self._running.total():
                self._busy_since = time.monotonic()
            self._running[name] += 1
            task = asyncio.create_task(self._carry_out(pieces))
            self._tasks.add(task)
            task.add_done_callback(lambda task, name=name: self._ended(task, name))  # type: ignore[misc]  # mypy guesses no default's type

    def _next(self) -> str:
        """The sink with the fewest tasks that may have one more; empty if none may."""
        free = self._state.cores - self._running.total()
        idle = sum(not count for count in self._running.values())
        for name, count in sorted(self._running.items(), key=lambda item: item[1]):
            if self._waiting[name] and (free > idle if count else free > 0):
                return name
        return ""

    def _take(self, name: str) -> list[_Piece]:
        """What waits, as evenly as the free cores allow, and no more than Spark sends."""
        waiting = self._waiting[name]
        events = sum(len(piece.events) for piece in waiting)
        share = max(TASK_EVENTS, math.ceil(events / max(1, self._state.cores - self._running.total())))
        taken: list[_Piece] = []
        room_bytes = CARRIED_BYTES
        while waiting and sum(len(piece.events) for piece in taken) < share:
            if taken and waiting[0].weight > room_bytes:
                break
            piece = waiting.popleft()
            if not piece.answer.done():  # else its lane has given it up
                taken.append(piece)
                room_bytes -= piece.weight
        return taken

    def _ended(self, task: asyncio.Task[None], name: str) -> None:
        self._tasks.discard(task)
        self._running[name] -= 1
        asyncio.get_running_loop().call_later(GATHER_SECONDS, self._give)  # its lane goes on first

    async def _carry_out(self, pieces: Sequence[_Piece]) -> None:
        carrier = pieces[0].carrier
        errand = carrier.errand([piece.events for piece in pieces])
        try:
            report = await self._report(errand, carrier.patience_seconds)
            carrier.hear(errand, report)
            answers = report.answers
        except Exception as exc:  # noqa: BLE001  whoever waits for it gets it
            answers = [Answer(error=told(exc))] * len(pieces)
        for piece, answer in zip(pieces, answers, strict=True):
            if not piece.answer.done():
                piece.answer.set_result(answer)

    async def _report(self, errand: Errand, patience_seconds: float) -> Report:
        try:
            return await asyncio.to_thread(self._call, errand, patience_seconds)
        except ClusterFailed as exc:
            detail = DESERTED if self._deserted() else str(exc).removesuffix(".")
            raise SinkUnavailable(sink=errand.sink, detail=detail) from exc

    def _call(self, errand: Errand, patience_seconds: float) -> Report:
        packed = self._cluster.call(work, msgspec.msgpack.encode(errand), patience_seconds)
        return msgspec.msgpack.decode(packed, type=Report)
