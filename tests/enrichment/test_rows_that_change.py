"""A history of rows that change: what it shows never replaces a change that it does not show. On a real server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest

from enrichment import RangeHistory
from enrichment.events.codec import codec_of, stored_row
from enrichment.history import moment
from enrichment.history.pages import BEGINNING, END, PickedHistory
from enrichment.tables.declared import Tables
from replicator.contracts.enricher import History, Page
from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Event, Lsn, Position, parse_lsn
from replicator.contracts.fields import BIGINT, TIMESTAMPTZ, Derived, Field, Role, Stream

TABLES = Tables(
    Stream(
        "parcels",
        table="public.parcels",
        updates="upsert",
        deletes="delete",
        fields=(
            Field("id", BIGINT, role=Role.IDENTITY),
            Field("depot", BIGINT, role=Role.KEY),
            Field("at", TIMESTAMPTZ, role=Role.TIME),
        ),
    )
)
MADE = """
CREATE TABLE parcels (id bigint PRIMARY KEY, depot bigint NOT NULL, at timestamptz NOT NULL) PARTITION BY RANGE (id);
CREATE TABLE parcels_few PARTITION OF parcels DEFAULT;
INSERT INTO parcels SELECT n, n % 3, now() FROM generate_series(1, 9) n;
"""


@pytest.fixture
def writer(database: str) -> Iterator[psycopg.Connection]:
    """Somebody who changes rows."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(MADE)
        yield connection


@pytest.fixture(params=["range", "picked"])
async def parcels(request: pytest.FixtureRequest, database: str) -> History:
    """All of them."""
    if request.param == "picked":
        return PickedHistory(database, range(1, 10), TABLES)
    return RangeHistory(database, BEGINNING, END, tables=TABLES)


async def _first(parcels: History) -> Page:
    place, _ = await parcels.begin()
    page = await parcels.read(place, Position(0, 0), 100)
    assert page is not None
    assert [*range(1, 10)] == [event.id for event in page.enriched.events]
    return page


def _wal_end(writer: psycopg.Connection) -> Lsn:
    [text] = writer.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("",)
    return parse_lsn(text)


async def test_a_page_is_as_of_before_its_snapshot(parcels: History, writer: psycopg.Connection) -> None:
    """Else a commit between the two would be older than the page, which does not show it. Nor may it be as old."""
    await parcels.open()
    before = _wal_end(writer)
    page = await _first(parcels)
    assert page.position.commit_lsn < before
    await parcels.close()


async def test_a_page_waits_for_who_has_written(
    parcels: History, writer: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit may be in the WAL before a snapshot shows it. Who only reads, or begins later, is not waited for."""
    monkeypatch.setattr(moment, "WRITERS_SECONDS", 0.1)
    await parcels.open()
    with writer.transaction():
        writer.execute("SELECT pg_current_xact_id(), count(*) FROM parcels")
        await _first(parcels)
        writer.execute("UPDATE parcels_few SET depot = 7 WHERE id = 1")
        refused = r"public.parcels is being written to: process \d+ has not ended its transaction"
        with pytest.raises(SourceUnavailable, match=refused):
            await _first(parcels)
    await _first(parcels)
    await parcels.close()


def test_a_row_that_no_event_can_be_made_of_keeps_its_former_identity() -> None:
    """A replay of its dead letter says that the row is gone under that one."""
    fails = Field("share", BIGINT.nullable(), derived=Derived(lambda depot: 1 // depot, of=("depot",)))
    codec = codec_of(Tables(replace(TABLES.stream, fields=(*TABLES.stream.fields, fails))))
    events: list[Event] = []
    drafts = [(100, number, number, number - 1, "2026-01-08 14:21:52+00") for number in (1, 2)]
    [letter] = codec.build(drafts, [], events, {Position(100, 1): 7})
    assert [2] == [event.id for event in events]
    row = stored_row(letter)
    assert ("U", [("id", 7)]) == (row.action, [(column.name, column.value) for column in row.identity])
