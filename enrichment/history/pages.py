"""The events that the table already holds, page by page; two `contracts.enricher.History`. `queries.py` has the SQL.

A page is one statement, hence one snapshot and one short transaction: events, and what their content is today. Its rows
become drafts as the stream's do. Pages are read

- by `(event_ts, id)` if an index begins with event_ts: a page costs what it holds;
- otherwise by id, from the first to the last event of the range: the primary key is enough, and the rows in between are
  read once, wanted or not. No page is ever found by reading the table from its beginning.

`moment.py` says what a page is as of.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import msgspec
from msgspec import structs

from enrichment.database import Database
from enrichment.events.codec import Codec, codec_of
from enrichment.events.draft import Content, Draft, RowUnusable, fitting
from enrichment.history.moment import REPLAYED, WAL_END, as_of, last_end
from enrichment.history.queries import Order, queries_of
from enrichment.tables.declared import Tables
from replicator.contracts.closing import close_all
from replicator.contracts.enricher import Enriched, Page
from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Column, DeadLetter, Event, Id, Lsn, Position, Row, format_lsn, parse_lsn
from replicator.contracts.fields import INT64_MAX, INT64_MIN
from replicator.source.connection import Dsn

log = logging.getLogger(__name__)

SCAN_TIMEOUT_SECONDS = 3600
"""Counting a range without an index reads the table once, at some 10 million rows a second."""

PAGE_SETTINGS = {
    # The planner can't know that the next page follows and would, for one page, read the whole table and sort it.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",  # without an index, the price of a forbidden scan would call for seconds of compiling
}

PAGE_BYTES = 8_000_000
"""Of text per page; its last event may be larger. Ordinary events have some ten bytes each, but nothing bounds them,
and memory holds a page several times: as result, rows and events."""

BEGINNING = datetime.min.replace(tzinfo=UTC)
END = datetime.max.replace(tzinfo=UTC)
"""Stands for the moment after it, the end of the year 9999: all events end there."""

_OWN_BEGINS = 3
"""Where a row of a page has the values of its own columns. The WAL's end, wanted, usable are before them."""


def between(start: datetime, end: datetime) -> dict[str, object]:
    """Parameters for `start <= time < end`; as text, so that neither driver nor time zone has a say."""
    return {"start": start.isoformat(), "end": "10000-01-01T00:00:00+00:00" if end == END else end.isoformat()}


