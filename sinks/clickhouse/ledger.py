"""The events that ClickHouse holds, as digests that PostgreSQL can compute as well; a `ledger.SinkLedger`.

An event's line is the checksum text of its fields (`contracts/fields.py`), with `|` between them. Its hash is 60 bits
of the line's MD5. The source makes the same line from the same contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from replicator.contracts.fields import Contract
from replicator.contracts.ledger import Digest, EventDigest, Slice
from sinks.clickhouse.client import Client

CHUNK = 5_000
"""Ids or keys a statement: below ClickHouse's 256 kB for the text of one."""

WITH = """
WITH toUnixTimestamp64Micro(event_ts) AS us,
     bitShiftRight(reinterpretAsUInt64(reverse(substring(MD5(concat({line})), 1, 8))), 4) AS hash,
     intDiv(us - {{origin}}, {{width}}) AS bucket, positiveModulo(event_id, {{modulus}}) AS remainder
"""
EVENTS = """
FROM {table} FINAL
WHERE event_ts >= fromUnixTimestamp64Micro({start}, 'UTC') AND event_ts < fromUnixTimestamp64Micro({end}, 'UTC')
"""
SPAN = "SELECT count(), min(toUnixTimestamp64Micro(event_ts)), max(toUnixTimestamp64Micro(event_ts))" + EVENTS
BY_TIME = "SELECT bucket, count(), sum(toUInt128(hash))" + EVENTS + "GROUP BY bucket"
BY_ID = "SELECT remainder, count(), sum(toUInt128(hash))" + EVENTS + "GROUP BY remainder"
ROWS = "SELECT event_id, us, content_id, hash, _lsn" + EVENTS
HELD = ROWS + "AND bucket IN ({buckets}) AND remainder IN ({remainders})"
FIND = ROWS + "AND event_id IN ({ids})"
DELETE = """
DELETE FROM {table}
WHERE event_ts >= fromUnixTimestamp64Micro({start}, 'UTC') AND event_ts < fromUnixTimestamp64Micro({end}, 'UTC')
  AND (event_id, toUnixTimestamp64Micro(event_ts), content_id) IN ({keys})
"""
"""Lightweight: the rows are gone from every query at once, and from the disk with the next merge."""

NO_PART: Mapping[str, object] = {"origin": 0, "width": 1, "modulus": 1}


class ClickHouseLedger:
    """`contracts.ledger.Ledger` of `events_enriched`, each event once, whatever was sent again."""

    slices_are_cheap = True

    def __init__(self, client: Client, table: str, contract: Contract, *, with_content: bool) -> None:
        self._client = client
        self._table = table
        compared = contract.compared(with_joined=with_content)
        line = ", '|', ".join(field.type.clickhouse_line.format(field.name) for field in compared)
        self._with = WITH.format(line=line)

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        [(events, first, last)] = await self._rows(SPAN, start=start_us, end=end_us)
        return events, first if events else 0, last if events else 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        query = BY_TIME if part.modulus == 1 else BY_ID
        return _digests(await self._rows(self._with + query, **_of(part)))

    async def events(self, part: Slice) -> list[EventDigest]:
        return [EventDigest(*row) for row in await self._rows(self._with + HELD, **_of(part))]

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        found: list[EventDigest] = []
        for start in range(0, len(ids), CHUNK):
            words = {**NO_PART, "start": start_us, "end": end_us, "ids": _list(ids[start : start + CHUNK])}
            found += [EventDigest(*row) for row in await self._rows(self._with + FIND, **words)]
        return found

    async def delete(self, doomed: Sequence[EventDigest]) -> None:
        """Exactly these rows; not those of the same event under another time or content."""
        for some in _chunks(doomed):
            times = [row.ts_us for row in some]
            keys = ",".join(f"({row.id},{row.ts_us},{row.key})" for row in some)
            await self._command(DELETE, start=min(times), end=max(times) + 1, keys=keys)

    async def _rows(self, query: str, **words: object) -> Sequence[Sequence[int]]:
        return await self._client.query(query.format(table=self._table, **words))

    async def _command(self, statement: str, **words: object) -> None:
        await self._client.command(statement.format(table=self._table, **words))


def _chunks(rows: Sequence[EventDigest]) -> Iterator[Sequence[EventDigest]]:
    """Few enough for a statement, and near each other in time."""
    ordered = sorted(rows, key=lambda row: row.ts_us)
    size = CHUNK // 2  # a key is three numbers
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _of(part: Slice) -> dict[str, object]:
    return {
        "start": part.start_us,
        "end": part.end_us,
        "origin": part.origin_us,
        "width": part.width_us,
        "modulus": part.modulus,
        "buckets": _list(part.buckets),
        "remainders": _list(part.remainders),
    }


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _digests(rows: Sequence[Sequence[int]]) -> dict[int, Digest]:
    return {int(group): Digest(int(events), int(total)) for group, events, total in rows}
