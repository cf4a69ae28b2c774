"""The events that ClickHouse holds, as digests that PostgreSQL can compute as well; a `ledger.SinkLedger`.

`holds` is for the sink: the proof that an insert took place when its answer proves nothing. So are `Witnesses`: they
show that the table was emptied.

An event's line is the checksum text of its fields (`contracts/fields/types.py`), with `|` between them. Its hash is 60
bits of the line's MD5. The source makes the same line from the same declaration.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, TypeAlias, TypeVar

import msgspec

from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.events import Event, Id
from replicator.contracts.fields import TIMESTAMP, Stream
from replicator.contracts.ledger import Digest, EventDigest, Slice
from replicator.contracts.sink import Held
from sinks.clickhouse.client import LONG_SECONDS, Client
from sinks.clickhouse.table import Look, quoted, version

CHUNK = 5_000
"""Ids a statement, and twice the keys: below ClickHouse's 256 kB for the text of one."""

HASH = "bitShiftRight(reinterpretAsUInt64(reverse(substring(MD5({line}), 1, 8))), 4)"

DELETE = """
-- Lightweight: the rows are gone from every query at once, and from the disk with the next merge.
DELETE FROM {table} WHERE {exactly}
"""

VERSIONS = """
-- Of rows that change: the commits of their versions.
SELECT DISTINCT {id}, {lsn} FROM {table} WHERE {id} IN %(ids)s
"""

SENT_BYTES = 4_000_000
"""Of events whose rows are fetched by one statement."""
AS_SENT = "SETTINGS output_format_json_quote_64bit_integers = 0, output_format_json_quote_decimals = 0"
"""In the statement, where no front end drops it."""

WITNESSES = 10
"""So many of the first events, and of the last inserts'."""
REMEMBERED_SECONDS = 3600.0
"""Newer than any partition that is dropped because of its age, and a rare write to the checkpoint database."""
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001  UTC, and printed without its zone
COPIES = 100
"""Of one event, the most that are looked at."""

T = TypeVar("T")

Key: TypeAlias = tuple[Id, int, Id]
"""An event's identity, time in µs, and key."""