class _Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a page begins. Events with ids above `last_id` were inserted after the history began."""

    order: Order
    ts: str
    """The next event is not before it. Only the order by time uses it."""
    id: Id | None
    """The next event's id is not below it; of ids that are no numbers the last one, None before the first."""
    last_id: int | None

    def after(self, event_id: Id, ts: str) -> _Place:
        """Where the page after this event begins."""
        if isinstance(event_id, str):
            return structs.replace(self, ts=ts, id=event_id)
        if self.order == "id":
            return structs.replace(self, id=event_id + 1)
        if event_id < INT64_MAX:
            return structs.replace(self, ts=ts, id=event_id + 1)
        later = datetime.fromisoformat(ts) + timedelta(microseconds=1)
        return structs.replace(self, ts=later.isoformat(), id=INT64_MIN)

    @property
    def over(self) -> bool:
        """Whether all ids up to the last one are read."""
        return self.order == "id" and isinstance(self.id, int) and self.id > (self.last_id or 0)

    def __str__(self) -> str:
        return msgspec.json.encode(self).decode()


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a range, for a history of its own."""

    start: datetime
    end: datetime
    place: str
    """Where its first page begins."""


SPANS_A_SLICE = 50
"""So that slices differ by some two per cent in size, where the events are spread out."""


def cuts(spans: Sequence[tuple[int, str]], most: int) -> list[str]:
    """Where to cut spans, each with its events and its first place, into at most so many parts of about one size."""
    share = sum(count for count, _ in spans) / most
    found: list[str] = []
    gathered = 0
    for count, first in spans:
        if gathered >= share and gathered:
            found.append(first)
            gathered = 0
        gathered += count
    return found


class RangeHistory:
    """The events of the stream's table with `start <= time < end`."""

    def __init__(self, dsn: Dsn, start: datetime, end: datetime, *, tables: Tables, since: Lsn | None = None) -> None:
        """With `since` a standby will do, once it has replayed the WAL up to there."""
        self._start, self._end, self._since = start, end, since
        self._range = between(start, end)
        self._scans = Database(dsn, timeout_seconds=SCAN_TIMEOUT_SECONDS)
        self._pages = Database(dsn, settings=PAGE_SETTINGS)
        self._codec, self._queries = codec_of(tables), queries_of(tables)
        self._indexed = False

    async def open(self) -> None:
        """See which order the table can be read in, and that it can be read: rights, columns, a primary."""
        [(self._indexed,)] = await self._scans.rows(self._queries.indexed)
        first = {**self._range, "id": 0, "last_id": -1, "rows": 1, "bytes": PAGE_BYTES, "as_of": ""}
        await self._pages.rows(self._queries.page("id", begun=False, standby=self._since is not None), first)
        reached = await self.wal_end()
        if self._since is not None and reached < self._since:
            detail = f"the standby has replayed the WAL up to {format_lsn(reached)}, not yet to"
            raise SourceUnavailable(
                problem="the standby is behind",
                detail=f"{detail} {format_lsn(self._since)}",
                cure="The backfill asks again until it has",
            )

    async def wal_end(self) -> Lsn:
        """Where the WAL ends, as far as this server has it."""
        [(text,)] = await self._pages.rows(WAL_END if self._since is None else REPLAYED)
        return last_end(parse_lsn(text))

    async def begin(self) -> tuple[str, int]:
        if not self._indexed:
            told = "no index begins with %s, so the table is read in the order of %s; an index makes it faster: %s"
            tables = self._codec.tables
            log.info(told, tables.time.column, tables.identity.column, self._queries.index)
        [(count, first_id, last_id)] = await self._scans.rows(self._queries.span, self._range)
        if self._queries.counted and (self._indexed or not count):
            first_id = INT64_MIN
        place = _Place(
            order="event_ts" if self._indexed else "id",
            ts=str(self._range["start"]),
            id=first_id,
            last_id=last_id if count or not self._queries.counted else INT64_MIN,
        )
        return str(place), count

    async def slices(self, place: str, most: int) -> list[Slice]:
        """The range from its beginning, a place that `begin` gave, in at most so many parts to be read side by side."""
        here = msgspec.json.decode(place, type=_Place)
        wanted = {**self._range, "last_id": here.last_id, "spans": most * SPANS_A_SLICE}
        if here.order == "id" and not self._queries.counted:
            return [Slice(start=self._start, end=self._end, place=place)]
        found = cuts(await self._scans.rows(self._queries.spans(here.order), wanted), most)
        if here.order == "id" and isinstance(here.id, int) and here.last_id is not None:
            firsts = [here.id, *map(int, found)]
            lasts = [*(first - 1 for first in firsts[1:]), here.last_id]
            places = [structs.replace(here, id=first, last_id=last) for first, last in zip(firsts, lasts, strict=True)]
            return [Slice(start=self._start, end=self._end, place=str(one)) for one in places]
        starts = [self._start, *map(datetime.fromisoformat, found)]
        return [
            Slice(start=start, end=end, place=str(structs.replace(here, ts=start.isoformat())))
            for start, end in zip(starts, [*starts[1:], self._end], strict=True)
        ]

    async def hours(self) -> dict[int, int]:
        """The number of events in each hour, by its start in Unix seconds; hours without events are absent."""
        return dict(await self._scans.rows(self._queries.hours, self._range))

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        here = msgspec.json.decode(place, type=_Place)
        if here.over:
            return None
        wanted = {**self._range, **structs.asdict(here), "rows": rows, "bytes": PAGE_BYTES}
        standby = self._since is not None
        wanted["as_of"] = await as_of(self._pages, self._codec.tables, standby=standby)
        query = self._queries.page(here.order, begun=here.id is not None, standby=standby)
        found = await self._pages.rows(query, wanted)
        return make_page(self._codec, found, after, str(here.after(*last_event(self._codec, found)))) if found else None

    async def close(self) -> None:
        await close_all(self._scans, self._pages)


