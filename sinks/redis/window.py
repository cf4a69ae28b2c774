"""The ranking of the last 10 minutes, `top:content:10m`, and the buckets that it is built from.

`lua/write.lua` logs what it counts, and this sums the logs up: at once after a write when there is little, otherwise so
often that a content is ranked once for many of its events, in calls of `lua/window.lua` that are all short. They write
totals and no differences. The logs are the truth: whatever goes wrong, the window is built again from them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import chain, islice
from typing import cast

from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkUnavailable
from sinks.redis.client import RedisClient, Script, script
from sinks.redis.keys import (
    BUILDING,
    LOGGED_BYTES,
    WINDOW,
    WINDOW_EXPIRY_SECONDS,
    Call,
    bucket_expiry_seconds,
    bucket_key,
    bucket_of,
    kept_buckets,
    log_key,
    logged,
    sizes_call,
    window_buckets,
    window_call,
)

PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 4.0  # with the 5 s of a bucket within the 10 s that are promised
PAUSE_FACTOR = 30  # a pass that took long is followed by a pause that is so much longer: 3 % of the reader's loop
SLICE = 500  # contents a call of `window.lua`: 1 ms of Redis at most
READ_BYTES = LOGGED_BYTES * 20_000  # of a log at a time: 3 ms of the reader's loop
SHOWN_BYTES = READ_BYTES  # of logs are summed up for their buckets in a pass, or one that is larger
GROWING_PASSES_MAX = 20  # so many passes wait for a log that is larger, and grows
ATTEMPTS = 3
DELETED = "the keys of the window are deleted again and again"

_log = logging.getLogger(__name__)


class _Outdated(Exception):
    """The window or its logs are not what we left."""


class _Sums:
    """What the window holds, as we know it; some 100 bytes a content."""

    def __init__(self, word: str) -> None:
        self.word = word
        """Redis has it from our last call. A new one with each pass shows when Redis has gone back in time."""
        self.target = BUILDING
        self.totals: dict[int, int] = {}
        self.changed: set[int] = set()
        """Contents whose totals the window has not got yet."""
        self.read: dict[int, int] = {}
        """How many bytes of each bucket's log are in the totals."""

    def add(self, data: bytes, sign: int) -> None:
        totals = self.totals
        for content, n in logged(data):
            totals[content] = totals.get(content, 0) + sign * n
            self.changed.add(content)


