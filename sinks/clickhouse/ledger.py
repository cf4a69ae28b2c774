"""The events that ClickHouse holds, as digests that PostgreSQL can compute as well; a `ledger.SinkLedger`.

An event's line is the checksum text of its fields (`contracts/fields.py`), with `|` between them. Its hash is 60 bits
of the line's MD5. The source makes the same line from the same contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from replicator.contracts.fields import Contract
from replicator.contracts.ledger import Digest, EventDigest, Slice
from sinks.clickhouse.client import Client

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

DELETE = f"""
-- Lightweight: the rows are gone from every query at once, and from the disk with the next merge.
DELETE FROM {{table}} WHERE {WITHIN} AND (event_id, {US}, content_id) IN %(keys)s
"""  # noqa: S608  our own names


class ClickHouseLedger:
    """The events of `events_enriched`, each once, whatever was sent again."""

    slices_are_cheap = True

    def __init__(self, client: Client, table: str, contract: Contract, *, with_content: bool) -> None:
        self._client = client
        self._table = table
        compared = contract.compared(with_joined=with_content)
        line = ", '|', ".join(field.type.clickhouse_line.format(field.name) for field in compared)
        self._hash = HASH.format(line=line)
        self._event = f"event_id, {US}, content_id, {self._hash}, _lsn"

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        what = f"count(), min({US}), max({US})"
        [(events, first, last)] = await self._select(what, {"start": start_us, "end": end_us})
        return events, first if events else 0, last if events else 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        group = BUCKET if part.modulus == 1 else REMAINDER
        rows = await self._select(f"{group} AS n, count(), sum(toUInt128({self._hash}))", _of(part), "GROUP BY n")
        return {int(number): Digest(int(events), int(total)) for number, events, total in rows}

    async def events(self, part: Slice) -> list[EventDigest]:
        return [EventDigest(*row) for row in await self._select(self._event, _of(part), IN_SLICE)]

    async def hours(self, start_us: int, end_us: int) -> dict[int, int]:
        """As `CountsByHour.hours`."""
        hour = f"intDiv({US} - positiveModulo({US}, 3600000000), 1000000)"
        return dict(await self._select(f"{hour} AS n, count()", {"start": start_us, "end": end_us}, "GROUP BY n"))

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        found: list[EventDigest] = []
        for at in range(0, len(ids), CHUNK):
            wanted = {"start": start_us, "end": end_us, "ids": tuple(ids[at : at + CHUNK])}
            found += [EventDigest(*row) for row in await self._select(self._event, wanted, "AND event_id IN %(ids)s")]
        return found

    async def delete(self, doomed: Sequence[EventDigest]) -> None:
        ordered = sorted(doomed, key=lambda row: row.ts_us)  # those of a statement are near each other in time
        for at in range(0, len(ordered), CHUNK // 2):  # a key is three numbers
            keys = tuple((row.id, row.ts_us, row.key) for row in ordered[at : at + CHUNK // 2])
            exactly = {"start": keys[0][1], "end": keys[-1][1] + 1, "keys": keys}
            await self._client.command(DELETE.format(table=self._table), exactly)

    async def _select(self, what: str, parameters: Mapping[str, object], more: str = "") -> list[list[Any]]:
        query = f"SELECT {what} FROM {self._table} FINAL WHERE {WITHIN} {more}"  # noqa: S608  our own names
        return await self._client.query(query, parameters)


def _of(part: Slice) -> dict[str, object]:
    return {"start": part.start_us, "end": part.end_us, **part._asdict()}
