"""Time from a commit until the event is visible in each sink, at a steady rate of small transactions.

The commit's time is PostgreSQL's (track_commit_timestamp). Redis and ClickHouse are polled for their number of events:
the n-th committed event is visible when they show n, because each lane writes in commit order. The API records when
each request arrives. All clocks are the same machine's. The figures include the polling interval.
"""

from __future__ import annotations

import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple, TypeAlias

import msgspec
import psycopg
import redis

from benchmarks.drain import HTTP_BATCH_SIZE, empty_sinks
from benchmarks.machine import cpu_seconds, peak_memory_mb
from devstack import DevStack
from devstack.process import DevStackError, wait_until
from sinks.redis.keys import PAGE_BITS

REDIS_LOOK_SECONDS = 0.002
CLICKHOUSE_LOOK_SECONDS = 0.025
WARM_UP_SECONDS = 2
SETTLE_TIMEOUT_SECONDS = 30.0
OK = 200

SCRIPT = """\\set content random_zipfian(1, 1000, 1.1)
INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, device)
VALUES (:content, 999, 'play', 7000, 'web');
"""

COMMITS = """
SELECT id, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM public.engagement_events WHERE id > %s
ORDER BY 2
"""

Sighting: TypeAlias = tuple[int, float]
"""The number of events that were visible at a Unix time."""


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of the time from commit to visible, in milliseconds."""

    p50_ms: float
    p99_ms: float
    max_ms: float


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """The result."""

    commits: int
    commits_per_second: float
    sinks: dict[str, Percentiles]
    cpu_us: float
    """The replicator's CPU time per row, in microseconds."""
    peak_memory_mb: float


class _Commit(NamedTuple):
    event_id: int
    time: float


def measure(stack: DevStack, *, rate: int, seconds: int) -> Latencies:
    """Commit single rows at this rate, watch the sinks, compare the times."""
    empty_sinks(stack)
    last_before = _last_id(stack)
    program = stack.replicator("bench_latency", REPLICATOR_HTTP_BATCH_SIZE=str(HTTP_BATCH_SIZE))
    program.start()
    before = cpu_seconds(program.pid)
    with _watching(stack, last_before, rate * (seconds + WARM_UP_SECONDS)) as sightings:
        _commit_steadily(stack, rate, seconds + WARM_UP_SECONDS)
        commits = _commits(stack, last_before)
        wait_until(lambda: _has_all(stack, sightings, len(commits)), "the sinks", SETTLE_TIMEOUT_SECONDS)
    used, peak = cpu_seconds(program.pid) - before, peak_memory_mb(program.pid)
    program.stop()
    measured = commits[WARM_UP_SECONDS * rate :]
    delays = {name: _delays(commits, seen)[-len(measured) :] for name, seen in sightings.items()}
    arrivals = _arrivals(stack)
    delays["http"] = [arrivals[commit.event_id] - commit.time for commit in measured]
    return Latencies(
        commits=len(measured),
        commits_per_second=(len(measured) - 1) / (measured[-1].time - measured[0].time),
        sinks={name: _percentiles(found) for name, found in delays.items()},
        cpu_us=used / len(commits) * 1e6,
        peak_memory_mb=peak,
    )


def _last_id(stack: DevStack) -> int:
    with psycopg.connect(stack.postgres.dsn) as connection:
        row = connection.execute("SELECT coalesce(max(id), 0) FROM public.engagement_events").fetchone()
    return row[0] if row else 0


def _commit_steadily(stack: DevStack, rate: int, seconds: int) -> None:
    script = Path(stack.folder) / "latency.sql"
    script.write_text(SCRIPT, encoding="utf-8")
    pgbench = [str(stack.postgres.bin_dir / "pgbench"), "--no-vacuum", "--client=4", "--protocol=prepared"]
    load = [f"--rate={rate}", f"--time={seconds}", f"--file={script}", stack.postgres.dsn]
    done = subprocess.run([*pgbench, *load], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DevStackError(f"pgbench failed: {done.stderr.strip()}")


def _commits(stack: DevStack, last_before: int) -> list[_Commit]:
    """Commit times, ascending."""
    with psycopg.connect(stack.postgres.dsn) as connection:
        return [_Commit(*row) for row in connection.execute(COMMITS, [last_before])]


@contextmanager
def _watching(stack: DevStack, last_before: int, rows: int) -> Iterator[dict[str, list[Sighting]]]:
    """Poll Redis and ClickHouse until the block ends."""
    ended = threading.Event()
    sightings: dict[str, list[Sighting]] = {"redis": [], "clickhouse": []}
    last = (last_before + 2 * rows) >> PAGE_BITS  # pgbench may make more of them
    pages = [f"engagement:seen:{page}" for page in range(last_before >> PAGE_BITS, last + 1)]
    with redis.Redis.from_url(stack.redis.url) as client, ThreadPoolExecutor(2) as threads:

        def in_redis() -> int:
            with client.pipeline(transaction=False) as pipeline:
                for page in pages:
                    pipeline.bitcount(page)
                return sum(pipeline.execute())

        def in_clickhouse() -> int:
            return stack.clickhouse.count()

        watchers: list[Future[None]] = [
            threads.submit(_look, in_redis, sightings["redis"], REDIS_LOOK_SECONDS, ended),
            threads.submit(_look, in_clickhouse, sightings["clickhouse"], CLICKHOUSE_LOOK_SECONDS, ended),
        ]
        try:
            yield sightings
        finally:
            ended.set()
        for watcher in watchers:
            watcher.result()


def _look(count: Callable[[], int], sightings: list[Sighting], interval_seconds: float, ended: threading.Event) -> None:
    """Record every change of the count, with the time at which it was seen."""
    shown = 0
    while not ended.wait(interval_seconds):
        now_shown = count()
        if now_shown != shown:
            sightings.append((now_shown, time.time()))
            shown = now_shown


def _has_all(stack: DevStack, sightings: dict[str, list[Sighting]], commits: int) -> bool:
    seen = all(seen and seen[-1][0] >= commits for seen in sightings.values())
    return seen and stack.api.stats().events >= commits


def _delays(commits: list[_Commit], seen: list[Sighting]) -> list[float]:
    """Seconds from the n-th commit until it was visible, for every n."""
    counts = [count for count, _ in seen]
    return [seen[bisect_left(counts, number)][1] - commit.time for number, commit in enumerate(commits, start=1)]


def _arrivals(stack: DevStack) -> dict[int, float]:
    """Arrival time of the request with each event."""
    ids = iter(stack.api.event_ids())
    return {
        next(ids): request.time
        for request in stack.api.requests()
        if request.status == OK
        for _ in range(request.events)
    }


def _percentiles(seconds: list[float]) -> Percentiles:
    cuts = quantiles(seconds, n=100)
    return Percentiles(p50_ms=cuts[49] * 1000, p99_ms=cuts[98] * 1000, max_ms=max(seconds) * 1000)
