"""The enrichment against real PostgreSQL and wal2json: it agrees with what PostgreSQL computes, in commit order."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from devstack import DevStack
from enrichment import BEGINNING, END, EVENT, EnrichmentSettings, RangeHistory, StreamEnricher, Tables, create_enricher
from enrichment.contract import engagement_pct
from enrichment.database import Database
from enrichment.streams.content import PRELOAD_PAGE, Contents, changes
from enrichment.streams.several import SeveralStreams
from replicator.contracts.enricher import Enriched
from replicator.contracts.errors import SettingsError, SourceError, SourceUnavailable, SourceUnusable, TablesUnfit
from replicator.contracts.events import Column, DeadLetter, Event, Finding, Position, Row
from replicator.contracts.fields import BIGINT, TIMESTAMPTZ, Field, Role
from replicator.contracts.fields import Stream as Declared
from replicator.contracts.settings import load
from replicator.source import wal2json
from tests.support.pgbouncer import pgbouncer
from tests.support.rows import EVENT_TABLES

EXPECTED = (Path(__file__).parents[1] / "support/expected.sql").read_text(encoding="utf-8")
SLOT = "enrichment_test"
NEXT_EVENT = iter(range(1, 10**9))


class Stream:
    """A session on the source database, and what wal2json makes of it."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True, options="-c TimeZone=UTC -c DateStyle=ISO")
        self._slot = f"{SLOT}_{self._connection.info.dbname}"
        self._decoder = wal2json.StreamDecoder()
        self.run("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self._slot)

    def run(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """One statement, committed."""
        cursor = self._connection.execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def copy(self, target: str, rows: Iterable[Sequence[object]]) -> None:
        """Many rows at once."""
        with self._connection.cursor() as cursor, cursor.copy(f"COPY {target} FROM STDIN".encode()) as copy:
            for row in rows:
                copy.write_row(row)

    def rows(self) -> list[Row]:
        """What was committed since the last call."""
        options = {
            **wal2json.OPTIONS,
            "add-tables": wal2json.listed(StreamEnricher("", Tables(EVENT), 10).tables),
        }
        flat = [text for option in options.items() for text in option]
        got = self.run("SELECT data FROM pg_logical_slot_get_changes(%s, NULL, NULL, VARIADIC %s)", self._slot, flat)
        for (data,) in got:
            self._decoder.feed(data.encode())
        return self._decoder.take().rows

    def expected(self) -> list[dict[str, Any]]:
        """The events as PostgreSQL computes them now."""
        query = f"SELECT row_to_json(expected)::text FROM ({EXPECTED}) AS expected"  # noqa: S608  a file of ours
        return [_parse(text) for (text,) in self.run(query)]

    def insert_event(self, content_id: int, **columns: object) -> int:
        """One event with that content."""
        event_id = next(NEXT_EVENT)
        columns = {"id": event_id, "content_id": content_id, "user_id": 1, "event_type": "play", **columns}
        columns.setdefault("duration_ms", 7000)
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        holes = sql.SQL(", ").join([sql.Placeholder()] * len(columns))
        statement = sql.SQL("INSERT INTO engagement_events ({}) VALUES ({})").format(names, holes)
        self.run(statement.as_string(self._connection), *columns.values())
        return event_id

    def close(self) -> None:
        """End the session."""
        self._connection.close()


@pytest.fixture
def stream(database: str) -> Iterator[Stream]:
    """A database without foreign key: events of missing content are possible."""
    stream = Stream(database)
    stream.run("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    yield stream
    stream.close()


@pytest.fixture
async def enricher(database: str, stream: Stream) -> AsyncIterator[StreamEnricher]:
    """Open on that database, everything preloaded."""
    assert stream is not None
    enricher = StreamEnricher(database, Tables(EVENT), 1_000)
    await enricher.open()
    yield enricher
    await enricher.close()


def _chance() -> random.Random:
    """Other values every time; the seed is in the output of a test that fails."""
    seed = random.randrange(2**32)  # noqa: S311  test data
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test fails
    return random.Random(seed)  # noqa: S311  test data


def _parse(text: str | bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(text, parse_float=Decimal)
    return fields


def _contents(events: Iterable[Event]) -> list[tuple[str | None, int | None]]:
    return [(fields["content_type"], fields["length_seconds"]) for fields in (_parse(event.json) for event in events)]


def _failing(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.ok]


# -- what PostgreSQL computes ------------------------------------------------------------------------------------


def _random_text(chance: random.Random) -> str:
    alphabet = "ab \"'\\/\n\t\r,;{}[]\b\x01\x7fäß映▶📱\u2028\ufeff"
    return "".join(chance.choices(alphabet, k=chance.randrange(12)))


def _random_timestamp(chance: random.Random) -> str:
    if chance.random() < 0.05:
        return chance.choice(["infinity", "-infinity", "12026-01-08 14:21:52.5+00", "0044-03-15 12:00:00+00 BC"])
    spread = chance.choice([timedelta(hours=1), timedelta(days=400_000), timedelta(days=900_000)])
    moment = datetime(2026, 1, 8, tzinfo=UTC) + spread * chance.uniform(-0.8, 1)
    step = 10 ** chance.randrange(7)
    return moment.replace(microsecond=moment.microsecond // step * step).isoformat()


def _random_event(event_id: int, chance: random.Random) -> tuple[object, ...]:
    durations = (None, 0, 7000, chance.randrange(600_000), chance.randrange(-(2**31), 2**31), 2**31 - 1, -(2**31))
    return (
        event_id if chance.random() < 0.9 else 2**62 + event_id,
        chance.randrange(1, 60) if chance.random() < 0.9 else 2**53 + 1,
        chance.choice([999, -5, 2**53 + 1, 2**63 - 1, -(2**63)]),
        _random_text(chance),
        _random_timestamp(chance),
        chance.choice(durations),
        chance.choice([None, "", "web", _random_text(chance)]),
        chance.choice([None, "{}", '{"a": [1, "b"]}']),
    )


async def test_random_events_are_what_postgresql_computes(enricher: StreamEnricher, stream: Stream) -> None:
    """20,000 events of all shapes, through wal2json, field by field; the microseconds as well."""
    chance = _chance()
    lengths = [None, 0, 1, -1, 300, -300, 2**31 - 1, -(2**31)]
    contents = [(n, _random_text(chance), chance.choice([*lengths, chance.randrange(1, 400)])) for n in range(4, 50)]
    stream.copy("content", contents)
    stream.copy("engagement_events", (_random_event(number, chance) for number in range(20_000)))
    made = await enricher.enrich(stream.rows())
    assert made.refused == []
    expected = stream.expected()
    events = sorted(made.events, key=lambda event: event.id)
    assert len(expected) == 20_000
    for fields, event in zip(expected, events, strict=True):
        assert list(fields.items()) == list(_parse(event.json).items())
        assert (fields["event_id"], fields["content_id"]) == (event.id, event.key)
        assert (
            b"-0.0" not in event.json.replace(b"-0.00", b"").replace(b"-0.0", b"-0.0", 1)
            or b'":-0.0,' not in event.json
        )
    microseconds = stream.run(
        "SELECT (extract(epoch FROM event_ts) * 1000000)::bigint FROM engagement_events"
        " WHERE event_ts >= '0001-01-01 00:00:00+00' AND event_ts < '10000-01-01 00:00:00+00' ORDER BY id"
    )
    assert [us for (us,) in microseconds] == [event.ts_us for event in events if event.ts_us is not None]


ROUNDED = "SELECT d, l, (round(d / 1000.0 / l, 2) * 100)::bigint FROM ({}) AS sample(d, l)"


@pytest.mark.parametrize(
    "sample",
    [
        # every tie up to the 60th of each length, and both neighbours
        """SELECT sign * 5 * length * (2 * k + 1) + near, length
           FROM generate_series(1, 400) length, generate_series(0, 59) k, unnest('{-1,0,1}'::int[]) near,
                unnest('{1,-1}'::int[]) sign""",
        # ties of negative lengths
        """SELECT sign * 5 * length * (2 * k + 1), -length
           FROM generate_series(1, 400) length, generate_series(0, 19) k, unnest('{1,-1}'::int[]) sign""",
        # ties as large as they get
        """SELECT 5 * length * (2 * ((2147483647 / (5 * length) - 1) / 2 - k) + 1), length
           FROM generate_series(1, 400) length, generate_series(0, 19) k""",
        # a dense sample
        """SELECT duration, length FROM generate_series(-6000, 6000, 7) duration, generate_series(1, 120) length""",
        # all sizes
        """SELECT (random() * 4294967294 - 2147483647)::bigint, 1 + (random() ^ 8 * 2147483640)::bigint
           FROM generate_series(1, 50000)""",
    ],
    ids=["ties", "negative", "large", "dense", "random"],
)
def test_rounding_agrees_with_postgresql(stream: Stream, sample: str) -> None:
    """`round(numeric, 2)`, half away from zero, on every exact half and elsewhere."""
    rows = stream.run(ROUNDED.format(sample))
    assert len(rows) > 5_000
    assert [row for row in rows if engagement_pct(*row[:2]) != row[2] / 100] == []


# -- content, in the order of the stream -------------------------------------------------------------------------


async def test_a_change_applies_to_the_events_after_it(enricher: StreamEnricher, stream: Stream) -> None:
    """Insert, update, delete, and a key that changes: each event has what was committed before it."""
    statements = [
        None,
        "UPDATE content SET length_seconds = 301 WHERE content_id = 1",
        "UPDATE content SET content_type = 'short', length_seconds = NULL WHERE content_id = 1",
        "UPDATE content SET content_id = 11 WHERE content_id = 1",
        "INSERT INTO content VALUES (1, 'audio', 60)",
        "DELETE FROM content WHERE content_id = 1",
    ]
    for statement in statements:
        if statement:
            stream.run(statement)
        stream.insert_event(1)
    stream.insert_event(11)
    events = (await enricher.enrich(stream.rows())).events
    expected = [
        ("video", 300), ("video", 301), ("short", None), (None, None), ("audio", 60), (None, None), ("short", None),
    ]  # fmt: skip
    assert expected == _contents(events)


async def test_a_change_applies_across_calls(enricher: StreamEnricher, stream: Stream) -> None:
    """What one call learned holds for the next, whatever the calls' borders."""
    stream.run("UPDATE content SET length_seconds = 10 WHERE content_id = 1")
    assert (await enricher.enrich(stream.rows())).events == []
    stream.insert_event(1)
    assert _contents((await enricher.enrich(stream.rows())).events) == [("video", 10)]


async def test_truncate_leaves_no_content(enricher: StreamEnricher, stream: Stream) -> None:
    """Everything is missing until it is inserted again."""
    stream.insert_event(1)
    stream.run("TRUNCATE content")
    stream.insert_event(1)
    stream.run("INSERT INTO content VALUES (1, 'audio', 60)")
    stream.insert_event(1)
    stream.insert_event(2)
    events = (await enricher.enrich(stream.rows())).events
    assert _contents(events) == [("video", 300), (None, None), ("audio", 60), (None, None)]


async def test_an_unchanged_toasted_column_is_looked_up(enricher: StreamEnricher, stream: Stream) -> None:
    """The update's row does not carry the long text; the event after it has it all the same."""
    stream.run("ALTER TABLE content ALTER COLUMN content_type SET STORAGE EXTERNAL")
    long = "x" * 10_000
    stream.run("INSERT INTO content VALUES (9, %s, 1)", long)
    stream.insert_event(9)
    stream.run("UPDATE content SET length_seconds = 2 WHERE content_id = 9")
    stream.insert_event(9)
    rows = stream.rows()
    assert [column.name for column in rows[2].columns] == ["content_id", "length_seconds"]
    assert [(long, 1), (long, 2)] == _contents((await enricher.enrich(rows)).events)


async def test_a_new_content_in_the_same_transaction(enricher: StreamEnricher, stream: Stream) -> None:
    """Content and its first event committed together, the foreign key's way."""
    with stream._connection.transaction():  # noqa: SLF001  our own class, one file
        stream.run("INSERT INTO content VALUES (8, 'live', 0)")
        stream.insert_event(8)
    made = await enricher.enrich(stream.rows())
    assert _contents(made.events) == [("live", 0)]
    assert _parse(made.events[0].json)["engagement_pct"] is None


def _random_step(stream: Stream, chance: random.Random) -> None:
    content_id, other = chance.randrange(1, 8), chance.randrange(1, 8)
    length = chance.randrange(1, 400)
    upsert = "INSERT INTO content VALUES (%s, 'video', %s) ON CONFLICT (content_id) DO UPDATE SET length_seconds = %s"
    rename = (
        "UPDATE content SET content_id = %s WHERE content_id = %s"
        " AND NOT EXISTS (SELECT FROM content WHERE content_id = %s)"
    )
    step = chance.random()
    if step < 0.3:
        stream.run(upsert, content_id, length, length)
    elif step < 0.4:
        stream.run("DELETE FROM content WHERE content_id = %s", content_id)
    elif step < 0.5:
        stream.run(rename, other, content_id, other)
    elif step < 0.52:
        stream.run("TRUNCATE content")
    elif step < 0.55:
        stream.run("UPDATE engagement_events SET device = 'x'")
    else:
        event_id = stream.insert_event(content_id)
        stream.run("INSERT INTO seen SELECT * FROM expected_now WHERE event_id = %s", event_id)


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
async def test_any_history_in_any_portions(enricher: StreamEnricher, stream: Stream, identity: str) -> None:
    """Random changes and events: each event is what PostgreSQL computed when it was inserted."""
    chance = _chance()
    stream.run(f"ALTER TABLE content REPLICA IDENTITY {identity}")
    stream.run("INSERT INTO content SELECT n, 'video', n FROM generate_series(4, 7) n")
    await enricher.open()  # what is not known yet is looked up, and may be newer than the stream
    stream.run(f"CREATE VIEW expected_now AS {EXPECTED}")
    stream.run("CREATE TABLE seen AS SELECT * FROM expected_now WITH NO DATA")
    for _ in range(600):
        _random_step(stream, chance)
    rows, events = stream.rows(), []
    while rows:
        count = chance.randrange(1, 60)
        events += (await enricher.enrich(rows[:count])).events
        rows = rows[count:]
    seen = [_parse(text) for (text,) in stream.run("SELECT row_to_json(s)::text FROM seen s ORDER BY event_id")]
    assert seen == [_parse(event.json) for event in events]
    assert len(seen) > 100


# -- look-ups and the bound --------------------------------------------------------------------------------------


class CountingDatabase(Database):
    """Counts the queries."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.queries: list[Any] = []

    async def rows(self, query: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        """Count, and ask."""
        self.queries.append(parameters)
        return await super().rows(query, parameters)


async def _counting(dsn: str, size: int) -> tuple[StreamEnricher, CountingDatabase]:
    enricher = StreamEnricher(dsn, Tables(EVENT), size)
    database = CountingDatabase(dsn)
    enricher._database = database  # noqa: SLF001  the only way to count what goes over the wire
    enricher._contents[0]._database = database  # noqa: SLF001
    await enricher.open()
    database.queries.clear()
    return enricher, database


async def test_one_look_up_for_all_that_is_missing(database: str, stream: Stream) -> None:
    """Distinct ids, once; also that there is no such content is remembered."""
    stream.run("INSERT INTO content SELECT n, 'video', n FROM generate_series(100, 149) n")
    enricher, counted = await _counting(database, size=3)
    for content_id in (1, 100, 101, 100, 77, 77):
        stream.insert_event(content_id)
    rows = stream.rows()
    events = (await enricher.enrich(rows)).events[-6:]
    expected = [("video", 300), ("video", 100), ("video", 101), ("video", 100), (None, None), (None, None)]
    assert expected == _contents(events)
    # the 50 inserts told of 100 and 101
    assert [{1, 77}] == [set(query["ids"]) for query in counted.queries]
    await enricher.close()


async def test_the_cache_is_bounded_between_calls(database: str, stream: Stream) -> None:
    """A batch with more contents than the bound works; afterwards the newest are left."""
    stream.run("INSERT INTO content SELECT n, 'video', n FROM generate_series(100, 149) n")
    stream.rows()
    enricher, counted = await _counting(database, size=10)
    for _ in range(2):
        for content_id in range(100, 150):
            stream.insert_event(content_id)
        events = (await enricher.enrich(stream.rows())).events
        assert [("video", n) for n in range(100, 150)] == _contents(events)
        assert len(enricher._contents[0].known) == 10  # noqa: SLF001
    assert [len(query["ids"]) for query in counted.queries] == [40, 40]
    await enricher.close()


async def test_what_is_known_is_not_asked_for(database: str, stream: Stream) -> None:
    """Preloaded, told by the stream, found missing before: no query."""
    enricher, counted = await _counting(database, size=100)
    stream.run("INSERT INTO content VALUES (5, 'video', 5)")
    for content_id in (1, 2, 3, 5):
        stream.insert_event(content_id)
    stream.insert_event(6)
    await enricher.enrich(stream.rows())
    stream.insert_event(6)
    await enricher.enrich(stream.rows())
    assert counted.queries == [{"ids": [6]}]
    await enricher.close()


async def test_preload_takes_the_newest_up_to_the_bound(database: str, stream: Stream) -> None:
    """In pages; the oldest of them are the first to be forgotten."""
    stream.run("TRUNCATE content")
    stream.run("INSERT INTO content SELECT n, 'video', n FROM generate_series(1, %s) n", PRELOAD_PAGE + 30)
    stream.run("INSERT INTO content VALUES (-9223372036854775808, 'least', 1), (9223372036854775807, 'most', 1)")
    contents = Contents(Database(database), PRELOAD_PAGE + 20, EVENT_TABLES, *EVENT_TABLES.joins)
    await contents.preload()
    known = list(contents.known)
    assert [*range(12, PRELOAD_PAGE + 31), 2**63 - 1] == known
    await contents._database.close()  # noqa: SLF001
    contents = Contents(Database(database), 10 * PRELOAD_PAGE, EVENT_TABLES, *EVENT_TABLES.joins)
    await contents.preload()
    assert list(contents.known)[:2] == [-(2**63), 1]
    assert len(contents.known) == PRELOAD_PAGE + 32
    await contents._database.close()  # noqa: SLF001


# -- rows that are not what they should be -----------------------------------------------------------------------


async def test_a_row_without_a_column_is_a_dead_letter_and_the_rest_goes_on(
    enricher: StreamEnricher, stream: Stream
) -> None:
    """Columns are dropped and changed while we read; the letter can be replayed when the column is back."""
    good = [stream.insert_event(1)]
    stream.run("ALTER TABLE engagement_events RENAME device TO gadget")
    bad = stream.insert_event(1)
    stream.run("ALTER TABLE engagement_events RENAME gadget TO device")
    stream.run("ALTER TABLE engagement_events ADD COLUMN country text DEFAULT 'AT'")
    good.append(stream.insert_event(2))
    rows = stream.rows()
    made = await enricher.enrich(rows)
    assert good == [event.id for event in made.events]
    [letter] = made.refused
    reason = "public.engagement_events has no column device; expected text or NULL"
    assert (None, bad, reason) == (letter.sink, letter.event_id, letter.reason)
    assert Position(rows[1].commit_lsn, 1) == letter.position
    mended = letter.payload.replace(b'],"identity"', b',{"name":"device"}],"identity"')
    restored = await enricher.restore([letter, DeadLetter(**_facts(letter) | {"payload": mended})])
    assert [bad] == [event.id for event in restored.events]
    assert [reason] == [again.reason for again in restored.refused]


def _facts(letter: DeadLetter) -> dict[str, Any]:
    return {name: getattr(letter, name) for name in letter.__struct_fields__}


async def test_wider_columns_stay_exact(enricher: StreamEnricher, stream: Stream) -> None:
    """Bigint durations and lengths, varchar and enum texts: numbers past 2^53 in full."""
    stream.run("ALTER TABLE engagement_events ALTER duration_ms TYPE bigint, ALTER device TYPE varchar(20)")
    stream.run("CREATE TYPE kind AS ENUM ('video', 'article')")
    stream.run(
        "ALTER TABLE content ALTER length_seconds TYPE bigint, ALTER content_type TYPE kind USING content_type::kind"
    )
    stream.run("INSERT INTO content VALUES (4, 'video', 9007199254740993), (5, 'video', 1)")
    for content_id in (1, 4, 5):
        for duration in (2**63 - 1, -(2**63), 2**53 + 1, 10**15, 10**15 - 1):
            stream.insert_event(content_id, duration_ms=duration, device="web")
    assert _failing(await enricher.check()) == []
    made = await enricher.enrich(stream.rows())
    assert made.refused == []
    assert stream.expected() == [_parse(event.json) for event in made.events]


async def test_fractions_are_refused_not_cut(enricher: StreamEnricher, stream: Stream) -> None:
    """A numeric duration is a number we could round, and must not."""
    stream.run("ALTER TABLE engagement_events ALTER duration_ms TYPE numeric")
    stream.insert_event(1, duration_ms=Decimal("7000.5"))
    stream.insert_event(1, duration_ms=Decimal(7000))
    made = await enricher.enrich(stream.rows())
    assert [x.reason for x in made.refused] == ["public.engagement_events.duration_ms is not a 64-bit integer or NULL"]
    assert b"7000.5" in made.refused[0].payload
    assert len(made.events) == 1


async def test_updates_deletes_and_truncates_of_events_are_counted(enricher: StreamEnricher, stream: Stream) -> None:
    """New rows only; what happens to old ones makes no event and no fuss."""
    ids = [stream.insert_event(1), stream.insert_event(1)]
    stream.run("UPDATE engagement_events SET device = 'x'")
    stream.run("DELETE FROM engagement_events WHERE id = %s", ids[0])
    stream.run("TRUNCATE engagement_events")
    made = await enricher.enrich(stream.rows())
    assert ids == [event.id for event in made.events]
    assert made.refused == []
    assert dict(enricher.ignored) == {"U": 2, "D": 1, "T": 1}


async def test_a_truncate_is_told(enricher: StreamEnricher, stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """With RESTART IDENTITY ids are given a second time, and Redis counts an id once: the cure is named."""
    stream.insert_event(1)
    await enricher.enrich(stream.rows())
    stream.run("TRUNCATE engagement_events RESTART IDENTITY")
    await enricher.enrich(stream.rows())
    [told] = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    assert "Ids must never be reused" in told
    assert "rebuild-redis --from-empty" in told


async def test_integers_of_a_domain(enricher: StreamEnricher, stream: Stream) -> None:
    """wal2json quotes them; in the events, in the contents, in a dead letter that is replayed, and NULL."""
    stream.run("CREATE DOMAIN ms AS int CHECK (VALUE >= 0)")
    stream.run("CREATE DOMAIN big AS bigint")
    for column, domain in (("id", "big"), ("content_id", "big"), ("user_id", "big"), ("duration_ms", "ms")):
        stream.run(f"ALTER TABLE engagement_events ALTER {column} TYPE {domain}")
    stream.run("ALTER TABLE content ALTER content_id TYPE big, ALTER length_seconds TYPE ms")
    for duration in (0, 2**31 - 1, None):
        stream.insert_event(-1 if duration is None else 1, duration_ms=duration)
    stream.run("UPDATE content SET length_seconds = 60 WHERE content_id = 1")
    stream.insert_event(1, duration_ms=6000)
    stream.run("DELETE FROM content WHERE content_id = 2")
    made = await enricher.enrich(stream.rows())
    assert [] == made.refused
    assert _contents(made.events) == [("video", 300), ("video", 300), (None, None), ("video", 60)]
    stream.run("ALTER TABLE engagement_events RENAME device TO gadget")
    lacking = stream.insert_event(1)
    [letter] = (await enricher.enrich(stream.rows())).refused
    assert lacking == letter.event_id
    mended = letter.payload.replace(b'],"identity"', b',{"name":"device"}],"identity"')
    again = await enricher.restore([DeadLetter(**_facts(letter) | {"payload": mended})])
    assert [lacking] == [event.id for event in again.events]


async def test_a_content_change_without_its_key(enricher: StreamEnricher) -> None:
    """What is known is given up, and the operator finds a letter: nothing stale goes on unnoticed."""
    row = Row("D", "public", "content", [], [Column("content_type", "video")], commit_lsn=7, ordinal=1)
    made = await enricher.enrich([row])
    reason = "public.content has no content_id, a 64-bit integer, in the row's identity"
    assert [reason] == [letter.reason for letter in made.refused]
    assert enricher._contents[0].known == {}  # noqa: SLF001


def test_a_content_row_of_the_wrong_type_is_looked_up() -> None:
    """Its own words are not believed; the database says what it is."""
    columns = [Column("content_id", 1), Column("content_type", "video"), Column("length_seconds", "five minutes")]
    [change] = changes(EVENT_TABLES.joins[0], Row("I", "public", "content", columns), part=False)
    assert change == (1, None)


async def test_a_row_of_another_table_is_a_dead_letter(enricher: StreamEnricher) -> None:
    """It can't come, and if it does it is not dropped in silence."""
    made = await enricher.enrich([Row("I", "public", "users", [Column("id", 1)], commit_lsn=7, ordinal=1)])
    assert [letter.reason for letter in made.refused] == ["public.users is not a table that events are made of"]


# -- trouble -----------------------------------------------------------------------------------------------------


async def test_a_lost_connection_changes_nothing(stack: DevStack, enricher: StreamEnricher, stream: Stream) -> None:
    """The look-up fails: SourceUnavailable; the same rows again give the same events, and nothing counted twice."""
    stream.insert_event(1)
    stream.run("UPDATE content SET length_seconds = 301 WHERE content_id = 1")
    stream.run("UPDATE engagement_events SET device = 'x'")
    stream.insert_event(77)
    rows = stream.rows()
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        kill = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s"
        assert admin.execute(kill, ["replicator enrichment"]).fetchall() == [(True,)]
    with pytest.raises(SourceUnavailable):
        await enricher.enrich(rows)
    made = await enricher.enrich(rows)
    assert _contents(made.events) == [("video", 300), (None, None)]
    assert dict(enricher.ignored) == {"U": 1}


async def test_a_server_that_is_away(stack: DevStack, database: str) -> None:
    """`open` says so, as often as it is tried, and succeeds when the server is back."""
    enricher = StreamEnricher(database, Tables(EVENT), 1_000)
    stack.postgres.stop()
    try:
        with pytest.raises(SourceUnavailable) as away:
            await enricher.open()
        findings = await enricher.check()
    finally:
        stack.postgres.start()
    assert "app:app" not in str(away.value)
    assert [finding.ok for finding in findings] == [False]
    await enricher.open()
    await enricher.close()
    await enricher.close()


async def test_a_look_up_behind_a_lock_gives_up(database: str, stream: Stream) -> None:
    """A statement that does not end is ended by the server, and tried again like any trouble."""
    impatient = Database(database, timeout_seconds=1)
    with stream._connection.transaction():  # noqa: SLF001
        stream.run("LOCK TABLE content IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(SourceUnavailable, match="statement timeout"):
            await impatient.rows("SELECT 1 FROM content")
    assert await impatient.rows("SELECT count(*) FROM content") == [(3,)]
    await impatient.close()


async def test_the_connection_can_only_read(database: str) -> None:
    """Whatever we send, the source database stays as it is."""
    ours = Database(database)
    with pytest.raises(SourceUnusable, match="ReadOnlySqlTransaction"):
        await ours.rows("DELETE FROM content RETURNING 1")
    await ours.close()


async def test_a_missing_table_is_waited_for(stream: Stream, enricher: StreamEnricher) -> None:
    """It says which, with a cure."""
    stream.run("ALTER TABLE content RENAME TO contents")
    with pytest.raises(TablesUnfit, match=r'relation "public.content" does not exist.*python -m replicator check'):
        await enricher.open()


@pytest.mark.parametrize("dsn", ["postgresql://app:secret@/x?nonsense=1", "password=secret nonsense"])
async def test_an_unreadable_dsn_is_not_quoted(dsn: str) -> None:
    """Libpq would print it, password and all."""
    with pytest.raises(SettingsError) as unusable:
        await create_enricher(dsn, load(EnrichmentSettings)).open()
    assert "secret" not in str(unusable.value)
    assert str(unusable.value).startswith("REPLICATOR_POSTGRES_DSN")


def test_settings_name_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of no size is refused by name."""
    monkeypatch.setenv("REPLICATOR_CONTENT_CACHE_SIZE", "0")
    with pytest.raises(SettingsError, match="REPLICATOR_CONTENT_CACHE_SIZE"):
        load(EnrichmentSettings)


# -- preflight and history ---------------------------------------------------------------------------------------


async def test_check_passes_on_the_contracts_tables(enricher: StreamEnricher) -> None:
    """Every line ok, no cure."""
    findings = await enricher.check()
    assert _failing(findings) == []
    assert len(findings) == 8
    assert not any(finding.cure for finding in findings)


BY_TYPE = "CREATE UNIQUE INDEX by_type ON content (content_type)"
BY_ID = "CREATE UNIQUE INDEX by_id ON content (content_id)"
PARTITIONED = "CREATE TABLE engagement_events (id bigint, event_ts timestamptz) PARTITION BY RANGE (event_ts)"
UNLOGGED_PART = "CREATE UNLOGGED TABLE part PARTITION OF engagement_events DEFAULT"


@pytest.mark.parametrize(
    ("statements", "what", "cure"),
    [
        (["DROP TABLE engagement_events"], "engagement_events: does not exist", "source_schema.sql"),
        (["ALTER TABLE engagement_events DROP device"], "has no column device (text)", "ADD COLUMN device text"),
        (
            ["ALTER TABLE engagement_events ALTER event_ts TYPE timestamp"],
            "has a column event_ts of type timestamp without time zone instead of timestamptz",
            "ALTER COLUMN event_ts TYPE timestamptz",
        ),
        (["ALTER TABLE engagement_events ALTER duration_ms TYPE float8"], "double precision", "TYPE bigint"),
        (["ALTER TABLE content ALTER length_seconds TYPE text"], "of type text instead of bigint", "TYPE bigint"),
        (["ALTER TABLE engagement_events SET UNLOGGED"], "not in the WAL (UNLOGGED)", "SET LOGGED"),
        (
            ["DROP TABLE engagement_events", "CREATE VIEW engagement_events AS SELECT 1 AS id"],
            "is a view",
            "Give the name public.engagement_events back",
        ),
        (
            ["DROP TABLE engagement_events", PARTITIONED, UNLOGGED_PART],
            "has rows in public.part that",
            "SET LOGGED",
        ),
    ],
)
async def test_check_finds(
    enricher: StreamEnricher, stream: Stream, statements: list[str], what: str, cure: str
) -> None:
    """What is wrong with the tables is named, with the command that mends it."""
    for statement in statements:
        stream.run(statement)
    failing = _failing(await enricher.check())
    assert what in failing[0].what
    assert cure in failing[0].cure


@pytest.mark.parametrize(
    ("statements", "what", "cure"),
    [
        (["ALTER TABLE content REPLICA IDENTITY NOTHING"], "a replica identity that does not", "IDENTITY DEFAULT"),
        (["ALTER TABLE content DROP CONSTRAINT content_pkey"], "a replica identity that does not", "IDENTITY FULL"),
        (
            ["TRUNCATE content", BY_TYPE, "ALTER TABLE content REPLICA IDENTITY USING INDEX by_type"],
            "a replica identity that does not",
            "IDENTITY DEFAULT",
        ),
        (["ALTER TABLE content SET UNLOGGED"], "not in the WAL", "SET LOGGED"),
        (["ALTER TABLE content RENAME TO c", "CREATE VIEW content AS SELECT * FROM c"], "is a view", "ordinary table"),
    ],
)
async def test_check_advises(
    enricher: StreamEnricher, stream: Stream, statements: list[str], what: str, cure: str
) -> None:
    """A content whose changes the stream does not show works, and is slower."""
    stream.run("ALTER TABLE engagement_events DROP CONSTRAINT IF EXISTS engagement_events_content_id_fkey")
    for statement in statements:
        stream.run(statement)
    findings = await enricher.check()
    assert _failing(findings) == []
    [advice] = [finding for finding in findings if finding.cure]
    assert what in advice.what
    assert cure in advice.cure


@pytest.mark.parametrize(
    "statements",
    [
        [BY_ID, "ALTER TABLE content REPLICA IDENTITY USING INDEX by_id"],
        ["ALTER TABLE content REPLICA IDENTITY FULL"],
        [
            "ALTER TABLE content DROP CONSTRAINT content_pkey",
            "ALTER TABLE content ADD PRIMARY KEY (content_id, content_type)",
        ],
        ["ALTER TABLE content ALTER length_seconds TYPE smallint, ALTER content_type TYPE varchar(20)"],
        ["CREATE DOMAIN a AS text", "CREATE DOMAIN b AS a", "ALTER TABLE content ALTER content_type TYPE b"],
        ["ALTER TABLE engagement_events DROP raw_payload, ADD country text"],
    ],
)
async def test_check_lets_pass_what_does_as_well(
    enricher: StreamEnricher, stream: Stream, statements: list[str]
) -> None:
    """Other replica identities, narrower integers, other texts, other columns: no finding."""
    for statement in statements:
        stream.run(statement)
    assert _failing(await enricher.check()) == []


class Plain(NamedTuple):
    """A role without rights."""

    name: str
    dsn: str


@pytest.fixture
def plain(stack: DevStack, database: str, stream: Stream) -> Iterator[Plain]:
    """One for this test."""
    name = "plain_" + database.rpartition("/")[2]
    stream.run(f"CREATE ROLE {name} LOGIN PASSWORD 'plain'")
    dsn = stack.postgres.dsn_for(database=database.rpartition("/")[2], user=name, password="plain")  # noqa: S106
    yield Plain(name, dsn)
    stream.run(f"DROP OWNED BY {name}")
    stream.run(f"DROP ROLE {name}")


async def test_check_tells_a_plain_role_what_it_lacks(plain: Plain, stream: Stream) -> None:
    """Without rights, with rights on some columns only, with all."""
    name, dsn = plain
    enricher = create_enricher(dsn, load(EnrichmentSettings))
    with pytest.raises(TablesUnfit, match="permission denied for table content"):
        await enricher.open()
    assert "could not be counted" in await enricher.history()
    lacking = [finding.what.partition(":")[0] for finding in _failing(await enricher.check())]
    assert lacking == ["table public.content", "table public.engagement_events"]
    stream.run(f"GRANT SELECT (content_id, content_type) ON content TO {name}")
    stream.run(f"GRANT SELECT ON engagement_events TO {name}")
    assert [f.what.partition(":")[0] for f in _failing(await enricher.check())] == ["table public.content"]
    stream.run(f"GRANT SELECT (length_seconds) ON content TO {name}")
    assert _failing(await enricher.check()) == []
    await enricher.open()
    await enricher.close()


async def test_rows_that_a_policy_hides(plain: Plain, stream: Stream) -> None:
    """Are an error and a finding, not missing; with BYPASSRLS there is no policy."""
    name, dsn = plain
    stream.run(f"GRANT SELECT ON content, engagement_events TO {name}")
    stream.run("ALTER TABLE content ENABLE ROW LEVEL SECURITY")
    enricher = create_enricher(dsn, load(EnrichmentSettings))
    with pytest.raises(TablesUnfit, match='affected by row-level security policy for table "content"'):
        await enricher.open()
    [finding] = _failing(await enricher.check())
    assert finding.what.startswith("table public.content: row-level security applies to us")
    assert "BYPASSRLS" in finding.cure
    stream.run(f"CREATE POLICY everything ON content TO {name} USING (true)")
    harmless = create_enricher(f"{dsn}?options=-c%20row_security%3Don", load(EnrichmentSettings))
    assert _failing(await harmless.check()) == []
    await harmless.open()
    await harmless.close()
    with pytest.raises(TablesUnfit):
        await enricher.open()
    stream.run(f"ALTER ROLE {name} BYPASSRLS")
    assert _failing(await enricher.check()) == []
    await enricher.open()
    await enricher.close()


@pytest.mark.parametrize("pool_mode", ["session", "transaction", "statement"])
async def test_rows_that_a_policy_hides_behind_a_pooler(
    stack: DevStack, plain: Plain, stream: Stream, pool_mode: str
) -> None:
    """It drops the options of a connection, and may give each transaction another session: still an error."""
    name, dsn = plain
    stream.run(f"GRANT SELECT ON content TO {name}")
    stream.run("ALTER TABLE content ENABLE ROW LEVEL SECURITY")
    stream.run(f"CREATE POLICY first ON content TO {name} USING (content_id < 2)")
    with pgbouncer(stack, pool_mode, **{name: "plain"}) as pooler:
        ours = Database(pooler.dsn_for(dsn))
        with pytest.raises(SourceError, match=r"row-level security|statement pooling|not to a pooler"):
            await ours.rows("SELECT count(*) FROM content")
        stream.run(f"ALTER ROLE {name} BYPASSRLS")
        if pool_mode != "statement":
            for _ in range(10):  # more than psycopg would prepare after
                assert [(3, "on")] == await ours.rows(
                    "SELECT count(*), current_setting('transaction_read_only') FROM content"
                )
        await ours.close()


async def test_history_names_the_command_that_brings_it(enricher: StreamEnricher, stream: Stream) -> None:
    """The range in whole seconds, end excluded; what no range holds is left out."""
    assert await enricher.history() == ""
    stream.insert_event(1, event_ts="infinity")
    assert await enricher.history() == ""
    stream.insert_event(1, event_ts="2026-01-08 09:00:00.25+00")
    stream.insert_event(1, event_ts="2026-01-08 09:59:59+00")
    expected = (
        "public.engagement_events holds 2 rows; those from before the slot do not come through it. "
        "To bring all of them: python -m replicator backfill --start 2026-01-08T09:00:00 --end 2026-01-08T10:00:00"
    )
    assert expected == await enricher.history()
    told = await enricher.history(["clickhouse", "http"])
    assert "2 rows; what clickhouse and http needs was only made now, and lacks the older ones. To bring" in told
    assert told.endswith("--end 2026-01-08T10:00:00 --sinks clickhouse,http")


class _Taking:
    """A stream that changes the rows that it is given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[list[str]] = []

    def knows(self, _: Row) -> bool:
        """Every table is its own."""
        return True

    async def enrich(self, rows: Sequence[Row], _: Sequence[Event]) -> Enriched:
        """Remember what the columns were."""
        self.seen += [[column.name for column in row.columns] for row in rows]
        for row in rows:
            row.columns += [Column("mine", self.name)]
        return Enriched([], [])


async def test_streams_of_one_table_do_not_see_each_others_changes() -> None:
    """A row that one has completed, or read again, has the columns of that one."""
    one, other = _Taking("one"), _Taking("other")
    both = SeveralStreams([one, other])  # type: ignore[list-item]  # they do what it needs
    await both.enrich([Row("I", "public", "shared", [Column("id", 1)], commit_lsn=1, ordinal=1)])
    assert [["id"]] == one.seen == other.seen


async def test_the_time_column_may_have_any_name(database: str) -> None:
    """Whether an index begins with it is asked by its name, whatever that is."""
    time = Field("at", TIMESTAMPTZ, column="it's 100%", role=Role.TIME)
    fields = (Field("id", BIGINT, role=Role.IDENTITY), Field("key", BIGINT, role=Role.KEY), time)
    table = """CREATE TABLE odd (id bigint PRIMARY KEY, key bigint NOT NULL, "it's 100%" timestamptz NOT NULL)"""
    with psycopg.connect(database) as source:
        source.execute(table.encode())
        source.execute("INSERT INTO odd SELECT n, n, now() FROM generate_series(1, 3) n")
        source.execute("""CREATE INDEX ON odd ("it's 100%", id)""")
    tables = Tables(Declared("odd", "public.odd", fields))
    enricher = StreamEnricher(database, tables, 10)
    assert "public.odd holds 3 rows" in await enricher.history()
    await enricher.close()
    past = RangeHistory(database, BEGINNING, END, tables=tables)
    await past.open()
    place, count = await past.begin()
    page = await past.read(place, Position(0, 0), 10)
    assert page
    assert (3, [1, 2, 3]) == (count, sorted(event.id for event in page.enriched.events))
    assert '"order":"event_ts"' in place
    await past.close()
