"""The guard of the tables: what the running stream assumes of them, and whether it is still so.

A position of the WAL is verified in three looks, in this order: where the WAL ends, who may be changing the tables, and
the catalog. A change whose commit is before the position either still holds its lock at the second look, or is visible
at the third one. If somebody holds a lock, the position is verified by a later look, when all of them are over; others
may have come meanwhile.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import msgspec
from msgspec import structs

from enrichment.database import Database
from enrichment.tables import fit, untold
from enrichment.tables.catalog import ENCODING, LOCKS, NOW, SHAPE, UNIQUE, Column, Relation, Shape, parameters
from enrichment.tables.declared import Join, Tables
from enrichment.tables.untold import Untold
from replicator.contracts.errors import TablesChanged, TablesUnfit, TablesUnsettled
from replicator.contracts.events import DeadLetter, Id, Lsn, Row
from replicator.contracts.settings import variable

SHOWN_SECONDS = 3.0
"""How long the stream may take to show the TRUNCATE whose traces are in the catalog."""
SHOWN_CHANGES = 5
"""A change of a table with a thousand partitions is not a thousand lines."""

Name: TypeAlias = tuple[str, str]
"""Schema and table."""


class Now(NamedTuple):
    """A moment of the server; see `NOW`."""

    lsn: Lsn
    time: float
    xid: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The tables as they were at a verified position, durable: what changes while nothing runs shows later.

    An older record is always safe: more rows are looked through, and more names listened to.
    """

    time: float
    """The server's clock, Unix seconds."""
    xid: int
    """Every older transaction was over."""
    highest_id: int | None
    """Of the events seen until then; None: none."""
    shape: Shape
    former: dict[str, str]
    """Names that the stream also lists for what was committed up to `until`: as JSON, and the table they belong to."""
    until: Lsn
    reshaped: Lsn = 0
    """Up to there the events' columns may have been others."""
    content_untils: dict[str, Lsn] = {}
    """By dimension: up to there it may have been another table; absent: as `until`."""
    parts: dict[int, Name] | None = None
    """Of the last look, whose changes the slot shows; None: all that `shape` has."""
    untold: dict[int, Untold] = {}
    """What has to be told before anything is read: of these it did not."""

    def until_of(self, table: str) -> Lsn:
        """Up to there this dimension may have been another table."""
        return self.content_untils.get(table, self.until)


def recorded(text: str | None, tables: Tables) -> Record | None:
    """What was recorded of this stream, alone in the slot or among others, as it may be now; None: nothing."""
    found = {} if text is None else msgspec.json.decode(text)
    if isinstance(found.get("xid"), int):  # of one stream; else a text by each stream's name
        record = msgspec.convert(found, Record, str_keys=True)
        top = record.shape.table(tables.events)
        return record if not tables.of_several or (top and top.schema == tables.schema) else None
    own = found.get(tables.stream.name)
    return None if own is None else msgspec.json.decode(own, type=Record)


