"""The vocabulary: what flows from the slot to the sinks. Imports nothing of ours.

`wal2json` makes `Row`s, an `Enricher` (protocols.py) turns them into `Event`s, `fan_out` carries them in
`Batch`es, the checkpoint store keeps `Checkpoint`s and `DeadLetter`s.
"""

from __future__ import annotations

import enum
import re
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

import msgspec

Lsn: TypeAlias = int
"""A position in PostgreSQL's write-ahead log: the 64-bit byte offset behind the text form `16/B374D848`."""

Value: TypeAlias = int | Decimal | str | bool | None
"""What wal2json gives for a column. Numbers are exact at any size (fractions as Decimal); timestamps and jsonb
are text."""


_fits_lsn = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})").fullmatch


def parse_lsn(text: str) -> Lsn:
    """`'16/B374D848'` → 64-bit offset. Raises ValueError on any other form."""
    halves = _fits_lsn(text)
    if halves is None:
        raise ValueError(text)
    return (int(halves[1], 16) << 32) | int(halves[2], 16)


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


class _RawColumn(msgspec.Struct, gc=False):
    name: str
    value: msgspec.Raw = msgspec.Raw(b"null")


class _RawRow(msgspec.Struct, gc=False):
    action: str
    schema: str
    table: str
    columns: list[_RawColumn] = []
    identity: list[_RawColumn] = []


_decode_row = msgspec.json.Decoder(Row, float_hook=Decimal).decode
_decode_raw_row = msgspec.json.Decoder(_RawRow).decode
_decode_value = msgspec.json.Decoder(float_hook=Decimal).decode
_is_long_integer = re.compile(rb"-?[1-9][0-9]{4300,}").fullmatch


def decode_row(payload: memoryview | bytes) -> Row:
    """A row of wal2json's. Raises ValueError for anything else; the message may quote it, msgspec's never does.

    A `numeric` of more than 4,300 digits, which Python and msgspec take for an attack, is a Decimal.
    """
    try:
        try:
            return _decode_row(payload)
        except msgspec.ValidationError:
            return _decode_long_integers(payload)
    except (RecursionError, ArithmeticError) as exc:  # nested too deep; an exponent that Decimal does not have
        raise ValueError(type(exc).__name__) from None


def _decode_long_integers(payload: memoryview | bytes) -> Row:
    raw = _decode_raw_row(payload)
    return Row(raw.action, raw.schema, raw.table, _columns(raw.columns), _columns(raw.identity))


def _columns(columns: list[_RawColumn]) -> list[Column]:
    return [Column(column.name, _value(bytes(column.value))) for column in columns]


def _value(text: bytes) -> Any:
    return Decimal(text.decode()) if _is_long_integer(text) else _decode_value(text)


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


class Origin(enum.StrEnum):
    """Which way a dead letter's event came."""

    STREAM = "stream"
    BACKFILL = "backfill"
    RESTORED = "restored"
    """Of a server that was restored from a backup since: its position may be another event's now."""


class Stage(enum.StrEnum):
    """What was refused."""

    ROW = "row"
    """No event could be made of the row."""
    EVENT = "event"
    """One sink refused the event."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """What was refused for good, kept in the checkpoint database until an operator replays or drops it."""

    sink: str | None
    """The sink that refused the event; None when no event could be made of the row: then every sink lacks it."""
    origin: Origin = Origin.STREAM
    position: Position | None
    """Where the row stands in the stream; None for a letter of a backfill, and for a restored one."""
    event_id: int | None
    """The source row's primary key; None when the row has none that fits 64 bits."""
    reason: str
    payload: bytes
    """The event's JSON; at stage `row` the row as wal2json sent it."""
    id: int | None = None
    """The store's number for it; None before it is stored."""
    created_at: float = 0.0
    """Unix time, seconds; the store sets it."""

    @property
    def stage(self) -> Stage:
        """Whether a row or an event was refused."""
        return Stage.ROW if self.sink is None else Stage.EVENT

    @property
    def replay_position(self) -> Position:
        """The position of the event that a replay makes of it.

        Without a position of its own it goes before every commit, so that it replaces no version that a sink has;
        its number keeps it apart from others.
        """
        return self.position or Position(0, self.id or 0)


class LetterCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many dead letters are kept."""

    rows: int = 0
    """At stage `row`."""
    sinks: dict[str, int] = {}
    """At stage `event`, by sink; sinks without any are absent."""


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
    stretch of the stream ahead of `end_lsn`. 0.0 before the first one."""
    updated_at: float = 0.0
    """Unix time, seconds; the store sets it."""

    @property
    def complete_until(self) -> float:
        """Every sink has what was committed before this moment, Unix seconds. A gap begins here."""
        return self.committed_at or self.updated_at


class Finding(NamedTuple):
    """One line of the preflight check."""

    ok: bool
    what: str
    """What was looked at and what was found."""
    cure: str = ""
    """What to do, the exact command where there is one; empty when ok."""
