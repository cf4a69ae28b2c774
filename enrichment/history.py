"""The events that the table already holds, page by page; two `contracts.stream.History`.

A page is one statement, hence one snapshot and one short transaction: events, and what their content is today. Its rows
become drafts as the stream's do. Pages are read

- by `(event_ts, id)` if an index begins with event_ts: a page costs what it holds;
- otherwise by id, from the first to the last event of the range: the primary key is enough, and the rows in between are
  read once, wanted or not. No page is ever found by reading the table from its beginning.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import structs

from enrichment.codec import DRAFT_KEY, DRAFT_TIME, Content, Draft, RowUnusable, build_events, check, dead_letter
from enrichment.contract import CONTENT_TABLE, EVENTS_TABLE, IDENTITY, JOINED, OWN, SCHEMA, TIME, named, rows_of
from enrichment.database import Database
from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Column, DeadLetter, Event, Lsn, Position, Row, format_lsn, parse_lsn
from replicator.contracts.fields import INT64_MAX, INT64_MIN
from replicator.contracts.stream import Enriched, Page
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

INDEX = "CREATE INDEX CONCURRENTLY engagement_events_event_ts_id ON public.engagement_events (event_ts, id)"
"""Makes a backfill of a short range fast on a long table."""

INDEXED = f"""
-- Whether an index gives events in the order of event_ts.
SELECT EXISTS (
    SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = 'public.engagement_events'::regclass AND a.attname = {named(EVENTS_TABLE, TIME.column)!r}
      AND m.amname = 'btree' AND i.indisvalid AND i.indpred IS NULL)
"""  # noqa: S608  names in the contract

SPAN = f"""
-- The number of events in a range, their first id and their last.
SELECT count(*), min(id)::bigint, max(id)::bigint FROM {rows_of(EVENTS_TABLE)} AS e
WHERE event_ts >= %(start)s::timestamptz AND event_ts < %(end)s::timestamptz
"""  # noqa: S608  names in the contract

HOURS = f"""
-- The number of events in each hour of a range, by the hour's start in seconds since 1970.
SELECT floor(extract(epoch FROM event_ts) / 3600)::bigint * 3600, count(*) FROM {rows_of(EVENTS_TABLE)} AS e
WHERE event_ts >= %(start)s::timestamptz AND event_ts < %(end)s::timestamptz
GROUP BY 1 ORDER BY 1
"""  # noqa: S608  names in the contract

WAL_END = "SELECT pg_current_wal_insert_lsn()::text"
REPLAYED = (
    "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)::text"
)
"""The same of a standby, too, which shows what it has replayed."""

WAL_BLOCK_BYTES = 8192
PAGE_HEADER_BYTES = 40

IN_RANGE = "p.event_ts >= %(start)s::timestamptz AND p.event_ts < %(end)s::timestamptz"
BY_TIME = """
(event_ts, id) >= (%(ts)s::timestamptz, %(id)s::bigint) AND event_ts < %(end)s::timestamptz
AND id <= %(last_id)s::bigint ORDER BY event_ts, id LIMIT %(rows)s"""
BY_ID = "id BETWEEN %(id)s::bigint AND %(last_id)s::bigint ORDER BY id LIMIT %(rows)s"
BY_IDS = "id = ANY(%(ids)s::bigint[])"

_TEXTS = [f"coalesce(octet_length({field.column}::text), 0)" for field in OWN if field.type.postgres == "text"]
_OWN = ", ".join(f"p.{field.column}::{field.type.postgres}{'::text' * (field is TIME)}" for field in OWN)
_JOINED = ", ".join(f"c.{field.joined}::{field.type.postgres}" for field in JOINED)
_USABLE = " AND ".join(f"p.{field.column} IS NOT NULL" for field in OWN if not field.type.optional)


def _page(rows: str, order: str, wanted: str = IN_RANGE, wal_end: str = WAL_END) -> str:
    return f"""
-- A page of events with their contents as of the same snapshot, cut where its text becomes too much. The page's last
-- row always comes, wanted or not: the next page begins after it. The WAL's end (inserted, not written: a commit may
-- be visible before it is on disk) is read while the statement runs, hence after its snapshot was taken.
WITH found AS MATERIALIZED (
    SELECT p.*, {" + ".join(["1", *_TEXTS])} AS size
    FROM (SELECT {", ".join(field.column for field in OWN)} FROM {rows_of(EVENTS_TABLE)} AS e WHERE {rows}) p
), measured AS (
    SELECT p.*, sum(size) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) AS size_up_to FROM found p
), page AS MATERIALIZED (SELECT * FROM measured WHERE size_up_to - size < %(bytes)s::bigint)
SELECT ({wal_end}), {wanted}, {_USABLE},
       {_OWN},
       {_JOINED}
