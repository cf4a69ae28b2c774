"""A dimension: the contents that are known, kept current by the stream itself.

Its rows, those of `public.content` for one, ride in the same slot as the events. `changes` reads such a row, `apply`
makes the change known once the events before it are made (`enricher.py` keeps that order).

A stream that begins after a checkpoint has to begin with the contents as of that checkpoint. The source has only
today's, so a copy as of the checkpoint is kept beside it. The changes since then wait in memory, and go into the copy
with the checkpoint that passes them. What is not in memory is looked up in the copy: memory is bounded, the copy is
whole. Without a copy today's content is looked up in the table; from then on the stream keeps it right.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from decimal import Decimal
from itertools import islice
from operator import attrgetter
from typing import Final, NamedTuple
from uuid import UUID

from enrichment.database import Database
from enrichment.events.codec import unquote
from enrichment.events.draft import Content, RowUnusable, fitting
from enrichment.streams.copies import Copy, Page, content_text, interned
from enrichment.tables.declared import Join, Tables, quoted
from replicator.contracts import stores
from replicator.contracts.events import Column, ContentChange, Id, Lsn, Position, Row
from replicator.contracts.fields import INT64_MAX, INT64_MIN, Type

log = logging.getLogger(__name__)

PRELOAD_PAGE = 50_000
"""Contents per query: under 0.2 s of the server's time and of the event loop's."""

UUIDS: Final = 2**128

MOST_CHANGES: Final = 200_000
"""Changes that wait for the checkpoint, some 400 bytes each: 80 MB."""
TOO_MANY = (
    "more than %s changes of %s wait for the checkpoint, which is too many to keep in memory. Until the checkpoint has"
    " passed them, events whose row of it is not in memory carry today's, and after a restart all that come again do:"
    " sinks may differ in it. Nothing has to be done"
)


def _key(join: Join) -> str:
    key = quoted(join.key)
    return key if join.on.type.python is int else join.on.type.select(key)


def _selected(tables: Tables, join: Join) -> str:
    columns = ", ".join([_key(join), *(field.type.select(quoted(field.joined)) for field in join.fields)])
    return f"SELECT {columns} FROM {tables.rows_of(join.table)} AS c"  # noqa: S608  names in the declaration


def preload(tables: Tables, join: Join) -> str:
    """The newest contents up to an id, newest first: they are the ones that people engage with."""
    key = quoted(join.key)
    return f"""
-- The newest contents up to an id, newest first: they are the ones that people engage with.
{_selected(tables, join)}
WHERE {key} <= %(highest)s::{join.on.type.postgres} ORDER BY {key} DESC LIMIT %(count)s
"""


def look_up(tables: Tables, join: Join) -> str:
    """The contents with some ids."""
    return f"""
