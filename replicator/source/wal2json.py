"""wal2json format-version 2: messages → events or rows, and transaction ends. Pure; `stream.py` feeds it.

A transaction comes as `B`, its rows, `C`. `B` already has the commit's LSN, so a row's position is known when it
arrives, and rows go to the sinks before the end of their transaction is read. wal2json sends committed rows only.

An insert becomes an event at once where the enricher has a `Shortcut`: decoded rows that wait for each other cost twice
as much (`enrichment/events/shortcut.py` has the figures). What can't take it waits as a `Row`, and so does all that
follows in the stretch, so that rows always come after events.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from replicator.contracts.enricher import Shortcut
from replicator.contracts.errors import DecodeError
from replicator.contracts.events import Event, Lsn, Mark, Position, Row, decode_row, format_lsn, parse_lsn

PLUGIN = "wal2json"

OPTIONS = {
    "format-version": "2",
    "include-transaction": "true",  # without B and C a row's place is unknown: debezium#7531, flink-cdc#4323 lost rows
    "include-lsn": "true",
    "include-timestamp": "true",  # lag in seconds; costs the walsender some 5 %
    "include-types": "false",
}
"""Plugin options of the stream; `add-tables` comes on top."""


def listed(tables: Iterable[tuple[str, str]]) -> str:
    """These tables, each its schema and its name, as `add-tables` takes them.

    Every character that could mean something to wal2json, `*` too, has a backslash before it.
    """
    return ",".join(f"{_escaped(schema)}.{_escaped(name)}" for schema, name in tables)


def _escaped(name: str) -> str:
    return re.sub(r"([^A-Za-z0-9_])", r"\\\1", name)


ACTION_AT = len('{"action":"')
"""Where the action's letter stands in every message: peeking at it saves decoding the ones that don't matter."""

_INSERT, _UPDATE, _DELETE, _TRUNCATE, _BEGIN, _COMMIT, _MESSAGE = b"IUDTBCM"
_ROWS = frozenset((_INSERT, _UPDATE, _DELETE, _TRUNCATE))


class _MalformedError(ValueError):
    """The message says what is wrong, and quotes no values."""


_UNREADABLE = (msgspec.MsgspecError, ValueError, IndexError, RecursionError)


class _Marker(msgspec.Struct, gc=False):
    """`B` or `C`."""

    lsn: str
    nextlsn: str
    timestamp: str


class _Message(msgspec.Struct, gc=False):
    """`M`, from pg_logical_emit_message: another program's; its content need not be UTF-8."""

    transactional: bool
    prefix: msgspec.Raw
    content: msgspec.Raw


class DecodedChunk(NamedTuple):
    """A piece of the stream, decoded."""

    events: list[Event]
    """Of the inserts that took the shortcut."""
    rows: list[Row]
    """What came after them."""
    mark: Mark
    """How far the stream was read with them."""


_decode_marker = msgspec.json.Decoder(_Marker).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_NO_OFFSET = timedelta(0)