FROM page p LEFT JOIN {rows_of(CONTENT_TABLE)} AS c ON c.content_id = p.content_id
WHERE {wanted} OR p.size_up_to = (SELECT max(size_up_to) FROM page)
ORDER BY p.size_up_to
"""  # noqa: S608  names in the contract


Order: TypeAlias = Literal["event_ts", "id"]

PAGES: Mapping[Order, str] = {"event_ts": _page(BY_TIME, "p.event_ts, p.id"), "id": _page(BY_ID, "p.id")}
STANDBY_PAGES: Mapping[Order, str] = {
    "event_ts": _page(BY_TIME, "p.event_ts, p.id", wal_end=REPLAYED),
    "id": _page(BY_ID, "p.id", wal_end=REPLAYED),
}
PICKED_PAGE = _page(BY_IDS, "p.id", "true")

_OWN_VALUES = slice(3, 3 + len(OWN))
_JOINED_VALUES = slice(_OWN_VALUES.stop, None)
"""Where a row of a page has the values of `OWN` and of `JOINED`. The WAL's end, wanted, usable are before them."""


def last_end(lsn: Lsn) -> Lsn:
    """Where the last record of the WAL ends that ends at this position.

    At the end of a page it is after the next page's header, where no commit ends before there is one.
    """
    over = lsn % WAL_BLOCK_BYTES
    return lsn - over if over <= PAGE_HEADER_BYTES else lsn


def between(start: datetime, end: datetime) -> dict[str, object]:
    """Parameters for `start <= event_ts < end`; as text, so that neither driver nor time zone has a say."""
    return {"start": start.isoformat(), "end": "10000-01-01T00:00:00+00:00" if end == END else end.isoformat()}


class _Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a page begins. Events with ids above `last_id` were inserted after the history began."""

    order: Order
    ts: str
    """The next event is not before it. Only the order by event_ts uses it."""
    id: int
    """The next event's id is not below it."""
    last_id: int

    def after(self, event_id: int, ts: str) -> _Place:
        """Where the page after this event begins."""
        if self.order == "id":
            return structs.replace(self, id=event_id + 1)
        if event_id < INT64_MAX:
            return structs.replace(self, ts=ts, id=event_id + 1)
        later = datetime.fromisoformat(ts) + timedelta(microseconds=1)
        return structs.replace(self, ts=later.isoformat(), id=INT64_MIN)

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


def _spans(key: str, number: str) -> str:
    events = f"{rows_of(EVENTS_TABLE)} AS p"
    wanted = f"{IN_RANGE} AND p.id <= %(last_id)s::bigint"
    bounds = f"{number.format(f'p.{key}')}, {number.format('low')}, {number.format('high')} + 1"
    return f"""
-- The events of a range in equal spans of their order: how many each span has, and where its first one is.
WITH ends AS (SELECT min(p.{key}) AS low, max(p.{key}) AS high FROM {events} WHERE {wanted})
SELECT count(*), min(p.{key})::text FROM {events} CROSS JOIN ends WHERE {wanted}
GROUP BY width_bucket({bounds}, %(spans)s::int) ORDER BY min(p.{key})
"""  # noqa: S608  names in the contract


SPANS: Mapping[Order, str] = {
    "event_ts": _spans("event_ts", "extract(epoch FROM {})::numeric"),
    "id": _spans("id", "{}::numeric"),
}


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


