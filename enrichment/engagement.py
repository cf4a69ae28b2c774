"""The engagement event and its derived metrics. Pure: rows in, events out, nothing looked up.

A `Reader` makes a draft of each inserted row, `finish` adds what is known of its content and encodes it; in between
`enricher.py` sees to it that `content.py` knows the content. This is the hot path: its shape follows measurements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple, NoReturn, TypeAlias

import msgspec

from replicator.contracts.events import Column, Event, Lsn, Row, Value

SCHEMA = "public"
TABLE = "engagement_events"
EVENTS = f"{SCHEMA}.{TABLE}"

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

EXACT_FLOAT_LIMIT = 10**15
"""Any decimal of up to 15 digits survives as a float, and the shortest text that gives the float back is that decimal
again. From here on the decimal is written out digit by digit."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_BEYOND_PYTHON = re.compile(r"-?infinity|\d{4,6}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,6})?\+00( BC)?", re.ASCII)
"""Timestamps that PostgreSQL holds and Python does not."""


Content: TypeAlias = tuple[str | None, int | None]
"""`(content_type, length_seconds)`: what an event takes over from its content. Plain: unpacked once an event."""

MISSING: Content = (None, None)
"""There is no such content: a left join."""


class RowUnusable(Exception):
    """A row is not what the enrichment needs; the text names table, column and what is expected, never a value."""


class Engagement(msgspec.Struct, gc=False):
    """The enriched event as every sink sends it: the contract's fields, in its order."""

    event_id: int
    content_id: int
    user_id: int
    event_type: str
    event_ts: datetime | str
    """A datetime is encoded in C; a whole second would come without its six digits, so that is text, like what Python
    can't hold."""
    duration_ms: int | None
    device: str | None
    content_type: str | None
    length_seconds: int | None
    engagement_seconds: float | msgspec.Raw | None
    engagement_pct: float | msgspec.Raw | None


Draft: TypeAlias = tuple[Lsn, int, int, int, int, str, datetime | str, int | None, str | None]
"""A row that has been read: commit_lsn, ordinal, event_id, content_id, user_id, event_type, event_ts, duration_ms,
device. A plain tuple: it costs a third of anything with names."""

CONTENT_ID: Final = 3
"""Where the content's id stands in a draft."""


class Needed(NamedTuple):
    """A column of the table that an event is made of."""

    name: str
    expected: str
    fits: Callable[[Value], bool]


def fits_integer(value: Value) -> bool:
    """Whether it is a signed 64-bit integer."""
    return type(value) is int and INT64_MIN <= value <= INT64_MAX


def _fits_text(value: Value) -> bool:
    return type(value) is str


IN_UTC = "a timestamp with time zone, in UTC"

COLUMNS = (
    Needed("id", "a 64-bit integer", fits_integer),
    Needed("content_id", "a 64-bit integer", fits_integer),
    Needed("user_id", "a 64-bit integer", fits_integer),
    Needed("event_type", "text", _fits_text),
    Needed("event_ts", IN_UTC, _fits_text),
    Needed("duration_ms", "a 64-bit integer or NULL", lambda value: value is None or fits_integer(value)),
    Needed("device", "text or NULL", lambda value: value is None or _fits_text(value)),
)


class Reader:
    """Reads inserted rows. Remembers where the columns stood in the last one and verifies that they still do."""

    def __init__(self) -> None:
        self._places = tuple(range(len(COLUMNS)))

    def read(self, row: Row) -> Draft:
        """The row, checked. Raises RowUnusable."""
        # Seven comparisons of names cost half of what a dict of the row does, and no column that was added, dropped
        # or renamed meanwhile can give a wrong value.
        columns = row.columns
        at_id, at_content, at_user, at_type, at_ts, at_duration, at_device = self._places
        try:
            c_id, c_content, c_user = columns[at_id], columns[at_content], columns[at_user]
            c_type, c_ts = columns[at_type], columns[at_ts]
            c_duration, c_device = columns[at_duration], columns[at_device]
        except IndexError:
            return self._read_again(row)
        if (
            c_id.name != "id"
            or c_content.name != "content_id"
            or c_user.name != "user_id"
            or c_type.name != "event_type"
            or c_ts.name != "event_ts"
            or c_duration.name != "duration_ms"
            or c_device.name != "device"
        ):
            return self._read_again(row)
        event_id, content_id, user_id = c_id.value, c_content.value, c_user.value
        event_type, text = c_type.value, c_ts.value
        duration_ms, device = c_duration.value, c_device.value
        if not (
            type(event_id) is int
            and type(content_id) is int
            and type(user_id) is int
            and type(event_type) is str
            and type(text) is str
            and (duration_ms is None or type(duration_ms) is int)
            and (device is None or type(device) is str)
        ):
            _complain(columns)
        # None negative and their bits together a signed 64-bit integer: so is each. Others are looked at one by one.
        if not 0 <= event_id | content_id | user_id | (duration_ms or 0) <= INT64_MAX:
            _check(columns)
        try:
            moment = datetime.fromisoformat(text)
            event_ts: datetime | str = moment
            in_utc = moment.tzinfo is UTC
        except ValueError:
            event_ts, in_utc = text, _BEYOND_PYTHON.fullmatch(text) is not None
        if not in_utc:
            raise RowUnusable(f"{EVENTS}.event_ts is not {IN_UTC}")
        return row.commit_lsn, row.ordinal, event_id, content_id, user_id, event_type, event_ts, duration_ms, device

    def _read_again(self, row: Row) -> Draft:
        """The table has another shape now: find the columns by name."""
        places = {column.name: place for place, column in enumerate(row.columns)}
        for needed in COLUMNS:
            if needed.name not in places:
                raise RowUnusable(f"{EVENTS} has no column {needed.name}; expected {needed.expected}")
        self._places = tuple(places[needed.name] for needed in COLUMNS)
        return self.read(row)