class ClickHouseLedger:
    """The events of `events_enriched`, each once, whatever was sent again."""

    slices_are_cheap = True

    def __init__(self, client: Client, table: str, stream: Stream, *, with_content: bool) -> None:
        self._client = client
        self._table = table
        self._stream = stream
        compared = stream.compared(with_joined=with_content)
        line = ", '|', ".join(field.type.clickhouse_line.format(quoted(field.name)) for field in compared)
        self._hash = HASH.format(line=f"concat({line})")
        self._time, self._id, self._key = (quoted(field.name) for field in (stream.time, stream.identity, stream.key))
        self._values = [field.name for field in stream.fields if "DateTime64" not in field.type.clickhouse]
        kinds = stream.identity.type.python, stream.key.type.python
        self._id_row: type[tuple[Any, int]] = tuple[kinds[0], int]  # type: ignore[valid-type]
        self._key_row: type[Key] = tuple[kinds[0], int, kinds[1]]  # type: ignore[valid-type]
        self._digest_row: type[tuple[Any, ...]] = tuple[kinds[0], int, kinds[1], int, int]  # type: ignore[valid-type]
        self._us = f"toUnixTimestamp64Micro({self._time})"
        self._lsn = "toUInt64(bitShiftRight(_version, 64))" if stream.follows else "_lsn"
        self._event = f"{self._id}, {self._us}, {self._key}, {self._hash}, {self._lsn}"
        text = stream.identity.type.clickhouse_line.format(self._id)
        number = self._id if stream.identity.type.python is int else HASH.format(line=text)
        self._bucket = f"intDiv({self._us} - %(origin_us)s, %(width_us)s)"
        self._remainder = f"positiveModulo({number}, %(modulus)s)"
        self._within = (
            f"{self._time} >= fromUnixTimestamp64Micro(%(start)s, 'UTC')"
            f" AND {self._time} < fromUnixTimestamp64Micro(%(end)s, 'UTC')"
        )
        self._one_of = f"AND ({self._id}, {self._us}, {self._key}) IN %(keys)s"

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        what = f"count(), min({self._us}), max({self._us})"
        [(events, first, last)] = await self._select(what, tuple[int, int, int], {"start": start_us, "end": end_us})
        return events, first if events else 0, last if events else 0

    async def digests(self, part: Slice) -> dict[int, Digest]:
        group = self._bucket if part.modulus == 1 else self._remainder
        what = f"{group} AS n, count(), sum(toUInt128({self._hash}))"
        rows = await self._select(what, tuple[int, int, int], _of(part), "GROUP BY n")
        return {number: Digest(events, total) for number, events, total in rows}

    async def events(self, part: Slice) -> list[EventDigest]:
        in_slice = f"AND {self._bucket} IN %(buckets)s AND {self._remainder} IN %(remainders)s"
        return await self._digests(_of(part), in_slice)

    async def hours(self, start_us: int, end_us: int) -> dict[int, int]:
        """As `CountsByHour.hours`."""
        hour = f"intDiv({self._us} - positiveModulo({self._us}, 3600000000), 1000000)"
        within = {"start": start_us, "end": end_us}
        return dict(await self._select(f"{hour} AS n, count()", tuple[int, int], within, "GROUP BY n"))

    async def find(self, ids: Sequence[Id], start_us: int, end_us: int) -> list[EventDigest]:
        found: list[EventDigest] = []
        for at in range(0, len(ids), CHUNK):
            wanted = {"start": start_us, "end": end_us, "ids": tuple(ids[at : at + CHUNK])}
            found += await self._digests(wanted, f"AND {self._id} IN %(ids)s")
        return found

    async def _digests(self, parameters: Mapping[str, object], more: str) -> list[EventDigest]:
        rows = await self._select(self._event, self._digest_row, parameters, more)
        return [EventDigest(*row) for row in rows]

    async def delete(self, doomed: Sequence[EventDigest]) -> None:
        if self._stream.follows:
            await self._forget(doomed)
            return
        ordered = sorted(doomed, key=lambda row: row.ts_us)  # those of a statement are near each other in time
        for at in range(0, len(ordered), CHUNK // 2):  # a key is three numbers
            keys = tuple((row.id, row.ts_us, row.key) for row in ordered[at : at + CHUNK // 2])
            exactly = {"start": keys[0][1], "end": keys[-1][1] + 1, "keys": keys}
            delete = DELETE.format(table=self._table, exactly=f"{self._within} {self._one_of}")
            await self._client.command(delete, exactly)
            [(left,)] = await self._select("count()", tuple[int], exactly, self._one_of)
            if left:
                detail = f"{left} rows are still there after they were deleted"
                raise SinkUnavailable(sink=self._client.errors.sink, detail=detail)

    async def _forget(self, doomed: Sequence[EventDigest]) -> None:
        """Of rows that change every version up to the one that was seen: older ones would come to light.

        What has come since stays. So does what is sent next, also where a version was of a source's other future.
        """
        for at in range(0, len(doomed), CHUNK // 2):
            seen = {row.id: row.lsn for row in doomed[at : at + CHUNK // 2]}
            versions = VERSIONS.format(table=self._table, id=self._id, lsn=self._lsn)
            found = await self._client.query(versions, self._id_row, {"ids": tuple(seen)}, seconds=LONG_SECONDS)
            keys = [(row_id, lsn) for row_id, lsn in found if lsn <= seen[row_id]]
            exactly = f"({self._id}, {self._lsn}) IN %(keys)s"
            for first in range(0, len(keys), CHUNK // 2):
                some = {"keys": tuple(keys[first : first + CHUNK // 2])}
                await self._client.command(DELETE.format(table=self._table, exactly=exactly), some)

    async def holds(self, events: Sequence[Event]) -> bool:
        """Whether the table has each of these events as it is here, or a later view of it."""
        if self._stream.follows:
            return await self._follows(events)
        what = f"{self._id}, {self._us}, {self._key}, {self._lsn}, {', '.join(map(quoted, self._values))}"
        for piece in _pieces(sorted(events, key=lambda event: event.ts_us or 0)):
            keys = tuple((event.id, event.ts_us, event.key) for event in piece)
            exactly = {"start": piece[0].ts_us, "end": (piece[-1].ts_us or 0) + 1, "keys": keys}
            rows = await self._select(what, list[Any], exactly, f"{self._one_of} {AS_SENT}")
            there = {tuple(row[:3]): row[3:] for row in rows}
            if not all(self._is_or_follows(there.get((event.id, event.ts_us, event.key)), event) for event in piece):
                return False
        return True

    async def _follows(self, events: Sequence[Event]) -> bool:
        """Whether the table has each of these versions, or a later one; also of rows that are gone."""
        for piece in _pieces(events):
            found = await self._versions([event.id for event in piece])
            if any(found.get(event.id, -1) < event.version for event in piece):
                return False
        return True

    async def _versions(self, ids: Sequence[Id]) -> dict[Id, int]:
        query = f"SELECT {self._id}, max(_version) FROM {self._table} WHERE {self._id} IN %(ids)s GROUP BY 1"  # noqa: S608
        wanted = {"ids": tuple(dict.fromkeys(ids))}
        return dict(await self._client.query(query, self._id_row, wanted, seconds=LONG_SECONDS))

    async def there(self, keys: Collection[Key]) -> set[Key]:
        """Which of these events are there; a row that is gone has left its last version."""
        if self._stream.follows:
            found = await self._versions([key[0] for key in keys])
            return {key for key in keys if key[0] in found}
        times = [key[1] for key in keys]
        exactly = {"start": min(times), "end": max(times) + 1, "keys": tuple(keys), "times": tuple(map(_text, times))}
        what = f"{self._id}, {self._us}, {self._key}"
        return {*await self._select(what, self._key_row, exactly, f"AND {self._time} IN %(times)s {self._one_of}")}

    async def oldest(self) -> list[Key]:
        """The first event by time; empty if there is none."""
        what = f"SELECT {self._id}, {self._us}, {self._key} FROM {self._table} ORDER BY {self._time} LIMIT 1"  # noqa: S608  our own names
        return await self._client.query(what, self._key_row)

    async def trace(self, event_id: Id, event: Event | None) -> Held:
        """What the table has of one event: all copies, of which `FINAL` shows the last."""
        at_its_time = event is not None and event.ts_us is not None
        rows = await self._copies(event_id, event.ts_us) if at_its_time and event else []
        rows = rows or await self._copies(event_id, None)
        if not rows:
            return Held(False)
        lsn, gone, *values = rows[-1]
        if gone:
            return Held(False, commit_lsn=lsn, notes=["it was deleted"])
        fields = {field.name: value for field, value in zip(self._stream.fields, values, strict=True)}
        for field in self._stream.fields:
            if field.type.postgres == TIMESTAMP.postgres and fields[field.name] is not None:
                fields[field.name] = fields[field.name].removesuffix("Z")  # it has no zone
        at = self._stream.fields.index(self._stream.time) + 2
        views = 1 if self._stream.follows else len({row[at] for row in rows})
        notes = [f"{len(rows)} copies until the next merge; FINAL shows the newest"] if len(rows) > 1 else []
        notes += [f"it is there at {views} times"] if views > 1 else []
        return Held(True, fields, lsn, notes)

    async def _copies(self, event_id: Id, ts_us: int | None) -> list[list[Any]]:
        """At its time, which the table is sorted by, or at any."""
        at = "" if ts_us is None or self._stream.follows else f"AND {self._within}"
        gone = "_deleted" if self._stream.follows else "0"
        what = ", ".join([self._lsn, gone, *(quoted(field.name) for field in self._stream.fields)])
        query = f"SELECT {what} FROM {self._table} WHERE {self._id} = %(id)s {at}"  # noqa: S608  our own names
        parameters = {"id": event_id, "start": ts_us, "end": (ts_us or 0) + 1}
        more = f"ORDER BY {version(self._stream)} LIMIT {COPIES} {AS_SENT}, date_time_output_format = 'iso'"
        return await self._client.query(f"{query} {more}", list[Any], parameters, seconds=LONG_SECONDS)

    def _is_or_follows(self, row: list[Any] | None, event: Event) -> bool:
        if not row or row[0] != event.commit_lsn:
            return bool(row and row[0] > event.commit_lsn)
        fields = json.loads(event.json, parse_float=Decimal)
        return row[1:] == [fields[name] for name in self._values]

    async def _select(self, what: str, row: type[T], parameters: Mapping[str, object], more: str = "") -> list[T]:
        query = f"SELECT {what} FROM {self._table} FINAL WHERE {self._within} {more}"  # noqa: S608  our own names
        return await self._client.query(query, row, parameters, seconds=LONG_SECONDS)


class _Memory(msgspec.Struct, frozen=True):
    """What `Witnesses` knows, as it is kept."""

    gone: bool
    keys: list[Key]


class Witnesses:
    """Events that the table was seen to hold: where none of them is left, it was emptied, or is another one.

    Rows also go for good reasons: merges, a TTL, partitions that are dropped, `reconcile --delete-extra`. So the
    events are only looked for when the table holds no more than the last insert brought, or is another one, and when
    writing begins, for nobody knows what happened before.
    """

    def __init__(self, ledger: ClickHouseLedger) -> None:
        self.gone = False
        """None of them was left, and not all are there again."""
        self.memory = ""
        """All of this, for a later run. The last inserts' events are an hour old at most."""
        self._ledger = ledger
        self._first: list[Key] = []
        self._last: deque[Key] = deque(maxlen=WITNESSES)
        self._rows = 0
        self._table = ""
        self._remembered_at = -math.inf  # time.monotonic()

    def recall(self, memory: str) -> None:
        """What an earlier run knew; of another release's words, nothing."""
        try:
            kept = msgspec.json.decode(memory, type=_Memory)
        except msgspec.MsgspecError:
            return
        self.gone, self.memory, self._first = kept.gone, memory, kept.keys[:WITNESSES]
        self._last.extend(kept.keys[WITNESSES:])

    async def begin(self, seen: Look) -> None:
        """The table as it is before the first insert, and whether it is still the one that was written to."""
        if self.gone or (self._first and not seen.expires):
            await self.look()
        elif not self._first and seen.rows:
            self._first = await self._ledger.oldest()
            self._remember()
        self._rows, self._table = seen.rows, seen.table

    async def see(self, events: Sequence[Event], seen: Look) -> None:
        """The table after these were inserted."""
        suspect = seen.table != self._table or (seen.rows <= len(events) and self._rows)
        if self.gone or (suspect and not seen.expires):
            await self.look()
        self._rows, self._table = seen.rows, seen.table
        event = random.choice(events)  # noqa: S311  not a secret
        begins = len(self._first) < WITNESSES
        (self._first if begins else self._last).append((event.id, event.ts_us or 0, event.key))
        if begins or time.monotonic() - self._remembered_at >= REMEMBERED_SECONDS:
            self._remember()

    async def look(self) -> None:
        """Ask for them. One that went for a good reason is forgotten: else it would have to be back after a loss."""
        if keys := {*self._first, *self._last}:
            there = await self._ledger.there(keys)
            before, self.gone = self.gone, there != keys if self.gone else not there
            went = not self.gone and there != keys
            if went:
                left = [key for key in (*self._first, *self._last) if key in there]
                self._first, self._last = left[:WITNESSES], deque(left[WITNESSES:], WITNESSES)
            if went or self.gone != before:
                self._remember()

    def _remember(self) -> None:
        self._remembered_at = time.monotonic()
        self.memory = msgspec.json.encode(_Memory(self.gone, [*self._first, *self._last])).decode()


def _text(ts_us: int) -> str:
    return f"{EPOCH + timedelta(microseconds=ts_us):%Y-%m-%d %H:%M:%S.%f}".rjust(26, "0")


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
