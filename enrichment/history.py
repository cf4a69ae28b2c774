"""The events that stand in the table already, page by page.

A page is one statement, hence one snapshot and one short transaction: events, and what their content is today. It
becomes drafts as the stream's rows do, and `engagement.finish` makes the events of both. `delivery/backfill.py` carries
them on; this module knows the tables and in which order they are read:

- by `(event_ts, id)` where an index begins with event_ts: a page costs what it holds;
- by id, from the first to the last event of the range, where none does: the primary key is enough, and the rows in
  between are read once, wanted or not. Never is a page found by reading the table from its beginning.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import structs

from enrichment import engagement
from enrichment.database import Database
from enrichment.dead_letters import dead_letter
from enrichment.engagement import INT64_MAX, INT64_MIN, Content, Draft, Reader, RowUnusable
from replicator.contracts.events import Column, DeadLetter, Event, Lsn, Position, Row, parse_lsn
from replicator.contracts.stream import Enriched, Page

log = logging.getLogger(__name__)

SCAN_TIMEOUT_SECONDS = 3600
"""Counting a range without an index reads the table once: some 10 million rows a second."""

PAGE_OPTIONS = (
    "-c TimeZone=UTC -c DateStyle=ISO"  # event_ts as in the stream
    # The planner can't know that the next page follows and would, for one page, read the whole table and sort it.
    " -c enable_seqscan=off -c enable_bitmapscan=off -c plan_cache_mode=force_custom_plan"
)

INDEX = "CREATE INDEX CONCURRENTLY engagement_events_event_ts_id ON public.engagement_events (event_ts, id)"
"""What makes a backfill of a short range fast on a long table."""

SPAN = """
-- How many events the range has, their first id and their last.
SELECT count(*), min(id)::bigint, max(id)::bigint FROM public.engagement_events
WHERE event_ts >= %(start)s::timestamptz AND event_ts < %(end)s::timestamptz
"""

HOURS = """
-- How many events the range has in each hour, by the hour's start in seconds since 1970.
SELECT floor(extract(epoch FROM event_ts) / 3600)::bigint * 3600, count(*) FROM public.engagement_events
WHERE event_ts >= %(start)s::timestamptz AND event_ts < %(end)s::timestamptz
GROUP BY 1 ORDER BY 1
"""

INDEXED = """
-- Whether an index gives events in the order of event_ts.
SELECT EXISTS (
    SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = 'public.engagement_events'::regclass AND a.attname = 'event_ts'
      AND m.amname = 'btree' AND i.indisvalid AND i.indpred IS NULL)
"""

WANTED = "id, content_id, user_id, event_type, event_ts, duration_ms, device"
"""Not raw_payload, which may be large."""

BY_TIME = f"""
SELECT {WANTED} FROM public.engagement_events
WHERE (event_ts, id) >= (%(ts)s::timestamptz, %(id)s::bigint) AND event_ts < %(end)s::timestamptz
  AND id <= %(last_id)s::bigint
ORDER BY event_ts, id LIMIT %(rows)s
"""  # noqa: S608  constants of ours

BY_ID = f"""
SELECT {WANTED} FROM public.engagement_events
WHERE id BETWEEN %(id)s::bigint AND %(last_id)s::bigint
ORDER BY id LIMIT %(rows)s
"""  # noqa: S608  constants of ours

BY_IDS = f"SELECT {WANTED} FROM public.engagement_events WHERE id = ANY(%(ids)s::bigint[])"  # noqa: S608  constants of ours

PAGE_BYTES = 8_000_000
"""Of text in a page; its last event may be larger. Ordinary events have some ten bytes each, but nothing bounds them,
and a page stands in memory several times: in the result, as rows, as events."""

WAL_END = "SELECT pg_current_wal_insert_lsn()::text"

PAGE = """
-- A page of events with their contents as of the same snapshot, cut where its text becomes too much. The page's last
-- row always comes, wanted or not: the next page begins behind it. The WAL's end (inserted, not written: a commit may
-- be visible before it is on disk) is read while the statement runs, hence after its snapshot was taken.
WITH found AS MATERIALIZED (
    SELECT p.*, 1 + coalesce(octet_length(event_type::text), 0) + coalesce(octet_length(device::text), 0) AS size
    FROM ({page}) p
), measured AS (
    SELECT p.*, sum(size) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) AS size_up_to FROM found p
), page AS MATERIALIZED (SELECT * FROM measured WHERE size_up_to - size < %(bytes)s::bigint)
SELECT p.id::bigint, p.content_id::bigint, p.user_id::bigint, p.event_type::text, p.event_ts::timestamptz::text,
       p.duration_ms::bigint, p.device::text, c.content_type::text, c.length_seconds::bigint,
       p.event_ts >= %(start)s::timestamptz AND p.event_ts < %(end)s::timestamptz,
       ({wal_end})
