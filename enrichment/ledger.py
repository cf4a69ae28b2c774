"""Which engagement events PostgreSQL has, as numbers that another place can compute as well; see `ledger.Ledger`.

An event's line is its fields as text, `|` between them: integers as they are, `event_ts` in microseconds since 1970,
text with its length before it (so that no two events have the same line), `engagement_seconds` in thousandths and
`engagement_pct` in hundredths, `~` for NULL. `sinks/clickhouse/ledger.py` makes the same line.
"""

from __future__ import annotations

import array
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from enrichment.database import Database
from enrichment.history import BEGINNING, END, INDEXED, PickedHistory, Range
from replicator.contracts.events import Lsn, parse_lsn
from replicator.contracts.ledger import Digest, EventDigest, Slice

STATEMENT_SECONDS = 86_400
"""In effect none: reading a table once takes as long as it takes, some 400,000 events a second."""
CHUNK = 5_000

OPTIONS = "-c TimeZone=UTC -c enable_sort=off"  # the groups are few; the planner expects as many as there are rows
ID_OPTIONS = "-c TimeZone=UTC -c enable_hashagg=off"  # sorted on disk: a group's ids in memory, not all groups'

MICROSECONDS = "(extract(epoch FROM e.event_ts) * 1000000)::bigint"
MICROSECONDS_13 = """(extract(epoch FROM date_trunc('second', e.event_ts))::bigint * 1000000
    + extract(microseconds FROM e.event_ts)::bigint %% 1000000)"""
"""Before PostgreSQL 14 `extract` gives a float, too short for microseconds of far years."""

OWN_LINE = """e.id, e.content_id, e.user_id, length(e.event_type::text) || ':' || e.event_type::text, {us},
    coalesce(e.duration_ms::text, '~'), coalesce(length(e.device::text) || ':' || e.device::text, '~'),
    coalesce(e.duration_ms::text, '~')"""
CONTENT_LINE = """
    coalesce(length(c.content_type::text) || ':' || c.content_type::text, '~'), coalesce(c.length_seconds::text, '~'),
    coalesce((round(e.duration_ms / 1000.0 / nullif(c.length_seconds, 0), 2) * 100)::bigint::text, '~')"""
JOIN = "LEFT JOIN public.content c ON c.content_id = e.content_id"

HASH = "('x' || left(md5(convert_to(concat_ws('|', {line}), 'UTF8')), 15))::bit(60)::bigint"

EVENTS = """
FROM public.engagement_events e {join}
WHERE e.event_ts >= %(start)s::timestamptz AND e.event_ts < %(end)s::timestamptz
  AND e.content_id IS NOT NULL AND e.user_id IS NOT NULL AND e.event_type IS NOT NULL
"""
"""Those that an event can be made of."""

SPAN = "SELECT count(*), min({us}), max({us}) {events}"
BY_TIME = "SELECT ({us} - %(origin)s::bigint) / %(width)s::bigint, count(*), sum({hash}) {events} GROUP BY 1"
BY_ID = "SELECT {remainder}, count(*), sum({hash}) {events} GROUP BY 1"
HELD = """
SELECT e.id::bigint, {us}, e.content_id::bigint, {hash} {events}
  AND ({us} - %(origin)s::bigint) / %(width)s::bigint = ANY(%(buckets)s::bigint[])
  AND {remainder} = ANY(%(remainders)s::bigint[])
"""
FIND = "SELECT e.id::bigint, {us}, e.content_id::bigint, {hash} {events} AND e.id = ANY(%(ids)s::bigint[])"
REMAINDER = "((e.id %% %(modulus)s::bigint + %(modulus)s::bigint) %% %(modulus)s::bigint)::bigint"
IDS = """
-- All ids, 65,536 neighbours at most in a row, each as eight bytes.
SELECT string_agg(int8send(e.id::bigint), ''::bytea) {events} GROUP BY e.id >> 16
"""
COUNTS = "SELECT e.content_id::bigint, count(*) {events} GROUP BY 1 ORDER BY 1"
COUNTS_OF = "SELECT e.content_id::bigint, count(*) {events} AND e.content_id = ANY(%(keys)s::bigint[]) GROUP BY 1"
LSN = "SELECT pg_current_wal_insert_lsn()::text"  # the WAL's end, inserted and not only written
NEXT_TRANSACTION = "SELECT txid_current()"  # takes one: a snapshot's xmax is behind the last that has ended, not begun
OLDEST_TRANSACTION = "SELECT txid_snapshot_xmin(txid_current_snapshot())"
VERSION = "SELECT current_setting('server_version_num')::int"

WAL_BLOCK_BYTES = 8192
PAGE_HEADER_BYTES = 40
_WITH_EXACT_EXTRACT = 140_000


