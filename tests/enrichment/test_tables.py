"""The guard of the tables on real PostgreSQL: what it notices, what leaves it alone, and what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest
from msgspec import structs

from devstack.process import wait_until
from enrichment import EVENT, Tables
from enrichment.database import Database
from enrichment.tables import fit
from enrichment.tables import guard as guards
from enrichment.tables.catalog import SHAPE, Shape, parameters
from enrichment.tables.guard import Guard, difference, swaps
from enrichment.tables.missed import MissedHistory, as_now
from replicator.contracts.errors import SourceUnavailable, TablesChanged, TablesUnsettled
from replicator.contracts.events import Column, Position, Row, parse_lsn
from replicator.contracts.fields import INT64_MIN
from tests.support.rows import EVENT_TABLES

INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'x')"


@pytest.fixture
def admin(database: str) -> Iterator[psycopg.Connection]:
    """The owner's connection, each statement a transaction."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE part () INHERITS (engagement_events)")
        yield connection


@pytest.fixture
async def guard(database: str, admin: psycopg.Connection) -> AsyncIterator[Guard]:
    """It has seen the tables once."""
    assert not admin.closed
    connection = Database(database)
    guard = Guard(connection, EVENT_TABLES)
    await guard.look(None, 0)
    yield guard
    await connection.close()


async def test_what_does_not_matter(guard: Guard, admin: psycopg.Connection) -> None:
    """Statistics, indexes, comments, other tables, rows: the position moves on, and no transaction id is taken."""
    for statement in (
        INSERT,
        "ANALYZE",
        "VACUUM FREEZE engagement_events",
        "CREATE INDEX ON engagement_events (event_ts)",
        "CREATE INDEX CONCURRENTLY ON part (event_ts)",
        "REINDEX TABLE engagement_events",
        "COMMENT ON TABLE content IS 'x'",
        "CREATE TABLE other (LIKE content)",
        "CREATE TEMP TABLE mine () INHERITS (engagement_events)",
        "VACUUM FULL pg_class",
        "UPDATE content SET length_seconds = 1",
    ):
        admin.execute(statement.encode())
        before = _now(admin)
        assert await guard.verify() >= before[0], statement
        assert before[1] == _now(admin)[1], "no transaction id"


def _now(admin: psycopg.Connection) -> tuple[int, str]:
    query = "SELECT pg_current_wal_insert_lsn()::text, pg_snapshot_xmax(pg_current_snapshot())::text"
    [lsn, xid] = admin.execute(query).fetchone() or ("", "")
    return parse_lsn(lsn), xid


THERE_AND_BACK = [
    ("ALTER TABLE content RENAME TO x", "ALTER TABLE x RENAME TO content"),
    ("ALTER SCHEMA public RENAME TO x", "ALTER SCHEMA x RENAME TO public"),
    ("ALTER TABLE part NO INHERIT engagement_events", "ALTER TABLE part INHERIT engagement_events"),
    ("ALTER TABLE part SET UNLOGGED", "ALTER TABLE part SET LOGGED"),
    ("ALTER TABLE content RENAME content_type TO x", "ALTER TABLE content RENAME x TO content_type"),
    ("ALTER TABLE content REPLICA IDENTITY FULL", "ALTER TABLE content REPLICA IDENTITY DEFAULT"),
]


@pytest.mark.parametrize(("there", "back"), THERE_AND_BACK)
async def test_there_and_back_between_two_looks(
    guard: Guard, admin: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, there: str, back: str
) -> None:
    """Everything looks as before, and is not taken for it."""
    monkeypatch.setattr(guards, "SHOWN_SECONDS", -1.0)
    await guard.verify()
    for statement in (there, back):
        admin.execute(statement.encode())
    with pytest.raises(TablesChanged):
        await guard.verify()


async def test_it_waits_for_whoever_may_be_changing_them(
    guard: Guard, database: str, admin: psycopg.Connection
) -> None:
    """A transaction that is not over, prepared or not; what only reads or writes rows is none."""
    admin.execute("CREATE TYPE kind AS ENUM ('a')")
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE content IN EXCLUSIVE MODE")
        await guard.verify()  # it has changed nothing yet
        other.execute("ALTER TABLE content ADD note text")
        with pytest.raises(TablesUnsettled, match=f"process {other.info.backend_pid}, which holds .*Lock on content"):
            await guard.verify()
        other.rollback()
        other.execute(INSERT)
        await guard.verify()
        other.execute("ALTER SCHEMA public RENAME TO x")
        with pytest.raises(TablesUnsettled, match="pg_namespace"):
            await guard.verify()
        other.rollback()
        await guard.verify()
        other.execute("ALTER TYPE kind RENAME VALUE 'a' TO 'b'")
        with pytest.raises(TablesUnsettled, match="ExclusiveLock on a type"):
            await guard.verify()
        other.rollback()
        await guard.verify()
        other.execute("ALTER TABLE part ADD note text")
        other.execute("PREPARE TRANSACTION 'x'")
        with pytest.raises(TablesUnsettled, match="a prepared transaction"):
            await guard.verify()
        other.rollback()
    admin.execute("ROLLBACK PREPARED 'x'")
    await guard.verify()


