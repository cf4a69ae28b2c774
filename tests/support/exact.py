"""Does every sink have exactly what PostgreSQL computes? `destinations.py` reads, this module compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tests.support.destinations import Destinations, Event, expected


class Difference(NamedTuple):
    """How the events of a sink differ from what they should be. Equal if all four are empty."""

    missing: list[int]
    """Event ids, sorted."""
    surplus: list[int]
    double: int
    wrong: list[tuple[Event, Event]]
    """As it should be and as it is."""

    def __str__(self) -> str:
        """In a few words: pytest would print thousands of rows."""
        return (
            f"{len(self.missing)} are missing ({self.missing[:5]}…), {len(self.surplus)} too many"
            f" ({self.surplus[:5]}…), {self.double} double, {len(self.wrong)} wrong ({self.wrong[:2]}…)"
        )


def assert_exact(dsn: str, destinations: Destinations, *, content_at_commit: bool = False) -> int:
    """Compare every field of every event in every sink. Returns the number of repeats at the API."""
    events = expected(dsn, content_at_commit=content_at_commit)
    assert events, "a test without events can't fail"
    assert_same(events, destinations.clickhouse(), "ClickHouse")
    assert Counter(event["content_id"] for event in events) == destinations.counts()
    assert newest(events) == destinations.last()
    distinct, repeats = first_views(destinations.api())
    assert_same(events, distinct, "the API")
    return repeats


def first_views(taken: list[Event]) -> tuple[list[Event], int]:
    """What the API accepted, by id, and the number of repeats. A repeat must equal the first one."""
    distinct: dict[int, Event] = {}
    for event in taken:
        distinct.setdefault(event["event_id"], event)
    wrong = [event for event in taken if event != distinct[event["event_id"]]]
    assert [] == wrong[:3], f"{len(wrong)} repeats at the API differ from the first one"
    return [distinct[event_id] for event_id in sorted(distinct)], len(taken) - len(distinct)


def assert_same(events: list[Event], arrived: list[Event], where: str) -> None:
    """Equal, each event once."""
    if events != arrived:
        raise AssertionError(f"{where}: of {len(events)} events {compare(events, arrived)}")


def compare(events: list[Event], arrived: list[Event]) -> Difference:
    """In any order."""
    wanted = {event["event_id"]: event for event in events}
    found = {event["event_id"]: event for event in arrived}
    return Difference(
        missing=sorted(wanted.keys() - found.keys()),
        surplus=sorted(found.keys() - wanted.keys()),
        double=len(arrived) - len(found),
        wrong=[(wanted[key], found[key]) for key in sorted(wanted.keys() & found.keys()) if wanted[key] != found[key]],
    )


def newest(events: Iterable[Event]) -> dict[int, Event]:
    """Content → its newest event, as Redis keeps it."""
    last: dict[int, Event] = {}
    for event in sorted(events, key=lambda event: (event["event_ts"], event["event_id"])):
        last[event["content_id"]] = event
    return last
