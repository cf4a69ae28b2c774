"""The engagement events that PostgreSQL holds, as digests that a sink can compute as well; a `ledger.SourceLedger`.

An event's line is the checksum text of its fields (`contracts/fields.py`), with `|` between them. Its hash is 60 bits
of the line's MD5. A sink makes the same line from the same contract.
"""

from __future__ import annotations

import array
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from enrichment.contract import EVENT, JOINED, OWN, TIME
from enrichment.database import Database
from enrichment.history import BEGINNING, END, INDEXED, PickedHistory, between
from replicator.contracts.events import Lsn, parse_lsn
from replicator.contracts.fields import Field
from replicator.contracts.ledger import Digest, EventDigest, Slice

STATEMENT_SECONDS = 86_400
"""In effect no limit: reading a table once takes what it takes, at some 400,000 events a second."""

CHUNK = 5_000

OPTIONS = "-c TimeZone=UTC -c enable_sort=off"  # the groups are few; the planner expects as many as there are rows
ID_OPTIONS = "-c TimeZone=UTC -c enable_hashagg=off"  # sorted on disk: a group's ids in memory, not all groups'

_SQL = {field.name: f"e.{field.column}" for field in OWN} | {field.name: f"c.{field.joined}" for field in JOINED}
_US = TIME.type.postgres_line.format(_SQL[TIME.name])
_REQUIRED = " AND ".join(f"{_SQL[field.name]} IS NOT NULL" for field in OWN if not field.type.optional)

EVENTS = f"""
FROM public.engagement_events e {{join}}
WHERE e.event_ts >= %(start)s::timestamptz AND e.event_ts < %(end)s::timestamptz AND {_REQUIRED}
"""
"""Those that an event can be made of."""

JOIN = "LEFT JOIN public.content c ON c.content_id = e.content_id"
HASH = "('x' || left(md5(convert_to(concat_ws('|', {line}), 'UTF8')), 15))::bit(60)::bigint"
REMAINDER = "mod(mod(e.id, %(modulus)s::bigint) + %(modulus)s::bigint, %(modulus)s::bigint)"
BUCKET = f"({_US} - %(origin)s::bigint) / %(width)s::bigint"

SPAN = f"SELECT count(*), min({_US}), max({_US}) {{events}}"
BY_TIME = f"SELECT {BUCKET}, count(*), sum({{hash}}) {{events}} GROUP BY 1"
BY_ID = f"SELECT {REMAINDER}, count(*), sum({{hash}}) {{events}} GROUP BY 1"
ROWS = f"SELECT e.id::bigint, {_US}, e.content_id::bigint, {{hash}} {{events}}"
SLICE = f"{ROWS} AND {BUCKET} = ANY(%(buckets)s::bigint[]) AND {REMAINDER} = ANY(%(remainders)s::bigint[])"
FIND = f"{ROWS} AND e.id = ANY(%(ids)s::bigint[])"
IDS = """
-- All ids, at most 65,536 neighbours in a row, each as eight bytes.
SELECT string_agg(int8send(e.id::bigint), ''::bytea) {events} GROUP BY e.id >> 16
"""
COUNTS = "SELECT e.content_id::bigint, count(*) {events} GROUP BY 1 ORDER BY 1"
COUNTS_OF = "SELECT e.content_id::bigint, count(*) {events} AND e.content_id = ANY(%(keys)s::bigint[]) GROUP BY 1"
LSN = "SELECT pg_current_wal_insert_lsn()::text"  # the WAL's end, inserted and not only written
NEXT_TRANSACTION = "SELECT txid_current()"  # takes one: a snapshot's xmax is behind the last that has ended, not begun
OLDEST_TRANSACTION = "SELECT txid_snapshot_xmin(txid_current_snapshot())"

WAL_BLOCK_BYTES = 8192
PAGE_HEADER_BYTES = 40


def _line(*, with_content: bool) -> str:
    def text(field: Field) -> str:
        value = field.derived.postgres.format_map(_SQL) if field.derived else _SQL[field.name]
        return field.type.postgres_line.format(value)

    return ", ".join(map(text, EVENT.compared(with_joined=with_content)))


class EngagementLedger:
    """The events of `public.engagement_events`."""

    def __init__(self, dsn: str, *, with_content: bool) -> None:
        self._dsn = dsn
        self._scans = Database(dsn, timeout_seconds=STATEMENT_SECONDS, options=OPTIONS)
        self._streams = Database(dsn, timeout_seconds=STATEMENT_SECONDS, options=ID_OPTIONS)
        self._words = {
            "hash": HASH.format(line=_line(with_content=with_content)),
            "events": EVENTS.format(join=JOIN if with_content else ""),
        }
        self.slices_are_cheap = False

    async def open(self) -> None:
        [(self.slices_are_cheap,)] = await self._scans.rows(INDEXED)
        await self._scans.rows(f"{self._text(FIND)} LIMIT 0", {**_between(0, 0), "ids": []})  # the columns are there

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        [(events, first, last)] = await self._scans.rows(self._text(SPAN), _between(start_us, end_us))
        return events, first or 0, last or 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        query = BY_TIME if part.modulus == 1 else BY_ID
        return _digests(await self._scans.rows(self._text(query), _of(part)))

    async def events(self, part: Slice) -> list[EventDigest]:
        return [EventDigest(*row) for row in await self._scans.rows(self._text(SLICE), _of(part))]

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        wanted = {**_between(start_us, end_us), "ids": list(ids)}
        return [EventDigest(*row) for row in await self._scans.rows(self._text(FIND), wanted)]

    async def lsn(self) -> Lsn:
        [(text,)] = await self._scans.rows(LSN)
        lsn = parse_lsn(text)
        # At the end of a WAL page this is behind the next page's header, where no commit ends before there is one.
        over = lsn % WAL_BLOCK_BYTES
        return lsn - over if over <= PAGE_HEADER_BYTES else lsn

    async def next_transaction(self) -> int:
        [(number,)] = await self._scans.rows(NEXT_TRANSACTION)
        return int(number)

    async def oldest_transaction(self) -> int:
        [(number,)] = await self._scans.rows(OLDEST_TRANSACTION)
        return int(number)

    async def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[int]]:
        async for (packed,) in self._streams.stream(self._text(IDS), _between(start_us, end_us)):
            ids = array.array("q", packed)
            if sys.byteorder == "little":
                ids.byteswap()
            yield ids

    async def counts(self) -> AsyncIterator[Sequence[tuple[int, int]]]:
        chunk: list[tuple[int, int]] = []
        async for row in self._streams.stream(self._text(COUNTS), between(BEGINNING, END)):
            chunk.append((row[0], row[1]))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        yield chunk

    async def counts_of(self, keys: Sequence[int]) -> dict[int, int]:
        wanted = {**between(BEGINNING, END), "keys": list(keys)}
        return dict(await self._scans.rows(self._text(COUNTS_OF), wanted))

    def picked(self, ids: Sequence[int]) -> PickedHistory:
        return PickedHistory(self._dsn, ids)

    async def close(self) -> None:
        await self._scans.close()
        await self._streams.close()

    def _text(self, query: str) -> str:
        return query.format_map(self._words)


def _between(start_us: int, end_us: int) -> dict[str, object]:
    return {"start": _moment(start_us), "end": _moment(end_us)}


def _moment(us: int) -> str:
    """As text that PostgreSQL reads exactly, up to the year 10000, where Python's calendar has ended."""
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