class Window:
    """The window in `redis`, at the time of `clock` (Unix seconds)."""

    def __init__(self, redis: RedisClient, clock: Callable[[], float]) -> None:
        self.failure: SinkError | None = None
        """Why the last slide failed."""
        self._redis = redis
        self._clock = clock
        self._script = script("window")
        self._sizes = script("sizes")
        self._task: asyncio.Task[None] | None = None
        self._keeper = secrets.token_hex(8)
        self._takes_over = True
        self._sums: _Sums | None = None  # None: the window is not ours, or not what we left
        self._shown: dict[int, int] = {}  # how many bytes of its log a bucket's sorted set has
        self._growing: dict[int, tuple[int, int]] = {}  # the size of a large log, and for how many passes it has grown
        self._lock = asyncio.Lock()
        self._written = asyncio.Event()
        self._pause_seconds = 0.0

    async def slide(self) -> None:
        """Bring the window to the present, and its buckets, save those that are still growing fast."""
        async with self._lock:
            began = asyncio.get_running_loop().time()
            try:
                await self._slide()
            except SinkError as exc:
                self.failure = exc
                raise
            self.failure = None
            took = asyncio.get_running_loop().time() - began
            self._pause_seconds = min(max(PAUSE_SECONDS_MIN, PAUSE_FACTOR * took), PAUSE_SECONDS_MAX)

    def probes(self) -> list[tuple[Script, Call]]:
        """Calls to every command of the window's scripts."""
        word = self._word()
        ranking = window_call(word, "ZADD", 1, 1, target=BUILDING)
        calls = [window_call(word, "begin", ""), ranking, window_call(word, "show")]
        calls += [window_call(word, "ZREM", 1), ranking]
        return [(self._sizes, sizes_call([bucket_of(self._clock())])), *((self._script, call) for call in calls)]

    def written(self) -> None:
        """There are new events in its buckets."""
        self._written.set()

    def forget(self) -> None:
        """Redis may have gone back in time: build the window again."""
        self._sums = None

    def keep(self, after_slide: Callable[[], Awaitable[None]], turned_away: Callable[[], Awaitable[None]]) -> None:
        """Slide from now on, and call `after_slide` once a second, `turned_away` when Redis refuses us."""
        self._task = self._task or asyncio.create_task(self._keep(after_slide, turned_away), name="redis window")

    def raise_bug(self) -> None:
        """Raise what ended the task, if it has ended: only a bug does that."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Slide no more: the window expires. Raises what ended the task before."""
        self._takes_over = True
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def _keep(
        self, after_slide: Callable[[], Awaitable[None]], turned_away: Callable[[], Awaitable[None]]
    ) -> None:
        """A failure is logged when it begins; the next write meets it as well."""
        # `stop` cancels, but redis-py sends within asyncio.wait_for, which can lose that (before 3.12; bpo-37658).
        window = self._redis.named(WINDOW)
        told = False  # not `failure`: a write slides, too, and may be the first to see it right again
        looked = 0
        while self._task is not None:
            await self._pause()
            try:
                await self.slide()
            except SinkError as exc:
                if not told:
                    told = True
                    _log.warning("%s can't be kept right and will expire: %s", window, exc, extra={"code": "R517"})
                if isinstance(exc, SinkMisconfigured):
                    await turned_away()
            else:
                if told:
                    told = False
                    _log.info("%s is kept right again", window)
                if looked != (second := int(self._clock())):
                    looked = second
                    with suppress(SinkError):  # the next write meets it as well
                        await after_slide()

    async def _pause(self) -> None:
        """Until the next full second, when a bucket may begin, or a write; but as long as the last pass asks for."""
        if not self.failure:
            await asyncio.sleep(self._pause_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(1 - self._clock() % 1):
                await (asyncio.Event() if self.failure else self._written).wait()
        self._written.clear()

    async def _slide(self) -> None:
        """Try again at once if the window is not what we left: then it is built anew, and the old one stays so long."""
        for _ in range(ATTEMPTS):
            try:
                return await self._pass()
            except _Outdated:
                self._sums = None
            except BaseException:  # a call may still arrive, long after its caller has given it up
                self._sums = None
                raise
        raise SinkUnavailable(sink=self._redis.sink, detail=DELETED)

    async def _pass(self) -> None:
        if not await self._is_ours():
            return
        sums, now = cast("_Sums", self._sums), self._clock()
        buckets = kept_buckets(now)
        found = await self._redis.run(self._sizes, sizes_call(buckets), returns=len(buckets))
        sizes = dict(zip(buckets, found, strict=True))
        current = window_buckets(now)
        await self._sum_up(sums, {bucket: size for bucket, size in sizes.items() if bucket in current})
        await self._rank(sums)
        await self._show_buckets(sums.word, sizes, now)

    async def _is_ours(self) -> bool:
        """Whether we keep the window: others do not take it from us while we live, save one that was just opened.

        Of two that took it from each other, neither would ever finish to build it. Whoever keeps it ranks all events.
        """
        if self._sums is None:
            word = self._word()
            keeper = "" if self._takes_over else self._keeper
            call = window_call(word, "begin", keeper, target=BUILDING)
            if await self._redis.run(self._script, call, returns=1) != [1]:
                return False
            self._takes_over = False
            self._sums, self._shown = _Sums(word), {}
        return True

    async def _sum_up(self, sums: _Sums, sizes: Mapping[int, int]) -> None:
        """Add what the logs of the window's buckets have more, and take out the buckets that have left."""
        for bucket in [bucket for bucket in sums.read if bucket not in sizes]:
            async for data in self._log(bucket, 0, sums.read.pop(bucket)):
                sums.add(data, -1)
        for bucket, size in sizes.items():
            had = sums.read.get(bucket, 0)
            if size < had:
                raise _Outdated
            if size > had:
                async for data in self._log(bucket, had, size):
                    sums.add(data, 1)
                sums.read[bucket] = size

    async def _rank(self, sums: _Sums) -> None:
        changed = {content: sums.totals[content] for content in sums.changed}
        gone = [content for content, total in changed.items() if not total]
        for content in gone:
            del sums.totals[content], changed[content]
        for start in range(0, len(gone), SLICE):
            await self._run(window_call(sums.word, "ZREM", *gone[start : start + SLICE], target=sums.target))
        await self._put(sums.word, changed, sums.target)
        sums.changed.clear()
        if sums.target == BUILDING:
            await self._run(window_call(sums.word, "show"))
            sums.target = WINDOW
        word = self._word()
        await self._run(window_call(sums.word, "stay", len(sums.totals), word))
        sums.word = word

    async def _show_buckets(self, word: str, sizes: Mapping[int, int], now: float) -> None:
        """Bring the sorted sets of some buckets up to their logs, the newest first."""
        left = SHOWN_BYTES
        for bucket in sorted(self._ripe(sizes), reverse=True):
            if sizes[bucket] > left < SHOWN_BYTES:
                break
            totals: dict[int, int] = defaultdict(int)
            async for data in self._log(bucket, 0, sizes[bucket]):
                for content, n in logged(data):
                    totals[content] += n
            await self._put(word, totals, bucket_key(bucket), bucket_expiry_seconds(bucket, now))
            self._shown[bucket] = sizes[bucket]
            left -= sizes[bucket]
        self._shown = {bucket: size for bucket, size in self._shown.items() if bucket in sizes}

    def _ripe(self, sizes: Mapping[int, int]) -> list[int]:
        """The buckets to bring up to their logs: one whose log is large, when it has grown no more for a pass."""
        before, self._growing = self._growing, {}
        ripe = []
        for bucket, size in sizes.items():
            if size == self._shown.get(bucket, 0):
                continue
            grew_from, passes = before.get(bucket, (0, 0))
            self._growing[bucket] = (size, passes + 1)
            if size <= SHOWN_BYTES or size == grew_from or passes >= GROWING_PASSES_MAX:
                ripe.append(bucket)
        return ripe

    async def _put(self, word: str, totals: Mapping[int, int], target: str, keep: int = WINDOW_EXPIRY_SECONDS) -> None:
        """In the order of totals, so that neighbours in the sorted set follow each other: half the cost."""
        by_total: dict[int, list[int]] = defaultdict(list)
        for content, total in totals.items():
            by_total[total].append(content)
        pairs = ((total, content) for total in sorted(by_total) for content in by_total[total])
        while some := [*chain.from_iterable(islice(pairs, SLICE))]:
            await self._run(window_call(word, "ZADD", *some, target=target, keep=keep))

    async def _log(self, bucket: int, start: int, end: int) -> AsyncIterator[bytes]:
        """That stretch of a log, in parts."""
        while start < end:
            size = min(READ_BYTES, end - start)
            data = await self._redis.part(log_key(bucket), start, size)
            if len(data) != size:
                raise _Outdated
            yield data
            start += size

    def _word(self) -> str:
        return self._keeper + secrets.token_hex(8)

    async def _run(self, call: Call) -> None:
        if await self._redis.run(self._script, call, returns=1) != [1]:
            raise _Outdated
