"""The vocabulary: what flows from the slot to the sinks. Imports no other module of the product.

`source` makes `Row`s, an `Enricher` turns them into `Event`s, `delivery` brings them to the sinks with the
`Mark` that they reach, the checkpoint store keeps `Checkpoint`s and `DeadLetter`s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

Lsn: TypeAlias = int
"""A position in PostgreSQL's write-ahead log: the 64-bit byte offset that the text form stands for, `16/B374D848`."""

Id: TypeAlias = Any
"""What makes two events the same, or what they are about: a signed 64-bit integer, or a text (of a uuid, too). Any,
because all of a stream's are of one kind, which whoever works with them knows."""

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


def utc(at: float) -> str:
    """Unix seconds as RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def counted(number: int, what: str) -> str:
    """For people: `1 row`, `2 rows`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class Position(NamedTuple):
    """Where a row stands in the stream; the only order and identity we use.

    A change's own LSN is not monotonic across transactions (debezium#7531, flink-cdc#4323 lost rows over it);
    transactions arrive in the order of their commit records, and the n-th row of one is the same row each time.
    """

    commit_lsn: Lsn
    """LSN of the transaction's commit record."""
    ordinal: int
    """1 for the transaction's first row in the slot's tables, then counting up; 0 stands before all of them."""


class Mark(NamedTuple):
    """How far something is in the stream."""

    position: Position = Position(0, 0)
    """The last row."""
    end_lsn: Lsn = 0
    """End of the last complete transaction, or a keepalive's position after it; 0 before the first."""
    committed_at: float = 0.0
    """When the newest transaction was committed, Unix seconds by PostgreSQL's clock; 0.0 when unknown."""

    def later(self, other: Mark) -> Mark:
        """The later of the two, part by part: after a reconnect the stream repeats what was read before.

        The commit's time is that of the later place: PostgreSQL's clock may have been ahead for a while.
        """
        ahead = (self.end_lsn, self.position) > (other.end_lsn, other.position)
        newer, older = (self, other) if ahead else (other, self)
        return Mark(
            max(self.position, other.position),
            max(self.end_lsn, other.end_lsn),
            newer.committed_at or older.committed_at,
        )


class Column(msgspec.Struct, gc=False):
    """One column of a row."""

    name: str
    value: Any = None
    """As wal2json gives it: an exact number (fractions as Decimal), text (timestamps and jsonb, too), bool or None.
    Any, because msgspec's hook for exact fractions applies to untyped values only."""


ACTIONS = {"I": "insert", "U": "update", "D": "delete", "T": "truncate"}
"""What happened to a row, in wal2json's word and in ours."""


# Not frozen, not keyword-only: one a row on the hot path, filled in by the decoder in two steps.
class Row(msgspec.Struct, gc=False):
    """One change as wal2json (format-version 2) sends it, with its position."""

    action: str
    """One of `ACTIONS`."""
    schema: str
    table: str
    columns: list[Column] = []
    """The new row, in the table's column order. Unchanged TOASTed columns are absent, not null."""
    identity: list[Column] = []
    """The old row's replica identity (U and D)."""
    commit_lsn: Lsn = 0
    ordinal: int = 0


_decode = msgspec.json.Decoder(Row, float_hook=Decimal).decode
_long_integer = re.compile(rb'"value":-?[1-9][0-9]{4300,}(?![0-9.eE])')  # a fraction beside it stays as it is


def decode_row(payload: memoryview | bytes) -> Row:
    """A row as wal2json writes it. Raises ValueError for anything else; only msgspec's message never quotes the row."""
    try:
        try:
            return _decode(payload)
        except msgspec.ValidationError:
            # msgspec refuses integers of more than 4,300 digits; with an exponent they reach Decimal, which takes them.
            return _decode(_long_integer.sub(rb"\g<0>e0", bytes(payload)))
    except (RecursionError, ArithmeticError) as exc:  # nested too deep; an exponent that Decimal does not have
        raise ValueError(type(exc).__name__) from None


class Event(msgspec.Struct, gc=False):
    """One enriched row on its way to the sinks; every sink sends the same `json` bytes."""

    commit_lsn: Lsn
    ordinal: int
    id: Id
    """The source row's primary key: the event's identity everywhere."""
    key: Id
    """What the event is about (the content's id, for instance): Redis keys and rankings go by it."""
    ts_us: int | None
    """Event time, microseconds since 1970-01-01 UTC; None when it is infinite or outside the years 1 to 9999."""
    json: bytes
    """The event as one JSON object, fields in the contract's order, UTF-8, no trailing newline."""

    # Fields of a `RowChange`. An event of a stream that needs none of them is a third smaller without: 64 bytes.
    @property
    def deleted(self) -> bool:
        """The row is gone; `json` has what the source's replica identity tells of it, the identity at least."""
        return False

    @property
    def was(self) -> Id | None:
        """The identity that the row had until this change: it is gone under that one."""
        return None

    @property
    def stream(self) -> str:
        """Which one it is of, where a slot has several."""
        return ""

    @property
    def version(self) -> int:
        """Of a row that changes: the higher the later."""
        return (self.commit_lsn << 64) | self.ordinal