FROM page p LEFT JOIN public.content c ON c.content_id = p.content_id
WHERE p.event_ts >= %(start)s::timestamptz AND p.event_ts < %(end)s::timestamptz
      OR p.size_up_to = (SELECT max(size_up_to) FROM page)
ORDER BY p.size_up_to
"""

Order: TypeAlias = Literal["event_ts", "id"]

PAGES: Mapping[Order, str] = {
    "event_ts": PAGE.format(page=BY_TIME, order="p.event_ts, p.id", wal_end=WAL_END),
    "id": PAGE.format(page=BY_ID, order="p.id", wal_end=WAL_END),
}


BEGINNING = datetime.min.replace(tzinfo=UTC)
END = datetime.max.replace(tzinfo=UTC)
"""Stands for the moment behind it, the end of the year 9999: the events of all times end there."""

PICKED = PAGE.format(page=BY_IDS, order="p.id", wal_end=WAL_END)


class Range(NamedTuple):
    """The events with `start <= event_ts < end`."""

    start: datetime
    end: datetime

    def parameters(self) -> dict[str, object]:
        """For the queries; as text, so that neither driver nor time zone has a say."""
        end = "10000-01-01T00:00:00+00:00" if self.end == END else self.end.isoformat()
        return {"start": self.start.isoformat(), "end": end}


class _Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a page begins. Events with higher ids than `last_id` were inserted after the beginning."""

    order: Order
    ts: str
    """Of the next event at the earliest; only the order by event_ts asks for it."""
    id: int
    """Likewise; included."""
    last_id: int


class EngagementHistory:
    """`contracts.stream.History` of `public.engagement_events`, for one range of time."""

    def __init__(self, dsn: str, wanted: Range) -> None:
        self._range = wanted
        self._scans = Database(dsn, timeout_seconds=SCAN_TIMEOUT_SECONDS)
        self._pages = Database(dsn, options=PAGE_OPTIONS)
        self._indexed = False

    async def open(self) -> None:
        """Connect, see in which order the table can be read, and that it can: rights, columns, a primary."""
        [(self._indexed,)] = await self._scans.rows(INDEXED)
        nothing = {"id": 0, "last_id": -1, "rows": 1, "bytes": PAGE_BYTES}
        await self._pages.rows(PAGES["id"], self._range.parameters() | nothing)
        await self._pages.rows(WAL_END)

    async def begin(self) -> tuple[str, int]:
        """See `stream.History`. Reads the range once, to count it."""
        if not self._indexed:
            log.info("no index begins with event_ts, the table is read in the order of id; to be faster: %s", INDEX)
        [(count, first_id, last_id)] = await self._scans.rows(SPAN, self._range.parameters())
        place = _Place(
            order="event_ts" if self._indexed else "id",
            ts=self._range.start.isoformat(),
            id=INT64_MIN if self._indexed or not count else first_id,
            last_id=last_id if count else INT64_MIN,
        )
        return _tell(place), count

    async def hours(self) -> dict[int, int]:
        """How many events each hour has, by its start in Unix seconds; hours without any are absent."""
        return dict(await self._scans.rows(HOURS, self._range.parameters()))

    async def read(self, place: str, behind: Position, rows: int) -> Page | None:
        """See `stream.History`."""
        here = _read_place(place)
        if here.id > here.last_id and here.order == "id":
            return None
        wanted = {"ts": here.ts, "id": here.id, "last_id": here.last_id, "rows": rows, "bytes": PAGE_BYTES}
        found = await self._pages.rows(PAGES[here.order], self._range.parameters() | wanted)
        if not found:
            return None
        drafts = _Drafts(found, behind)
        events: list[Event] = []
        engagement.finish(drafts.made, drafts.contents, events)
        return Page(Enriched(events, drafts.refused), drafts.position, _tell(_behind(here, found[-1])))

    async def close(self) -> None:
        """Close the connections."""
        await self._scans.close()
        await self._pages.close()


