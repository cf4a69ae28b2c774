"""20,000 random events of all shapes: identical in all sinks to what PostgreSQL computes (`expected.sql`)."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import psycopg
import pytest

from devstack import DevStack
from devstack.process import wait_until
from tests.support.destinations import FIELDS, Destinations, Event, expected
from tests.support.exact import assert_same
from tests.support.program import Program, succeed

EVENTS = 20_000
TRANSACTION_ROWS_MAX = 2_000
CONTENTS = range(4, 60)
MISSING = (900, 2**53 + 1, -(2**63))  # contents that nobody has
MONTHS = 60  # ClickHouse makes a part for each in an insert: few, far apart, instead of all 4,800
NOBODY_HOLDS = ("infinity", "-infinity", "12026-01-08 14:21:52.5+00", "0044-03-15 12:00:00+00 BC")
SOME_CLICKHOUSES_HOLD = ("0001-01-01 00:00:00+00", "1899-12-31 23:59:59.999999+00", "9999-12-31 23:59:59.999999+00")
COLUMNS = "id, content_id, user_id, event_type, event_ts, duration_ms, device, raw_payload"
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


class Chance:
    """Random values; everything depends on the seed and the time alone."""

    def __init__(self, seed: int, now: datetime) -> None:
        self._random = random.Random(seed)  # noqa: S311  test data
        self._now = now
        days = [self._random.randrange((datetime(2299, 12, 1) - datetime(1900, 1, 1)).days) for _ in range(MONTHS)]  # noqa: DTZ001  a difference
        self._months = [datetime(1900, 1, 1, tzinfo=UTC) + timedelta(days=day) for day in days]

    def text(self) -> str:
        """All that JSON, TSV and SQL may stumble over; no NUL, which PostgreSQL doesn't hold."""
        alphabet = "ab \"'\\/\n\t\r,;{}[]\b\x01\x7fäß映▶📱\u2028\ufeff"
        return "".join(self._random.choices(alphabet, k=self._random.randrange(12)))

    def moment(self) -> str:
        """Now (in the window for certain), some time ago (out of it for certain), or far away; 0 to 6 digits."""
        kind = self._random.random()
        if kind < 0.01:
            return self._random.choice((*NOBODY_HOLDS, *SOME_CLICKHOUSES_HOLD))
        if kind < 0.3:
            moment = self._now - timedelta(seconds=self._random.uniform(20, 400))
        elif kind < 0.6:
            moment = self._now + timedelta(seconds=self._random.choice((-1, 1)) * self._random.uniform(900, 80_000))
        else:
            moment = self._random.choice(self._months) + timedelta(seconds=self._random.uniform(0, 86_400))
        step = 10 ** self._random.randrange(7)
        return moment.replace(microsecond=moment.microsecond // step * step).isoformat()

    def content(self) -> int:
        """Mostly one that exists."""
        content: int = self._random.choice((*CONTENTS, *MISSING))
        return content

    def event(self, number: int) -> tuple[object, ...]:
        """One row of engagement_events; its id is the number, or one that no float holds, or negative."""
        durations = (None, 0, 7000, -1, self._random.randrange(600_000), self._random.randrange(-(2**31), 2**31))
        return (
            self._random.choice((number, number, number, 2**62 + number, -number)),
            self.content(),
            self._random.choice((999, -5, 2**53 + 1, 2**63 - 1, -(2**63))),
            self.text(),
            self.moment(),
            self._random.choice((*durations, 2**31 - 1, -(2**31))),
            self._random.choice((None, "", "web", self.text())),
            self._random.choice((None, "{}", '{"a": [1, "b\\u0007"]}')),
        )

    def lengths(self) -> Iterator[tuple[int, str, int | None]]:
        """The rows of content."""
        for content in CONTENTS:
            length = self._random.choice((None, 0, 1, 3, 7, 2**31 - 1, -7, self._random.randrange(1, 400)))
            yield content, self.text(), length

    def transactions(self) -> Iterator[list[tuple[object, ...]]]:
        """All events, in transactions of any size."""
        rows = [self.event(number) for number in range(1, EVENTS + 1)]
        while rows:
            size = min(len(rows), int(TRANSACTION_ROWS_MAX ** self._random.random()))
            yield rows[:size]
            del rows[:size]


def _copy(source: psycopg.Connection, table: str, rows: Sequence[Sequence[object]]) -> None:
    with source.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN".encode()) as copy:
        for row in rows:
            copy.write_row(row)


def _newest(events: list[Event]) -> dict[int, Event]:
    ordered = sorted(events, key=lambda event: (event["event_ts"], event["event_id"]))
    return {event["content_id"]: event for event in ordered}


class Letter(NamedTuple):
    """What `dead-letters list` says of one."""

    sink: str
    event_id: int
    reason: str


def _dead_letters(program: Program) -> list[Letter]:
    lines = succeed(program.run("dead-letters", "list")).split("\n")  # not at U+2028, as splitlines() would
    fields = [line.split("  ") for line in lines[:-1:2]]
    return [Letter(sink, int(event.removeprefix("event ")), reason) for _, _, sink, event, _, reason in fields]


@pytest.mark.timeout(180)
def test_random_events(
    program: Program, source: psycopg.Connection, destinations: Destinations, database: str, stack: DevStack
) -> None:
    """Every field of every event, in every sink, exactly once; what none can hold is a dead letter, once a sink."""
    seed, now = random.randrange(2**32), datetime.now(UTC)  # noqa: S311  test data
    print(f"seed {seed}, now {now.isoformat()}")  # noqa: T201  to run it again
    chance = Chance(seed, now)
    source.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    _copy(source, "content", list(chance.lengths()))
    succeed(program.run("init"))
    for number, rows in enumerate(chance.transactions()):
        if number == 5:
            program.start()  # some wait for it, the others come while it runs
        _copy(source, f"engagement_events ({COLUMNS})", rows)
    program.wait_until_caught_up()

    events = expected(database)
    assert EVENTS == len(events)
    held = [event for event in events if RFC_3339.fullmatch(event["event_ts"])]
    letters = _dead_letters(program)
    beyond_clickhouse = {letter.event_id for letter in letters if letter.sink == "clickhouse"}

    taken = destinations.api()
    assert_same(held, sorted(taken, key=lambda event: int(event["event_id"])), "the API")
    assert {FIELDS} == {tuple(event) for event in taken}
    in_clickhouse = [event for event in held if event["event_id"] not in beyond_clickhouse]
    assert_same(in_clickhouse, destinations.clickhouse(), "ClickHouse")
    assert f"{len(in_clickhouse)}\n" == stack.clickhouse.query("SELECT count() FROM events_enriched")  # not even once
    assert Counter(event["content_id"] for event in held) == destinations.counts()
    assert _newest(held) == destinations.last()
    in_window = [event for event in held if _within_ten_minutes(event, now)]
    ranking = Counter(event["content_id"] for event in in_window)
    wait_until(lambda: ranking == destinations.top(), "the window")

    beyond = {event["event_id"] for event in events} - {event["event_id"] for event in held}
    assert beyond, "there were none to refuse"
    for sink in ("redis", "http"):
        assert sorted(beyond) == sorted(letter.event_id for letter in letters if letter.sink == sink)
    assert beyond <= beyond_clickhouse
    # An older ClickHouse refuses more, and nothing that the years 1900 to 2299 hold.
    rest = [event["event_ts"][:4] for event in held if event["event_id"] in beyond_clickhouse]
    assert set(rest) <= {"0001", "1899", "9999"}
    assert len(letters) == len({(letter.sink, letter.event_id) for letter in letters})
    assert 0 == program.stop()


def _within_ten_minutes(event: Event, now: datetime) -> bool:
    """No event is near either end of the window: see `Chance.moment`."""
    age = now - datetime.fromisoformat(event["event_ts"])
    return timedelta(0) < age < timedelta(minutes=10)
