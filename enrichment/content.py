"""The content dimension: the contents that are known, kept current by the stream itself.

Rows of `public.content` ride in the same slot as the events. `changes` reads such a row, `apply` makes the change known
once the events before it are made (`enricher.py` keeps that order), and `look_up` asks the database for what the stream
has not brought. A look-up gives today's content; from then on the stream keeps it right.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

from enrichment.codec import MISSING, Content, RowUnusable, unquote
from enrichment.contract import CONTENT, CONTENT_TABLE, JOINED, rows_of
from enrichment.database import Database
from replicator.contracts.events import Column, Row
from replicator.contracts.fields import BIGINT, INT64_MAX, INT64_MIN

CONTENT_ID: Final = "content_id"

PRELOAD_PAGE = 50_000
"""Contents per query: under 0.2 s of the server's time and of the event loop's."""

_COLUMNS = ", ".join(f"{field.joined}::{field.type.postgres}" for field in JOINED)

PRELOAD = f"""
-- The newest contents up to an id, newest first: they are the ones that people engage with.
SELECT content_id, {_COLUMNS} FROM {rows_of(CONTENT_TABLE)} AS c
WHERE content_id <= %(highest)s::bigint ORDER BY content_id DESC LIMIT %(count)s
"""  # noqa: S608  names in the contract

LOOK_UP = f"""
-- The contents with these ids. An id without a row has no content.
SELECT content_id, {_COLUMNS} FROM {rows_of(CONTENT_TABLE)} AS c WHERE content_id = ANY(%(ids)s::bigint[])
"""  # noqa: S608  names in the contract


class Change(NamedTuple):
    """What a row of the stream changes."""

    content_id: int | None
    """None: every content that is known."""
    content: Content | None
    """None: the row does not carry all of it, so it has to be looked up."""


FORGET: Final = Change(None, None)
"""Nobody knows which contents are gone: a part of the table was emptied."""


class Contents:
    """The contents that are known, at most `size` after each `trim`."""

    def __init__(self, database: Database, size: int) -> None:
        self._database = database
        self._size = size
        self.known: dict[int, Content] = {}
        """By content_id, oldest first; MISSING where there is no such content."""

    async def preload(self) -> None:
        """Start from what the table holds now. Raises as `Database.rows`, with nothing changed."""
        loaded: list[tuple[int, Content]] = []
        highest = INT64_MAX
        while highest >= INT64_MIN and len(loaded) < self._size:
            count = min(PRELOAD_PAGE, self._size - len(loaded))
            page = await self._database.rows(PRELOAD, {"highest": highest, "count": count})
            loaded += ((content_id, _interned(values)) for content_id, *values in page)
            highest = page[-1][0] - 1 if len(page) == count else INT64_MIN - 1
        self.known.clear()
        self.known.update(reversed(loaded))

    async def look_up(self, ids: Collection[int]) -> dict[int, Content]:
        """The content of each id. One query, or none without ids. Raises as `Database.rows`."""
        if not ids:
            return {}
        rows = await self._database.rows(LOOK_UP, {"ids": list(ids)})
        return dict.fromkeys(ids, MISSING) | {content_id: _interned(values) for content_id, *values in rows}

    def apply(self, change: Change, found: Mapping[int, Content]) -> None:
        """Make a change known; `found` has the contents that had to be looked up."""
        if change == FORGET:
            self.known.clear()
            self.known.update(found)
        elif change.content_id is None:
            self.known.update(dict.fromkeys(self.known, MISSING))
        else:
            self.known[change.content_id] = found[change.content_id] if change.content is None else change.content

    def trim(self) -> None:
        """Forget the oldest beyond `size`."""
        for content_id in list(islice(self.known, max(0, len(self.known) - self._size))):
            del self.known[content_id]


def changes(row: Row, *, part: bool) -> list[Change]:
    """What a row of the table changes; `part`: it has others. Raises RowUnusable when it does not name its content."""
    if row.action == "T":
        return [FORGET if part else Change(None, MISSING)]
    if row.action == "D":
        return [Change(_id(row.identity, "identity"), MISSING)]
    content_id = _id(row.columns, "columns")
    change = Change(content_id, _content(row.columns))
    if row.action == "U" and (old_id := _id(row.identity, "identity")) != content_id:
        return [Change(old_id, MISSING), change]
    return [change]


def _id(columns: Iterable[Column], where: str) -> int:
    columns = list(columns)
    unquote(columns)
    for column in columns:
        if column.name == CONTENT_ID and BIGINT.fits(column.value):
            return int(column.value)
    raise RowUnusable(f"{CONTENT} has no content_id, a 64-bit integer, in the row's {where}")


def _content(columns: Iterable[Column]) -> Content | None:
    """The row's content; None unless all of it is there (an unchanged TOASTed column is not) and of the right types."""
    values = {column.name: column.value for column in columns}
    if all(field.joined in values and field.type.fits(values[field.joined]) for field in JOINED):
        return _interned(values[field.joined] for field in JOINED)
    return None


def _interned(values: Iterable[Any]) -> Content:
    """As a tuple. There are few types and many contents: one string for each takes a third of the memory."""
    return tuple(sys.intern(value) if type(value) is str else value for value in values)
