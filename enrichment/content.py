"""The content dimension: what is known of each content, kept current by the stream itself.

Rows of `public.content` ride in the same slot as the events. `changes` tells what such a row means, `apply` makes it so
when the events before it have been made (`enricher.py` keeps that order), and `look_up` asks `database.py` for what
the stream has not told. What is asked is today's content; from then on the stream keeps it right.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import NamedTuple

from enrichment.database import Database
from enrichment.engagement import INT64_MAX, INT64_MIN, MISSING, Content, RowUnusable, fits_integer
from replicator.contracts.events import Column, Row, Value

SCHEMA = "public"
TABLE = "content"
CONTENT = f"{SCHEMA}.{TABLE}"

PRELOAD_PAGE = 50_000
"""Contents a query: under 0.2 s of the server's time and of our event loop's."""

PRELOAD = """
-- The newest contents up to an id, newest first: they are what people engage with.
SELECT content_id, content_type::text, length_seconds::bigint FROM public.content
WHERE content_id <= %(highest)s::bigint ORDER BY content_id DESC LIMIT %(count)s
"""

LOOK_UP = """
-- The contents with these ids; an id that does not come back has no content.
SELECT content_id, content_type::text, length_seconds::bigint FROM public.content
WHERE content_id = ANY(%(ids)s::bigint[])
"""


class Change(NamedTuple):
    """What a row of the stream does to what is known."""

    content_id: int | None
    """None: to every content there is."""
    content: Content | None
    """None: the row does not carry it; it has to be looked up."""


class Contents:
    """What is known of the contents, at most `size` of them between two calls of `trim`."""

    def __init__(self, database: Database, size: int) -> None:
        self._database = database
        self._size = size
        self.known: dict[int, Content] = {}
        """By content_id, oldest first; MISSING where there is no such content."""

    async def preload(self) -> None:
        """Start with what the table holds now. Raises as `Database.rows`; nothing has changed then."""
        loaded: list[tuple[int, Content]] = []
        highest = INT64_MAX
        while highest >= INT64_MIN and len(loaded) < self._size:
            count = min(PRELOAD_PAGE, self._size - len(loaded))
            page = await self._database.rows(PRELOAD, {"highest": highest, "count": count})
            loaded += ((content_id, _content(*told)) for content_id, *told in page)
            highest = page[-1][0] - 1 if len(page) == count else INT64_MIN - 1
        self.known.clear()
        self.known.update(reversed(loaded))

    async def look_up(self, ids: Collection[int]) -> dict[int, Content]:
        """The content of each id, in one query; none at all without ids. Raises as `Database.rows`."""
        if not ids:
            return {}
        rows = await self._database.rows(LOOK_UP, {"ids": list(ids)})
        return dict.fromkeys(ids, MISSING) | {content_id: _content(*told) for content_id, *told in rows}

    def apply(self, change: Change, found: Mapping[int, Content]) -> None:
        """Make a change known; `found` has the content of those that had to be looked up."""
        if change.content_id is None:
            self.known.update(dict.fromkeys(self.known, MISSING))
        else:
            self.known[change.content_id] = found[change.content_id] if change.content is None else change.content

    def trim(self) -> None:
        """Forget the oldest beyond `size`."""
        for content_id in list(islice(self.known, max(0, len(self.known) - self._size))):
            del self.known[content_id]


def changes(row: Row) -> list[Change]:
    """What a row of the table changes. Raises RowUnusable when it does not say which content it is about."""
    if row.action == "T":
        return [Change(None, MISSING)]
    if row.action == "D":
        return [Change(_id(row.identity, "identity"), MISSING)]
    content_id = _id(row.columns, "columns")
    change = Change(content_id, _told(row.columns))
    if row.action == "U" and (old_id := _id(row.identity, "identity")) != content_id:
        return [Change(old_id, MISSING), change]
    return [change]


def _id(columns: Iterable[Column], where: str) -> int:
    for column in columns:
        if column.name == "content_id" and type(column.value) is int and fits_integer(column.value):
            return column.value
    raise RowUnusable(f"{CONTENT} has no content_id, a 64-bit integer, in the row's {where}")


def _told(columns: Iterable[Column]) -> Content | None:
    """The row's content; None unless it is all there (an unchanged TOASTed column is not) and of the right types."""
    values: dict[str, Value] = {column.name: column.value for column in columns}
    content_type, length_seconds = values.get("content_type", 0), values.get("length_seconds", "")
    if not (content_type is None or isinstance(content_type, str)):
        return None
    if length_seconds is None:
        return _content(content_type, None)
    if type(length_seconds) is int and INT64_MIN <= length_seconds <= INT64_MAX:
        return _content(content_type, length_seconds)
    return None


def _content(content_type: str | None, length_seconds: int | None) -> Content:
    # There are few types and many contents: one string each, a third of the memory.
    return None if content_type is None else sys.intern(content_type), length_seconds
