"""Do the sinks have what PostgreSQL has? Reads all four and names the differences; `demo` prints them.

PostgreSQL computes what each event must look like (`expected.sql`), not the code under test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import psycopg
import redis

from devstack.stack import DevStack

Event: TypeAlias = dict[str, Any]
Events: TypeAlias = Mapping[int, Event]

COUNT_KEY, LAST_KEY = "content:count:", "content:last:"

EXPECTED = (Path(__file__).parent / "expected.sql").read_text(encoding="utf-8")

CLICKHOUSE_EVENTS = """
SELECT * FROM events_enriched FINAL FORMAT JSONEachRow
SETTINGS date_time_output_format = 'iso', output_format_json_quote_64bit_integers = 0,
         output_format_json_quote_decimals = 0
"""

_decode = msgspec.json.Decoder(float_hook=Decimal).decode


class Verdict(NamedTuple):
    """One sink beside PostgreSQL."""

    sink: str
    events: int
    """How many distinct events it has."""
    note: str
    differences: list[str]
    """The first few, in words; empty if there are none."""


def expected_events(dsn: str) -> dict[int, Event]:
    """Every event as PostgreSQL computes it, by id."""
    query = f"SELECT row_to_json(expected)::text FROM ({EXPECTED}) AS expected"  # noqa: S608  our own file
    with psycopg.connect(dsn, options="-c TimeZone=UTC -c DateStyle=ISO") as connection:
        return _by_id(_decode(text) for (text,) in connection.execute(query.encode()))


def compare(stack: DevStack) -> list[Verdict]:
    """Compare all sinks with PostgreSQL, counts and values."""
    expected = expected_events(stack.postgres.dsn)
    rows = [_decode(line) for line in stack.clickhouse.query(CLICKHOUSE_EVENTS).splitlines()]
    posted = stack.api.events_json()
    return [
        Verdict("PostgreSQL", len(expected), "", []),
        compare_events("ClickHouse", expected, rows, note="FINAL"),
        compare_redis(expected, *_read_redis(stack.redis.url)),
        compare_events("API", expected, _decode(posted), note="distinct event_id"),
    ]


def compare_events(sink: str, expected: Events, found: Iterable[Event], *, note: str = "") -> Verdict:
    """Compare a sink that keeps events. An event may be there twice, but both must be the same."""
    found = list(found)
    by_id = _by_id(found)
    differences = _missing_or_new(expected, by_id)
    for event in found:
        event_id = event["event_id"]
        if event_id in expected:
            differences += _fields(f"event {event_id}", expected[event_id], event)
    if repeats := len(found) - len(by_id):
        note += f", {repeats} repeats"
    return Verdict(sink, len(by_id), note, differences)


def compare_redis(expected: Events, counts: Mapping[int, int], last: Mapping[int, Event]) -> Verdict:
    """Compare counts and newest events, content by content."""
    wanted = Counter(event["content_id"] for event in expected.values())
    differences = [
        f"content {content_id} counts {counts.get(content_id, 0)} and not {wanted[content_id]}"
        for content_id in sorted(wanted.keys() | counts.keys())
        if counts.get(content_id, 0) != wanted[content_id]
    ]
    newest: dict[int, Event] = {}
    for event in sorted(expected.values(), key=lambda event: (event["event_ts"], event["event_id"])):
        newest[event["content_id"]] = event
    for content_id, event in newest.items():
        differences += _fields(f"last event of content {content_id}", event, last.get(content_id, {}))
    return Verdict("Redis", sum(counts.values()), "sum of content:count:*", differences)


def _by_id(events: Iterable[Event]) -> dict[int, Event]:
    return {event["event_id"]: event for event in events}


def _missing_or_new(expected: Events, found: Events) -> list[str]:
    missing = [f"event {event_id} is missing" for event_id in sorted(expected.keys() - found.keys())]
    return missing + [f"event {event_id} is not in PostgreSQL" for event_id in sorted(found.keys() - expected.keys())]


def _fields(what: str, expected: Event, found: Event) -> list[str]:
    """Additional fields are fine: ClickHouse has columns of its own."""
    return [
        f"{what}: {name} is {found.get(name, 'missing')!s} and not {value!s}"
        for name, value in expected.items()
        if name not in found or found[name] != value
    ]


def _read_redis(url: str) -> tuple[dict[int, int], dict[int, Event]]:
    with redis.Redis.from_url(url) as client:
        counts = {content_id: int(value) for content_id, value in _values(client, COUNT_KEY)}
        last = {content_id: _decode(value) for content_id, value in _values(client, LAST_KEY)}
    return counts, last


def _values(client: redis.Redis, prefix: str) -> Iterable[tuple[int, Any]]:
    keys = list(client.scan_iter(f"{prefix}*", count=1_000))
    for key, value in zip(keys, client.mget(keys) if keys else [], strict=True):
        if value is not None:  # it has expired
            yield int(key.removeprefix(prefix.encode())), value


class Counts(NamedTuple):
    """How many events each has. Cheap enough for once a second."""

    postgres: int
    clickhouse: int
    redis: int
    api: int


def count(stack: DevStack) -> Counts:
    """Counts of all, the sinks first, so that none is ahead of PostgreSQL."""
    with redis.Redis.from_url(stack.redis.url) as client:
        in_redis = sum(int(value) for _, value in _values(client, COUNT_KEY))
    in_clickhouse = stack.clickhouse.count()
    in_api = stack.api.stats().events
    with psycopg.connect(stack.postgres.dsn) as connection:
        found = connection.execute("SELECT count(*) FROM public.engagement_events").fetchone()
    return Counts(found[0] if found else 0, in_clickhouse, in_redis, in_api)