class StreamDecoder:
    """Follows one stream from its start, message by message."""

    def __init__(self) -> None:
        self.shortcut: Shortcut | None = None
        """For the inserts of this stretch."""
        self.events: list[Event] = []
        self.rows: list[Row] = []
        self.size = 0
        self.in_transaction = False
        self._begin: bytes | None = None  # decoded only when a row follows: most transactions have none
        self._commit: bytes | None = None  # decoded only when it is the last one of a chunk
        self._rows_commit_lsn: Lsn | None = None  # what its `B` said; None: it had no rows
        self._commit_lsn: Lsn = 0
        self._ordinal = 0
        self._end_lsn: Lsn = 0
        self._timestamp = ""  # of the newest transaction, parsed once a chunk

    def feed(self, payload: memoryview | bytes) -> None:
        """Take one message. Raises DecodeError; the stream can't be followed any further then."""
        try:
            self._feed(payload)
        except _UNREADABLE as exc:
            raise self._error(exc) from None  # the cause would quote the row

    def _feed(self, payload: memoryview | bytes) -> None:
        action = payload[ACTION_AT]
        if action in _ROWS and self.in_transaction:
            self._feed_row(payload, action)
        elif action == _BEGIN and not self.in_transaction:
            self._begin = bytes(payload)
            self.in_transaction = True
        elif action == _COMMIT and self.in_transaction:
            self._commit = bytes(payload)
            self._rows_commit_lsn = self._commit_lsn if self._begin is None else None
            self.in_transaction = False
        elif action == _MESSAGE:  # moves the position, like any WAL
            _decode_message(payload)  # a damaged row must not pass for one
        else:
            raise _MalformedError(f"action {chr(action)!r} in the wrong place")

    def _feed_row(self, payload: memoryview | bytes, action: int) -> None:
        if self._begin is not None:
            self._open(_decode_marker(self._begin))
        self._ordinal += 1
        self.size += len(payload)
        if action == _INSERT and self.shortcut is not None and not self.rows:
            event = self.shortcut(payload, self._commit_lsn, self._ordinal)
            if event is not None:
                self.events.append(event)
                return
        row = decode_row(payload)
        if row.action != chr(action):
            raise _MalformedError("the action is in the wrong place")
        row.commit_lsn = self._commit_lsn
        row.ordinal = self._ordinal
        self.rows.append(row)

    def _open(self, begin: _Marker) -> None:
        commit_lsn = parse_lsn(begin.lsn)
        if commit_lsn <= self._commit_lsn or commit_lsn < self._end_lsn:
            raise _MalformedError(f"transaction {format_lsn(commit_lsn)} comes after a later one")
        self._commit_lsn = commit_lsn
        self._timestamp = begin.timestamp
        self._ordinal = 0
        self._begin = None

    def keepalive(self, wal_end: Lsn) -> None:
        """The server has sent everything up to `wal_end`: between two transactions that is an end, too."""
        if not self.in_transaction:
            self._settle()
            self._end_lsn = max(self._end_lsn, wal_end)

    def take(self) -> DecodedChunk:
        """What was read since the last call; an open transaction continues in the next chunk."""
        self._settle()
        try:
            committed_at = _seconds(self._timestamp) if self._timestamp else 0.0
        except ValueError as exc:
            raise self._error(exc) from None
        mark = Mark(Position(self._commit_lsn, self._ordinal), self._end_lsn, committed_at)
        chunk = DecodedChunk(self.events, self.rows, mark)
        self.events, self.rows, self.size = [], [], 0
        return chunk

    def _settle(self) -> None:
        if self._commit is None:
            return
        try:
            marker = _decode_marker(self._commit)
            self._end_lsn = self._end_of(marker)
        except _UNREADABLE as exc:
            raise self._error(exc) from None
        self._timestamp = marker.timestamp
        self._commit = None

    def _end_of(self, commit: _Marker) -> Lsn:
        """Where its transaction ends: never before an earlier position."""
        commit_lsn, end_lsn = parse_lsn(commit.lsn), parse_lsn(commit.nextlsn)
        if self._rows_commit_lsn not in (None, commit_lsn):
            raise _MalformedError(f"the rows' transaction does not end with the commit at {format_lsn(commit_lsn)}")
        if not self._end_lsn <= commit_lsn < end_lsn:
            raise _MalformedError(f"a transaction that ends at {format_lsn(end_lsn)} comes after a later position")
        return end_lsn

    def _error(self, exc: Exception) -> DecodeError:
        # msgspec names types and paths, never values; what int() and fromisoformat() say quotes their input
        problem = str(exc) if isinstance(exc, (msgspec.MsgspecError, _MalformedError)) else type(exc).__name__
        return DecodeError(lsn=format_lsn(self._commit_lsn), problem=problem)


def _seconds(timestamp: str) -> float:
    """Since 1970. Raises ValueError unless it is in UTC, as the session asks for."""
    moment = datetime.fromisoformat(timestamp)
    if moment.utcoffset() != _NO_OFFSET:
        raise _MalformedError("the commit's timestamp is not in UTC")
    return moment.timestamp()
