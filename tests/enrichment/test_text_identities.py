"""Identities and keys of every kind of text: whatever asks for rows by them finds each, and finds it once."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from enrichment import RangeHistory
from enrichment.database import Database
from enrichment.history.pages import BEGINNING, END, PickedHistory
from enrichment.ledger import TableLedger
from enrichment.tables import missed
from enrichment.tables.catalog import SHAPE, Shape, parameters
from enrichment.tables.declared import Tables
from enrichment.tables.guard import Record
from enrichment.tables.missed import MissedHistory, as_now, complete
from replicator.contracts.enricher import History
from replicator.contracts.events import Column, Id, Position, Row
from replicator.contracts.fields import TEXT, TIMESTAMPTZ, Field, Role, Stream

CASELESS = """CREATE COLLATION "case" (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"""
FOREVER_US = (0, 4_000_000_000_000_000)

IDS = ["a", "B", "c", "D", "e f", "ab", "a-b", "ü", 'x"y', "x\\y", "{,}", "NULL"]
STREAM = Stream(
    "named",
    table="public.named",
    updates="upsert",
    deletes="delete",
    fields=(
        Field("id", TEXT, role=Role.IDENTITY),
        Field("kind", TEXT, role=Role.KEY),
        Field("at", TIMESTAMPTZ, role=Role.TIME),
        Field("long", TEXT),
    ),
)
TABLES = Tables(STREAM)


@pytest.fixture(
    params=["text", "varchar(9)", "char(6)", "word", "word6", "citext", 'text COLLATE "case"', 'text COLLATE "C"']
)
def ids(request: pytest.FixtureRequest, database: str) -> Iterator[list[str]]:
    """The identities of a table's rows as the slot shows them."""
    values = ", ".join(psycopg.sql.Literal(one).as_string() for one in IDS)
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE EXTENSION IF NOT EXISTS citext")
        source.execute(f"CREATE TYPE word AS ENUM ({values})".encode())
        source.execute("CREATE DOMAIN word6 AS char(6)")
        source.execute(CASELESS)
        kind, columns = request.param, "at timestamptz NOT NULL DEFAULT now(), long text NOT NULL"
        source.execute(f"CREATE TABLE named (id {kind} PRIMARY KEY, kind {kind} NOT NULL, {columns})".encode())
        with source.cursor() as cursor, cursor.copy("COPY named (id, kind, long) FROM STDIN") as copy:
            for one in IDS:
                copy.write_row([one] * 3)
        yield [name for (name,) in source.execute("SELECT concat(id) FROM named")]


async def _read(history: History, rows: int) -> list[Id]:
    found: list[Id] = []
    await history.open()
    place, _ = await history.begin()
    while page := await history.read(place, Position(0, 0), rows):
        found += [event.id for event in page.enriched.events]
        place = page.place
    await history.close()
    return found


@pytest.mark.parametrize("rows", [1, 5])
async def test_page_by_page(ids: list[str], database: str, rows: int) -> None:
    """In any order, and of any size."""
    assert sorted(ids) == sorted(await _read(RangeHistory(database, BEGINNING, END, tables=TABLES), rows))
    assert sorted(ids) == sorted(await _read(PickedHistory(database, ids, TABLES), rows))


async def test_an_index_by_time(ids: list[str], database: str) -> None:
    """All rows have the same one."""
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE INDEX ON named (at, id)")
    assert sorted(ids) == sorted(await _read(RangeHistory(database, BEGINNING, END, tables=TABLES), 1))


async def test_a_page_that_is_cut(ids: list[str], database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that did not fit into it come with the next one."""
    monkeypatch.setattr("enrichment.history.pages.PAGE_BYTES", 1)
    assert sorted(ids) == sorted(await _read(PickedHistory(database, ids, TABLES), 100))


async def test_missed_rows(ids: list[str], database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a table that was not known before."""
    monkeypatch.setattr(missed, "FIND_IDS", 5)
    looking = Database(database)
    [(text,)] = await looking.rows(SHAPE, parameters(TABLES))
    await looking.close()
    record = Record(time=0.0, xid=0, highest_id=None, shape=Shape(()), former={}, until=0)
    history = MissedHistory.since(database, TABLES, record, Shape.parse(text))
    assert history
    assert sorted(ids) == sorted(await _read(history, 3))


async def test_rows_that_lack_something(ids: list[str], database: str) -> None:
    """A long value that did not change, and values under former names."""
    looking = Database(database)
    lacking = [Row("U", "public", "named", [Column("id", one)], [], 1, number) for number, one in enumerate(ids)]
    # kind and at are in the WAL in truth
    assert set() == await complete(looking, TABLES, lacking)
    assert [one.rstrip() for one in ids] == [_value(row, "long") for row in lacking]
    renamed = [Row("I", "public", "named", [Column("id", one), Column("x", 1)], [], 1, 1) for one in ids]
    await as_now(looking, TABLES, renamed)
    assert [one.rstrip() for one in ids] == [_value(row, "long") for row in renamed]
    await looking.close()


async def test_what_reconcile_asks(ids: list[str], database: str) -> None:
    """By identity and by key, and all of them."""
    ledger = TableLedger(database, tables=TABLES, with_content=True)
    await ledger.open()
    assert sorted(ids) == sorted(event.id for event in await ledger.find(ids, *FOREVER_US))
    assert dict.fromkeys(ids, 1) == await ledger.counts_of([*ids, "nobody's"])
    assert sorted(ids) == sorted([one async for chunk in ledger.ids(*FOREVER_US) for one in chunk])
    await ledger.close()


def _value(row: Row, name: str) -> object:
    return next(column.value for column in row.columns if column.name == name)
