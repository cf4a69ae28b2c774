"""Writes the changes of rows, and keeps the window of those whose time is in the last minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.events import Event, Id, unfolded
from sinks.redis.client import RedisClient, Script, script
from sinks.redis.keys import NEWEST_PREFIX, WINDOW, WINDOW_EXPIRY_SECONDS, Call, bucket_key, window_buckets
from sinks.redis.rows.plan import ROWS, Plan, newest_of
from sinks.redis.window import Window

CALL_EVENTS = 1_000
"""A call takes some 5 ms, and Redis serves nobody else meanwhile."""
ATTEMPTS = 10
RIVALS = "another process changes the same rows again and again"


class RowsWriter:
    """The rows of one stream in `redis`; `follows`: they change."""

    def __init__(self, redis: RedisClient, clock: Callable[[], float], *, follows: bool) -> None:
        self._redis = redis
        self._clock = clock
        self._follows = follows
        self._script = script("rows")

    async def write(self, events: Sequence[Event]) -> int:
        """Apply them, each version once; how many of the rows are new."""
        events = [*unfolded(events, "")]
        starts = range(0, len(events), CALL_EVENTS)
        return sum([await self._write(events[start : start + CALL_EVENTS]) for start in starts])

    async def _write(self, events: Sequence[Event]) -> int:
        for _ in range(ATTEMPTS):
            plan = await self._plan(events)
            call = plan.call()
            if call is None or await self._redis.run(self._script, call, returns=1) == [1]:
                return plan.new
        raise SinkUnavailable(sink=self._redis.sink, detail=RIVALS)

    async def _plan(self, events: Sequence[Event]) -> Plan:
        states = await self.states([event.id for event in events])
        keys = newest_of(events, states)
        found = await self._redis.values([NEWEST_PREFIX + key for key in keys])
        newest = {key: (value or b"").decode() for key, value in zip(keys, found, strict=True)}
        plan = Plan(states, newest, self._clock(), follows=self._follows)
        for event in events:
            plan.add(event)
        return plan

    async def states(self, ids: Sequence[Id]) -> dict[Id, str]:
        """What is known of these rows, as text; empty: nothing."""
        known = list(dict.fromkeys(ids))
        found = await self._redis.fields(ROWS, [str(one) for one in known])
        return {one: (value or b"").decode() for one, value in zip(known, found, strict=True)}

    def probes(self, event: Event) -> list[tuple[Script, Call]]:
        """Calls to every command of the script."""
        plan = Plan({}, {}, self._clock(), follows=self._follows)
        plan.add(event)
        call = plan.call()
        return [(self._script, call)] if call else []


class UnionWindow(Window):
    """The sum of its buckets, made again each time: whoever does it, it comes out the same."""

    def __init__(self, redis: RedisClient, clock: Callable[[], float]) -> None:
        super().__init__(redis, clock)
        self._union = script("union")

    def probes(self) -> list[tuple[Script, Call]]:
        return [(self._union, self._call())]

    def _call(self) -> Call:
        return Call([WINDOW, *map(bucket_key, window_buckets(self._clock()))], [WINDOW_EXPIRY_SECONDS])

    async def _slide(self) -> None:
        await self._redis.run(self._union, self._call(), returns=1)
