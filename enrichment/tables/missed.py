"""What the stream could not show because the tables were different for a while; a `contracts.enricher.History`.

Looked for in every part of the events' table that is not as it was recorded: in one that was not known everything, as
it may have been filled before it was attached; in the others what was written since.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from psycopg import sql

from enrichment.database import Database
from enrichment.events.codec import codec_of
from enrichment.history.pages import SCAN_TIMEOUT_SECONDS, PickedHistory, last_event, make_page
from enrichment.tables.catalog import Relation, Shape
from enrichment.tables.declared import Tables, quoted
from enrichment.tables.guard import Record
from replicator.contracts.closing import close_all
from replicator.contracts.enricher import Enriched, Page
from replicator.contracts.errors import SourceUnusable, TablesUnfit
from replicator.contracts.events import Column, Id, Position, Row
from replicator.contracts.fields import INT64_MAX, INT64_MIN
from replicator.source.connection import Dsn

MARGIN_SECONDS = 3600
"""How much earlier than the record an event may be that was inserted after it: its time is often the application's."""
MARGIN_IDS = 100_000
"""The same for ids, which a sequence gives out before the commit."""
FIND_IDS = 200_000
"""Ids per look: 2 MB, and one pass over the part."""

PARTS = """
-- Whether we may read a part of the table by its own name; and which rows it takes, so that the other parts need not
-- be read for it.
SELECT has_schema_privilege(relnamespace, 'USAGE') AND has_table_privilege(oid, 'SELECT')
       AND NOT row_security_active(oid),
       coalesce(pg_get_partition_constraintdef(oid), 'true')
FROM pg_class WHERE oid = %(oid)s::oid
"""

EVERYTHING = "true"
WRITTEN_SINCE = """(pg_snapshot_xmax(pg_current_snapshot())::text::int8 - %(xid)s::int8 > 2000000000
 OR age(xmin) <= age(mod(%(xid)s::int8, 4294967296)::text::xid))"""
"""Transaction ids wrap: beyond two billion their order is not known."""


def _recent(tables: Tables) -> str:
    if tables.identity.type.python is not int or tables.stream.follows:  # a row may be old, and its change new
        return EVERYTHING
    time, identity = quoted(tables.time.column), quoted(tables.identity.column)
    return f"({time} >= to_timestamp(%(time)s) OR {identity} > %(highest_id)s::bigint)"


def _find(tables: Tables, source: str, condition: str, *, begun: bool) -> str:
    identity, kind = quoted(tables.identity.column), tables.identity.type
    selected = kind.select(identity)
    order = f'{selected} COLLATE "C"' if kind.postgres == "text" else identity
    after = f"{identity} >= %(id)s::bigint" if kind.python is int else f"{order} > %(id)s::{kind.postgres}"
    where = f"{after if begun or kind.python is int else 'true'} AND {condition} ORDER BY {order} LIMIT %(count)s"
    return f"SELECT {selected} FROM {tables.rows_of(tables.events, source)} AS e WHERE {where}"  # noqa: S608


def as_now_query(tables: Tables) -> str:
    """Events by id, in the form of the stream's rows."""
    selected = ", ".join(field.type.select(f"e.{quoted(field.column)}") for field in tables.own)
    return f"""
-- Events by id, in the form of the stream's rows.
SELECT {selected}
FROM {tables.rows_of(tables.events)} AS e WHERE {tables.among}
"""  # noqa: S608  names in the declaration


async def as_now(database: Database, tables: Tables, rows: Sequence[Row]) -> set[Position]:
    """Give rows of the stream the values that they have in the table now; the positions of those that are not there.

    They were committed while its columns may have been others: a type that is no longer there, or a name that was
    another column's. A row that is no longer in the table stays as it is.
    """
    codec = codec_of(tables)
    by_id: dict[Id, list[Row]] = {}  # several, of one that was moved to another partition
    for row in rows:
        codec.unquote(row.columns)
        if tables.identity.type.fits(event_id := codec.identity_in(row.columns)):
            by_id.setdefault(event_id, []).append(row)
    for event_id, now in (await _now(database, tables, by_id)).items():
        for row in by_id.pop(event_id):
            row.columns = [Column(name, value) for name, value in now.items()]
    return {Position(row.commit_lsn, row.ordinal) for gone in by_id.values() for row in gone}


async def complete(database: Database, tables: Tables, rows: Sequence[Row]) -> set[Position]:
    """Give updates what they lack because it did not change; the positions of those that are past being completed.

    Their rows are gone by now, or have another identity: a later change of the stream says so.
    """
    codec = codec_of(tables)
    lacking = [(row, codec.identity_in(row.columns)) for row in rows if not codec.complete(row, None)]
    fitting = {event_id for _, event_id in lacking if tables.identity.type.fits(event_id)}
    now = await _now(database, tables, fitting)
    gone = (row for row, event_id in lacking if not codec.complete(row, now.get(event_id)))
    return {Position(row.commit_lsn, row.ordinal) for row in gone}


