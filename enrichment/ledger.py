"""The events that PostgreSQL holds, as digests that a sink can compute as well; a `ledger.SourceLedger`.

An event's line is the checksum text of its fields (`contracts/fields/types.py`), with `|` between them. Its hash is 60
bits of the line's MD5. A sink makes the same line from the same declaration.
"""

from __future__ import annotations

import array
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from enrichment.database import Database
from enrichment.history.moment import WAL_END, last_end
from enrichment.history.pages import BEGINNING, END, PickedHistory, between
from enrichment.history.queries import queries_of
from enrichment.tables.declared import Tables, quoted
from replicator.contracts.closing import close_all
from replicator.contracts.events import Id, Lsn, parse_lsn
from replicator.contracts.fields import Field, Role
from replicator.contracts.ledger import Digest, EventDigest, Slice
from replicator.source.connection import Dsn

STATEMENT_SECONDS = 86_400
"""In effect no limit: reading a table once takes what it takes, at some 400,000 events a second."""

CHUNK = 5_000

SETTINGS = {"enable_sort": "off"}  # the groups are few; the planner expects as many as there are rows
ID_SETTINGS = {"enable_hashagg": "off"}  # sorted on disk: a group's ids in memory, not all groups'

HASH = "('x' || left(md5(convert_to(concat_ws('|', {line}), 'UTF8')), 15))::bit(60)::bigint"
MICROSECONDS = "(extract(epoch FROM {0}) * 1000000)::bigint"
NUMBER_OF = "('x' || left(md5({0}::text), 15))::bit(60)::bigint"
"""The number that stands for an identity that is a text."""

NEXT_TRANSACTION = "SELECT txid_current()"  # takes one: a snapshot's xmax is after the last that has ended, not begun
OLDEST_TRANSACTION = "SELECT txid_snapshot_xmin(txid_current_snapshot())"


class TableLedger:
    """The events of the stream's table."""

    slices_are_cheap = False

    def __init__(self, dsn: Dsn, *, tables: Tables, with_content: bool) -> None:
        self._dsn, self._tables = dsn, tables
        self._scans = Database(dsn, timeout_seconds=STATEMENT_SECONDS, settings=SETTINGS)
        self._streams = Database(dsn, timeout_seconds=STATEMENT_SECONDS, settings=ID_SETTINGS)
        self._sql = {field.name: f"e.{quoted(field.column)}" for field in tables.own}
        for join in tables.joins:
            self._sql |= {field.name: f"{join.alias}.{quoted(field.joined)}" for field in join.fields}
        self._id, self._key, time = (self._sql[field.name] for field in (tables.identity, tables.key, tables.time))
        self._us = MICROSECONDS.format(time)
        compared = tables.stream.compared(with_joined=with_content)
        self._hash = HASH.format(line=", ".join(map(self._text, compared)))
        of_id, of_key = tables.identity.type, tables.key.type
        self._event = f"{of_id.select(self._id)}, {self._us}, {of_key.select(self._key)}, {self._hash}"
        self._of_keys = f"{of_key.select(self._key)} = ANY(%(keys)s::{of_key.postgres}[])"
        number = self._id if of_id.python is int else NUMBER_OF.format(self._id)
        self._bucket = f"({self._us} - %(origin_us)s::bigint) / %(width_us)s::bigint"
        self._remainder = f"mod(mod({number}, %(modulus)s::bigint) + %(modulus)s::bigint, %(modulus)s::bigint)"
        required = [field.type.usable(self._sql[field.name]) for field in tables.own]
        usable = " AND ".join(filter(None, [*required, tables.wanted("e")]))
        # Those that an event can be made of.
        self._events = f"""FROM {tables.rows_of(tables.events)} AS e {tables.joined("e") if with_content else ""}
WHERE {time} >= %(start)s::timestamptz AND {time} < %(end)s::timestamptz AND {usable}"""

    def _text(self, field: Field) -> str:
        if field.role is Role.TIME:  # here it is never infinite
            return self._us
        if derived := field.derived:  # in a query with parameters
            return field.type.postgres_line.format(f"({derived.postgres.replace('%', '%%').format_map(self._sql)})")
        return field.type.postgres_line.format(self._sql[field.name])

    async def open(self) -> None:
        [(self.slices_are_cheap,)] = await self._scans.rows(queries_of(self._tables).indexed)
        await self._select(self._event, _between(0, 0), "LIMIT 0")  # the columns are there

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        [(events, first, last)] = await self._select(
            f"count(*), min({self._us}), max({self._us})", _between(start_us, end_us)
        )
        return events, first or 0, last or 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        group = self._bucket if part.modulus == 1 else self._remainder
        rows = await self._select(f"{group}, count(*), sum({self._hash})", _of(part), "GROUP BY 1")
        return {int(number): Digest(int(events), int(total)) for number, events, total in rows}

    async def events(self, part: Slice) -> list[EventDigest]:
        buckets, remainders = f"{self._bucket} = ANY(%(buckets)s", f"{self._remainder} = ANY(%(remainders)s"
        in_slice = f"AND {buckets}::bigint[]) AND {remainders}::bigint[])"
        return [EventDigest(*row) for row in await self._select(self._event, _of(part), in_slice)]

    async def find(self, ids: Sequence[Id], start_us: int, end_us: int) -> list[EventDigest]:
        wanted = {**_between(start_us, end_us), "ids": list(ids)}
        rows = await self._select(self._event, wanted, f"AND e.{self._tables.among}")
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

    async def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[Id]]:
        if self._tables.identity.type.python is not int:
            name = self._tables.identity.type.select(self._id)
            async for chunk in self._chunks(f"SELECT {name} {self._events}", _between(start_us, end_us)):
                yield [name for (name,) in chunk]
            return
        # At most 65,536 neighbours in a row, each as eight bytes.
        packing = f"string_agg(int8send({self._id}::bigint), ''::bytea)"
        query = f"SELECT {packing} {self._events} GROUP BY {self._id} >> 16"
        async for (packed,) in self._streams.stream(query, _between(start_us, end_us)):
            ids = array.array("q", packed)
            if sys.byteorder == "little":
                ids.byteswap()
            yield ids

    async def counts(self) -> AsyncIterator[Sequence[tuple[Id, int]]]:
        key = self._tables.key.type.select(self._key)
        query = f"SELECT {key}, count(*) {self._events} GROUP BY 1 ORDER BY 1"
        async for chunk in self._chunks(query, between(BEGINNING, END)):
            yield chunk

    async def _chunks(self, query: str, parameters: Mapping[str, object]) -> AsyncIterator[list[Any]]:
        chunk: list[Any] = []
        async for row in self._streams.stream(query, parameters):
            chunk.append(row)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        yield chunk

    async def counts_of(self, keys: Sequence[Id]) -> dict[Id, int]:
        wanted = {**between(BEGINNING, END), "keys": list(keys)}
        of_keys = f"AND {self._of_keys} GROUP BY 1"
        return dict(await self._select(f"{self._tables.key.type.select(self._key)}, count(*)", wanted, of_keys))

    def picked(self, ids: Sequence[Id]) -> PickedHistory:
        return PickedHistory(self._dsn, ids, self._tables)

    async def close(self) -> None:
        await close_all(self._scans, self._streams)

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