async def test_writers_that_wait_for_each_other_are_not_waited_for(
    guard: Guard, database: str, admin: psycopg.Connection
) -> None:
    """Whoever waits for a row holds an exclusive lock on it, as long as the other transaction takes."""
    update = "UPDATE content SET length_seconds = 1 WHERE content_id = 1"
    on_a_row = "SELECT count(*) FROM pg_locks WHERE locktype = 'tuple' AND mode = 'ExclusiveLock' AND granted"
    with psycopg.connect(database) as first, psycopg.connect(database) as second:
        first.execute(update)
        waiting = asyncio.create_task(asyncio.to_thread(second.execute, update))
        await asyncio.to_thread(wait_until, lambda: admin.execute(on_a_row).fetchone() == (1,), "it to wait")
        await guard.verify()
        first.rollback()
        await waiting


async def test_a_truncate_is_no_surprise_once_it_was_shown(guard: Guard, admin: psycopg.Connection) -> None:
    """Until then it may be something else."""
    await guard.verify()
    admin.execute("TRUNCATE part, content CASCADE")
    with pytest.raises(TablesUnsettled, match="the stream to show what happened to public"):
        await guard.verify()
    for table in ("part", "content", "engagement_events"):
        guard.saw(Row("T", "public", table, commit_lsn=1))
    await guard.verify()
    await guard.verify()
    assert guard.until == 0


async def test_what_was_missed(guard: Guard, database: str, admin: psycopg.Connection) -> None:
    """In a part that was changed what was written since the last look; in a new one everything; else nothing."""
    for _ in range(3):
        admin.execute(INSERT)
    admin.execute(INSERT.replace("engagement_events", "part"))
    await guard.verify()
    guard.saw_event(4)
    record = guard.accept()
    admin.execute("CREATE TABLE filled (LIKE engagement_events INCLUDING ALL)")
    for table in ("filled", "filled", "part", "engagement_events"):
        admin.execute(INSERT.replace("engagement_events", table).encode())
    admin.execute("ALTER TABLE filled INHERIT engagement_events")
    admin.execute("GRANT SELECT ON part TO PUBLIC")
    seen = await guard.look(None, 0)
    assert seen
    assert record == structs.replace(seen, former={}, until=0)
    assert "engagement_events" == seen.former['["public","filled"]'], "its rows of that time are events"
    history = MissedHistory.since(database, EVENT_TABLES, record, guard.shape)
    assert history
    assert [5, 6, 7] == sorted(await _all(history))
    assert "public.filled is a new part of engagement_events" in difference(record.shape, guard.shape)


async def test_a_look_that_fails_forgets_nothing(guard: Guard) -> None:
    """What is recorded may be saved then: it is what is on disk, which another process may have moved on meanwhile."""
    record = guard.accept()
    unreachable = Guard(Database("postgresql://127.0.0.1:1/nobody"), EVENT_TABLES)
    for known in (record, structs.replace(record, xid=record.xid + 1)):
        with pytest.raises(SourceUnavailable):
            await unreachable.look(known, 0)
        assert known == unreachable.record


async def test_a_column_of_the_table_is_one_of_its_parts(
    guard: Guard, database: str, admin: psycopg.Connection
) -> None:
    """Renamed and back between two looks: rows of every part may have had another shape."""
    await guard.verify()
    guard.accept()
    admin.execute("ALTER TABLE engagement_events RENAME device TO dev")
    for table in ("part", "engagement_events"):
        admin.execute(INSERT.replace("engagement_events", table).encode())
    admin.execute("ALTER TABLE engagement_events RENAME dev TO device")
    record = await guard.look(None, 0)
    assert record
    history = MissedHistory.since(database, EVENT_TABLES, record, guard.shape)
    assert history
    assert [1, 2] == sorted(await _all(history))


async def test_up_to_where_columns_were_others_is_kept(guard: Guard, admin: psycopg.Connection) -> None:
    """A stream that begins again before that still shows rows of the time; a column that no event needs is none."""
    await guard.verify()
    guard.accept()
    admin.execute("ALTER TABLE engagement_events ADD other text; CREATE TABLE later () INHERITS (engagement_events)")
    await guard.look(None, 0)
    assert (True, 0) == (guard.until > 0, guard.reshaped)
    admin.execute("ALTER TABLE engagement_events RENAME device TO dev")
    admin.execute("ALTER TABLE engagement_events RENAME dev TO device")
    await guard.look(None, 0)
    await guard.verify()
    assert guard.until == guard.reshaped
    await guard.look(guard.accept(), guard.reshaped - 1)
    assert guard.reshaped