class EngagementLedger:
    """`contracts.ledger.SourceLedger` of `public.engagement_events`."""

    def __init__(self, dsn: str, *, with_content: bool) -> None:
        self._dsn = dsn
        self._with_content = with_content
        self._scans = Database(dsn, timeout_seconds=STATEMENT_SECONDS, options=OPTIONS)
        self._streams = Database(dsn, timeout_seconds=STATEMENT_SECONDS, options=ID_OPTIONS)
        self._words: dict[str, str] = {}
        self.slices_are_cheap = False

    async def open(self) -> None:
        """Connect, and look at server and table."""
        [(self.slices_are_cheap,)] = await self._scans.rows(INDEXED)
        [(version,)] = await self._scans.rows(VERSION)
        us = MICROSECONDS if version >= _WITH_EXACT_EXTRACT else MICROSECONDS_13
        line = OWN_LINE + ("," + CONTENT_LINE if self._with_content else "")
        self._words = {
            "us": us,
            "hash": HASH.format(line=line.format(us=us)),
            "events": EVENTS.format(join=JOIN if self._with_content else ""),
            "remainder": REMAINDER,
        }
        await self._scans.rows(f"{self._text(FIND)} LIMIT 0", {**_between(0, 0), "ids": []})  # the columns are there

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        """See `ledger.Ledger`."""
        [(events, first, last)] = await self._scans.rows(self._text(SPAN), _between(start_us, end_us))
        return events, first or 0, last or 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        """See `ledger.Ledger`."""
        query = BY_TIME if part.modulus == 1 else BY_ID
        return _digests(await self._scans.rows(self._text(query), _of(part)))

    async def events(self, part: Slice) -> list[EventDigest]:
        """See `ledger.Ledger`."""
        return [EventDigest(*row) for row in await self._scans.rows(self._text(HELD), _of(part))]

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        """See `ledger.Ledger`."""
        wanted = {**_between(start_us, end_us), "ids": list(ids)}
        return [EventDigest(*row) for row in await self._scans.rows(self._text(FIND), wanted)]

    async def lsn(self) -> Lsn:
        """See `ledger.SourceLedger`."""
        [(text,)] = await self._scans.rows(LSN)
        lsn = parse_lsn(text)
        # At the end of a WAL page this is behind the next page's header, where no commit ends before there is one.
        over = lsn % WAL_BLOCK_BYTES
        return lsn - over if over <= PAGE_HEADER_BYTES else lsn

    async def next_transaction(self) -> int:
        """See `ledger.SourceLedger`."""
        [(number,)] = await self._scans.rows(NEXT_TRANSACTION)
        return int(number)

    async def oldest_transaction(self) -> int:
        """See `ledger.SourceLedger`."""
        [(number,)] = await self._scans.rows(OLDEST_TRANSACTION)
        return int(number)

    async def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[int]]:
        """See `ledger.SourceLedger`."""
        async for (packed,) in self._streams.stream(self._text(IDS), _between(start_us, end_us)):
            ids = array.array("q", packed)
            if sys.byteorder == "little":
                ids.byteswap()
            yield ids

    async def counts(self) -> AsyncIterator[Sequence[tuple[int, int]]]:
        """See `ledger.SourceLedger`."""
        chunk: list[tuple[int, int]] = []
        async for row in self._streams.stream(self._text(COUNTS), Range(BEGINNING, END).parameters()):
            chunk.append((row[0], row[1]))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        yield chunk

    async def counts_of(self, keys: Sequence[int]) -> dict[int, int]:
        """See `ledger.SourceLedger`."""
        wanted = {**Range(BEGINNING, END).parameters(), "keys": list(keys)}
        return dict(await self._scans.rows(self._text(COUNTS_OF), wanted))

    def picked(self, ids: Sequence[int]) -> PickedHistory:
        """See `ledger.SourceLedger`."""
        return PickedHistory(self._dsn, ids)

    async def close(self) -> None:
        """Close the connections."""
        await self._scans.close()
        await self._streams.close()

    def _text(self, query: str) -> str:
        return query.format_map(self._words)


def _between(start_us: int, end_us: int) -> dict[str, object]:
    return {"start": _moment(start_us), "end": _moment(end_us)}


def _moment(us: int) -> str:
    """As text that PostgreSQL reads exactly, the year 10000 included, where Python's calendar ends."""
    days, rest = divmod(us, 86_400_000_000)
    seconds, fraction = divmod(rest, 1_000_000)
    return f"J{2_440_588 + days} {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction:06}+00"


def _of(part: Slice) -> dict[str, object]:
    return {
        **_between(part.start_us, part.end_us),
        "origin": part.origin_us,
        "width": part.width_us,
        "buckets": list(part.buckets),
        "modulus": part.modulus,
        "remainders": list(part.remainders),
    }


def _digests(rows: Sequence[tuple[Any, ...]]) -> dict[int, Digest]:
    return {int(group): Digest(int(events), int(total)) for group, events, total in rows}
