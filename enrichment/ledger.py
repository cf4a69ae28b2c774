"""The engagement events that PostgreSQL holds, as digests that a sink can compute as well; a `ledger.SourceLedger`.

An event's line is the checksum text of its fields (`contracts/fields.py`), with `|` between them. Its hash is 60 bits
of the line's MD5. A sink makes the same line from the same contract.
"""

from __future__ import annotations

import array
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from enrichment.contract import CONTENT_TABLE, EVENT, EVENTS_TABLE, JOINED, OWN, TIME, rows_of
from enrichment.database import Database
from enrichment.history import BEGINNING, END, INDEXED, WAL_END, PickedHistory, between, last_end
from replicator.contracts.events import Lsn, parse_lsn
from replicator.contracts.fields import Field
from replicator.contracts.ledger import Digest, EventDigest, Slice
from replicator.source.connection import Dsn

STATEMENT_SECONDS = 86_400
"""In effect no limit: reading a table once takes what it takes, at some 400,000 events a second."""

CHUNK = 5_000

SETTINGS = {"enable_sort": "off"}  # the groups are few; the planner expects as many as there are rows
ID_SETTINGS = {"enable_hashagg": "off"}  # sorted on disk: a group's ids in memory, not all groups'

_SQL = {field.name: f"e.{field.column}" for field in OWN} | {field.name: f"c.{field.joined}" for field in JOINED}
_US = TIME.type.postgres_line.format(_SQL[TIME.name])
_REQUIRED = " AND ".join(f"{_SQL[field.name]} IS NOT NULL" for field in OWN if not field.type.optional)

EVENTS = f"""FROM {rows_of(EVENTS_TABLE)} AS e {{join}}
WHERE e.event_ts >= %(start)s::timestamptz AND e.event_ts < %(end)s::timestamptz AND {_REQUIRED}"""
"""Those that an event can be made of."""

JOIN = f"LEFT JOIN {rows_of(CONTENT_TABLE)} AS c ON c.content_id = e.content_id"
HASH = "('x' || left(md5(convert_to(concat_ws('|', {line}), 'UTF8')), 15))::bit(60)::bigint"
BUCKET = f"({_US} - %(origin_us)s::bigint) / %(width_us)s::bigint"
REMAINDER = "mod(mod(e.id, %(modulus)s::bigint) + %(modulus)s::bigint, %(modulus)s::bigint)"
IN_SLICE = f"AND {BUCKET} = ANY(%(buckets)s::bigint[]) AND {REMAINDER} = ANY(%(remainders)s::bigint[])"

NEXT_TRANSACTION = "SELECT txid_current()"  # takes one: a snapshot's xmax is after the last that has ended, not begun
OLDEST_TRANSACTION = "SELECT txid_snapshot_xmin(txid_current_snapshot())"


def _text(field: Field) -> str:
    value = field.derived.postgres.format_map(_SQL) if field.derived else _SQL[field.name]
    return field.type.postgres_line.format(value)


class EngagementLedger:
    """The events of `public.engagement_events`."""

    slices_are_cheap = False

    def __init__(self, dsn: Dsn, *, with_content: bool) -> None:
        self._dsn = dsn
        self._scans = Database(dsn, timeout_seconds=STATEMENT_SECONDS, settings=SETTINGS)
        self._streams = Database(dsn, timeout_seconds=STATEMENT_SECONDS, settings=ID_SETTINGS)
        self._hash = HASH.format(line=", ".join(map(_text, EVENT.compared(with_joined=with_content))))
        self._event = f"e.id::bigint, {_US}, e.content_id::bigint, {self._hash}"
        self._events = EVENTS.format(join=JOIN if with_content else "")

    async def open(self) -> None:
        [(self.slices_are_cheap,)] = await self._scans.rows(INDEXED)
        await self._select(self._event, _between(0, 0), "LIMIT 0")  # the columns are there

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        [(events, first, last)] = await self._select(f"count(*), min({_US}), max({_US})", _between(start_us, end_us))
        return events, first or 0, last or 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        group = BUCKET if part.modulus == 1 else REMAINDER
        rows = await self._select(f"{group}, count(*), sum({self._hash})", _of(part), "GROUP BY 1")
        return {int(number): Digest(int(events), int(total)) for number, events, total in rows}

    async def events(self, part: Slice) -> list[EventDigest]:
        return [EventDigest(*row) for row in await self._select(self._event, _of(part), IN_SLICE)]

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        wanted = {**_between(start_us, end_us), "ids": list(ids)}
        rows = await self._select(self._event, wanted, "AND e.id = ANY(%(ids)s::bigint[])")
        return [EventDigest(*row) for row in rows]

    async def lsn(self) -> Lsn:
        [(text,)] = await self._scans.rows(WAL_END)
        return last_end(parse_lsn(text))

    async def next_transaction(self) -> int:
        [(number,)] = await self._scans.rows(NEXT_TRANSACTION)
        return int(number)

    async def oldest_transaction(self) -> int:
        [(number,)] = await self._scans.rows(OLDEST_TRANSACTION)
        return int(number)

    async def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[int]]:
        # At most 65,536 neighbours in a row, each as eight bytes.
        query = f"SELECT string_agg(int8send(e.id::bigint), ''::bytea) {self._events} GROUP BY e.id >> 16"
        async for (packed,) in self._streams.stream(query, _between(start_us, end_us)):
            ids = array.array("q", packed)
            if sys.byteorder == "little":
                ids.byteswap()
            yield ids

    async def counts(self) -> AsyncIterator[Sequence[tuple[int, int]]]:
        query = f"SELECT e.content_id::bigint, count(*) {self._events} GROUP BY 1 ORDER BY 1"
        chunk: list[tuple[int, int]] = []
        async for key, count in self._streams.stream(query, between(BEGINNING, END)):
            chunk.append((key, count))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        yield chunk

    async def counts_of(self, keys: Sequence[int]) -> dict[int, int]:
        wanted = {**between(BEGINNING, END), "keys": list(keys)}
        of_keys = "AND e.content_id = ANY(%(keys)s::bigint[]) GROUP BY 1"
        return dict(await self._select("e.content_id::bigint, count(*)", wanted, of_keys))

    def picked(self, ids: Sequence[int]) -> PickedHistory:
        return PickedHistory(self._dsn, ids)

    async def close(self) -> None:
        await self._scans.close()
        await self._streams.close()

    async def _select(self, what: str, parameters: Mapping[str, object], more: str = "") -> list[tuple[Any, ...]]:
        return await self._scans.rows(f"SELECT {what} {self._events} {more}", parameters)


def _between(start_us: int, end_us: int) -> dict[str, object]:
    return {"start": _moment(start_us), "end": _moment(end_us)}


def _moment(us: int) -> str:
    """As text that PostgreSQL reads exactly, up to the year 10000, where Python's calendar has ended."""
    days, rest = divmod(us, 86_400_000_000)
    seconds, fraction = divmod(rest, 1_000_000)
    return f"J{2_440_588 + days} {seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction:06}+00"


def _of(part: Slice) -> dict[str, object]:
    arrays = {"buckets": list(part.buckets), "remainders": list(part.remainders)}  # psycopg makes a row of a tuple
    return {**part._asdict(), **_between(part.start_us, part.end_us), **arrays}
