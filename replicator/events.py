"""The vocabulary: what flows from the slot to the sinks. Imports nothing of ours.

`wal2json` makes `Row`s, an `Enricher` (protocols.py) turns them into `Event`s, `fan_out` carries them in
`Batch`es, the checkpoint store keeps `Checkpoint`s and `DeadLetter`s.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

import msgspec

Lsn: TypeAlias = int
"""A position in PostgreSQL's write-ahead log: the 64-bit byte offset behind the text form `16/B374D848`."""

Value: TypeAlias = int | Decimal | str | bool | None
"""What wal2json gives for a column. Numbers are exact at any size (fractions as Decimal); timestamps and jsonb
are text."""


def parse_lsn(text: str) -> Lsn:
    """`'16/B374D848'` → 64-bit offset. Raises ValueError on any other form."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def format_lsn(lsn: Lsn) -> str:
    """64-bit offset → `'16/B374D848'`, as PostgreSQL prints it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


class Position(NamedTuple):
    """Where a row stands in the stream; the only order and identity we use.

    A change's own LSN is not monotonic across transactions (debezium#7531, flink-cdc#4323 lost rows over it);
    transactions arrive in the order of their commit records, and the n-th row of one is the same row each time.
    """

    commit_lsn: Lsn
    """LSN of the transaction's commit record."""
    ordinal: int
    """1 for the transaction's first row in the slot's tables, then counting up; 0 stands before all of them."""


class Column(msgspec.Struct, gc=False):
    """One column of a row."""

    name: str
    value: Any = None
    """A `Value`; typed Any because msgspec's hook for exact fractions applies to untyped values only."""


# Not frozen, not keyword-only: one a row on the hot path, filled in by the decoder in two steps.
class Row(msgspec.Struct, gc=False):
    """One change as wal2json (format-version 2) tells it, with its position."""

    action: str
    """`I` insert, `U` update, `D` delete, `T` truncate."""
    schema: str
    table: str
    columns: list[Column] = []
    """The new row, in the table's column order. Unchanged TOASTed columns are absent, not null."""
    identity: list[Column] = []
    """The old row's replica identity (U and D)."""
    commit_lsn: Lsn = 0
    ordinal: int = 0


class Event(msgspec.Struct, gc=False):
    """One enriched row on its way to the sinks; every sink sends the same `json` bytes."""

    commit_lsn: Lsn
    ordinal: int
    id: int
    """The source row's primary key: the event's identity everywhere (signed 64 bits)."""
    key: int
    """What the event is about (the content's id, signed 64 bits): Redis keys and rankings go by it."""
    ts_us: int | None
    """Event time, microseconds since 1970-01-01 UTC; None when it is infinite or outside the years 1 to 9999."""
    json: bytes
    """The event as one JSON object, fields in the contract's order, UTF-8, no trailing newline."""


class Refusal(NamedTuple):
    """An event that a destination will never take, and why, in its own words (no row values, no secrets)."""

    event: Event
    reason: str


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """What was refused for good, kept in the checkpoint database until an operator replays or drops it."""

    sink: str
    """The sink that refused it; `enrichment` when no event could be made of the row."""
    commit_lsn: Lsn
    ordinal: int
    event_id: int | None
    reason: str
    payload: bytes
    """The event's JSON; for `enrichment` the row as wal2json sent it."""
    id: int | None = None
    """The store's number for it; None before it is stored."""
    created_at: float = 0.0
    """Unix time, seconds; the store sets it."""


class Batch(msgspec.Struct, kw_only=True):
    """A stretch of the stream, shared by all lanes: its events, and how far one has come once they are written."""

    events: list[Event]
    """In stream order; may be empty (transactions without our tables still move the position)."""
    position: Position
    """The last row read, event or not; a lane that has written `events` is here."""
    end_lsn: Lsn
    """End of the last transaction that is complete at the end of this batch."""
    size: int
    """Memory it holds, bytes, estimated."""
    committed_at: float
    """When the newest transaction in it was committed, Unix seconds by PostgreSQL's clock; 0.0 when unknown."""
    holders: int = 0
    """Lanes that are not done with it."""


class SinkPosition(msgspec.Struct, frozen=True, kw_only=True):
    """How far one sink is."""

    position: Position
    """Last row written: a restart inside a huge transaction goes on behind it."""
    end_lsn: Lsn
    """End of the last transaction of which the sink has every event."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Our durable position in a slot. The slot's confirmed position never passes `end_lsn`."""

    slot: str
    system_identifier: str
    """`IDENTIFY_SYSTEM`'s: which cluster the LSNs belong to."""
    timeline: int
    end_lsn: Lsn
    """Every sink has all events up to here; always a transaction's end, or a keepalive's position between two."""
    sinks: dict[str, SinkPosition]
    committed_at: float = 0.0
    """When the newest transaction was committed that every sink has, Unix seconds by PostgreSQL's clock; up to a
    stretch of the stream ahead of `end_lsn`, and 0.0 when unknown. A gap begins here."""
    updated_at: float = 0.0
    """Unix time, seconds; the store sets it."""


class Finding(NamedTuple):
    """One line of the preflight check."""

    ok: bool
    what: str
    """What was looked at and what was found."""
    cure: str = ""
    """What to do, the exact command where there is one; empty when ok."""