class Guard:
    """Looks at the tables over a connection of its own: no look-up holds it up."""

    def __init__(self, database: Database, tables: Tables) -> None:
        self.shape = Shape(())
        """What the stream assumes."""
        self.highest_id: int | None = None
        """Of the events in the stream, about: for the record."""
        self.until: Lsn = 0
        """Up to there the tables may have been different."""
        self.reshaped: Lsn = 0
        """Up to there columns of the events may have been: what a name meant then is another column's now."""
        self.content_untils: dict[str, Lsn] = {}
        """By dimension: up to there it may have been another table, or had other columns."""
        self.record: Record | None = None
        """What the next look compares with."""
        self._begun = False
        self._database = database
        self._tables = tables
        self._looked = (SHAPE, parameters(tables))
        self._text = ""
        schemas = {tables.events: tables.schema} | {join.table: join.schema for join in tables.joins}
        self._names: dict[Name, str] = {(schema, table): table for table, schema in schemas.items()}
        self._former: dict[Name, str] = {}
        self._seen = Now(0, 0.0, 0)
        self._waiting: tuple[Now, set[str]] | None = None  # a position, and the transactions that it waits for
        self._truncated: dict[Name, Lsn] = {}
        self._puzzled_at = 0.0

    @property
    def tables(self) -> list[Name]:
        """What the stream has to list, the newest parts first: wal2json compares a change with one after the other."""
        return list({**self._names, **self._former})

    def names(self, root: str) -> list[Name]:
        """The present names of one of the tables and of its parts."""
        return [name for name, its in self._names.items() if its == root]

    async def look(self, record: Record | None, after: Lsn) -> Record | None:
        """See what the tables are before a stream begins after a position; the record, if they were different then.

        Raises TablesUnfit; `record` has then what the slot does not show meanwhile.
        """
        if record is not None and not self._begun:  # another process may have gone on since the last look
            self.record = record
        self._begun = False
        [[now], [(text,)], [(encoding,)]] = await self._database.each((NOW, {}), self._looked, (ENCODING, {}))
        if foreign := fit.encoding(encoding):
            raise TablesUnfit(problem=foreign.what, cure=foreign.cure)
        shape = Shape.parse(text)
        record = self.record = self._noting(self.record, shape, Now(*now))
        repeated = [one async for one in self._repeated(shape)]
        fit.require(self._tables, shape, repeated, untold=bool(record and record.untold))
        changed = record is not None and record.shape != shape
        self.shape, self._text, self._names = shape, text, _names(self._tables, shape)
        self._former, self.until = {}, 0
        if record and (changed or after < record.until):
            self._former = {**_names(self._tables, record.shape), **_parsed(record.former)}
            self.until = Now(*now).lsn
            reshaped = self.until if _reshaped(self._tables, record.shape, shape) else record.reshaped
            content_untils = {join.table: self._until_of(join, record, shape) for join in self._tables.joins}
            # A part that is here now may be gone before the next record, and leave no other trace.
            former = _packed({**self._former, **self._names})
            record = structs.replace(
                record, former=former, until=self.until, reshaped=reshaped, content_untils=content_untils
            )
        self.highest_id = record.highest_id if record else None
        self.reshaped = record.reshaped if record else 0
        self.content_untils = {join.table: record.until_of(join.table) if record else 0 for join in self._tables.joins}
        self._seen, self._waiting, self.record, self._begun = Now(*now), None, record, True
        if record is None:  # the first start: what the stream assumes from now on
            self.accept()
        return record if changed else None

    def _noting(self, record: Record | None, shape: Shape, now: Now) -> Record | None:
        """The record with what the slot does not show from now on."""
        tables = self._tables
        if record is None:
            if untold.parts(tables, shape) == untold.told(tables, shape):
                return None
            self.shape, self._seen = shape, now  # nothing was ever fit, and rows are being deleted already
            record = self.accept()
        elif not tables.stream.follows:
            return record
        top = record.shape.table(tables.events)
        known = top is not None and top.schema == tables.schema  # not another declaration's
        before = record.parts if record.parts is not None else untold.parts(tables, record.shape)
        found = untold.found(tables, before if known else {}, shape, now.lsn)
        shown = dict(untold.told(tables, shape))
        return structs.replace(record, parts=shown, untold={**found, **record.untold})

    def untold(self) -> list[DeadLetter]:
        """What the slot did not show until the last look, to be kept before `told` forgets it."""
        return untold.letters(self._tables, self.record.untold, self.shape) if self.record else []

    def told(self) -> None:
        """It is kept: the record need no longer have it."""
        if self.record:
            self.record = structs.replace(self.record, untold={})

    async def _repeated(self, shape: Shape) -> AsyncIterator[fit.Unique]:
        """The columns that should be unique, and are not."""
        for wanted in fit.wanted_unique(self._tables, shape):
            [(unique,)] = await self._database.rows(UNIQUE, wanted.parameters)
            if not unique:
                yield wanted

    def _until_of(self, join: Join, record: Record, shape: Shape) -> Lsn:
        same = all(
            contents(self._tables, record.shape, one) == contents(self._tables, shape, one)
            for one in self._tables.joins_of(join.table)
        )
        return record.until_of(join.table) if same else self.until

    async def verify(self) -> Lsn:
        """The position up to which the tables were seen to be as at the last `look`.

        Raises TablesChanged, and TablesUnsettled while a transaction may be changing them.
        """
        locked = (LOCKS, {"oids": self.shape.oids})
        [[now], locks, [(text,)]] = await self._database.each((NOW, {}), locked, self._looked)
        if text != self._text:
            self._adopt(text)
        self._seen, self._puzzled_at = self._settled(Now(*now), dict(locks)), 0.0
        self._truncated = {name: lsn for name, lsn in self._truncated.items() if lsn >= self._seen.lsn}
        return self._seen.lsn

    def _settled(self, now: Now, holders: Mapping[str, str]) -> Now:
        """The newest moment for which nobody holds a lock any more. Raises TablesUnsettled."""
        before, self._waiting = self._waiting, (now, set(holders)) if holders else None
        if not holders:
            return now
        if before and (still := before[1] & holders.keys()):
            self._waiting = before[0], still
            raise TablesUnsettled(holder=holders[min(still)])
        if before:
            return before[0]
        raise TablesUnsettled(holder=next(iter(holders.values())))

    def _adopt(self, text: str) -> None:
        """Take over what is only a TRUNCATE that the stream has shown. Raises TablesChanged, TablesUnsettled."""
        shape, now = Shape.parse(text), time.monotonic()
        self._puzzled_at = self._puzzled_at or now
        emptied = self.shape.emptied(shape)
        if not emptied or now - self._puzzled_at > SHOWN_SECONDS:
            self._puzzled_at = 0.0
            raise TablesChanged(what=difference(self.shape, shape))
        if not all((part.schema, part.name) in self._truncated for part in emptied):
            raise TablesUnsettled(holder=f"the stream to show what happened to {emptied[0]}")
        self.shape, self._text = shape, text

    def accept(self) -> Record:
        """The record as of the last verification."""
        self.record = Record(
            time=self._seen.time,
            xid=self._seen.xid,
            highest_id=self.highest_id,
            shape=self.shape,
            former=_packed(self._former),
            until=self.until,
            reshaped=self.reshaped,
            content_untils=self.content_untils,
        )
        return self.record

    def saw_event(self, event_id: Id) -> None:
        """An event of the stream, one in each chunk."""
        if isinstance(event_id, str):
            return
        self.highest_id = max(event_id, event_id if self.highest_id is None else self.highest_id)

    def saw(self, row: Row) -> None:
        """A row of the stream: after a TRUNCATE a new file of its table is no surprise."""
        if row.action == "T":
            self._truncated[row.schema, row.table] = row.commit_lsn

    def root(self, row: Row) -> str | None:
        """Which of the tables a row belongs to; empty: to one of them until an earlier commit, None: to none."""
        name = (row.schema, row.table)
        if root := self._names.get(name):
            return root
        former = self._former.get(name)
        return former if former is None or row.commit_lsn <= self.until else ""


