"""Rows to events, and back from dead letters. Pure: nothing is looked up.

A `RowReader` makes a draft of an inserted row, `build_events` adds its content and encodes it; in between `enricher.py`
sees to it that the content is known. `shortcut.py` does all of it at once for ordinary inserts. All are Python source
made from the contract and compiled, as dataclasses are: they are the hot path, and run for every event.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, TypeAlias

import msgspec
from msgspec import structs

from enrichment.contract import EVENT, EVENTS, IDENTITY, JOINED, KEY, OWN, TIME
from replicator.contracts.events import Column, DeadLetter, Event, Position, Row, decode_row
from replicator.contracts.fields import BIGINT, INT64_MAX, Derived, Field

Draft: TypeAlias = Sequence[Any]
"""A row that has been read: commit_lsn, ordinal, then the values of `OWN`, the time as a datetime or, outside Python's
years, as text. Plain: it costs a third of anything with names."""

DRAFT_ID: Final = 2 + OWN.index(IDENTITY)
DRAFT_KEY: Final = 2 + OWN.index(KEY)
DRAFT_TIME: Final = 2 + OWN.index(TIME)
"""Where a draft has its id, its content_id and its time."""

Content: TypeAlias = tuple[Any, ...]
"""The values of `JOINED`: what an event takes over from its content."""

MISSING: Content = (None,) * len(JOINED)
"""There is no such content: a left join."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_INTEGERS = {field.column or field.joined for field in (*OWN, *JOINED) if field.type.python is int}
_integer = re.compile(r"-?\d{1,19}", re.ASCII).fullmatch
_BEYOND_PYTHON = re.compile(r"-?infinity|\d{4,6}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,6})?\+00( BC)?", re.ASCII)
"""Timestamps that PostgreSQL holds and Python does not."""


class RowUnusable(Exception):
    """No event can be made of a row. The text names table, column and what is expected, never a value."""


class ShapeUnusable(RowUnusable):
    """Nor of any other of that shape: a column is missing, or of another type."""


def check(columns: Iterable[Column]) -> None:
    """Raise RowUnusable for the first column whose value does not fit; of two with one name both are looked at."""
    for column in columns:
        for field in OWN:
            if column.name == field.column and not field.type.fits(column.value):
                if column.value is None:
                    raise RowUnusable(f"{EVENTS}.{field.column} is NULL, not {field.type.words}")
                raise _misfit(field)


def unquote(columns: Iterable[Column]) -> bool:
    """Integers of a domain type, which wal2json quotes, become integers; whether there were any."""
    found = False
    for column in columns:
        if column.name in _INTEGERS and type(column.value) is str and _integer(column.value):
            column.value, found = int(column.value), True
    return found


def _misfit(field: Field) -> RowUnusable:
    return ShapeUnusable(f"{EVENTS}.{field.column} is not {field.type.words}")


def microseconds(moment: datetime) -> int:
    """Since 1970, exactly."""
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _each(form: str, between: str = ", ", fields: Iterable[Field] = OWN) -> str:
    return between.join(form.format(field.name) for field in fields)


def _typed(field: Field) -> str:
    test = f"type({field.name}) is {field.type.python.__name__}"
    return f"({field.name} is None or {test})" if field.type.optional else test


def _bits(field: Field) -> str:
    return f"({field.name} or 0)" if field.type.optional else field.name


def _made(source: str, name: str, names: Mapping[str, object], **words: object) -> Any:
    """The function of that name, compiled from source; `names` are what it may use besides this module's."""
    namespace = {**globals(), **names}
    exec(source.format(**words), namespace)  # noqa: S102  our own source, with names from the contract
    return namespace[name]


_READ = """
def read(self, row):
    columns = row.columns
    {places} = self._places
    try:
        {cells}
    except IndexError:
        return self._read_again(row)
    if {renamed}:
        return self._read_again(row)
    {values}
    # None negative and their bits together a signed 64-bit integer: so is each. Others are looked at one by one.
    if not ({typed} and 0 <= {bits} <= {most}):
        if unquote(columns):
            return self.read(row)
        check(columns)
    try:
        moment = fromisoformat({time})
        in_utc = moment.tzinfo is UTC
    except ValueError:
        moment, in_utc = {time}, beyond_python({time})
    if not in_utc:
        raise misfit(TIME)
    return row.commit_lsn, row.ordinal, {draft}
"""


class RowReader:
    """Reads inserted rows. Remembers where the columns stood in the last one and verifies that they still do.

    Comparing the names costs half of what a dict of the row does, and no column that was added, dropped or renamed
    meanwhile can give a wrong value.
    """

    read: ClassVar[Callable[[RowReader, Row], Draft]] = _made(
        _READ,
        "read",
        {"fromisoformat": datetime.fromisoformat, "beyond_python": _BEYOND_PYTHON.fullmatch, "misfit": _misfit},
        places=_each("at_{0}"),
        cells=_each("c_{0} = columns[at_{0}]", "; "),
        renamed=" or ".join(f"c_{field.name}.name != {field.column!r}" for field in OWN),
        values=_each("{0} = c_{0}.value", "; "),
        typed=" and ".join(map(_typed, OWN)),
        bits=" | ".join(_bits(field) for field in OWN if field.type.python is int),
        most=INT64_MAX,
        time=TIME.name,
        draft=", ".join("moment" if field is TIME else field.name for field in OWN),
    )
    """The row as a draft. Raises RowUnusable."""

    def __init__(self) -> None:
        self._places = tuple(range(len(OWN)))

    def _read_again(self, row: Row) -> Draft:
        """The table has another shape now: find the columns by name."""
        places = {column.name: place for place, column in enumerate(row.columns)}
        for field in OWN:
            if field.column not in places:
                raise ShapeUnusable(f"{EVENTS} has no column {field.column}; expected {field.type.words}")
        self._places = tuple(places[field.column] for field in OWN)
        return self.read(row)


