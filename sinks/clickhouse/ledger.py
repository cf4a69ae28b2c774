"""The events that ClickHouse holds, as digests that PostgreSQL can compute as well; a `ledger.SinkLedger`.

`holds` is for the sink: the proof that an insert took place when its answer proves nothing.

An event's line is the checksum text of its fields (`contracts/fields.py`), with `|` between them. Its hash is 60 bits
of the line's MD5. The source makes the same line from the same contract.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.events import Event
from replicator.contracts.fields import TIMESTAMPTZ, Contract
from replicator.contracts.ledger import Digest, EventDigest, Slice
from sinks.clickhouse.client import LONG_SECONDS, Client
from sinks.clickhouse.errors import SINK

CHUNK = 5_000
"""Ids a statement, and twice the keys: below ClickHouse's 256 kB for the text of one."""

US = "toUnixTimestamp64Micro(event_ts)"
HASH = "bitShiftRight(reinterpretAsUInt64(reverse(substring(MD5(concat({line})), 1, 8))), 4)"
BUCKET = f"intDiv({US} - %(origin_us)s, %(width_us)s)"
REMAINDER = "positiveModulo(event_id, %(modulus)s)"
IN_SLICE = f"AND {BUCKET} IN %(buckets)s AND {REMAINDER} IN %(remainders)s"
WITHIN = (
    "event_ts >= fromUnixTimestamp64Micro(%(start)s, 'UTC') AND event_ts < fromUnixTimestamp64Micro(%(end)s, 'UTC')"
)

ONE_OF = f"AND (event_id, {US}, content_id) IN %(keys)s"

DELETE = f"""
-- Lightweight: the rows are gone from every query at once, and from the disk with the next merge.
DELETE FROM {{table}} WHERE {WITHIN} {ONE_OF}
"""  # noqa: S608  our own names

SENT_BYTES = 4_000_000
"""Of events whose rows are fetched by one statement."""
AS_SENT = "SETTINGS output_format_json_quote_64bit_integers = 0, output_format_json_quote_decimals = 0"
"""In the statement, where no front end drops it."""

T = TypeVar("T")


class ClickHouseLedger:
    """The events of `events_enriched`, each once, whatever was sent again."""

    slices_are_cheap = True

    def __init__(self, client: Client, table: str, contract: Contract, *, with_content: bool) -> None:
        self._client = client
        self._table = table
        compared = contract.compared(with_joined=with_content)
        line = ", '|', ".join(field.type.clickhouse_line.format(field.name) for field in compared)
        self._hash = HASH.format(line=line)
        self._values = [field.name for field in contract.fields if field.type is not TIMESTAMPTZ]
        self._event = f"event_id, {US}, content_id, {self._hash}, _lsn"

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        what = f"count(), min({US}), max({US})"
        [(events, first, last)] = await self._select(what, tuple[int, int, int], {"start": start_us, "end": end_us})
        return events, first if events else 0, last if events else 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        group = BUCKET if part.modulus == 1 else REMAINDER
        what = f"{group} AS n, count(), sum(toUInt128({self._hash}))"
        rows = await self._select(what, tuple[int, int, int], _of(part), "GROUP BY n")
        return {number: Digest(events, total) for number, events, total in rows}

    async def events(self, part: Slice) -> list[EventDigest]:
        return await self._select(self._event, EventDigest, _of(part), IN_SLICE)

    async def hours(self, start_us: int, end_us: int) -> dict[int, int]:
        """As `CountsByHour.hours`."""
        hour = f"intDiv({US} - positiveModulo({US}, 3600000000), 1000000)"
        within = {"start": start_us, "end": end_us}
        return dict(await self._select(f"{hour} AS n, count()", tuple[int, int], within, "GROUP BY n"))

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        found: list[EventDigest] = []
        for at in range(0, len(ids), CHUNK):
            wanted = {"start": start_us, "end": end_us, "ids": tuple(ids[at : at + CHUNK])}
            found += await self._select(self._event, EventDigest, wanted, "AND event_id IN %(ids)s")
        return found

    async def delete(self, doomed: Sequence[EventDigest]) -> None:
        ordered = sorted(doomed, key=lambda row: row.ts_us)  # those of a statement are near each other in time
        for at in range(0, len(ordered), CHUNK // 2):  # a key is three numbers
            keys = tuple((row.id, row.ts_us, row.key) for row in ordered[at : at + CHUNK // 2])
            exactly = {"start": keys[0][1], "end": keys[-1][1] + 1, "keys": keys}
            await self._client.command(DELETE.format(table=self._table), exactly)
            [(left,)] = await self._select("count()", tuple[int], exactly, ONE_OF)
            if left:
                raise SinkUnavailable(sink=SINK, detail=f"{left} rows are still there after they were deleted")

    async def holds(self, events: Sequence[Event]) -> bool:
        """Whether the table has each of these events as it is here, or a later view of it."""
        what = f"event_id, {US}, content_id, _lsn, {', '.join(self._values)}"
        for piece in _pieces(sorted(events, key=lambda event: event.ts_us or 0)):
            keys = tuple((event.id, event.ts_us, event.key) for event in piece)
            exactly = {"start": piece[0].ts_us, "end": (piece[-1].ts_us or 0) + 1, "keys": keys}
            rows = await self._select(what, list[Any], exactly, f"{ONE_OF} {AS_SENT}")
            there = {tuple(row[:3]): row[3:] for row in rows}
            if not all(self._is_or_follows(there.get((event.id, event.ts_us, event.key)), event) for event in piece):
                return False
        return True

    def _is_or_follows(self, row: list[Any] | None, event: Event) -> bool:
        if not row or row[0] != event.commit_lsn:
            return bool(row and row[0] > event.commit_lsn)
        fields = json.loads(event.json, parse_float=Decimal)
        return row[1:] == [fields[name] for name in self._values]

    async def _select(self, what: str, row: type[T], parameters: Mapping[str, object], more: str = "") -> list[T]:
        query = f"SELECT {what} FROM {self._table} FINAL WHERE {WITHIN} {more}"  # noqa: S608  our own names
        return await self._client.query(query, row, parameters, seconds=LONG_SECONDS)


def _of(part: Slice) -> dict[str, object]:
    return {"start": part.start_us, "end": part.end_us, **part._asdict()}


def _pieces(events: Iterable[Event]) -> Iterator[list[Event]]:
    """As they are, cut so that neither a statement nor its answer is too long."""
    piece: list[Event] = []
    size = 0
    for event in events:
        if piece and (len(piece) == CHUNK // 2 or size + len(event.json) > SENT_BYTES):
            yield piece
            piece, size = [], 0
        piece.append(event)
        size += len(event.json)
    if piece:
        yield piece
