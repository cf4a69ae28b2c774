"""The Redis sink on a real Redis: exact counts whatever is repeated or killed, newest events, the window, faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from pydantic import SecretStr

from devstack import DevStack
from devstack.process import free_port
from enrichment import EVENT
from replicator.contracts.errors import SinkEmptied, SinkMisconfigured, SinkUnavailable, SinkUnusable, SourceUnavailable
from replicator.contracts.events import Event, Position, SinkPosition
from replicator.contracts.sink import SinkContext
from sinks.redis.client import Generation, RedisClient, Script
from sinks.redis.errors import turned_away_cure
from sinks.redis.keys import Call, bucket_of, kept_buckets
from sinks.redis.settings import RedisSettings
from sinks.redis.sink import RedisSink
from sinks.redis.window import SLICE

NOON = 1_767_873_600.0  # 2026-01-08T12:00:00Z, the start of a bucket
WINDOW = "top:content:10m"
Ask = Callable[[], Awaitable[str]]
DEADLINE_SECONDS = 30.0  # for what a background task or a server does soon


class Clock:
    """The replicator's clock, in our hand."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time."""
        return self.now


class Server:
    """Redis as a test looks at it, and time as Redis's keys feel it."""

    def __init__(self, stack: DevStack) -> None:
        self.service = stack.redis
        self.client: Any = redis.Redis.from_url(stack.redis.url, decode_responses=True)
        self.raw: Any = redis.Redis.from_url(stack.redis.url)

    def cli(self, *words: str) -> str:
        """What an operator sees."""
        command = ["redis-cli", "-p", str(self.service.port), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def counts(self) -> dict[int, int]:
        """Every content's count."""
        keys = self.client.keys("content:count:*")
        return {int(key.rpartition(":")[2]): int(self.client.get(key)) for key in keys}

    def window(self) -> dict[int, int]:
        """The ranking."""
        return {int(member): int(score) for member, score in self.client.zrange(WINDOW, 0, -1, withscores=True)}

    def pass_time(self, clock: Clock, seconds: float) -> None:
        """Move the clock, and every key as far towards its end."""
        clock.now += seconds
        keys = self.client.keys("*")
        with self.client.pipeline() as reading, self.client.pipeline() as changing:
            for key in keys:
                reading.pttl(key)
            for key, left_ms in zip(keys, reading.execute(), strict=True):
                if left_ms >= 0:
                    changing.pexpire(key, max(0, left_ms - int(seconds * 1000)))
            changing.execute()


@pytest.fixture(scope="module")
def module_stack() -> Iterator[DevStack]:
    """A Redis that keeps what it answered over a kill."""
    with DevStack("redis", redis_settings={"appendonly": "yes", "appendfsync": "always"}) as stack:
        yield stack


@pytest.fixture
def server(module_stack: DevStack) -> Iterator[Server]:
    """It, empty."""
    found = Server(module_stack)
    found.client.flushall()
    yield found
    found.client.close()
    found.raw.close()


def sink_at(
    url: str, clock: Clock | None = None, *, timeout_seconds: float = 10.0, prefix: str = "", origin: str | Ask = ""
) -> RedisSink:
    """A sink that is not open yet."""
    settings = RedisSettings(redis_url=SecretStr(url), redis_timeout_seconds=timeout_seconds, redis_prefix=prefix)

    async def told() -> str:
        return str(origin)

    context = SinkContext(EVENT, origin=told if isinstance(origin, str) else origin)
    return RedisSink(settings, context, clock=clock) if clock else RedisSink(settings, context)


@contextlib.asynccontextmanager
async def unopened(
    url: str, clock: Clock | None = None, *, timeout_seconds: float = 10.0, prefix: str = "", origin: str | Ask = ""
) -> AsyncIterator[RedisSink]:
    """A sink whose window moves only when the test moves it."""
    sink = sink_at(url, clock, timeout_seconds=timeout_seconds, prefix=prefix, origin=origin)
    try:
        yield sink
    finally:
        await sink.close()


@contextlib.asynccontextmanager
async def opened(
    url: str, clock: Clock | None = None, *, prefix: str = "", origin: str = ""
) -> AsyncIterator[RedisSink]:
    """A sink as a lane has it."""
    async with unopened(url, clock, prefix=prefix, origin=origin) as sink:
        await sink.open()
        yield sink


WRITTEN = SinkPosition(position=Position(1, 1), end_lsn=2)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Return when `condition` holds."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110  the condition is in another process
            await asyncio.sleep(0.01)
    assert condition(), what


def event(number: int, *, key: int = 1, at: float = NOON) -> Event:
    """An event whose JSON tells its number."""
    body = json.dumps({"event_id": number, "content_id": key}).encode()
    return Event(commit_lsn=1, ordinal=1, id=number, key=key, ts_us=round(at * 1_000_000), json=body)


def events(random_source: random.Random, first: int, count: int, *, contents: int = 50) -> list[Event]:
    """Consecutive ids, out of order in time."""
    return [
        event(number, key=random_source.randrange(contents), at=NOON - random_source.uniform(0, 500))
        for number in range(first, first + count)
    ]


@pytest.fixture
def random_source() -> random.Random:
    """Repeatable with the printed seed."""
    seed = random.randrange(2**32)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  shown when the test fails
    return random.Random(seed)  # noqa: S311  not a secret


async def test_keys_are_as_the_contract_says(server: Server) -> None:
    """Types, values and expiries, as redis-cli shows them."""
    async with opened(server.service.url, Clock(NOON + 2)) as sink:
        assert list(await sink.write([event(10, key=7), event(11, key=7), event(12, key=-3)])) == []
        assert json.loads(server.cli("GET", "content:last:7")) == {"event_id": 11, "content_id": 7}
        assert server.cli("GET", "content:count:7") == "2"
        await until(lambda: server.window() == {7: 2, -3: 1}, "the ranking")
        await sink.window.slide()
        assert server.cli("ZREVRANGE", WINDOW, "0", "10", "WITHSCORES").split() == ["7", "2", "-3", "1"]
        bucket = f"top:content:bucket:{int(NOON)}"
        assert server.cli("ZREVRANGE", bucket, "0", "10", "WITHSCORES").split() == ["7", "2", "-3", "1"]
        assert server.cli("TTL", "content:count:7") == "-1"
        assert 3590 <= int(server.cli("TTL", "content:last:7")) <= 3600
        assert 110 <= int(server.cli("TTL", WINDOW)) <= 120
        assert 890 <= int(server.cli("TTL", bucket)) <= 900


async def test_replays_and_overlaps_count_once(server: Server, random_source: random.Random) -> None:
    """Any stretch may come again, in any order, within a batch too."""
    stream = events(random_source, 65_000, 3_000)  # over the border of two pages
    async with opened(server.service.url, Clock()) as sink:
        for _ in range(40):
            start = random_source.randrange(len(stream))
            stretch = stream[start : start + random_source.randrange(1, 1_000)]
            await sink.write(random_source.sample(stretch + stretch[:50], len(stretch + stretch[:50])))
        for start in range(0, len(stream), 700):
            await sink.write(stream[start : start + 700])
        await sink.window.slide()
    assert server.counts() == Counter(e.key for e in stream)
    assert server.window() == Counter(e.key for e in stream)


def odd(random_source: random.Random) -> Event:
    """An event of any id, content and time, or another view of one that was there before."""
    ends = [-(2**63), -65_537, -1, 0, 65_535, 65_536, 2**63 - 1]
    number = random_source.choice([*ends, *random_source.choices(range(100_000, 102_000), k=40)])
    its = random.Random(number)  # noqa: S311  not a secret
    key = its.choice([-7, 2**63 - 1, *range(2_000)])
    at = its.choice(
        [-62_135_596_800, -1, 253_402_300_799, *(NOON + ago for ago in range(-900, 700, 90)), NOON + 86_405]
    )
    lsn = random_source.choice([0, 1, 9, 10, 2**63])
    body = json.dumps({"event_id": number, "content_id": key, "lsn": lsn}).encode()
    return Event(commit_lsn=lsn, ordinal=1, id=number, key=key, ts_us=int(at) * 1_000_000, json=body)


async def test_a_write_leaves_what_its_events_leave_one_by_one(server: Server, random_source: random.Random) -> None:
    """Several calls of many pages, buckets and contents, ids and times at their ends, views of one event."""
    stream = [odd(random_source) for _ in range(2_000)]
    async with opened(server.service.url, Clock(), prefix="a:") as whole:
        await whole.write(stream)
        await whole.window.slide()
    async with opened(server.service.url, Clock(), prefix="b:") as single:
        for one in stream:
            await single.write([one])
        await single.window.slide()

    def held(prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in server.client.keys(f"{prefix}*"):
            if "log" in key:
                continue  # in the order of the calls
            if server.client.type(key) == "zset":
                found[key.removeprefix(prefix)] = server.client.zrange(key, 0, -1, withscores=True)
            elif "seen" in key:
                found[key.removeprefix(prefix)] = server.client.bitcount(key)
            else:
                found[key.removeprefix(prefix)] = server.client.get(key)
        return {key: value for key, value in found.items() if "generation" not in key and "window" not in key}

    assert held("b:") == held("a:")


async def test_another_sink_does_not_count_again(server: Server, random_source: random.Random) -> None:
    """A restarted replicator and a backfill see the same bits."""
    stream = events(random_source, 1, 500)
    for _ in range(2):
        async with opened(server.service.url, Clock()) as sink:
            await sink.write(stream)
    assert server.counts() == Counter(e.key for e in stream)


async def test_extreme_ids_stay_exact(server: Server) -> None:
    """Event and content ids beyond 2^53, up to both ends of 64 bits, are kept apart."""
    edges = [-(2**63), -(2**63) + 1, -(2**53) - 1, -65_537, -65_536, -1, 0, 65_535, 65_536, 2**53 + 1, 2**63 - 1]
    async with opened(server.service.url, Clock()) as sink:
        for _ in range(2):
            await sink.write([event(number, key=key) for number in edges for key in [number]])
        await sink.window.slide()
        assert server.counts() == dict.fromkeys(edges, 1)
        assert server.window() == dict.fromkeys(edges, 1)
        assert json.loads(server.client.get(f"content:last:{2**63 - 1}"))["event_id"] == 2**63 - 1


async def test_full_batches_of_distinct_everything(server: Server, random_source: random.Random) -> None:
    """No limit of Lua is met when every event has its own page, content and bucket."""
    async with opened(server.service.url, Clock()) as sink:
        batch = [event(n * 65_536, key=n, at=NOON + random_source.randrange(-800, 80_000)) for n in range(16_000)]
        for _ in range(2):
            await sink.write(batch)
        assert server.counts() == {e.key: 1 for e in batch}


async def test_the_newest_event_stays(server: Server, random_source: random.Random) -> None:
    """By event_ts, then by id, numerically, whatever the order of arrival."""
    stream = [event(n, at=NOON - random_source.randrange(5)) for n in range(-200, 200)]
    newest = max(stream, key=lambda e: (e.ts_us or 0, e.id))
    random_source.shuffle(stream)
    async with opened(server.service.url, Clock()) as sink:
        for start in range(0, len(stream), 7):
            await sink.write(stream[start : start + 7])
        assert json.loads(server.client.get("content:last:1"))["event_id"] == newest.id


@pytest.mark.parametrize(("older_at", "older_id"), [(NOON - 1e-6, 9), (NOON, 4), (-6e10, 10**15)])
async def test_an_older_event_never_comes_back(server: Server, older_at: float, older_id: int) -> None:
    """Not even after the newest has expired: an older one does not take its place, nor does a replay."""
    async with opened(server.service.url, Clock()) as sink:
        await sink.write([event(5)])
        await sink.write([event(older_id, at=older_at)])
        assert json.loads(server.client.get("content:last:1"))["event_id"] == 5
        server.client.delete("content:last:1")
        await sink.write([event(older_id, at=older_at), event(5)])
        assert server.client.get("content:last:1") is None
        await sink.write([event(6)])
        assert json.loads(server.client.get("content:last:1"))["event_id"] == 6


async def test_the_same_event_again_replaces_itself(server: Server) -> None:
    """With the same position, too: after a restart its content may have been corrected. What has expired stays away."""
    async with opened(server.service.url, Clock()) as sink:
        await sink.write([event(5)])
        server.client.expire("content:last:1", 100)
        corrected = event(5)
        corrected.json = b'{"event_id":5,"corrected":true}'
        await sink.write([corrected])
        assert '{"event_id":5,"corrected":true}' == server.client.get("content:last:1")
        assert 0 < server.client.ttl("content:last:1") <= 100
        assert {1: 1} == server.counts()
        server.client.delete("content:last:1")
        await sink.write([corrected])
        assert server.client.get("content:last:1") is None


async def test_events_without_a_time_are_refused(server: Server) -> None:
    """Nothing of them is counted, their neighbours are."""
    lost = event(1, key=1)
    lost.ts_us = None
    async with opened(server.service.url, Clock()) as sink:
        refused = await sink.write([lost, event(2, key=2)])
        assert [refusal.event for refusal in refused] == [lost]
        assert len(await sink.write([lost])) == 1
    assert server.counts() == {2: 1}


def expected_window(written: Sequence[Event], now: float, *, tolerance_seconds: float) -> Counter[int]:
    """Events of the last ten minutes; the tolerance widens (or, negative, narrows) them on both ends."""
    earliest, latest = now - 600 - tolerance_seconds, now + tolerance_seconds
    return Counter(e.key for e in written if earliest <= (e.ts_us or 0) / 1e6 <= latest)


def assert_window_right(server: Server, written: Sequence[Event], now: float) -> None:
    """Within 10 s on either side."""
    window = server.window()
    least = expected_window(written, now, tolerance_seconds=-10)
    most = expected_window(written, now, tolerance_seconds=10)
    assert all(least[key] <= window.get(key, 0) <= most[key] for key in most | window), now
    assert all(score > 0 for score in window.values())


async def test_the_window_is_right_at_any_moment(server: Server, random_source: random.Random) -> None:
    """Random traffic, late, early and repeated, over hours with pauses longer than every expiry, beside a recount."""
    clock = Clock(NOON + random_source.random() * 60)
    written: list[Event] = []
    async with unopened(server.service.url, clock) as sink:
        for _ in range(250):
            gap = random_source.choice([0.3, 1, 4, 7, 55, 70, 119, 130, 595, 700, 1_000])
            server.pass_time(clock, random_source.uniform(0, gap))
            if random_source.random() < 0.7:
                ahead = random_source.choice([0, 0, 30, 3_000])
                batch = [
                    event(len(written) + n, key=random_source.randrange(8), at=clock() + shift)
                    for n in range(random_source.randrange(30))
                    for shift in [random_source.uniform(-850, ahead)]
                ]
                written += batch
                await sink.write(batch + random_source.sample(written, min(len(written), 5)))
            await sink.window.slide()
            assert_window_right(server, written, clock())
    assert server.counts() == Counter(e.key for e in written)


BUCKETS_SECONDS = 700
"""What is kept for 900 s by Redis's clock is there so long by ours, which the test sets back by 180 s at most."""


class Cut:
    """A sink's calls to Redis, one of which goes wrong."""

    def __init__(self, sink: RedisSink, server: Server, at: int, how: str) -> None:
        self.late: list[Callable[[], Awaitable[Any]]] = []
        """A call that was given up, and has not arrived yet."""
        self.flushed = False
        self._server, self._left, self._how = server, at, how
        for name in ("run", "part"):
            setattr(sink._redis, name, partial(self._call, getattr(RedisClient, name).__get__(sink._redis)))  # noqa: SLF001  between the window and Redis

    def end(self) -> None:
        """Nothing goes wrong any more."""
        self._left = -1

    async def _call(self, call: Callable[..., Awaitable[Any]], *args: Any, **named: Any) -> Any:
        self._left -= 1
        if self._left == -1 and self._how == "flush":
            self._server.client.flushall()
            self.flushed = True
        elif self._left == -1 and self._how == "late":
            self.late.append(partial(call, *args, **named))
            raise SinkUnavailable(sink="redis", detail="no answer")
        answer = await call(*args, **named)
        if self._left == -1 and self._how == "unanswered":
            raise SinkUnavailable(sink="redis", detail="no answer")
        if self._left == -1 and self._how == "cancelled":
            raise asyncio.CancelledError
        return answer


async def test_a_pass_that_is_cut_short(
    server: Server, random_source: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any command: not sent, not answered, arriving late, in a Redis that is emptied, or by the program's end.

    The next pass, of this sink or of the one after a restart, makes the window and its buckets right.
    """
    for name, size in (("SLICE", 2), ("READ_BYTES", 24), ("SHOWN_BYTES", 72), ("GROWING_PASSES_MAX", 2)):
        monkeypatch.setattr(f"sinks.redis.window.{name}", size)
    clock = Clock()
    written: list[Event] = []
    number = may_go_back = 0
    async with contextlib.AsyncExitStack() as stack:
        sink = await stack.enter_async_context(unopened(server.service.url, clock))
        for _ in range(80):
            passed = random_source.choice([0, 0.3, 4, 5, 11, 130, 700])
            server.pass_time(clock, passed)
            if passed == 700:
                may_go_back = 90
            back = min(may_go_back, random_source.choice([0, 0, 0, 7, 70]))
            clock.now -= back
            may_go_back -= back
            ats = [clock() - random_source.choice([0, 3, 8, 300, 590, 850]) for _ in range(random_source.randrange(12))]
            batch = [event(number + n, key=random_source.randrange(9), at=at) for n, at in enumerate(ats)]
            number += len(batch)
            written += batch
            await sink.write(batch)
            how = random_source.choice(["flush", "late", "unanswered", "cancelled"])
            cut = Cut(sink, server, random_source.randrange(25), how)
            with contextlib.suppress(SinkUnavailable, asyncio.CancelledError):
                await sink.window.slide()
            cut.end()
            if cut.flushed:
                written.clear()
            if random_source.random() < 0.2:
                sink = await stack.enter_async_context(unopened(server.service.url, clock))
            await sink.window.slide()
            for arrive in cut.late:
                await arrive()
            assert expected_buckets(written, clock()) == server.window()
            for _ in range(6 * 180):
                if bucket_sums(server, clock()) == expected_buckets(written, clock(), seconds=BUCKETS_SECONDS):
                    break
                await sink.window.slide()
            assert bucket_sums(server, clock()) == expected_buckets(written, clock(), seconds=BUCKETS_SECONDS)


def expected_buckets(written: Sequence[Event], now: float, *, seconds: int = 595) -> Counter[int]:
    """Events of so many seconds before the present bucket, and of that one."""
    newest = bucket_of(now)
    return Counter(e.key for e in written if newest - seconds <= (e.ts_us or 0) / 1e6 < newest + 5)


def bucket_sums(server: Server, now: float) -> Counter[int]:
    """What the sorted sets of those buckets say."""
    sums: Counter[int] = Counter()
    for bucket in [bucket for bucket in kept_buckets(now) if bucket >= bucket_of(now) - BUCKETS_SECONDS]:
        found = server.client.zrange(f"top:content:bucket:{bucket}", 0, -1, withscores=True)
        sums.update({int(content): int(score) for content, score in found})
    return sums


async def test_a_redis_that_went_back_in_time(server: Server) -> None:
    """It has lost its latest writes, as after a failover or a crash, and logs go on behind other events than before."""
    clock = Clock()
    async with unopened(server.service.url, clock) as sink:
        await sink.write([event(1)])
        await sink.window.slide()
        kept = {key: server.raw.dump(key) for key in server.raw.keys("*")}
        await sink.write([event(2), event(3, key=2)])
        await sink.window.slide()
        assert {1: 2, 2: 1} == server.window()
        server.raw.flushall()
        for key, dumped in kept.items():
            server.raw.restore(key, 900_000, dumped)
        await sink.write([event(4, key=4), event(5, key=5), event(6, key=6)])
        await sink.window.slide()
        assert {1: 1, 4: 1, 5: 1, 6: 1} == server.window()
        clock.now += 606
        await sink.window.slide()
        assert {} == server.window()


async def test_two_that_keep_the_window(server: Server) -> None:
    """A replicator that hung while another took over: it leaves the window to the other one while that lives."""
    clock = Clock()
    async with unopened(server.service.url, clock) as one, unopened(server.service.url, clock) as other:
        await one.write([event(1)])
        await one.window.slide()
        await other.window.slide()
        for number in range(2, 8):
            await one.write([event(number)])
            await one.window.slide()
            assert {1: number - 1} == server.window()
            await other.window.slide()
            assert {1: number} == server.window()
        await one.write([event(8)])
        server.client.delete("top:content:window")  # it expires without the other one
        await one.window.slide()
        assert {1: 8} == server.window()
        server.client.set("top:content:window", str(int(NOON)))  # an older release leaves nothing to anybody
        await one.write([event(9)])
        await one.window.slide()
        assert {1: 9} == server.window()


async def test_one_that_builds_a_large_window_is_not_disturbed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one before it, which still runs and still writes."""
    clock = Clock()
    async with unopened(server.service.url, clock) as one, unopened(server.service.url, clock) as other:
        await one.write([event(number, key=number) for number in range(SLICE * 3)])
        await one.window.slide()
        run = other._redis.run  # noqa: SLF001  between the window and Redis

        async def beside(script: Script, call: Call, returns: int = 0) -> list[int]:
            answer = await run(script, call, returns)
            await one.window.slide()
            return answer

        monkeypatch.setattr(other._redis, "run", beside)  # noqa: SLF001
        await other.window.slide()
        assert not one.window.failure
        assert server.window() == dict.fromkeys(range(SLICE * 3), 1)


async def test_a_redis_that_was_restarted_within_a_pass(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lost a log's end, and the log grew again: the window is built anew once the restart is seen."""
    async with unopened(server.service.url, Clock()) as sink:
        await sink._notice_loss()  # noqa: SLF001  once a second else
        await sink.write([event(1, key=1)])
        await sink.window.slide()
        server.client.delete(f"top:content:log:{int(NOON)}", f"top:content:bucket:{int(NOON)}")
        await sink.write([event(2, key=2)])
        await sink.window.slide()
        assert {1: 1} == server.window()

        async def info() -> dict[str, str]:
            return {"run_id": "another"}

        monkeypatch.setattr(sink._redis._redis, "info", info)  # noqa: SLF001  no server changes it that fast
        await sink._notice_loss()  # noqa: SLF001  as above
        await sink.window.slide()
        assert {2: 1} == server.window()


async def test_a_window_that_is_deleted_again_and_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and tried again with the next pass."""
    async with unopened(server.service.url, Clock()) as sink:
        await sink.write([event(1)])
        run = sink._redis.run  # noqa: SLF001  between the window and Redis

        async def after_deletion(script: Script, call: Call, returns: int = 0) -> list[int]:
            server.client.delete("top:content:window")
            return await run(script, call, returns)

        with monkeypatch.context() as patches:
            patches.setattr(sink._redis, "run", after_deletion)  # noqa: SLF001
            with pytest.raises(SinkUnavailable, match="deleted again and again"):
                await sink.window.slide()
            with pytest.raises(SinkUnavailable, match="deleted again and again"):
                sink.look()
        await sink.window.slide()
        sink.look()
        assert {1: 1} == server.window()


async def test_no_call_of_the_window_is_large(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many contents there are: Redis serves others in between."""
    sizes: list[int] = []
    async with unopened(server.service.url, Clock()) as sink:
        await sink.write([event(number, key=number) for number in range(16_000)])
        run = sink._redis.run  # noqa: SLF001  between the window and Redis

        async def counted(script: Script, call: Call, returns: int = 0) -> list[int]:
            sizes.append(len(call.args))
            return await run(script, call, returns)

        monkeypatch.setattr(sink._redis, "run", counted)  # noqa: SLF001
        await sink.window.slide()
        assert server.window() == dict.fromkeys(range(16_000), 1)
    assert max(sizes) <= 4 + 2 * SLICE
    assert sum(sizes) >= 4 * 16_000  # the window and the bucket


async def test_the_window_slides_by_itself(server: Server) -> None:
    """With no traffic an event leaves after ten minutes, and one that lies three hours ahead enters in time."""
    clock = Clock()
    async with opened(server.service.url, clock) as sink:
        await sink.write([event(1, key=1), event(2, key=2, at=NOON + 10_800), event(3, key=3, at=NOON + 90_000)])
        await until(lambda: server.window() == {1: 1}, "it entered at once")
        clock.now += 606
        await until(lambda: server.window() == {}, "it left")
        clock.now = NOON + 10_800
        await until(lambda: server.window() == {2: 1}, "it entered")


async def test_a_clock_set_back_takes_the_window_along(server: Server) -> None:
    """By little or by much."""
    clock = Clock()
    async with unopened(server.service.url, clock) as sink:
        await sink.write([event(1, key=1), event(2, key=2, at=NOON - 30), event(3, key=3, at=NOON - 610)])
        await sink.window.slide()
        assert server.window() == {1: 1, 2: 1}
        clock.now -= 20
        await sink.window.slide()
        assert server.window() == {2: 1, 3: 1}
        clock.now -= 100
        await sink.window.slide()
        assert server.window() == {3: 1}
        clock.now += 120
        await sink.window.slide()
        assert server.window() == {1: 1, 2: 1}


async def test_the_window_ends_with_the_replicator(server: Server) -> None:
    """A closed sink refreshes nothing, so that the window expires; an open one does."""
    clock = Clock()
    async with opened(server.service.url, clock) as sink:
        await sink.write([event(1)])
        server.client.expire(WINDOW, 5)
        await until(lambda: server.client.ttl(WINDOW) > 110, "the expiry was refreshed")
    server.pass_time(clock, 121)
    assert server.client.exists(WINDOW) == 0


@pytest.mark.parametrize("resumes", [True, False])
async def test_what_is_gone_is_said(server: Server, *, resumes: bool) -> None:
    """From when it opens until all is made again, by any process; not of a new Redis, nor of one that has it all."""
    async with unopened(server.service.url) as sink:
        await sink.open(WRITTEN if resumes else None)
        assert resumes == says_lost(sink)
        await sink.write([event(1)])
    async with unopened(server.service.url) as again, unopened(server.service.url) as rebuild:
        await again.open(WRITTEN)
        assert resumes == says_lost(again)
        await rebuild.filled("another")
        await again._look()  # noqa: SLF001  once a second else
        assert resumes == says_lost(again)
        await rebuild.filled(await rebuild.generation())
        await again._look()  # noqa: SLF001
        assert not says_lost(again)
        server.client.flushall()
        await again._look()  # noqa: SLF001
        await again.write([event(2)])
        assert says_lost(again)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("finished", [True, False])
async def test_a_rebuild_that_was_faster(server: Server, *, runs: bool, finished: bool) -> None:
    """It found nothing, and nobody knows of the loss yet: whether it has finished is what counts."""
    async with unopened(server.service.url) as sink, unopened(server.service.url) as rebuild:
        if runs:
            await sink.open(WRITTEN)
            await rebuild.filled(await rebuild.generation())
            server.client.flushall()
        generation = await rebuild.generation()
        if finished:
            await rebuild.filled(generation)
        if runs:
            await sink._look()  # noqa: SLF001  once a second else
        else:
            await sink.open(WRITTEN)
        assert finished != says_lost(sink)
    async with unopened(server.service.url) as first:  # a sink that is new in the settings, beside its first rebuild
        server.client.flushall()
        await first.generation()
        await first.open(None)
        assert not says_lost(first)


async def test_a_paused_sink_remembers_its_loss(server: Server) -> None:
    """It is not opened, so Redis is not asked; once it is, Redis knows better."""
    async with opened(server.service.url) as first:
        whole = first.remember()
        server.client.flushall()
        await first._look()  # noqa: SLF001  once a second else
        memory = first.remember()
    async with unopened(server.service.url) as again:
        again.recall(memory)
        assert says_lost(again)
        assert any(not found.ok and "lost what it had" in found.what for found in await again.check())
        async with unopened(server.service.url) as rebuild:
            await rebuild.filled(await rebuild.generation())
            assert whole == rebuild.remember()
        await again.open(None)
        assert not says_lost(again)
        assert whole == again.remember()


@pytest.mark.parametrize("policy", ["allkeys-random", "volatile-random"])
async def test_keys_that_are_thrown_away_are_said(server: Server, policy: str) -> None:
    """Until all is counted anew, over restarts, too. Where only keys go that expire anyway, nothing is said."""
    evicts = policy == "allkeys-random"
    async with opened(server.service.url) as sink:
        await sink.write([event(1)])
        for number in range(50):
            server.client.set(f"other:{number}", "x" * 100_000, ex=600)
        await sink._look()  # noqa: SLF001  once a second else
        server.client.config_set("maxmemory-policy", policy)
        server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] - 1_000_000)
        try:
            await until(lambda: server.client.set("other:0", "") and server.client.info()["evicted_keys"], "evictions")
        finally:
            server.client.config_set("maxmemory", 0)
            server.client.config_set("maxmemory-policy", "noeviction" if evicts else policy)
        await sink._look()  # noqa: SLF001
        assert evicts == says_evicted(sink)
        memory = sink.remember()
    server.client.config_set("maxmemory-policy", "noeviction")
    async with unopened(server.service.url) as again, unopened(server.service.url) as rebuild:
        again.recall(memory)
        assert evicts == says_evicted(again)
        await again.open(WRITTEN)
        assert evicts == says_evicted(again)
        await rebuild.filled(await rebuild.generation())
        await again._look()  # noqa: SLF001
        assert evicts == says_evicted(again), "what is seen already is not counted again"
        await rebuild.empty()
        await rebuild.filled(await rebuild.generation())
        await again._look()  # noqa: SLF001
        assert not says_evicted(again)


async def test_a_rebuild_that_ends_while_keys_are_thrown_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls the keys whole between what a look reads and what it writes: the next look says it all the same."""
    async with opened(server.service.url) as sink, unopened(server.service.url) as rebuild:
        await rebuild.empty()
        rebuilt, read = await rebuild.generation(), sink._redis.generation  # noqa: SLF001
        await sink._look()  # noqa: SLF001  once a second else
        assert says_lost(sink), "until it is finished"

        async def meanwhile(new: str) -> Generation:
            found = await read(new)
            await rebuild.filled(rebuilt)
            return found._replace(evicted=found.evicted + 1, policy="allkeys-lru")

        monkeypatch.setattr(sink._redis, "generation", meanwhile)  # noqa: SLF001
        for _ in range(2):
            await sink._look()  # noqa: SLF001
            assert says_evicted(sink)


def says_evicted(sink: RedisSink) -> bool:
    """Whether Redis has thrown keys away; and it names the cure."""
    try:
        sink.look()
    except SinkEmptied as exc:
        return "has evicted keys" in str(exc) and "--from-empty" in exc.cure
    return False


def says_lost(sink: RedisSink) -> bool:
    """Whether it has lost keys, and names the cure."""
    try:
        sink.look()
    except SinkEmptied as exc:
        return "was emptied, or came back without its keys" in str(exc) and "rebuild-redis" in exc.cure
    return False


async def test_a_restart_is_said_once(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run_id is another run; two that answer in turn are logged once."""
    async with unopened(server.service.url) as sink:
        runs = iter(["a", "b", "a", "b", "c"])

        async def info() -> dict[str, str]:
            return {"run_id": next(runs)}

        monkeypatch.setattr(sink._redis._redis, "info", info)  # noqa: SLF001  no server changes it that fast
        for _ in range(5):
            await sink._notice_loss()  # noqa: SLF001  once a second else
    assert 2 == caplog.text.count("was restarted, or another one answers now")
    assert "was emptied" not in caplog.text


@pytest.mark.parametrize("released", [True, False])
async def test_a_restart_while_we_were_down(
    server: Server, caplog: pytest.LogCaptureFixture, *, released: bool
) -> None:
    """A power cut ends both. What an earlier release remembers has no run in it: then nothing is said."""
    async with opened(server.service.url) as sink:
        await sink.write([event(1)])
        memory = sink.remember()
    for restarts in (False, True):
        if restarts:
            server.service.kill()
            server.service.start()
        async with unopened(server.service.url) as again:
            again.recall(memory if released else "")
            await again.open(WRITTEN)
            assert (restarts and released) == ("was restarted, or another one answers now" in caplog.text)
            assert not says_lost(again)
            assert (memory == again.remember()) != restarts


async def test_so_many_runs_are_remembered(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest; none where INFO is denied."""
    async with unopened(server.service.url) as sink:
        runs = iter(["", *map(str, range(100))])

        async def info() -> dict[str, str]:
            return {"run_id": next(runs)}

        monkeypatch.setattr(sink._redis._redis, "info", info)  # noqa: SLF001  no server changes it that fast
        await sink._notice_loss()  # noqa: SLF001  once a second else
        assert "" == sink.remember()
        for _ in range(100):
            await sink._notice_loss()  # noqa: SLF001
        assert [f"{run}=0" for run in range(84, 100)] == sink.remember().split()


async def test_closing_ends_even_if_a_cancellation_is_lost(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `asyncio.wait_for` does it until Python 3.12 when what it waits for ends at the same moment."""
    sliding = asyncio.Event()

    async def slide() -> None:
        sliding.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    sink = sink_at(server.service.url, Clock())
    await sink.open()
    monkeypatch.setattr(sink.window, "slide", slide)
    await sliding.wait()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await sink.close()


@pytest.mark.parametrize(
    "lost", [[WINDOW], ["top:content:window"], [WINDOW, "top:content:window"], [f"top:content:log:{int(NOON) - 590}"]]
)
async def test_a_lost_window_is_built_again(server: Server, lost: list[str]) -> None:
    """From the logs of its buckets; also when it can't take a bucket out of it any more."""
    clock = Clock()
    async with unopened(server.service.url, clock) as sink:
        await sink.write([event(1, key=1), event(2, key=2, at=NOON - 590)])
        await sink.window.slide()
        server.client.delete(*lost)
        await sink.write([event(3, key=1)])
        if WINDOW not in lost and "top:content:window" not in lost:
            clock.now += 30
            await sink.window.slide()
            assert server.window() == {1: 2}
            return
        await sink.window.slide()
        assert server.window() == {1: 2, 2: 1}


async def test_a_flushed_redis_starts_over(server: Server) -> None:
    """Scripts and data gone under a running sink: the next write is right, its window too."""
    async with opened(server.service.url, Clock()) as sink:
        await sink.write([event(1)])
        server.client.script_flush()
        server.client.flushall()
        await sink.write([event(2), event(3)])
        assert server.counts() == {1: 2}
        await until(lambda: server.window() == {1: 2}, "the window of what came since")


async def test_kills_of_redis_lose_and_repeat_nothing(server: Server, random_source: random.Random) -> None:
    """A lane's view: a batch that failed is written again when Redis is back, answered or not before."""
    stream = events(random_source, 1, 6_000)
    async with opened(server.service.url, Clock()) as sink:
        batches = [stream[start : start + 200] for start in range(0, len(stream), 200)]
        killed_at = random_source.sample(range(len(batches)), 4)
        for i, batch in enumerate(batches):
            writing = asyncio.create_task(sink.write(batch))
            if i in killed_at:
                for _ in range(random_source.randrange(30)):
                    await asyncio.sleep(0)
                await asyncio.to_thread(server.service.kill)
                await asyncio.to_thread(server.service.start)
                if isinstance((await asyncio.gather(writing, return_exceptions=True))[0], SinkUnavailable):
                    await write_again(sink, batch)
            else:
                await write_again(sink, batch, writing)
        assert server.counts() == Counter(e.key for e in stream)
        await until(lambda: server.window() == Counter(e.key for e in stream), "the window")


async def write_again(sink: RedisSink, batch: list[Event], first: asyncio.Task[Any] | None = None) -> None:
    """Until it is taken: the pool may still hold a connection to the Redis that was killed."""
    for _ in range(10):
        try:
            await (first or sink.write(batch))
        except SinkUnavailable:
            first = None
        else:
            return
    raise AssertionError("Redis is back and does not take the batch")


async def test_a_write_may_be_cancelled_anywhere(server: Server, random_source: random.Random) -> None:
    """It then counts as not written; written again it counts once, and no answer goes to the wrong caller."""
    stream = events(random_source, 1, 20_000)
    async with opened(server.service.url, Clock()) as sink:
        for start in range(0, len(stream), 200):
            batch = stream[start : start + 200]
            writing = asyncio.create_task(sink.write(batch))
            for _ in range(random_source.randrange(12)):
                await asyncio.sleep(0)
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing
            assert list(await sink.write(batch)) == []
    assert server.counts() == Counter(e.key for e in stream)


async def test_two_sources_are_kept_apart(server: Server) -> None:
    """Whoever comes first has the keys; another is refused at open and by `check`, and may have a prefix."""
    url = server.service.url
    async with opened(url, Clock(), origin="cluster 1, database a") as first:
        await first.write([event(1)])
        async with unopened(url, Clock(), origin="cluster 1, database b") as second:
            with pytest.raises(SinkUnusable, match=r"belong to cluster 1, database a.*REPLICATOR_REDIS_PREFIX"):
                await second.open()
            [finding] = await second.check()
            assert (False, True) == (finding.ok, "come from cluster 1, database b" in finding.what)
        async with opened(url, Clock(), prefix="b:", origin="cluster 1, database b") as second:
            await second.write([event(1), event(2)])
            assert all(finding.ok for finding in await second.check())
        async with opened(url, Clock(), origin="cluster 1, database a") as again:
            await again.write([event(1), event(2), event(3)])
    assert {"content:count:1": "3", "b:content:count:1": "2"} == {
        key: server.client.get(key) for key in server.client.keys("*content:count:*")
    }


async def test_a_copy_of_the_source_is_another_source(server: Server) -> None:
    """A failover goes on with the keys; whoever is left on the timeline before finds that another one has them."""
    url, key = server.service.url, "engagement:seen:owner"
    server.client.set(key, "cluster 1, database a")  # of an older release
    async with opened(url, Clock(), origin="cluster 1, database a, timeline 9") as original:
        assert "cluster 1, database a, timeline 9" == server.client.get(key)
        async with opened(url, Clock(), origin="cluster 1, database a, timeline 10"):
            assert "cluster 1, database a, timeline 10" == server.client.get(key)
        await original._look()  # noqa: SLF001  once a second else
        with pytest.raises(SinkUnusable, match=r"belong to .* timeline 10, and these events come from .* timeline 9"):
            original.look()
    async with unopened(url, Clock(), origin="cluster 1, database ab, timeline 11") as other:
        with pytest.raises(SinkUnusable, match="belong to"):
            await other.open()


async def test_a_failover_that_a_running_sink_has_followed(server: Server) -> None:
    """A command that began afterwards has taken the keys over: the sink asks who it is now."""
    timelines = iter([1, 2])

    async def ask() -> str:
        return f"cluster 1, database a, timeline {next(timelines)}"

    async with unopened(server.service.url, Clock(), origin=ask) as sink:
        await sink.open()
        server.client.set("engagement:seen:owner", "cluster 1, database a, timeline 2")
        await sink._look()  # noqa: SLF001  once a second else
        await sink._look()  # noqa: SLF001
        sink.look()


async def test_the_source_is_silent_while_the_keys_become_another_s(server: Server) -> None:
    """Who we are can't be asked, or is not told: the keys are not ours until it is known."""
    ours, later = "cluster 1, database a, timeline 1", "cluster 1, database a, timeline 2"
    answers: list[str | SourceUnavailable] = [ours]

    async def ask() -> str:
        if isinstance(answers[-1], SourceUnavailable):
            raise answers[-1]
        return answers[-1]

    async with unopened(server.service.url, Clock(), origin=ask) as sink:
        await sink.open()
        server.client.set("engagement:seen:owner", later)
        for silence in (SourceUnavailable(detail="no route to host"), ""):
            answers.append(silence)
            for _ in range(2):
                await sink._look()  # noqa: SLF001  once a second else
                with pytest.raises(SinkUnusable, match="belong to"):
                    sink.look()
        answers.append(later)
        await sink._look()  # noqa: SLF001
        sink.look()


async def test_a_redis_without_an_owner_is_adopted(server: Server) -> None:
    """One that an older release has filled; a `check` before does not adopt it."""
    async with opened(server.service.url, Clock()) as older:
        await older.write([event(1)])
    async with unopened(server.service.url, Clock(), origin="ours") as sink:
        assert all(finding.ok for finding in await sink.check())
        assert server.client.get("engagement:seen:owner") is None
        await sink.open()
        assert "ours" == server.client.get("engagement:seen:owner")
        await sink.write([event(1), event(2)])
    assert {1: 2} == server.counts()


async def test_where_events_come_from_is_asked_once(server: Server) -> None:
    """Also where it can't be known: not each second anew."""
    asked = []

    async def ask() -> str:
        asked.append(1)
        return ""

    async with unopened(server.service.url, Clock(), origin=ask) as sink:
        await sink.open()
        await sink._look()  # noqa: SLF001  once a second else
        await sink._look()  # noqa: SLF001
    assert [1] == asked


async def test_another_source_that_came_between_is_noticed(server: Server) -> None:
    """Redis was emptied, and the other was faster: nothing more is written until the keys are ours again."""
    async with opened(server.service.url, Clock(), origin="ours") as sink:
        server.client.flushall()
        await until(lambda: server.client.get("engagement:seen:owner") == "ours", "it to take what is nobody's")
        server.client.set("engagement:seen:owner", "theirs \x1b[31m")
        await sink._look()  # noqa: SLF001  once a second else
        with pytest.raises(SinkUnusable, match="belong to theirs"):
            sink.look()
        with pytest.raises(SinkUnusable, match="belong to theirs"):
            await sink.counter().counts([1])
        with pytest.raises(SinkUnusable, match="belong to theirs"):
            await sink.counter().unseen([1])
        with pytest.raises(SinkUnusable, match=r"belong to theirs \[31m, and"):
            await sink.write([event(1)])
        server.client.delete("engagement:seen:owner")
        await sink._look()  # noqa: SLF001
        with pytest.raises(SinkEmptied):  # what is left is that it was emptied
            sink.look()
        await sink.write([event(1)])
    assert {1: 1} == server.counts()


async def test_a_prefix_begins_every_key(server: Server) -> None:
    """Also in scripts, of the window's members too; emptying takes those with the prefix, and no others."""
    url = server.service.url
    async with opened(url, Clock()) as plain, opened(url, Clock(), prefix="shop:") as sink:
        await plain.write([event(1)])
        await sink.write([event(5, key=7), event(6, key=7), event(7, key=-3)])
        await sink.window.slide()
        await plain.window.slide()
        own = {*server.client.keys("*")} - {*server.client.keys("shop:*")}
        assert ["7", "2", "-3", "1"] == server.cli("ZREVRANGE", f"shop:{WINDOW}", "0", "10", "WITHSCORES").split()
        assert "2" == server.client.get("shop:content:count:7")
        assert [2, 0] == await sink.counter().counts([7, 8])
        assert [(7, 2), (-3, 1)] == await sink.top(5)
        assert [(7, 2)] == await sink.top(1)
        assert [99] == await sink.counter().unseen([5, 6, 7, 99])
        await sink.window.slide()
        assert own == {key for key in server.client.keys("*") if not key.startswith("shop:")}
        written = {*server.client.keys("shop:*")}
        assert len(written) <= await sink.empty() <= len(written) + 3  # the window may have been slid between the two
        assert own <= {*server.client.keys("*")}
        assert {1: 1} == server.counts()


FOREIGN = ["content:count:1", "content:newest:1", "content:last:1", "engagement:seen:0", WINDOW, "top:content:window"]


@pytest.mark.parametrize("key", [*FOREIGN, *(f"top:content:{kind}:{int(NOON)}" for kind in ("bucket", "log"))])
async def test_a_key_of_another_program_is_left_alone(server: Server, key: str) -> None:
    """The write fails for good and with a cure, and has changed nothing, so that it counts once the key is gone."""
    async with unopened(server.service.url, Clock()) as sink:
        server.client.rpush(key, "theirs")
        with pytest.raises(SinkUnusable, match="Another program uses a key"):
            await sink.write([event(1), event(2, key=2)])
        assert server.client.keys("*") == [key]
        server.client.delete(key)
        await sink.write([event(1), event(2, key=2)])
        await sink.window.slide()
        assert server.counts() == {1: 1, 2: 1}
        assert server.window() == {1: 1, 2: 1}


async def test_a_full_redis_takes_nothing_of_a_batch(server: Server) -> None:
    """Out of memory: nothing is counted, and everything once there is memory again."""
    async with opened(server.service.url, Clock()) as sink:
        await sink.write([event(1)])
        server.client.config_set("maxmemory", 1)
        try:
            with pytest.raises(SinkUnavailable, match="OOM"):
                await sink.write([event(1), event(2)])
            assert server.counts() == {1: 1}
        finally:
            server.client.config_set("maxmemory", 0)
        await sink.write([event(1), event(2)])
        assert server.counts() == {1: 2}
        await until(lambda: server.window() == {1: 2}, "the window")


async def test_a_replica_is_tried_again(server: Server) -> None:
    """After a failover the connection may still be to the old primary: not now, on a new connection."""
    async with unopened(server.service.url, Clock()) as sink:
        await sink.write([event(1)])
        server.client.replicaof("127.0.0.1", 1)
        try:
            with pytest.raises(SinkUnavailable, match="READONLY"):
                await sink.write([event(2)])
            [finding] = await sink.check()
            assert re.search("READONLY [^()]* read only replica$", finding.what)
        finally:
            server.client.replicaof("NO", "ONE")
        await sink.write([event(2)])
        assert server.counts() == {1: 2}


async def test_a_redis_that_hangs_is_left_after_the_timeout(server: Server) -> None:
    """Connections stay open and nothing is answered; what was sent before may still arrive, and counts once."""
    async with unopened(server.service.url, Clock(), timeout_seconds=0.3) as sink:
        await sink.write([event(1)])
        server.service.pause()
        try:
            with pytest.raises(SinkUnavailable, match=r"(?i)timeout"):
                await sink.write([event(2)])
        finally:
            server.service.resume()
        await sink.write([event(2)])
        assert server.counts() == {1: 2}


async def test_an_unreachable_redis_is_tried_again(server: Server) -> None:
    """The message has the address, never the password."""
    server.service.kill()
    try:
        url = f"redis://user:secret@127.0.0.1:{server.service.port}/0"
        async with unopened(url, Clock()) as sink:
            with pytest.raises(SinkUnavailable, match=str(server.service.port)) as caught:
                await sink.open()
            assert "secret" not in str(caught.value)
            (finding,) = await sink.check()
            assert not finding.ok
            assert "REPLICATOR_REDIS_URL" in finding.cure
    finally:
        server.service.start()


async def test_a_failing_window_is_logged_and_tried_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Logged when it begins and when it ends, raised by the next write, right again when its hindrance is gone."""
    caplog.set_level(logging.INFO, "sinks.redis.window")
    async with opened(server.service.url, Clock()) as sink:
        await sink.write([event(1)])
        await until(lambda: server.window() == {1: 1}, "the window")
        server.client.rename(WINDOW, "kept")
        server.client.rpush(WINDOW, "theirs")
        await until(lambda: "can't be kept right" in caplog.text, "it was logged")
        with pytest.raises(SinkUnusable, match="Another program uses a key"):
            await sink.write([event(2)])
        server.client.delete(WINDOW)
        await sink.write([event(2)])  # slides as well, before the next second
        await until(lambda: "kept right again" in caplog.text, "it goes on")
        await until(lambda: server.window() == {1: 2}, "the window")


async def test_a_bug_in_the_window_s_task_ends_the_next_write(server: Server) -> None:
    """What nobody foresaw is neither lost nor waited for."""
    clock = Clock()
    async with unopened(server.service.url, clock) as sink:
        await sink.open()
        clock.now = cast("float", "no number")
        others = asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}
        await asyncio.wait(others)
        clock.now = NOON
        with pytest.raises(TypeError):
            await sink.write([event(1)])
        with pytest.raises(TypeError):
            await sink.close()


@contextlib.contextmanager
def acl_user(server: Server, *rules: str) -> Iterator[str]:
    """The URL of a user with these rights."""
    server.cli("ACL", "SETUSER", "writer", "on", ">secret", *rules)
    try:
        yield f"redis://writer:secret@127.0.0.1:{server.service.port}/0"
    finally:
        server.cli("ACL", "DELUSER", "writer")


RIGHTS = turned_away_cure().partition("ACL SETUSER name ")[2]


async def test_the_rights_that_the_cure_names_suffice(server: Server) -> None:
    """For everything a sink does."""
    with acl_user(server, *RIGHTS.split()) as url:
        async with opened(url, Clock()) as sink:
            assert [finding.ok for finding in await sink.check()] == [True] * 4
            await sink.write([event(1)])
    assert server.counts() == {1: 1}


async def test_without_the_right_to_ask_evictions_are_not_known(server: Server) -> None:
    """It works, and says what it can't see."""
    with acl_user(server, *RIGHTS.split(), "-info") as url:
        async with opened(url, Clock()) as sink:
            [unseen] = [finding for finding in await sink.check() if "unnoticed" in finding.what]
    assert "+info" in unseen.cure


@pytest.mark.parametrize(
    "missing", ["-evalsha", "-zadd", "-expire", "-zrem", "-rename", "-append", "-getrange", "-strlen", "-setex", "-set"]
)
async def test_a_missing_right_shows_before_the_first_event(server: Server, missing: str) -> None:
    """At open, with the rights that are needed; nothing is left behind."""
    with acl_user(server, *RIGHTS.split(), missing) as url:
        async with unopened(url, Clock()) as sink:
            with pytest.raises(SinkMisconfigured, match="ACL SETUSER"):
                await sink.open()
            (finding,) = await sink.check()
            assert not finding.ok
    assert server.client.keys("*") == []


@pytest.mark.parametrize("lost", ["-setrange", "-mset", "-setex", "-append", "-expire", "-get", "-zcard"])
async def test_a_right_that_is_lost_while_it_writes(server: Server, lost: str) -> None:
    """A batch is counted and ranked whole, once the right is back."""
    clock = Clock()
    with acl_user(server, *RIGHTS.split()) as url:
        async with unopened(url, clock) as sink:
            await sink.write([event(1)])
            await sink.window.slide()
            server.cli("ACL", "SETUSER", "writer", lost)
            with pytest.raises(SinkMisconfigured):
                await sink.write([event(2), event(3, key=2)])
            assert server.counts() == {1: 1}
            server.cli("ACL", "SETUSER", "writer", lost.replace("-", "+"))
            await sink.write([event(2), event(3, key=2)])
            await sink.window.slide()
            assert (server.counts(), server.window()) == ({1: 2, 2: 1}, {1: 2, 2: 1})


async def test_keys_out_of_reach_are_a_missing_right(server: Server) -> None:
    """Nothing of the batch is written when the user may touch half of its keys."""
    with acl_user(server, "~content:*", "+@all") as url:
        async with unopened(url, Clock()) as sink:
            with pytest.raises(SinkMisconfigured, match="NOPERM"):
                await sink.write([event(1)])
    assert server.client.keys("*") == []


async def test_wrong_credentials_are_ours_to_correct(server: Server) -> None:
    """Wrong password, no password, no such database: the settings are wrong, the events are not."""
    port = server.service.port
    async with unopened(f"redis://:secret@127.0.0.1:{port}/0") as sink:
        with pytest.raises(SinkMisconfigured) as caught:
            await sink.write([event(1)])
        assert "secret" not in str(caught.value)
    async with unopened(f"redis://127.0.0.1:{port}/99") as sink:
        with pytest.raises(SinkMisconfigured, match="database number"):
            await sink.write([event(1)])
    server.client.config_set("requirepass", "secret")
    try:
        async with unopened(f"redis://127.0.0.1:{port}/0") as sink:
            for _ in range(50):  # Redis also hangs up, at times before its reason is read
                with pytest.raises(SinkMisconfigured, match=r"unauthenticated|Authentication"):
                    await sink.write([event(number) for number in range(1, 1_001)])
    finally:
        server.client.config_set("requirepass", "")


async def test_check_leaves_no_trace(server: Server) -> None:
    """Four lines, all fine here, and not a key."""
    async with unopened(server.service.url) as sink:
        assert await sink.create() == []
        assert [finding.ok for finding in await sink.check()] == [True] * 4
    assert server.client.keys("*") == []


async def test_check_says_that_eviction_breaks_counts(server: Server) -> None:
    """A limit with a policy that throws keys away fails, with the cure."""
    server.client.config_set("maxmemory", "1gb")
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        async with unopened(server.service.url) as sink:
            (bad,) = [finding for finding in await sink.check() if not finding.ok]
        assert "noeviction" in bad.cure
    finally:
        server.client.config_set("maxmemory", 0)
        server.client.config_set("maxmemory-policy", "noeviction")


async def test_redis_cluster_is_named_as_the_reason() -> None:
    """It can't change keys of several slots as one."""
    bus = str(free_port())  # Redis's own choice is in the range of ports that connections are given
    with DevStack("redis", redis_settings={"cluster-enabled": "yes", "cluster-port": bus}) as stack:
        client: Any = redis.Redis.from_url(stack.redis.url)
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        await until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO", NEVER_DECODE=True), "up")
        client.close()
        async with unopened(stack.redis.url) as sink:
            with pytest.raises(SinkUnusable, match="cluster mode"):
                await sink.open()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=redis"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return cert, key


async def test_tls_and_its_options(server: Server, certificate: tuple[Path, Path]) -> None:
    """rediss:// with our authority writes; without it the certificate is not trusted and the settings are at fault."""
    cert, key = certificate
    server.client.config_set("tls-key-file", str(key), "tls-cert-file", str(cert), "tls-auth-clients", "no")
    server.client.config_set("tls-ca-cert-file", str(cert))
    port = server.service.port + 1
    server.client.config_set("tls-port", port)
    try:
        async with opened(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}", Clock()) as sink:
            await sink.write([event(1)])
            assert not [finding for finding in await sink.check() if "not verified" in finding.what]
        async with unopened(f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=none&ssl_check_hostname=false") as sink:
            [finding] = [finding for finding in await sink.check() if "not verified" in finding.what]
            assert (True, True) == (finding.ok, "remove ssl_cert_reqs" in finding.cure)
        async with unopened(f"rediss://127.0.0.1:{port}/0") as sink:
            with pytest.raises(SinkMisconfigured, match="ssl_ca_certs"):
                await sink.open()
    finally:
        server.client.config_set("tls-port", 0)
    assert server.counts() == {1: 1}
