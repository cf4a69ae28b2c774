"""The events that ClickHouse holds, as digests that PostgreSQL can compute as well; a `ledger.SinkLedger`.

An event's line is the checksum text of its fields (`contracts/fields.py`), with `|` between them. Its hash is 60 bits
of the line's MD5. The source makes the same line from the same contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from replicator.contracts.fields import Contract
from replicator.contracts.ledger import Digest, EventDigest, Slice
from sinks.clickhouse.client import Client

CHUNK = 5_000
"""Ids or keys a statement: below ClickHouse's 256 kB for the text of one."""

WITHIN = "event_ts >= fromUnixTimestamp64Micro({start}, 'UTC') AND event_ts < fromUnixTimestamp64Micro({end}, 'UTC')"

SELECT = f"""
WITH toUnixTimestamp64Micro(event_ts) AS us,
     bitShiftRight(reinterpretAsUInt64(reverse(substring(MD5(concat({{line}})), 1, 8))), 4) AS hash,
     intDiv(us - {{origin}}, {{width}}) AS bucket, positiveModulo(event_id, {{modulus}}) AS remainder
SELECT {{what}} FROM {{table}} FINAL WHERE {WITHIN} {{more}}
"""  # noqa: S608  names in the contract, and numbers

DELETE = f"""
-- Lightweight: the rows are gone from every query at once, and from the disk with the next merge.
DELETE FROM {{table}}
WHERE {WITHIN} AND (event_id, toUnixTimestamp64Micro(event_ts), content_id) IN ({{keys}})
"""  # noqa: S608  numbers

EVENT = "event_id, us, content_id, hash, _lsn"


class ClickHouseLedger:
    """The events of `events_enriched`, each once, whatever was sent again."""

    slices_are_cheap = True

    def __init__(self, client: Client, table: str, contract: Contract, *, with_content: bool) -> None:
        self._client = client
        self._table = table
        compared = contract.compared(with_joined=with_content)
        self._line = ", '|', ".join(field.type.clickhouse_line.format(field.name) for field in compared)

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        [(events, first, last)] = await self._select("count(), min(us), max(us)", start=start_us, end=end_us)
        return events, first if events else 0, last if events else 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        group = "bucket" if part.modulus == 1 else "remainder"
        rows = await self._select(f"{group}, count(), sum(toUInt128(hash))", f"GROUP BY {group}", **_of(part))
        return {int(number): Digest(int(events), int(total)) for number, events, total in rows}

    async def events(self, part: Slice) -> list[EventDigest]:
        in_slice = f"AND bucket IN ({_list(part.buckets)}) AND remainder IN ({_list(part.remainders)})"
        return [EventDigest(*row) for row in await self._select(EVENT, in_slice, **_of(part))]

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        found: list[EventDigest] = []
        for at in range(0, len(ids), CHUNK):
            picked = f"AND event_id IN ({_list(ids[at : at + CHUNK])})"
            found += [EventDigest(*row) for row in await self._select(EVENT, picked, start=start_us, end=end_us)]
        return found

    async def delete(self, doomed: Sequence[EventDigest]) -> None:
        for some in _chunks(doomed):
            times = [row.ts_us for row in some]
            keys = ",".join(f"({row.id},{row.ts_us},{row.key})" for row in some)
            statement = DELETE.format(table=self._table, start=min(times), end=max(times) + 1, keys=keys)
            await self._client.command(statement)

    async def _select(self, what: str, more: str = "", **numbers: int) -> Sequence[Sequence[int]]:
        words = {"origin": 0, "width": 1, "modulus": 1, **numbers}
        query = SELECT.format(what=what, more=more, table=self._table, line=self._line, **words)
        return await self._client.query(query)


def _chunks(rows: Sequence[EventDigest]) -> Iterator[Sequence[EventDigest]]:
    """Few enough for a statement, and near each other in time."""
    ordered = sorted(rows, key=lambda row: row.ts_us)
    size = CHUNK // 2  # a key is three numbers
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _of(part: Slice) -> dict[str, int]:
    return {
        "start": part.start_us,
        "end": part.end_us,
        "origin": part.origin_us,
        "width": part.width_us,
        "modulus": part.modulus,
    }


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
