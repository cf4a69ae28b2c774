"""What the stream could not show because the tables were different for a while; a `contracts.stream.History`.

Looked for in every part of the events' table that is not as it was recorded: in one that was not known everything, as
it may have been filled before it was attached; in the others what was written since.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from psycopg import sql

from enrichment.codec import unquote
from enrichment.contract import EVENTS_TABLE, IDENTITY, OWN, RENAMED, SCHEMA, TIME, rows_of
from enrichment.database import Database
from enrichment.history import SCAN_TIMEOUT_SECONDS, PickedHistory, last_event, make_page
from enrichment.tables.catalog import Relation, Shape
from enrichment.tables.guard import Record
from replicator.contracts.errors import SourceUnusable, TablesUnfit
from replicator.contracts.events import Column, Position, Row
from replicator.contracts.fields import BIGINT, INT64_MAX, INT64_MIN
from replicator.contracts.stream import Enriched, Page
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
RECENT = "(event_ts >= to_timestamp(%(time)s) OR id > %(highest_id)s::bigint)"
WRITTEN_SINCE = """(pg_snapshot_xmax(pg_current_snapshot())::text::int8 - %(xid)s::int8 > 2000000000
 OR age(xmin) <= age(mod(%(xid)s::int8, 4294967296)::text::xid))"""
"""Transaction ids wrap: beyond two billion their order is not known."""

FIND = "SELECT id FROM {} AS e WHERE id >= %(id)s::bigint AND {} ORDER BY id LIMIT %(count)s"


AS_NOW = f"""
-- Events by id, in the form of the stream's rows.
SELECT {", ".join(f"e.{field.column}::{field.type.postgres}{'::text' * (field is TIME)}" for field in OWN)}
FROM {rows_of(EVENTS_TABLE)} AS e WHERE id = ANY(%(ids)s::bigint[])
"""  # noqa: S608  names in the contract


async def as_now(database: Database, rows: Sequence[Row]) -> None:
    """Give inserted rows of the stream the values that they have in the table now.

    They were committed while its columns may have been others: a type that is no longer there, or a name that was
    another column's. A row that is no longer in the table stays as it is.
    """
    for row in rows:
        unquote(row.columns)
    by_id: dict[object, list[Row]] = {}  # several, of one that was moved to another partition
    for row in rows:
        for column in row.columns:
            if column.name == IDENTITY.column:
                by_id.setdefault(column.value, []).append(row)
    ids = [event_id for event_id in by_id if BIGINT.fits(event_id)]
    names = [field.column for field in OWN]
    for values in await database.rows(AS_NOW, {"ids": ids}) if ids else ():
        for row in by_id[values[names.index(IDENTITY.column)]]:
            row.columns = [Column(name, value) for name, value in zip(names, values, strict=True)]


class _Part(NamedTuple):
    relation: Relation
    condition: str


class MissedHistory:
    """Rows that the stream could not show. A place is the number of a part and an id in it."""

    def __init__(self, dsn: Dsn, record: Record, parts: list[_Part]) -> None:
        highest = INT64_MIN if record.highest_id is None else record.highest_id - MARGIN_IDS  # none seen: any is new
        self._parameters: Mapping[str, object] = {
            "time": record.time - MARGIN_SECONDS,
            "highest_id": max(highest, INT64_MIN),
            "xid": record.xid,
            "count": FIND_IDS,
        }
        self._parts = parts
        self._scans = Database(dsn, timeout_seconds=SCAN_TIMEOUT_SECONDS)
        self._picked = PickedHistory(dsn, [])
        self._part = -1
        self._ids = array("q")

    @classmethod
    def since(cls, dsn: Dsn, record: Record, shape: Shape) -> MissedHistory | None:
        """What may have been missed since the record; None: nothing."""
        parts = list(_changed(record.shape, shape))
        return cls(dsn, record, parts) if parts else None

    async def open(self) -> None:
        await self._picked.open()

    async def begin(self) -> tuple[str, int]:
        return f"0 {INT64_MIN}", 0

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        part, first = map(int, place.split())
        if part == len(self._parts):
            return None
        try:
            return await self._read(part, first, after, rows)
        except SourceUnusable as exc:  # the stream goes on meanwhile
            raise TablesUnfit(problem=exc.detail, cure=exc.cure) from exc

    async def close(self) -> None:
        await self._scans.close()
        await self._picked.close()

    async def _read(self, part: int, first: int, after: Position, rows: int) -> Page:
        ids = await self._upcoming(part, first, rows)
        found = await self._picked.find(ids) if ids else []
        last = last_event(found)[0] if found else ids[-1] if ids else INT64_MAX
        place = f"{part + 1} {INT64_MIN}" if last == INT64_MAX else f"{part} {last + 1}"
        return make_page(found, after, place) if found else Page(Enriched([], []), after, place)

    async def _upcoming(self, part: int, first: int, rows: int) -> list[int]:
        at = bisect_left(self._ids, first)
        if self._part != part or (at == len(self._ids) == FIND_IDS):
            query = await self._query(self._parts[part])
            found = await self._scans.rows(query, {**self._parameters, "id": first})
            self._part, self._ids, at = part, array("q", (event_id for (event_id,) in found)), 0
        return list(self._ids[at : at + rows])

    async def _query(self, part: _Part) -> str:
        oid = part.relation.oid
        [(readable, constraint)] = await self._scans.rows(PARTS, {"oid": oid}) or [(False, "false")]
        if readable:
            name = sql.Identifier(part.relation.schema, part.relation.name)
            return _composed(sql.SQL("ONLY {}").format(name), part.condition)
        escaped = "true" if EVENTS_TABLE in RENAMED else constraint.replace("%", "%%")  # it has the table's own names
        name = sql.Identifier(SCHEMA, EVENTS_TABLE)
        return _composed(sql.SQL("{}").format(name), f"tableoid = {oid} AND {escaped} AND {part.condition}")


def _composed(source: sql.Composed, condition: str) -> str:
    return FIND.format(rows_of(EVENTS_TABLE, source.as_string().replace("%", "%%")), condition)


def _changed(before: Shape, after: Shape) -> Iterator[_Part]:
    known = {relation.oid: relation for relation in before.relations}
    tables = [shape.table(EVENTS_TABLE) for shape in (before, after)]
    # A column that is renamed is another one in every part, and the catalog shows it in the table alone.
    [columns_before, columns] = [table.columns if table else () for table in tables]
    for part in after.of(EVENTS_TABLE):
        old = known.get(part.oid)
        if part.kind != "r" or (old == part and columns_before == columns):
            continue
        if old is not None:
            yield _Part(part, f"{RECENT} AND {WRITTEN_SINCE}")
        else:
            yield _Part(part, RECENT if part.top else EVERYTHING)
