"""What every sink must have at the end, by PostgreSQL, and how the sinks differ from it.

As `tests/support/exact.py`, but content changes while events arrive (`writers.py` says which versions are right).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import psycopg

from tests.prove.world.writers import BEFORE_CHANGE
from tests.support.destinations import EXPECTED_SQL, Destinations, Event

CONTENT_FIELDS = ("content_type", "length_seconds", "engagement_pct")
"""What depends on the content."""

VERSIONS = """
SELECT json_build_array(v.content_id, v.until, v.content_type, v.length_seconds)::text FROM chaos.versions AS v
"""
EPOCHS = "SELECT id, coalesce((raw_payload ->> 'epoch')::int, 0), event_type FROM public.engagement_events"
_decode = msgspec.json.Decoder(float_hook=Decimal).decode


class Version(NamedTuple):
    """A content as it was until an epoch."""

    until: int | None
    content_type: str | None
    length_seconds: int | None


class Truth:
    """Every event that PostgreSQL has, and which contents it may carry."""

    def __init__(self, dsn: str) -> None:
        with psycopg.connect(dsn, options="-c TimeZone=UTC -c DateStyle=ISO", autocommit=True) as connection:
            connection.execute(BEFORE_CHANGE)
            query = f"SELECT row_to_json(expected)::text FROM ({EXPECTED_SQL}) AS expected"
            events: list[Event] = [_decode(text) for (text,) in connection.execute(query.encode())]
            self.events = {event["event_id"]: event for event in events}
            found = connection.execute(EPOCHS.encode()).fetchall()
            self._epochs = {event_id: epoch for event_id, epoch, _ in found}
            self.kinds = {event_id: kind for event_id, _, kind in found}
            """Which writer it is from, or which partition it is for."""
            self.odd = {event_id for event_id, kind in self.kinds.items() if kind == "odd"}
            self._versions = defaultdict[int, list[Version]](list)
            for (text,) in connection.execute(VERSIONS.encode()):
                content, *version = _decode(text)
                self._versions[content].append(Version(*version))
        self.doubled = len(events) - len(self.events)
        """Ids that several events have: the world may not do that."""

    def wrong(self, event: Event, wanted: Event) -> str:
        """How an event that arrived differs from what it must be; empty if it does not."""
        fixed = [name for name in wanted if name not in CONTENT_FIELDS and event.get(name) != wanted[name]]
        if fixed or event.keys() != wanted.keys():
            return f"event {wanted['event_id']}: {fixed or sorted(event.keys() ^ wanted.keys())}"
        if event == wanted:
            return ""
        allowed = self._allowed(wanted)
        got = tuple(event[name] for name in CONTENT_FIELDS)
        return "" if got in allowed else f"event {wanted['event_id']} carries {got}, content was {allowed}"

    def _allowed(self, event: Event) -> list[tuple[Any, ...]]:
        """The contents of the event's epoch and of all later ones."""
        epoch = self._epochs[event["event_id"]]
        return [
            (version.content_type, version.length_seconds, _pct(event["engagement_seconds"], version.length_seconds))
            for version in self._versions[event["content_id"]]
            if version.until is None or version.until > epoch
        ] or [(None, None, None)]


def _pct(seconds: Decimal | int | None, length: int | None) -> Decimal | int | None:
    """As PostgreSQL rounds: half away from zero."""
    if seconds is None or not length:
        return None
    return (Decimal(seconds) / length).quantize(Decimal("0.01"), rounding="ROUND_HALF_UP")


def differences(truth: Truth, destinations: Destinations) -> tuple[list[str], int]:
    """What is wrong, in words, a line for each sink and kind; and how many events the API got again."""
    wanted = {key: event for key, event in truth.events.items() if key not in truth.odd}
    found = list(_rows("ClickHouse", truth, wanted, destinations.clickhouse(), double=True))
    taken = destinations.api()
    found += _rows("the API", truth, wanted, taken, double=False)
    repeats = len(taken) - len({event["event_id"] for event in taken})
    found += _redis(truth, wanted, destinations)
    return found, repeats


def _rows(where: str, truth: Truth, wanted: dict[int, Event], got: list[Event], *, double: bool) -> Iterable[str]:
    ids = Counter(event["event_id"] for event in got)
    lost = sorted(wanted.keys() - ids.keys())
    yield from _some(f"{where} lacks, of {sorted({truth.kinds[key] for key in lost})}", lost)
    yield from _some(f"{where} has too much", sorted(ids.keys() - wanted.keys()))
    if double:
        yield from _some(f"{where} has twice", sorted(key for key, count in ids.items() if count > 1))
    last = {event["event_id"]: event for event in got}  # what was enriched too early goes out again, right
    wrong = (truth.wrong(event, wanted[key]) for key, event in last.items() if key in wanted)
    yield from _some(f"{where} has wrong", sorted({text for text in wrong if text}))


def _redis(truth: Truth, wanted: dict[int, Event], destinations: Destinations) -> Iterable[str]:
    counted, last = destinations.counts(), destinations.last()
    counts = Counter(event["content_id"] for event in wanted.values())
    differ = {key for key in counts.keys() | counted.keys() if counts[key] != counted.get(key, 0)}
    yield from _some("Redis counts", [f"content {key}: {counted.get(key)} of {counts[key]}" for key in sorted(differ)])
    newest: dict[int, Event] = {}
    for event in sorted(wanted.values(), key=lambda event: (event["event_ts"], event["event_id"])):
        newest[event["content_id"]] = event
    missing = sorted(newest.keys() - last.keys())
    yield from _some("Redis lacks the last event of content", missing)
    wrong = (truth.wrong(last[key], event) for key, event in newest.items() if key in last)
    yield from _some("Redis has a wrong last event", sorted({text for text in wrong if text}))


def _some(what: str, found: list[Any]) -> Iterable[str]:
    if found:
        yield f"{what}: {len(found)}, the first {found[:5]}, the last {found[-1:]}"