FINISH = """
        {derived}
        if type({time}) is datetime:
            since = {time} - EPOCH
            microseconds = since.microseconds
            ts_us = (since.days * 86_400 + since.seconds) * 1_000_000 + microseconds
            if not microseconds:  # as a datetime it would come without its six digits
                {time} = {time}.isoformat()[:19] + ".000000Z"
        else:
            ts_us = None
        event = Event(commit_lsn, ordinal, {identity}, {key}, ts_us, encode(Enriched({every})))
"""
"""From the values of `OWN` and `JOINED`, and a position, to the event."""


def _computed(name: str, derived: Derived) -> str:
    null = " or ".join(f"{argument} is None" for argument in derived.of)
    return f"{name} = None if {null} else {derived.shortcut} else compute_{name}({', '.join(derived.of)})"


def finishing(source: str, name: str, names: Mapping[str, object] | None = None) -> Any:
    """The function of that name, compiled from source that has `FINISH` in it."""
    return _made(
        source,
        name,
        {
            "encode": msgspec.json.Encoder().encode,
            "Enriched": msgspec.defstruct("Enriched", [(field.name, Any) for field in EVENT.fields], gc=False),
            **{f"compute_{field.name}": field.derived.function for field in EVENT.fields if field.derived},
            **(names or {}),
        },
        own=_each("{0}"),
        values=_each("{0} = columns.{0}.value", "; "),
        joined=_each("{0}", fields=JOINED),
        key=KEY.name,
        identity=IDENTITY.name,
        time=TIME.name,
        derived="; ".join(_computed(field.name, field.derived) for field in EVENT.fields if field.derived),
        every=_each("{0}", fields=EVENT.fields),
    )


_BUILD = f"""
def build_events(drafts, contents, events):
    append = events.append
    for commit_lsn, ordinal, {{own}} in drafts:
        [{{joined}}] = contents[{{key}}]{FINISH}
        append(event)
"""

build_events: Callable[[Iterable[Draft], Mapping[int, Content], list[Event]], None] = finishing(_BUILD, "build_events")
"""Append the events of drafts. Every content must be known, if only as MISSING."""

_encode_row = msgspec.json.Encoder(decimal_format="number").encode

_KEPT = [*(field.column for field in OWN), *(field.joined for field in JOINED)]
"""The columns that a dead letter keeps; others, such as raw_payload, may be nobody's business."""


def _kept(columns: Iterable[Column]) -> list[Column]:
    """In one order: a row looks the same from the stream and from the table, and is kept once."""
    return sorted((column for column in columns if column.name in _KEPT), key=lambda column: _KEPT.index(column.name))


def dead_letter(row: Row, reason: str) -> DeadLetter:
    """Keeps the row that no event can be made of, with the columns that events are made from."""
    columns, identity = _kept(row.columns), _kept(row.identity)
    kept = structs.replace(row, columns=columns, identity=identity, commit_lsn=0, ordinal=0)  # the letter has its own
    unquote(kept.columns)
    event_id = next((column.value for column in kept.columns if column.name == IDENTITY.column), None)
    return DeadLetter(
        sink=None,
        position=Position(row.commit_lsn, row.ordinal),
        event_id=event_id if BIGINT.fits(event_id) else None,
        reason=reason,
        payload=_encode_row(kept),
    )


def stored_row(letter: DeadLetter) -> Row:
    """The row that `dead_letter` kept. Raises RowUnusable."""
    try:
        row = decode_row(letter.payload)
    except ValueError as exc:
        problem = exc if isinstance(exc, msgspec.MsgspecError) else type(exc).__name__  # others quote the payload
        raise RowUnusable(f"the dead letter's payload is no row: {problem}") from None
    row.commit_lsn, row.ordinal = letter.replay_position
    return row


class _Stored(msgspec.Struct, gc=False):
    event_id: int
    content_id: int
    event_ts: str


_decode_stored = msgspec.json.Decoder(_Stored).decode


def stored_event(letter: DeadLetter) -> Event:
    """The event that a sink refused, from its JSON. Raises RowUnusable."""
    try:
        stored = _decode_stored(letter.payload)
    except msgspec.MsgspecError as exc:
        raise RowUnusable(f"the dead letter's payload is no event: {exc}") from exc
    try:
        ts_us = microseconds(datetime.fromisoformat(stored.event_ts))
    except ValueError:
        ts_us = None  # infinite, or outside Python's years, as it was
    commit_lsn, ordinal = letter.replay_position
    return Event(commit_lsn, ordinal, stored.event_id, stored.content_id, ts_us, letter.payload)
