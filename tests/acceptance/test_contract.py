"""Against services of somebody else's: tables made by hand, a plain role, nothing but environment variables.

The contract's INSERT in all sinks, in its form and in time. `test_commands.py` has what the commands say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import psycopg
import pytest

from devstack import DevStack
from devstack.process import wait_until
from tests.support.destinations import Destinations, expected
from tests.support.program import Program, assert_clean, succeed

BY_HAND = """
CREATE TABLE content (content_id bigint PRIMARY KEY, content_type text NOT NULL, length_seconds int);
CREATE TABLE engagement_events (
    id bigserial PRIMARY KEY, content_id bigint NOT NULL REFERENCES content, user_id bigint NOT NULL,
    event_type text NOT NULL, event_ts timestamptz NOT NULL DEFAULT now(), duration_ms int, device text,
    raw_payload jsonb);
INSERT INTO content VALUES (1, 'video', 300), (2, 'video', 120), (3, 'article', NULL);
"""

CONTRACTS_INSERT = (
    "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, device) "
    "VALUES (1, 999, 'play', 7000, 'web');"
)
REDIS_SECONDS, CLICKHOUSE_SECONDS = 1.0, 2.0  # what the contract promises
INSERTS = 5  # the median of them is held against it: a noisy machine spoils one, not most

CLICKHOUSE_COLUMNS = [
    ("event_id", "Int64"),
    ("content_id", "Int64"),
    ("user_id", "Int64"),
    ("event_type", "LowCardinality(String)"),
    ("event_ts", "DateTime64(6, 'UTC')"),
    ("duration_ms", "Nullable(Int64)"),
    ("device", "LowCardinality(Nullable(String))"),
    ("content_type", "LowCardinality(Nullable(String))"),
    ("length_seconds", "Nullable(Int64)"),
    ("engagement_seconds", "Nullable(Decimal(18, 3))"),
    ("engagement_pct", "Nullable(Decimal(18, 2))"),
]


@pytest.fixture
def database(database: str) -> str:
    """Tables that no file of ours has made."""
    with psycopg.connect(database) as connection:
        connection.execute("DROP TABLE engagement_events, content")
        connection.execute(BY_HAND)
    return database


def test_init_check_run_and_an_insert(
    program: Program, source: psycopg.Connection, destinations: Destinations, stack: DevStack
) -> None:
    """The contract's INSERT is everywhere in the contract's form, and in time; SIGTERM ends it in order."""
    succeed(program.run("init"))
    assert succeed(program.run("check")).endswith("all checks passed\n")
    program.start("run")
    delays = Delays(source, destinations)
    delays.measure()

    [(event_ts,)] = source.execute(
        """SELECT to_char(event_ts AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') FROM engagement_events"""
    )
    json = (
        f'{{"event_id":1,"content_id":1,"user_id":999,"event_type":"play","event_ts":"{event_ts}","duration_ms":7000,'
        '"device":"web","content_type":"video","length_seconds":300,"engagement_seconds":7.0,"engagement_pct":0.02}'
    )
    assert f"[{json}]" == destinations.api_text()
    _assert_in_redis(destinations, json)
    _assert_in_clickhouse(stack, event_ts)

    for _ in range(INSERTS - 1):
        delays.measure()
    print(delays)  # noqa: T201  pytest shows it when the test has failed
    assert statistics.median(delays.redis) < REDIS_SECONDS
    assert statistics.median(delays.api) < REDIS_SECONDS
    assert statistics.median(delays.clickhouse) < CLICKHOUSE_SECONDS
    assert 0 == program.stop()
    assert_clean(program.log)


def _assert_in_redis(destinations: Destinations, json: str) -> None:
    redis = destinations.redis
    assert json == redis.get("content:last:1")
    assert "1" == redis.get("content:count:1")
    wait_until(lambda: bool(redis.keys("top:content:bucket:*")), "the window and its bucket")
    assert [("1", 1.0)] == redis.zrevrange("top:content:10m", 0, 10, withscores=True)
    [bucket] = redis.keys("top:content:bucket:*")
    assert [("1", 1.0)] == redis.zrange(bucket, 0, -1, withscores=True)
    assert -1 == redis.ttl("content:count:1")
    for key, longest in (("content:last:1", 3600), ("top:content:10m", 120), (bucket, 900)):
        assert longest - 60 < redis.ttl(key) <= longest, key


def _assert_in_clickhouse(stack: DevStack, event_ts: str) -> None:
    described = stack.clickhouse.query("DESCRIBE TABLE engagement.events_enriched FORMAT TSVRaw").splitlines()
    assert CLICKHOUSE_COLUMNS == [tuple(line.split("\t")[:2]) for line in described[: len(CLICKHOUSE_COLUMNS)]]
    names = ", ".join(name for name, _ in CLICKHOUSE_COLUMNS)
    row = stack.clickhouse.query(f"SELECT {names} FROM events_enriched ORDER BY event_id DESC LIMIT 5")  # noqa: S608  ours
    moment = event_ts.replace("T", " ").removesuffix("Z")
    # tab-separated as clickhouse-client prints it; its decimals drop the zeros at their end
    assert f"1\t1\t999\tplay\t{moment}\t7000\tweb\tvideo\t300\t7\t0.02\n" == row
    key = "SELECT sorting_key FROM system.tables WHERE database = 'engagement' AND name = 'events_enriched'"
    assert "event_ts, content_id, event_id\n" == stack.clickhouse.query(key)


class Delays:
    """Seconds from the commit of the contract's INSERT until each sink shows it."""

    def __init__(self, source: psycopg.Connection, destinations: Destinations) -> None:
        self._source = source
        self._destinations = destinations
        self.redis: list[float] = []
        self.api: list[float] = []
        self.clickhouse: list[float] = []

    def measure(self) -> None:
        """Insert one event and watch."""
        count = len(self.redis) + 1
        self._source.execute(CONTRACTS_INSERT.encode())
        begin = time.monotonic()

        def since_commit(visible: Callable[[], bool], what: str) -> float:
            wait_until(visible, what, 30)
            return time.monotonic() - begin

        there = self._destinations
        self.redis.append(since_commit(lambda: there.counts() == {1: count}, "Redis"))
        self.api.append(since_commit(lambda: len(there.api()) == count, "the API"))
        self.clickhouse.append(since_commit(lambda: len(there.clickhouse()) == count, "ClickHouse"))

    def __str__(self) -> str:
        return f"seconds to Redis {self.redis}, API {self.api}, ClickHouse {self.clickhouse}"


def test_without_init(program: Program, source: psycopg.Connection, destinations: Destinations, database: str) -> None:
    """`python -m replicator` alone makes what is missing; killed and started again it goes on where it was."""
    program.start()
    source.execute(CONTRACTS_INSERT.encode())
    program.wait_until_caught_up()
    program.kill()
    source.execute(CONTRACTS_INSERT.encode())
    program.start()
    program.wait_until_caught_up()
    assert [1, 2] == [event["event_id"] for event in expected(database)]
    assert expected(database) == destinations.api() == destinations.clickhouse()
    assert {1: 2} == destinations.counts()
    assert 0 == program.stop()
    assert_clean(program.log)
