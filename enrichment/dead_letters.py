"""Dead letters and back: what is kept of a row that no event can be made of, and what a replay starts from.

`enricher.py` makes them when `engagement.py` or `content.py` refuses a row, and restores them for a replay.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from enrichment.engagement import RowUnusable, fits_integer, microseconds
from replicator.contracts.events import DeadLetter, Event, Position, Row, decode_row

_encode_row = msgspec.json.Encoder(decimal_format="number").encode


def dead_letter(row: Row, reason: str) -> DeadLetter:
    """What is kept of a row that no event can be made of: all of it."""
    event_id = next((column.value for column in row.columns if column.name == "id"), None)
    return DeadLetter(
        sink=None,
        position=Position(row.commit_lsn, row.ordinal),
        event_id=event_id if type(event_id) is int and fits_integer(event_id) else None,
        reason=reason,
        payload=_encode_row(row),
    )


class _Stored(msgspec.Struct, gc=False):
    """What an event is known by, in its JSON."""

    event_id: int
    content_id: int
    event_ts: str


_decode_stored = msgspec.json.Decoder(_Stored).decode


def stored_event(letter: DeadLetter) -> Event:
    """The event that a sink refused, from the JSON that was kept. Raises RowUnusable."""
    try:
        stored = _decode_stored(letter.payload)
    except msgspec.MsgspecError as exc:
        raise RowUnusable(f"the dead letter's payload is no event: {exc}") from exc
    try:
        ts_us = microseconds(datetime.fromisoformat(stored.event_ts))
    except ValueError:
        ts_us = None  # infinite or out of Python's years, as it was
    commit_lsn, ordinal = letter.replay_position
    return Event(commit_lsn, ordinal, stored.event_id, stored.content_id, ts_us, letter.payload)


def stored_row(letter: DeadLetter) -> Row:
    """The row that `dead_letter` kept. Raises RowUnusable."""
    try:
        row = decode_row(letter.payload)
    except ValueError as exc:
        told = exc if isinstance(exc, msgspec.MsgspecError) else type(exc).__name__  # others quote the payload
        raise RowUnusable(f"the dead letter's payload is no row: {told}") from None
    row.commit_lsn, row.ordinal = letter.replay_position
    return row