class EngagementHistory:
    """The events of `public.engagement_events` with `start <= event_ts < end`."""

    def __init__(self, dsn: Dsn, start: datetime, end: datetime, *, since: Lsn | None = None) -> None:
        """With `since` a standby will do, once it has replayed the WAL up to there."""
        self._start, self._end, self._since = start, end, since
        self._range = between(start, end)
        self._scans = Database(dsn, timeout_seconds=SCAN_TIMEOUT_SECONDS)
        self._pages = Database(dsn, settings=PAGE_SETTINGS)
        self._queries = PAGES if since is None else STANDBY_PAGES
        self._indexed = False

    async def open(self) -> None:
        """See which order the table can be read in, and that it can be read: rights, columns, a primary."""
        [(self._indexed,)] = await self._scans.rows(INDEXED)
        first = {**self._range, "id": 0, "last_id": -1, "rows": 1, "bytes": PAGE_BYTES}
        await self._pages.rows(self._queries["id"], first)
        reached = await self.wal_end()
        if self._since is not None and reached < self._since:
            detail = f"the standby has replayed the WAL up to {format_lsn(reached)}, not yet to"
            raise SourceUnavailable(
                problem="the standby is behind",
                detail=f"{detail} {format_lsn(self._since)}",
                cure="It is asked again until it is there",
            )

    async def wal_end(self) -> Lsn:
        """Where the WAL ends, as far as this server has it."""
        [(text,)] = await self._pages.rows(WAL_END if self._since is None else REPLAYED)
        return last_end(parse_lsn(text))

    async def begin(self) -> tuple[str, int]:
        if not self._indexed:
            log.info("no index begins with event_ts, the table is read in the order of id; to be faster: %s", INDEX)
        [(count, first_id, last_id)] = await self._scans.rows(SPAN, self._range)
        place = _Place(
            order="event_ts" if self._indexed else "id",
            ts=str(self._range["start"]),
            id=INT64_MIN if self._indexed or not count else first_id,
            last_id=last_id if count else INT64_MIN,
        )
        return str(place), count

    async def slices(self, place: str, most: int) -> list[Slice]:
        """The range from its beginning, a place that `begin` gave, in at most so many parts to be read side by side."""
        here = msgspec.json.decode(place, type=_Place)
        wanted = {**self._range, "last_id": here.last_id, "spans": most * SPANS_A_SLICE}
        found = cuts(await self._scans.rows(SPANS[here.order], wanted), most)
        if here.order == "id":
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
        return dict(await self._scans.rows(HOURS, self._range))

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        here = msgspec.json.decode(place, type=_Place)
        if here.id > here.last_id and here.order == "id":
            return None
        wanted = {**self._range, **structs.asdict(here), "rows": rows, "bytes": PAGE_BYTES}
        found = await self._pages.rows(self._queries[here.order], wanted)
        return make_page(found, after, str(here.after(*last_event(found)))) if found else None

    async def close(self) -> None:
        await self._scans.close()
        await self._pages.close()


class PickedHistory:
    """Some events by id, whenever they were, also at infinity. Ids that are gone are left out.

    A place is a number of ids.
    """

    def __init__(self, dsn: Dsn, ids: Sequence[int]) -> None:
        self._ids = sorted(ids)
        self._pages = Database(dsn, settings=PAGE_SETTINGS)

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
        last_id, _ = last_event(found)
        # The ids up to the page's last event are done: those between have gone, later ones may have been cut off.
        return make_page(found, after, str(bisect_right(self._ids, last_id)))

    async def close(self) -> None:
        await self._pages.close()

    async def find(self, ids: Sequence[int]) -> Found:
        return await self._pages.rows(PICKED_PAGE, {"ids": list(ids), "bytes": PAGE_BYTES})


Found: TypeAlias = list[tuple[Any, ...]]
"""The rows of a page."""


def last_event(found: Found) -> tuple[int, str]:
    """Id and time of the page's last event."""
    last = dict(zip(OWN, found[-1][_OWN_VALUES], strict=True))
    return last[IDENTITY], last[TIME]


def make_page(found: Found, after: Position, next_place: str) -> Page:
    """The events of a page's rows. The loop is where a backfill spends its time, beside `build_events`."""
    [wal_end, *_], *_ = found
    lsn = max(parse_lsn(wal_end), after.commit_lsn)  # after a failover the WAL may end before that
    ordinal = after.ordinal
    drafts: list[Draft] = []
    contents: dict[int, Content] = {}
    refused: list[DeadLetter] = []
    for row in found:
        _, wanted, usable, *_ = row
        if not wanted:
            continue
        ordinal += 1
        draft = [lsn, ordinal, *row[_OWN_VALUES]]
        if not usable:
            refused.append(_refused(row[_OWN_VALUES], lsn, ordinal))
            continue
        draft[DRAFT_TIME] = _moment(draft[DRAFT_TIME])
        drafts.append(draft)
        contents[draft[DRAFT_KEY]] = row[_JOINED_VALUES]
    events: list[Event] = []
    build_events(drafts, contents, events)
    return Page(Enriched(events, refused), Position(lsn, ordinal), next_place)


def _moment(text: str) -> datetime | str:
    """What Python's calendar does not have stays text, as in the stream: each sink says what becomes of it."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return text


def _refused(values: tuple[Any, ...], lsn: Lsn, ordinal: int) -> DeadLetter:
    """As from the stream: the row as it is, and in the same words what is wrong with it."""
    columns = [Column(field.column, value) for field, value in zip(OWN, values, strict=True)]
    try:
        check(columns)
    except RowUnusable as exc:
        return dead_letter(Row("I", SCHEMA, EVENTS_TABLE, columns, [], lsn, ordinal), str(exc))
    raise AssertionError  # a NULL that the contract does not allow
