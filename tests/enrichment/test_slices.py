"""A range in slices, and a standby that is read, on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
import pytest

from devstack import DevStack
from devstack.process import wait_until
from enrichment import RangeHistory
from replicator.contracts.errors import SourceError, SourceUnavailable
from replicator.contracts.events import Position
from tests.support.environment import SQL
from tests.support.rows import EVENT_TABLES

START, END = datetime(2026, 1, 8, 9, tzinfo=UTC), datetime(2026, 1, 8, 10, tzinfo=UTC)
INDEX = "CREATE INDEX ON engagement_events (event_ts, id)"
# Many at one moment, few elsewhere, some outside on both sides.
EVENTS = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts)
SELECT 1, n, 'play', timestamptz '2026-01-08 08:50:00+00'
       + CASE WHEN n % 3 = 0 THEN interval '30 minutes' ELSE n * interval '1 second' END
FROM generate_series(1, 4800) AS n ORDER BY md5(n::text)
"""


async def _ids(history: RangeHistory, place: str) -> list[int]:
    """All events from there on."""
    found: list[int] = []
    after, here = Position(0, 0), place
    while page := await history.read(here, after, 500):
        found += [event.id for event in page.enriched.events]
        after, here = page.position, page.place
    return found


@pytest.mark.parametrize("index", [None, INDEX], ids=["by id", "by event_ts"])
@pytest.mark.parametrize("most", [1, 7, 300])
async def test_slices_are_the_range(index: str | None, most: int, database: str) -> None:
    """Each event of the range is in one slice, and in no other."""
    with psycopg.connect(database) as source:
        source.execute(EVENTS)
        if index:
            source.execute(index)
    whole = RangeHistory(database, START, END, tables=EVENT_TABLES)
    await whole.open()
    place, total = await whole.begin()
    slices = await whole.slices(place, most)
    assert 1 <= len(slices) <= most
    parts = []
    for part in slices:
        history = RangeHistory(database, part.start, part.end, tables=EVENT_TABLES)
        parts += await _ids(history, part.place)
        await history.close()
    assert sorted(await _ids(whole, place)) == sorted(parts)
    assert total == len(parts)
    await whole.close()


async def test_an_empty_range_is_one_slice(database: str) -> None:
    """Nothing is in it."""
    whole = RangeHistory(database, START, END, tables=EVENT_TABLES)
    await whole.open()
    place, total = await whole.begin()
    [part] = await whole.slices(place, 5)
    assert (0, []) == (total, await _ids(whole, part.place))
    await whole.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[str, str]]:
    """DSNs of a primary with events, and the superuser's of its standby."""
    with DevStack("postgres") as own:
        primary, standby = own.postgres, own.standby()
        with psycopg.connect(primary.dsn) as source:
            source.execute((SQL / "source_schema.sql").read_bytes())
            source.execute(EVENTS)
        standby.start()
        yield primary.dsn, standby.superuser_dsn.replace("/postgres", "/" + primary.dsn.rpartition("/")[2])


async def test_a_standby_that_is_behind_is_waited_for(pair: tuple[str, str]) -> None:
    """It shows what it has replayed: without what was there when the backfill began, events would be missing."""
    primary, standby = pair
    first = RangeHistory(primary, START, END, tables=EVENT_TABLES)
    await first.open()
    with psycopg.connect(standby, autocommit=True) as replaying:
        replaying.execute("SELECT pg_wal_replay_pause()")
        paused = "SELECT pg_get_wal_replay_pause_state() = 'paused'"
        wait_until(lambda: replaying.execute(paused).fetchone() == (True,), "the standby to stand still")
        with psycopg.connect(primary) as source:
            source.execute("UPDATE content SET length_seconds = 7")
        since = await first.wal_end()
        second = RangeHistory(standby, START, END, since=since, tables=EVENT_TABLES)
        with pytest.raises(SourceUnavailable, match="The standby is behind: the standby has replayed the WAL up to"):
            await second.open()
        replaying.execute("SELECT pg_wal_replay_resume()")
        caught_up = "SELECT pg_last_wal_replay_lsn() - '0/0' >= %s"
        wait_until(lambda: replaying.execute(caught_up, [since]).fetchone() == (True,), "the standby to catch up")
    await second.open()
    place, _ = await first.begin()
    assert await _ids(first, place) == await _ids(second, place)
    page = await second.read(place, Position(0, 0), 10)
    assert page
    assert page.position.commit_lsn >= since
    assert b'"length_seconds":7' in page.enriched.events[0].json
    await first.close()
    await second.close()


async def test_a_standby_is_refused_otherwise(pair: tuple[str, str]) -> None:
    """A backfill that has not said how far it has to be reads the primary."""
    _, standby = pair
    history = RangeHistory(standby, START, END, tables=EVENT_TABLES)
    with pytest.raises(SourceError):
        await history.open()
    await history.close()