def contents(tables: Tables, shape: Shape, join: Join) -> str:
    """Names a dimension as it is, with its parts and the columns that we read: another one has another name.

    So has one whose copy is in another place.
    """
    columns = [tables.named(join.table, column) for column in join.columns]
    place = [join.copy] if join.copy else []
    return hashlib.sha256(msgspec.json.encode([*place, columns, *shape.of(join.table)])).hexdigest()[:24]


def exchanged(old: Relation, new: Relation) -> list[str]:
    """The names that other columns have now, as after a swap, when no name has come or gone."""
    places = [[column.name for column in its.columns] for its in (old, new)]
    if places[0] == places[1] or sorted(places[0]) != sorted(places[1]):
        return []
    before = {column.name: column for column in old.columns}
    return sorted(column.name for column in new.columns if before[column.name] != column)


def swaps(tables: Tables, before: Shape, now: Shape) -> Iterator[str]:
    """What to tell when columns that events are made of seem to have swapped their names, and no setting says so."""
    for table in tables.needed:
        old, new = before.table(table), now.table(table)
        others = exchanged(old, new) if old and new and old.oid == new.oid else []
        names = [name for name in others if name in tables.needed[table]]
        if len(names) > 1 and tables.renamed.get(table, {}).keys().isdisjoint(names):
            prefix = "" if table == tables.events else f"{table}."
            pair = f"{prefix}{names[0]}={names[1]},{prefix}{names[1]}={names[0]}"
            yield (
                f"{tables.named_in_schema(table)} has other columns under the names {', '.join(names)} than before. If"
                f" names were swapped, events now have values under the wrong names: swap them back, or set"
                f" {variable('columns')} to what is now right, such as {pair}, and restart the replicator"
            )


def _names(tables: Tables, shape: Shape) -> dict[Name, str]:
    """Of everything whose rows the stream should show; those of a dimension only if it shows all of its changes."""
    shown = {table for table in tables.needed if table == tables.events or not fit.hidden(tables, shape, table)}
    newest_first = sorted(shape.relations, key=lambda relation: -relation.oid)
    return {(found.schema, found.name): found.root for found in newest_first if found.root in shown}


def _reshaped(tables: Tables, before: Shape, now: Shape) -> bool:
    """Whether rows from before have to be read again by their ids. In another table, an id may be another row's."""
    return _columns(tables, before) != _columns(tables, now) and not fit.replaced(tables, before, now)


def _columns(tables: Tables, shape: Shape) -> list[Column]:
    """Those that events are made of, with their versions."""
    needed = {tables.named(tables.events, column) for column in tables.needed[tables.events]}
    table = shape.table(tables.events)
    return [column for column in table.columns if column.name in needed] if table else []


def _packed(names: Mapping[Name, str]) -> dict[str, str]:
    return {msgspec.json.encode(name).decode(): root for name, root in names.items()}


def _parsed(former: Mapping[str, str]) -> dict[Name, str]:
    return {msgspec.json.decode(name, type=Name): root for name, root in former.items()}


def difference(before: Shape, after: Shape) -> str:
    """What has changed between two looks, in words."""
    changes = list(_changes(before, after))
    more = f" and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
    return f"{', '.join(changes[:SHOWN_CHANGES])}{more}"


def _changes(before: Shape, after: Shape) -> Iterator[str]:
    was = {relation.oid: relation for relation in before.relations}
    for relation in after.relations:
        if (old := was.pop(relation.oid, None)) is None:
            yield f"{relation} is new" if relation.top else f"{relation} is a new part of {relation.root}"
        elif old != relation:
            yield f"{old} {_change(old, relation)}"
    for gone in was.values():
        yield f"{gone} is gone" if gone.top else f"{gone} is no longer a part of {gone.root}"


def _change(old: Relation, new: Relation) -> str:
    if str(old) != str(new):
        return f"is {new} now"
    names, before = ({column.name for column in its.columns} for its in (new, old))
    words = [("has new columns", names - before), ("has lost columns", before - names)]
    if told := [f"{word} ({', '.join(sorted(which))})" for word, which in words if which]:
        return " and ".join(told)
    if others := exchanged(old, new):
        return f"has other columns under the names {', '.join(others)}"
    return "was rewritten" if old.file != new.file else "was altered"