class RowChange(Event, gc=False):
    """An event of a stream whose rows change, or of one of several streams."""

    stream: str = ""
    deleted: bool = False
    was: Id | None = None


def unfolded(events: Iterable[Event], identity: str) -> Iterator[Event]:
    """Changes of rows, each of one identity: a row whose identity has changed is gone, and then there.

    `identity` is the name of the field. Both have one position, so they are one event until a sink writes it.
    """
    for event in events:
        if event.was is not None:
            json = msgspec.json.encode({identity: event.was})
            yield RowChange(event.commit_lsn, event.ordinal, event.was, event.key, None, json, deleted=True)
        yield event


def change(event: Event) -> bytes:
    """The row's JSON, with what has happened, and a version: the higher text of two is the later change.

    `_was` is the identity that it had until now, if that is another one: there the row is gone.
    """
    operation = b"delete" if event.deleted else b"upsert"
    version = b"%016X%016X" % (event.commit_lsn, event.ordinal)
    was = b',"_was":%b' % msgspec.json.encode(event.was) if event.was is not None else b""
    return b'%b,"_operation":"%b","_version":"%b"%b}' % (event.json[:-1], operation, version, was)


class Refusal(NamedTuple):
    """An event that a destination will never take."""

    event: Event
    reason: str
    """Why, for the dead letter, which has the event anyway: the destination's words may quote it. Never a secret."""
    detail: str = ""
    """Why, for the log, without row values; empty: as `reason`."""


Origin: TypeAlias = Literal["stream", "backfill", "restored"]
"""Which way a dead letter's event came. `restored`: from before a gap was accepted, so that its position may
be another event's now."""
Stage: TypeAlias = Literal["row", "event"]
"""What was refused: a row that no event could be made of, or an event that one sink refused."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """What was refused for good, kept in the checkpoint database until an operator replays or drops it."""

    sink: str | None
    """The sink that refused the event; None when no event could be made of the row: then every sink lacks it."""
    origin: Origin = "stream"
    position: Position | None
    """Where the row stands in the stream; None for a letter of a backfill, or from before a gap was accepted."""
    event_id: Id | None
    """The source row's primary key; None when the row has none that fits."""
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
        return "row" if self.sink is None else "event"

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


class ContentChange(NamedTuple):
    """What the stream has made of a content."""

    commit_lsn: Lsn
    content_id: Id | None
    """None: of every content."""
    content: str | None
    """In the enricher's own form; None: it is gone."""
    copy: str = ""
    """Which copy has it, where a slot has several: each stream has its own, and each of several dimensions."""


class SinkPosition(msgspec.Struct, frozen=True, kw_only=True):
    """How far one sink is."""

    position: Position
    """Last row written: a restart inside a huge transaction continues after it."""
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
    """When the newest transaction was committed that every sink has, Unix seconds by PostgreSQL's clock; up to one
    chunk of the stream ahead of `end_lsn`. When the slot was made, before there is one; 0.0 if that is unknown. A gap
    begins here."""
    contents: str | None = None
    """The copy of the contents beside the checkpoint: a name of its table, the position after which it needs changes of
    content, and `end_lsn`, as of which it is. None: there is no copy that can be used."""
    updated_at: float = 0.0
    """Unix time, seconds; the store sets it."""

    @property
    def dated(self) -> float:
        """Since when something may be missing after it, Unix seconds; 0.0 if that is unknown.

        Never after its save: PostgreSQL's clock may have been ahead of ours when that commit was dated.
        """
        return min(self.committed_at, self.updated_at or self.committed_at)


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """A sink gets nothing, because somebody wants it so."""

    until: float | None = None
    """Unix seconds; None: until somebody resumes it."""

    @property
    def end(self) -> str | None:
        """The same in UTC, as it can be read."""
        return None if self.until is None else utc(self.until)

    def is_over(self, now: float) -> bool:
        """It has ended by itself."""
        return self.until is not None and self.until <= now

    def describe(self, sink: str, at: SinkPosition | None) -> str:
        """For people; `at` is where the sink is."""
        kept = f"; PostgreSQL keeps the WAL after {format_lsn(at.end_lsn)} for it" if at else ""
        return f"sink {sink} is paused until {self.end or 'somebody resumes it'}{kept}"


class Finding(NamedTuple):
    """One line of the preflight check."""

    ok: bool
    what: str
    """What was looked at and what was found."""
    cure: str = ""
    """What to do, the exact command where there is one; may be empty when ok."""
    made_by_init: bool = False
    """It is not there, and `init` makes it, or waits until it can: that is as it should be before the first `init`."""
