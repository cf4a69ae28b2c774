"""Works a plan off: gives each slice its next turn on the cluster, and keeps what the turn brings back.

Dead letters first, then the place: a driver that dies in between gives the turn again, and a letter is kept once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from msgspec import structs

from replicator.app import App
from replicator.contracts.errors import CheckpointUnavailable, ClusterFailed, ReplicatorError
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.retry import Stopped, Trouble, retry
from replicator_spark.backfill.plan import Plan, Share, kept
from replicator_spark.backfill.turn import HELD_SECONDS, TURN_SECONDS, Order, Turn, Written, run
from replicator_spark.session import PATIENCE_SECONDS, Cluster, State, look

LOOK_SECONDS = 2.0
"""How often it is seen whether there are more cores by now."""
SPARE = 2
"""Turns that wait for a core: a core that is free never waits for us, and Spark sees that it could use more."""
STALLED_SECONDS = TURN_SECONDS + HELD_SECONDS + PATIENCE_SECONDS
"""Where no turn ends for so long, those that run have hung: a turn ends by itself."""
STALLED = "no turn has ended for %g s: those that run have hung. Spark ends their processes, and they are given again"

log = logging.getLogger("replicator.spark")

T = TypeVar("T")


class Crew:
    """As many turns at once as the cluster has cores, also when more come. `run` once.

    With a rate they are counted when it begins: each turn gets its part of the rate.
    """

    def __init__(self, app: App, cluster: Cluster, plan: Plan, order: Order, *, task: str) -> None:
        """`order.rate` is that of all turns together; `task` is what an interrupted run is found by."""
        self.plan = plan
        self.sinks = {name: Written() for name in order.sinks}
        """What was written since this run began."""
        self.rows_refused = 0
        self._app = app
        self._cluster = cluster
        self._task = task
        self._letters = DeadLetters(app.store, app.settings, "backfill")
        self._waiting = deque(plan.left)
        self._order = order
        self._stopping = asyncio.Event()
        self._saving = asyncio.Lock()
        self._most = 1
        self._asking = 0
        self._given_up = 0
        self._heard_at = 0.0

    def stop(self) -> None:
        """Begin no more turns; `run` returns when those that run have ended."""
        self._stopping.set()

    def is_deserted(self) -> bool:
        """There is no executor: no turn begins. Blocks."""
        with suppress(ClusterFailed):  # the turns that run are told
            return not self._cluster.state().executors
        return False

    async def run(self) -> bool:
        """All of it. False: `stop` came first. Raises the first failure, after the other turns have ended.

        Raises ClusterFailed at once when Spark has ended, or does not answer.
        """
        failures: list[BaseException] = []
        self._heard_at = time.monotonic()
        at_work = {asyncio.create_task(self._settle())} if self._order.rate and self._waiting else set()
        while at_work or (self._waiting and not self._stopping.is_set()):
            state = await look(self._cluster)
            await self._give_up(state)
            while len(at_work) < self._room(state) and self._waiting:
                at_work.add(asyncio.create_task(self._carry(self._waiting.popleft())))
            ended, at_work = await asyncio.wait(at_work, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            failures += [failure for task in ended if (failure := task.exception())]
            if failures:
                self.stop()
        if failures:
            raise failures[0]
        return await self._done()

    async def _settle(self) -> None:
        """Share the rate among as many turns as the cluster has cores."""
        cores, rate = None, self._order.rate or 0
        while not cores and not self._stopping.is_set():
            cores = await self._ask(self._cluster.settled)
        self._most = min(cores or 1, len(self._waiting))
        self._order = structs.replace(self._order, rate=rate / self._most)

    def _room(self, state: State) -> int:
        """For so many at once: turns, and before them what shares the rate."""
        if self._order.rate:
            return self._most
        return state.cores + SPARE

    async def _give_up(self, state: State) -> None:
        """What hangs; once it is to stop, what waits for an executor, too."""
        if not self._asking or not state.executors:
            self._heard_at = time.monotonic()
        if time.monotonic() - self._heard_at >= STALLED_SECONDS:
            log.error(STALLED, STALLED_SECONDS, extra={"code": ClusterFailed.code})
        elif state.executors or not self._stopping.is_set():
            return
        self._given_up += 1
        self._heard_at = time.monotonic()
        await asyncio.to_thread(self._cluster.cancel)

    async def _ask(self, call: Callable[[], T]) -> T | None:
        """What the cluster answers. None: it was given up."""
        given_up = self._given_up
        self._asking += 1
        try:
            return await asyncio.to_thread(call)
        except ClusterFailed:
            if given_up == self._given_up:
                raise
            return None
        finally:
            self._asking -= 1
            self._heard_at = time.monotonic()

    async def _done(self) -> bool:
        if self.plan.left:
            return False
        await self._save(None)
        return True

    async def _carry(self, number: int) -> None:
        """One slice, turn by turn."""
        while not (share := self.plan.shares[number]).done and not self._stopping.is_set():
            turn = await self._ask(partial(self._cluster.call, partial(run, self._order), share))
            if turn is None:
                continue
            if turn.trouble:
                message = "slice %d is held, on node %s: %s"
                log.error(message, number + 1, turn.node, turn.trouble, extra={"code": "R702"})
            if turn.failure:
                raise _failure(*turn.failure)
            await self._keep(number, share, turn)

    async def _keep(self, number: int, share: Share, turn: Turn) -> None:
        if turn.letters:
            keep = partial(self._letters.keep, turn.letters)
            try:
                await retry(keep, Trouble(), self._app.settings.retry_max_seconds, stopping=self._stopping)
            except Stopped:  # the turn is given again
                return
        self.plan.shares[number] = structs.replace(share, reached=turn.reached, done=turn.done)
        self.rows_refused += turn.rows_refused
        self.sinks |= {name: added(self.sinks[name], written) for name, written in turn.sinks.items()}
        await self._save(self.plan)

    async def _save(self, plan: Plan | None) -> None:
        """Without it, more would be written again."""
        async with self._saving:
            text = kept(plan) if plan else None
            try:
                await asyncio.to_thread(self._app.store.save_progress, self._app.settings.slot, self._task, text)
            except CheckpointUnavailable as exc:
                log.error("%s", exc)


def _failure(problem: str, cure: str, code: str) -> ReplicatorError:
    """As it was on the node."""
    failure = ReplicatorError(problem, cure)
    failure.code = code
    return failure


def added(one: Written, other: Written) -> Written:
    """Both together."""
    return Written(
        events=one.events + other.events,
        new=None if other.new is None else (one.new or 0) + other.new,
        dead_letters=one.dead_letters + other.dead_letters,
    )