class PickedHistory:
    """Some events by id, whenever they were, also at infinity. Ids that are gone are left out.

    A place is a number of ids.
    """

    def __init__(self, dsn: Dsn, ids: Sequence[Id], tables: Tables) -> None:
        self._ids = sorted(ids)
        self._pages = Database(dsn, settings=PAGE_SETTINGS)
        self._codec, self._query = codec_of(tables), queries_of(tables).picked

    async def open(self) -> None:
        await self.find([])
        await self._pages.rows(WAL_END)

    async def begin(self) -> tuple[str, int]:
        return "0", len(self._ids)

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        ids = self._ids[int(place) : int(place) + rows]
        if not ids:
            return None
        found = await self.find(ids)
        if not found:
            return Page(Enriched([], []), after, str(int(place) + len(ids)))
        last_id, _ = last_event(self._codec, found)
        # The ids up to the page's last event are done: those between have gone, later ones may have been cut off.
        return make_page(self._codec, found, after, str(bisect_right(self._ids, last_id)))

    async def close(self) -> None:
        await self._pages.close()

    async def find(self, ids: Sequence[Id]) -> Found:
        position = await as_of(self._pages, self._codec.tables) if ids else ""
        return await self._pages.rows(self._query, {"ids": list(ids), "bytes": PAGE_BYTES, "as_of": position})


Found: TypeAlias = list[tuple[Any, ...]]
"""The rows of a page."""


def last_event(codec: Codec, found: Found) -> tuple[Id, str]:
    """Id and time of the page's last event."""
    tables = codec.tables
    last = dict(zip(tables.own, found[-1][_OWN_BEGINS:], strict=False))
    return last[tables.identity], last[tables.time]


def make_page(codec: Codec, found: Found, after: Position, next_place: str) -> Page:
    """The events of a page's rows. The loop is where a backfill spends its time, beside `build_events`."""
    [wal_end, *_], *_ = found
    own = slice(_OWN_BEGINS, _OWN_BEGINS + len(codec.tables.own))
    contents: list[dict[Any, Content]] = [{} for _ in codec.tables.joins]
    joined = [*zip(codec.tables.joins, contents, codec.draft_ons, _joined(codec.tables, own.stop), strict=True)]
    lsn = max(parse_lsn(wal_end), after.commit_lsn)  # after a failover the WAL may end before that
    ordinal = after.ordinal
    drafts: list[Draft] = []
    refused: list[DeadLetter] = []
    for row in found:
        _, wanted, usable, *_ = row
        if not wanted:
            continue
        ordinal += 1
        draft = [lsn, ordinal, *row[own]]
        if not usable:
            refused.append(_refused(codec, row[own], lsn, ordinal))
            continue
        draft[codec.draft_time] = _moment(draft[codec.draft_time])
        drafts.append(draft)
        for join, known, on, cells in joined:
            known[draft[on]] = fitting(join, row[cells])
    events: list[Event] = []
    refused += codec.build(drafts, contents, events)
    return Page(Enriched(events, refused), Position(lsn, ordinal), next_place)


def _joined(tables: Tables, begin: int) -> Iterator[slice]:
    """Where a row of a page has the values of each dimension's columns."""
    for join in tables.joins:
        yield slice(begin, begin := begin + len(join.fields))


def _moment(text: str) -> datetime | str:
    """What Python's calendar does not have stays text, as in the stream: each sink says what becomes of it."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return text


def _refused(codec: Codec, values: tuple[Any, ...], lsn: Lsn, ordinal: int) -> DeadLetter:
    """As from the stream: the row as it is, and in the same words what is wrong with it."""
    tables = codec.tables
    columns = [Column(field.column, value) for field, value in zip(tables.own, values, strict=True)]
    try:
        codec.check(columns)
    except RowUnusable as exc:
        return codec.dead_letter(Row("I", tables.schema, tables.events, columns, [], lsn, ordinal), str(exc))
    raise AssertionError  # a NULL that the declaration does not allow, or a number with too many digits