class PickedHistory:
    """`contracts.stream.History` of some events, whenever they were; ids that are gone are left out."""

    def __init__(self, dsn: str, ids: Sequence[int]) -> None:
        self._ids = sorted(ids)
        self._database = Database(dsn, options=PAGE_OPTIONS)

    async def open(self) -> None:
        """Connect, and see that the tables can be read."""
        await self._database.rows(PICKED, self._wanted([]))
        await self._database.rows(WAL_END)

    async def begin(self) -> tuple[str, int]:
        """A place is a number of ids."""
        return "0", len(self._ids)

    async def read(self, place: str, behind: Position, rows: int) -> Page | None:
        """See `stream.History`."""
        here = int(place)
        ids = self._ids[here : here + rows]
        if not ids:
            return None
        found = await self._database.rows(PICKED, self._wanted(ids))
        if not found:
            return Page(Enriched([], []), behind, str(here + len(ids)))
        after = str(bisect_right(self._ids, found[-1][0]))  # the next: the ids between have gone, or were not read yet
        drafts = _Drafts(found, behind)
        events: list[Event] = []
        engagement.finish(drafts.made, drafts.contents, events)
        return Page(Enriched(events, drafts.refused), drafts.position, after)

    def _wanted(self, ids: Sequence[int]) -> dict[str, object]:
        return {**Range(BEGINNING, END).parameters(), "ids": list(ids), "bytes": PAGE_BYTES}

    async def close(self) -> None:
        """Close the connection."""
        await self._database.close()


_Found: TypeAlias = tuple[Any, ...]
"""A row of PAGE."""


class _Drafts:
    """What the rows of a page come to. The loop is what a backfill spends its time in, beside `engagement.finish`."""

    def __init__(self, found: list[_Found], behind: Position) -> None:
        self.contents: dict[int, Content] = {}
        self.made: list[Draft] = []
        self.refused: list[DeadLetter] = []
        lsn = max(parse_lsn(found[0][-1]), behind.commit_lsn)  # after a failover the WAL may end before that
        ordinal = behind.ordinal
        for event_id, content_id, user_id, event_type, ts, duration_ms, device, kind, length, wanted, _ in found:
            if not wanted:
                continue
            ordinal += 1
            if content_id is None or user_id is None or event_type is None:
                values = (event_id, content_id, user_id, event_type, ts, duration_ms, device)
                self.refused.append(_refused(values, lsn, ordinal))
                continue
            moment = datetime.fromisoformat(ts)
            self.made.append((lsn, ordinal, event_id, content_id, user_id, event_type, moment, duration_ms, device))
            self.contents[content_id] = (kind, length)
        self.position = Position(lsn, ordinal)


def _refused(values: _Found, lsn: Lsn, ordinal: int) -> DeadLetter:
    """As of the stream: the row as it is, and in the same words what is wrong with it."""
    columns = [Column(needed.name, value) for needed, value in zip(engagement.COLUMNS, values, strict=True)]
    row = Row("I", engagement.SCHEMA, engagement.TABLE, columns, [], lsn, ordinal)
    try:
        Reader().read(row)
    except RowUnusable as exc:
        return dead_letter(row, str(exc))
    raise AssertionError  # a null where the reader wants a value


def _behind(here: _Place, last: _Found) -> _Place:
    event_id, ts = last[0], last[4]
    if here.order == "id":
        return structs.replace(here, id=event_id + 1)
    if event_id < INT64_MAX:
        return structs.replace(here, ts=ts, id=event_id + 1)
    later = datetime.fromisoformat(ts) + timedelta(microseconds=1)
    return structs.replace(here, ts=later.isoformat(), id=INT64_MIN)


def _tell(place: _Place) -> str:
    return msgspec.json.encode(place).decode()


def _read_place(place: str) -> _Place:
    return msgspec.json.decode(place, type=_Place)