async def _now(database: Database, tables: Tables, ids: Collection[Id]) -> dict[Id, dict[str, Any]]:
    """Rows of the events' table, by identity."""
    names = [field.column for field in tables.own]
    found = await database.rows(as_now_query(tables), {"ids": [*ids]}) if ids else []
    rows = (dict(zip(names, values, strict=True)) for values in found)
    return {row[tables.identity.column]: row for row in rows}


class _Part(NamedTuple):
    relation: Relation
    condition: str


class MissedHistory:
    """Rows that the stream could not show. A place is the number of a part and an id in it."""

    def __init__(self, dsn: Dsn, tables: Tables, record: Record, parts: list[_Part]) -> None:
        highest = INT64_MIN if record.highest_id is None else record.highest_id - MARGIN_IDS  # none seen: any is new
        self._tables, self._codec = tables, codec_of(tables)
        self._counted = tables.identity.type.python is int
        self._parameters: Mapping[str, object] = {
            "time": record.time - MARGIN_SECONDS,
            "highest_id": max(highest, INT64_MIN),
            "xid": record.xid,
            "count": FIND_IDS,
        }
        self._parts = parts
        self._scans = Database(dsn, timeout_seconds=SCAN_TIMEOUT_SECONDS)
        self._picked = PickedHistory(dsn, [], tables)
        self._part = -1
        self._ids: Sequence[Id] = []

    @classmethod
    def since(cls, dsn: Dsn, tables: Tables, record: Record, shape: Shape) -> MissedHistory | None:
        """What may have been missed since the record; None: nothing."""
        parts = list(_changed(tables, record.shape, shape))
        return cls(dsn, tables, record, parts) if parts else None

    async def open(self) -> None:
        await self._picked.open()

    async def begin(self) -> tuple[str, int]:
        return self._place(0), 0

    def _place(self, part: int, first: Id | None = None) -> str:
        """`first`: as `_Place.id` of a history; None: the beginning of the part."""
        if first is None:
            first = INT64_MIN if self._counted else None
        return str(part) if first is None else f"{part} {first}"

    def _parsed(self, place: str) -> tuple[int, Id | None]:
        number, begun, text = place.partition(" ")
        return int(number), int(text) if self._counted else text if begun else None

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        part, first = self._parsed(place)
        if part == len(self._parts):
            return None
        try:
            return await self._read(part, first, after, rows)
        except SourceUnusable as exc:  # the stream goes on meanwhile
            raise TablesUnfit(problem=exc.detail, cure=exc.cure) from exc

    async def close(self) -> None:
        await close_all(self._scans, self._picked)

    async def _read(self, part: int, first: Id | None, after: Position, rows: int) -> Page:
        ids = await self._upcoming(part, first, rows)
        found = await self._picked.find(ids) if ids else []
        last = last_event(self._codec, found)[0] if found else ids[-1] if ids else None
        if isinstance(last, int):
            last = None if last == INT64_MAX else last + 1
        place = self._place(part + 1) if last is None else self._place(part, last)
        return make_page(self._codec, found, after, place) if found else Page(Enriched([], []), after, place)

    async def _upcoming(self, part: int, first: Id | None, rows: int) -> list[Id]:
        at = self._at(first)
        if self._part != part or (at == len(self._ids) == FIND_IDS):
            query = await self._query(self._parts[part], begun=first is not None)
            found = await self._scans.rows(query, {**self._parameters, "id": first})
            self._part, self._ids, at = part, [event_id for (event_id,) in found], 0
        return list(self._ids[at : at + rows])

    def _at(self, first: Id | None) -> int:
        """Where the next ids are among those that were found."""
        if first is None:
            return 0
        find = bisect_left if self._counted else bisect_right
        return find(self._ids, first)

    async def _query(self, part: _Part, *, begun: bool) -> str:
        oid, tables = part.relation.oid, self._tables
        [(readable, constraint)] = await self._scans.rows(PARTS, {"oid": oid}) or [(False, "false")]
        if readable:
            name = sql.Identifier(part.relation.schema, part.relation.name)
            return self._composed(sql.SQL("ONLY {}").format(name), part.condition, begun=begun)
        # It has the table's own names.
        escaped = "true" if tables.events in tables.renamed else constraint.replace("%", "%%")
        name = sql.Identifier(tables.schema, tables.events)
        condition = f"tableoid = {oid} AND {escaped} AND {part.condition}"
        return self._composed(sql.SQL("{}").format(name), condition, begun=begun)

    def _composed(self, source: sql.Composed, condition: str, *, begun: bool) -> str:
        return _find(self._tables, source.as_string().replace("%", "%%"), condition, begun=begun)


def _changed(tables: Tables, before: Shape, after: Shape) -> Iterator[_Part]:
    known = {relation.oid: relation for relation in before.relations}
    found = [shape.table(tables.events) for shape in (before, after)]
    # A column that is renamed is another one in every part, and the catalog shows it in the table alone.
    [columns_before, columns] = [table.columns if table else () for table in found]
    for part in after.of(tables.events):
        old = known.get(part.oid)
        if part.kind != "r" or (old == part and columns_before == columns):
            continue
        if old is not None:
            yield _Part(part, f"{_recent(tables)} AND {WRITTEN_SINCE}")
        else:
            yield _Part(part, _recent(tables) if part.top else EVERYTHING)
