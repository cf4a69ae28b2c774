"""Pause, resume and retry: in the running replicator, or on disk while none runs.

`pipeline.py` keeps a pause and takes the sink out; here it is said whether that goes, and how long it goes well.
"""

from __future__ import annotations

import asyncio
import time

from replicator.contracts.errors import ReplicatorError, command
from replicator.contracts.events import Pause
from replicator.contracts.settings import CoreSettings
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.lane import Lane
from replicator.operations.control.address import Answer, Request
from replicator.operations.status.text import outlook
from replicator.operations.status.wal import loses_slot, standing_still
from replicator.operations.watchdog import Watchdog
from replicator.pipeline import Pipeline
from replicator.source import slot as slots
from replicator.source.takeover import keep_pause, pauses

WHERE = "Run the command where that one runs. If it is this machine, stop the replicator that waits first"
APART = "Give each replicator its own RUNTIME_DIRECTORY, for `run` and for this command, or another REPLICATOR_SLOT"
ONLY = "no other sink would be left. Stop the replicator instead: PostgreSQL keeps the WAL until it runs again"


def pause_of(request: Request) -> Pause:
    """As it is kept."""
    return Pause(until=None if request.seconds is None else time.time() + request.seconds)


class Pauses:
    """Of the running replicator."""

    def __init__(self, watchdog: Watchdog, settings: CoreSettings, store: CheckpointStore) -> None:
        self._watchdog = watchdog
        self._slot, self._sinks = settings.slot, settings.sinks
        self._store = store
        self._pausing = asyncio.Lock()

    @property
    def _pipeline(self) -> Pipeline:
        return self._watchdog.pipeline

    async def act(self, request: Request) -> Answer:
        """Do it. Raises CheckpointError: then nothing was done."""
        if other := await self._other_cluster(request.system_identifier):
            return _refused(other, APART)
        if standby := self._watchdog.standby:
            return _refused(f"this replicator is the standby, {standby}", WHERE)
        if self._pipeline.trouble.standby:  # it has read, and another one has taken the slot from it
            return _refused(f"this replicator no longer reads: {self._pipeline.trouble.message}", WHERE)
        if request.do == "tail":
            return self._tail(request)
        if request.sink not in self._sinks:
            return _refused(f"the running replicator has no sink {request.sink}, only {', '.join(self._sinks)}")
        deeds = {"pause": self._pause, "resume": self._resume, "retry": self._retry}
        return await deeds[request.do](request)

    async def _other_cluster(self, meant: str) -> str:
        """That the command means another replicator; else empty."""
        stored = self._pipeline.checkpoint
        if meant and stored is None:
            stored = await asyncio.to_thread(self._store.load, self._slot)
        if not meant or stored is None or meant == stored.system_identifier:
            return ""
        return (
            f"the replicator that listens here reads slot {self._slot} of the PostgreSQL cluster"
            f" {stored.system_identifier}, and these settings mean that of {meant}"
        )

    def _tail(self, request: Request) -> Answer:
        if request.sink in self._pipeline.pauses:
            return _refused(f"sink {request.sink} is paused: it gets nothing")
        return Answer(done=True, lines=[])

    async def _paused(self) -> set[str]:
        """The sinks that are paused, those included that the pipeline does not know of before it reads."""
        kept = await asyncio.to_thread(pauses, self._store, self._slot, self._sinks, time.time())
        return self._pipeline.pauses.keys() | kept.keys()

    async def _pause(self, request: Request) -> Answer:
        pause = pause_of(request)
        async with self._pausing:  # of two that come at once the second sees the first
            if not set(self._sinks) - await self._paused() - {request.sink}:
                return _refused(ONLY)
            await self._pipeline.pause(request.sink, pause)
        at = next((lane.reached for lane in self._pipeline.fan_out.every if lane.name == request.sink), None)
        now = self._watchdog.status()
        still = standing_still(now.wal, now.slot.safe_wal_bytes)
        lines = [pause.describe(request.sink, at), f"WAL kept for the slot: {outlook(still)}"]
        problem, cure = loses_slot(request.sink, pause, still)
        if problem:
            lines.append(f"WARNING: {problem}. {cure}")
        return Answer(done=True, lines=lines)

    async def _resume(self, request: Request) -> Answer:
        if request.sink not in await self._paused():
            return Answer(done=True, lines=[f"sink {request.sink} is not paused"])
        await self._pipeline.resume(request.sink)
        return Answer(done=True, lines=[f"sink {request.sink} continues from its position; `status` shows its lag"])

    async def _retry(self, request: Request) -> Answer:
        lanes: dict[str, Lane] = {lane.name: lane for lane in self._pipeline.fan_out.lanes}
        if request.sink in self._pipeline.pauses:
            return _refused(f"sink {request.sink} is paused; {command(f'resume {request.sink}')} ends that")
        if request.sink not in lanes:
            return _refused(f"sink {request.sink} is not open yet: {self._pipeline.trouble.message}")
        trouble = lanes[request.sink].trouble.message
        if not lanes[request.sink].hurry():
            return Answer(done=True, lines=[f"sink {request.sink} is not in trouble: there is nothing to retry"])
        return Answer(done=True, lines=[f"sink {request.sink} is tried again now; the trouble until now: {trouble}"])


def _refused(*lines: str) -> Answer:
    return Answer(done=False, lines=[*lines])


async def act_alone(request: Request, settings: CoreSettings, store: CheckpointStore, path: object) -> Answer:
    """While no replicator runs here: keep it for the next start, unless one runs elsewhere."""
    state = await slots.look(settings.postgres_dsn.get_secret_value(), settings.slot, f"replicator {request.do}")
    if state is not None and state.active_pid is not None:
        raise ReplicatorError(
            f"process {state.active_pid} of PostgreSQL sends replication slot {settings.slot} to a replicator that does"
            f" not run here: nothing listens at {path}",
            "Run this command where that replicator runs (in its container), with its settings and as its user",
        )
    if request.do == "retry":
        return _refused("no replicator runs here, so nothing is tried")
    return await asyncio.to_thread(_keep, request, settings, store)


def _keep(request: Request, settings: CoreSettings, store: CheckpointStore) -> Answer:
    known, sink = pauses(store, settings.slot, settings.sinks, time.time()), request.sink
    if request.do == "resume":
        keep_pause(store, settings.slot, sink, None)
        was = "continues from its position with the next start" if sink in known else "is not paused"
        return Answer(done=True, lines=[f"no replicator runs here; sink {sink} {was}"])
    if not set(settings.sinks) - known.keys() - {sink}:
        return _refused(ONLY)
    pause = pause_of(request)
    keep_pause(store, settings.slot, sink, pause)
    return Answer(done=True, lines=[f"no replicator runs here; with the next start {pause.describe(sink, None)}"])