-- The contents with these ids. An id without a row has no content.
{_selected(tables, join)} WHERE {quoted(join.key)} = ANY(%(ids)s::{join.on.type.postgres}[])
"""


class Change(NamedTuple):
    """What a row of the stream changes."""

    content_id: Id | None
    """None: every content that is known."""
    content: Content | None
    """None: the row does not carry all of it, so it has to be looked up."""


FORGET: Final = Change(None, None)
"""Nobody knows which contents are gone: a part of the table was emptied."""


class Contents:
    """The contents of a dimension that are known, at most `size` after each `trim`."""

    def __init__(self, database: Database, size: int, tables: Tables, join: Join) -> None:
        self.join = join
        self.shown = True
        """Whether the stream shows all changes of them."""
        self.until: Lsn = 0
        """Changes up to this position are left out: the copy has them already, or they are another table's."""
        self._database = database
        self._missing = join.missing
        self._highest: Id = INT64_MAX if join.on.type.python is int else str(UUID(int=UUIDS - 1))
        self._preload, self._look_up = preload(tables, join), look_up(tables, join)
        self._size = size
        self.known: dict[Id, Content] = {}
        """By content_id, oldest first; `Join.missing` where the table has no such row."""
        self.copied = False
        """Whether the copy, with the changes after it, is whole."""
        self._copy: Copy | None = None
        self._changes: list[ContentChange] = []
        """After the copy."""
        self._since: dict[Id | None, tuple[Lsn, Content]] = {}
        """What the changes after the copy have made of each content, and when. Key None: before them all were gone."""
        self._reached = Position(0, 0)
        self._saved: Lsn = 0
        self._lost_at: Lsn = 0

    async def open(self, store: stores.Contents | None, slot: str, *, usable: bool) -> None:
        """Start as of the slot's copy, or from what the table holds now. Raises as `preload`, CheckpointError."""
        self._reached, self._saved, self._lost_at = Position(0, 0), 0, 0
        name = f"{slot}/{self.join.copy}" if self.join.copy else slot
        self._copy = Copy(store, name, self.join) if store else None
        self._begin(copied=usable)
        if not usable:
            await self.preload()
            return
        assert self._copy is not None  # noqa: S101  one that can be used
        await self._fill(self._copy.newest)

    def forget(self) -> None:
        """Know nothing, and keep no copy."""
        self._copy = None
        self._begin(copied=False)
        self.known.clear()

    async def preload(self) -> None:
        """Start from what the table holds now, with a new copy of it. Raises as `Database.rows`, CheckpointError."""
        self._begin(copied=False)
        if self._copy:
            await self._copy.clear()
        await self._fill(self._page, self._copy)
        self._begin(copied=self._copy is not None)

    def _begin(self, *, copied: bool) -> None:
        """Nothing has changed since the copy, if there is one."""
        self.copied = copied
        self._changes.clear()
        self._since.clear()

    async def _fill(self, page: Callable[[Id, int], Awaitable[Page]], copy: Copy | None = None) -> None:
        """Page by page, the newest first; all of them into the copy. Until the end nothing is changed but that."""
        loaded: dict[Id, Content] = {}
        highest: Id | None = self._highest
        while highest is not None and (copy or len(loaded) < self._size):
            count = PRELOAD_PAGE if copy else min(PRELOAD_PAGE, self._size - len(loaded))
            found = await page(highest, count)
            if copy:
                await copy.add(found)
            loaded.update(found[: self._size - len(loaded)])
            highest = _before(found[-1][0]) if len(found) == count else None
        self.known.clear()
        self.known.update(reversed(loaded.items()))

    async def _page(self, highest: Id, count: int) -> Page:
        page = await self._database.rows(self._preload, {"highest": highest, "count": count})
        return [(content_id, fitting(self.join, interned(values))) for content_id, *values in page]

    async def find(self, ids: Collection[Id]) -> dict[Id, Content]:
        """The content of each id as of the rows so far. Raises as `look_up`, CheckpointError."""
        if not (ids and self._copy and self.copied):
            return await self.look_up(ids)
        # Before the copy is asked: meanwhile it may take them over.
        since = {content_id: self._since[content_id][1] for content_id in ids if content_id in self._since}
        left = [content_id for content_id in ids if content_id not in since]
        return since | (dict.fromkeys(left, self._missing) if None in self._since else await self._copy.find(left))

    async def look_up(self, ids: Collection[Id]) -> dict[Id, Content]:
        """The content of each id today. One query, or none without ids. Raises as `Database.rows`."""
        if not ids:
            return {}
        rows = await self._database.rows(self._look_up, {"ids": list(ids)})
        found = {content_id: fitting(self.join, interned(values)) for content_id, *values in rows}
        return dict.fromkeys(ids, self._missing) | found

    def apply(self, change: Change, found: Mapping[Id, Content], at: Position) -> None:
        """Make a change known; `found` has the contents that had to be looked up."""
        content = change.content
        if change == FORGET:
            self.known.clear()
            self.known.update(found)
            self.lose(at.commit_lsn)
        elif change.content_id is None:
            self.known.update(dict.fromkeys(self.known, self._missing))
        else:
            content = found[change.content_id] if content is None else content
            self.known[change.content_id] = content
        # After a reconnect the stream repeats what was read before.
        if self.copied and at >= self._reached:
            self._note(change.content_id, content or self._missing, at)
            if len(self._changes) > MOST_CHANGES:
                log.warning(TOO_MANY, MOST_CHANGES, self.join.name, extra={"code": "R408"})
                self.lose(at.commit_lsn)

    def _note(self, content_id: Id | None, content: Content, at: Position) -> None:
        self._reached = at
        text = None if content == self._missing else content_text(content)
        self._changes.append(ContentChange(at.commit_lsn, content_id, text, self.join.copy))
        if content_id is None:
            self._since.clear()
        self._since[content_id] = at.commit_lsn, content

    def changes(self, before: Lsn) -> list[ContentChange]:
        """The changes that a checkpoint at this position brings into the copy."""
        return self._changes[: self._passed(before)]

    def saved(self, end_lsn: Lsn) -> None:
        """A checkpoint at this position is on disk: the copy has what it passed."""
        passed = self._passed(end_lsn)
        for _, content_id, *_ in self._changes[:passed]:
            if content_id in self._since and self._since[content_id][0] < end_lsn:
                del self._since[content_id]
        del self._changes[:passed]
        self._saved = end_lsn

    def _passed(self, end_lsn: Lsn) -> int:
        return bisect_left(self._changes, end_lsn, key=attrgetter("commit_lsn"))

    def lose(self, lsn: Lsn) -> None:
        """The copy can't be kept: what the rows up to this commit have changed is not known."""
        self._begin(copied=False)
        self._lost_at = max(lsn, self._lost_at)

    async def renew(self) -> None:
        """A new copy, once the checkpoint has passed what made the last one useless. Raises as `preload`."""
        if self._copy and not self.copied and self._saved > self._lost_at:
            await self.preload()

    def trim(self) -> None:
        """Forget the oldest beyond `size`."""
        for content_id in list(islice(self.known, max(0, len(self.known) - self._size))):
            del self.known[content_id]