async def test_columns_that_came_went_or_swapped_names(guard: Guard, admin: psycopg.Connection) -> None:
    """They are named; a swap of two that events are made of comes with the setting."""
    before = guard.shape
    admin.execute("ALTER TABLE engagement_events RENAME device TO dev")
    renamed = await _shape(guard)
    table = "public.engagement_events"
    assert f"{table} has new columns (dev) and has lost columns (device)" == difference(before, renamed)
    assert not list(swaps(EVENT_TABLES, before, renamed))
    admin.execute("ALTER TABLE engagement_events RENAME event_type TO device")
    admin.execute("ALTER TABLE engagement_events RENAME dev TO event_type")
    swapped = await _shape(guard)
    assert f"{table} has other columns under the names device, event_type" == difference(before, swapped)
    [told] = swaps(EVENT_TABLES, before, swapped)
    assert "set REPLICATOR_COLUMNS to what is now right, such as device=event_type,event_type=device" in told
    admin.execute("ALTER TABLE content ADD again int, DROP length_seconds, ADD length_seconds int")
    again = await _shape(guard)
    assert not list(swaps(EVENT_TABLES, swapped, again)), "one alone was made again"
    columns = "length_seconds, again, content_type, content_id"
    admin.execute("ALTER TABLE content RENAME TO x")
    admin.execute(f"CREATE TABLE content AS SELECT {columns} FROM x")  # noqa: S608  ours
    other = await _shape(guard)
    assert not list(swaps(EVENT_TABLES, again, other)), "another table may have its columns in another order"


async def test_a_column_that_is_missing(guard: Guard, admin: psycopg.Connection) -> None:
    """A setting takes effect with a restart; one that is no longer true is to be taken out."""
    [[what, cure]] = fit.problems(_named("dev"), guard.shape, "engagement_events")
    assert "has no column dev (text)" == what
    assert cure.endswith("or take device=dev out of REPLICATOR_COLUMNS and restart the replicator")
    admin.execute("ALTER TABLE engagement_events RENAME device TO other")
    [[_, cure]] = fit.problems(EVENT_TABLES, await _shape(guard), "engagement_events")
    assert cure.endswith("or name it in REPLICATOR_COLUMNS=device=… and restart the replicator")
    named = _named("The Device")
    [[_, cure]] = fit.problems(named, await _shape(guard), "engagement_events")
    assert 'RENAME COLUMN … TO "The Device")' in cure
    assert 'ADD COLUMN "The Device" text' in cure
    admin.execute('ALTER TABLE engagement_events ADD "The Device" int')
    [[_, cure]] = fit.problems(named, await _shape(guard), "engagement_events")
    assert cure.endswith('ALTER COLUMN "The Device" TYPE text USING "The Device"::text')


def _named(device: str) -> Tables:
    return Tables(EVENT, {"engagement_events": {"device": device}})


async def _shape(guard: Guard) -> Shape:
    [(text,)] = await guard._database.rows(SHAPE, parameters(EVENT_TABLES))  # noqa: SLF001  its connection
    return Shape.parse(text)


PARTITIONED = """
CREATE TABLE engagement_events (LIKE former INCLUDING DEFAULTS) PARTITION BY RANGE (user_id);
CREATE TABLE rest PARTITION OF engagement_events DEFAULT
"""


@pytest.mark.parametrize("new", ["CREATE TABLE engagement_events (LIKE former INCLUDING ALL)", PARTITIONED])
async def test_another_table_has_other_rows_under_the_same_ids(
    guard: Guard, admin: psycopg.Connection, new: str
) -> None:
    """What the stream says of the former table's rows stays as it is."""
    await guard.verify()
    guard.accept()
    admin.execute("DROP TABLE part; ALTER TABLE engagement_events RENAME TO former")
    admin.execute(new.encode())
    await guard.look(None, 0)
    assert (True, 0) == (guard.until > 0, guard.reshaped)


async def test_rows_as_they_are_now(database: str, admin: psycopg.Connection) -> None:
    """By their ids, also quoted ones and several of one id; what is gone, or has no usable id, stays as it is."""
    admin.execute(INSERT)
    connection = Database(database)
    rows = [Row("I", "public", "part", [Column("id", value), Column("device", "old")]) for value in (1, "1", 2, "x")]
    try:
        await as_now(connection, EVENT_TABLES, rows)
    finally:
        await connection.close()
    old = [Column("device", "old")]
    assert [True, True, False, False] == [("event_type", "x") in _values(row) for row in rows]
    assert old == rows[2].columns[1:] == rows[3].columns[1:]


def _values(row: Row) -> list[tuple[str, object]]:
    return [(column.name, column.value) for column in row.columns]


async def _all(history: MissedHistory) -> list[int]:
    place, after, ids = f"0 {INT64_MIN}", Position(0, 0), []
    while page := await history.read(place, after, 1):
        place, after = page.place, page.position
        ids += [event.id for event in page.enriched.events]
    await history.close()
    return ids
