"""Whether every sink has exactly what PostgreSQL computes; `destinations.py` reads, this module judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.acceptance.destinations import Destinations, Event, expected


def assert_exact(dsn: str, destinations: Destinations) -> int:
    """Every field of every event, in every sink. Returns how many repeats the API got."""
    events = expected(dsn)
    assert events, "a test without events can't fail"
    assert_same(events, destinations.clickhouse(), "ClickHouse")
    assert Counter(event["content_id"] for event in events) == destinations.counts()
    assert _newest(events) == destinations.last()
    taken = destinations.api()
    distinct = {event["event_id"]: event for event in taken}
    assert_same(events, [distinct[event_id] for event_id in sorted(distinct)], "the API")
    wrong = [event for event in taken if event != distinct[event["event_id"]]]
    assert [] == wrong[:3], f"{len(wrong)} repeats at the API differ from the first one"
    return len(taken) - len(distinct)


def assert_same(events: list[Event], arrived: list[Event], where: str) -> None:
    """Equal; said in a few words when not, where pytest would print thousands of rows."""
    if events == arrived:
        return
    wanted = {event["event_id"]: event for event in events}
    found = {event["event_id"]: event for event in arrived}
    missing = sorted(wanted.keys() - found.keys())
    surplus = sorted(found.keys() - wanted.keys())
    wrong = [(wanted[key], found[key]) for key in sorted(wanted.keys() & found.keys()) if wanted[key] != found[key]]
    raise AssertionError(
        f"{where}: {len(missing)} of {len(wanted)} are missing ({missing[:5]}…), {len(surplus)} too many"
        f" ({surplus[:5]}…), {len(arrived) - len(found)} double, {len(wrong)} wrong ({wrong[:2]}…)"
    )


def _newest(events: Iterable[Event]) -> dict[int, Event]:
    newest: dict[int, Event] = {}
    for event in sorted(events, key=lambda event: (event["event_ts"], event["event_id"])):
        newest[event["content_id"]] = event
    return newest