def changes(join: Join, row: Row, *, part: bool) -> list[Change]:
    """What a row of the table changes; `part`: it has others. Raises RowUnusable when it does not name its content."""
    missing = join.missing
    if row.action == "T":
        return [FORGET if part else Change(None, missing)]
    if row.action == "D":
        return [Change(_id(join, row.identity, "identity"), missing)]
    content_id = _id(join, row.columns, "columns")
    change = Change(content_id, _content(join, row.columns))
    if row.action == "U" and (old_id := _id(join, row.identity, "identity")) != content_id:
        return [Change(old_id, missing), change]
    return [change]


def _id(join: Join, columns: Iterable[Column], where: str) -> Id:
    columns = list(columns)
    unquote(columns, join.integers)
    for column in columns:
        if column.name == join.key and column.value is not None and join.on.type.fits(column.value):
            return column.value
    what = join.on.type.words.removesuffix(" or NULL")
    raise RowUnusable(f"{join.name} has no {join.key}, {what}, in the row's {where}")


def _content(join: Join, columns: Iterable[Column]) -> Content | None:
    """The row's content; None unless all of it is there (an unchanged TOASTed column is not) and of the right types."""
    values = {column.name: column.value for column in columns}
    if all(field.joined in values and _is_of(field.type, values[field.joined]) for field in join.fields):
        return fitting(join, interned(values[field.joined] for field in join.fields))
    return None


def _is_of(kind: Type, value: object) -> bool:
    """Whether a value is of this type; a number may have too many digits: nothing that is looked up has fewer."""
    return kind.fits(value) or (kind.python is Decimal and type(value) in {Decimal, int})


def _before(content_id: Id) -> Id | None:
    """The highest id below this one."""
    if isinstance(content_id, int):
        return content_id - 1 if content_id > INT64_MIN else None
    number = UUID(content_id).int
    return str(UUID(int=number - 1)) if number else None