def _check(columns: Iterable[Column]) -> None:
    """Raise RowUnusable for the first needed column whose value does not fit; of two of a name both are looked at."""
    for column in columns:
        for name, expected, fits in COLUMNS:
            if column.name == name and not fits(column.value):
                raise RowUnusable(f"{EVENTS}.{name} is not {expected}")


def _complain(columns: Iterable[Column]) -> NoReturn:
    _check(columns)
    raise AssertionError  # whoever calls knows that one does not fit


_encode = msgspec.json.Encoder().encode


def finish(drafts: Iterable[Draft], contents: Mapping[int, Content], events: list[Event]) -> None:
    """Append the drafts' events. Every content must be known, if only as MISSING."""
    encode, append = _encode, events.append
    ts_us: int | None
    for draft in drafts:
        commit_lsn, ordinal, event_id, content_id, user_id, event_type, event_ts, duration_ms, device = draft
        content_type, length = contents[content_id]
        seconds: float | msgspec.Raw | None
        pct: float | msgspec.Raw | None
        if duration_ms is None:
            seconds = pct = None
        elif 0 <= duration_ms < EXACT_FLOAT_LIMIT and (length is None or length > 0):
            # What the functions below do, for the ordinary event: 0.3 µs less.
            seconds = duration_ms / 1000
            pct = None if length is None else (duration_ms + 5 * length) // (10 * length) / 100
        else:
            seconds, pct = engagement_seconds(duration_ms), engagement_pct(duration_ms, length)
        if type(event_ts) is datetime:
            since = event_ts - _EPOCH
            ts_us = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
            if not since.microseconds:
                event_ts = event_ts.isoformat()[:19] + ".000000Z"
        else:
            ts_us = None
        json = encode(
            Engagement(
                event_id, content_id, user_id, event_type, event_ts, duration_ms, device,
                content_type, length, seconds, pct,
            )
        )  # fmt: skip
        append(Event(commit_lsn, ordinal, event_id, content_id, ts_us, json))


def microseconds(moment: datetime) -> int:
    """Since 1970, exactly."""
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def engagement_seconds(duration_ms: int | None) -> float | msgspec.Raw | None:
    """`duration_ms / 1000`, exactly."""
    return None if duration_ms is None else _decimal(duration_ms, 1000)


def engagement_pct(duration_ms: int | None, length_seconds: int | None) -> float | msgspec.Raw | None:
    """`duration_ms / 1000 / length_seconds` to 2 decimals, half away from zero as PostgreSQL and Spark round."""
    if duration_ms is None or not length_seconds:
        return None
    duration, length = abs(duration_ms), abs(length_seconds)
    hundredths = (duration + 5 * length) // (10 * length)
    return _decimal(hundredths if (duration_ms < 0) == (length_seconds < 0) else -hundredths, 100)


def _decimal(number: int, parts: int) -> float | msgspec.Raw:
    """`number / parts`, a hundred or a thousand of them, as JSON will show it."""
    if -EXACT_FLOAT_LIMIT < number < EXACT_FLOAT_LIMIT:
        return number / parts
    whole, fraction = divmod(abs(number), parts)
    digits = str(parts + fraction)[1:].rstrip("0") or "0"
    return msgspec.Raw(f"{'-' if number < 0 else ''}{whole}.{digits}".encode())
