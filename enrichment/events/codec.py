"""Rows to events, and back from dead letters. Pure: nothing is looked up.

A `RowReader` makes a draft of an inserted row, `build_events` adds its content and encodes it; in between `enricher.py`
sees to it that the content is known. `shortcut.py` does all of it at once for ordinary inserts. `compiled.py` makes
these functions from the declaration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from msgspec import structs

from enrichment.events.compiled import BUILD, EPOCH, Compiler
from enrichment.events.draft import Content, DerivedUnusable, Draft, RowUnusable, ShapeUnusable
from enrichment.tables.declared import Tables, unpadded
from replicator.contracts.events import Column, DeadLetter, Event, Id, Position, Row, RowChange, decode_row
from replicator.contracts.fields import Field

NONE: Mapping[Position, Id] = MappingProxyType({})

_integer = re.compile(r"-?\d{1,19}", re.ASCII).fullmatch


def microseconds(moment: datetime) -> int:
    """Since 1970, exactly."""
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


class Codec:
    """What is made of a stream's declaration; `codec_of` gives it."""

    build_events: Callable[..., None]
    """Append the events of drafts: given them, the contents of each dimension by its key, and the list of events.

    Every content must be known, if only as the join's `missing`."""
    read: Callable[[RowReader, Row], Draft]

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        stream, own = tables.stream, tables.own
        self.compiler = compiler = Compiler(tables)
        self._gone = partial(RowChange, stream=stream.name, deleted=True)
        self.draft_id = 2 + own.index(tables.identity)
        self.draft_ons = [2 + own.index(join.on) for join in tables.joins]
        self.draft_time = 2 + own.index(tables.time)
        """The index in a draft of its identity, the key of each dimension, and its time."""
        names = [field.name for field in own]
        self._draft_where = 2 + names.index(stream.where.field) if stream.where else None
        self._values = frozenset(map(unpadded, stream.where.values)) if stream.where else frozenset()
        self._integers = {field.column for field in own if field.type.python is int}
        kept = [field.column for field in own]
        for join in tables.joins:
            kept += [*(field.joined for field in join.fields), join.key]
        self._kept = [*dict.fromkeys(kept)]
        self._stored = msgspec.json.Decoder(_stored(tables))
        derived = any(field.derived and not field.derived.shortcut for field in stream.fields)
        self.derives = derived or any(join.numbers for join in tables.joins)
        """Whether making an event may raise DerivedUnusable."""
        self._show_old = {field: compiler.showing(field) for field in own}
        self.read = compiler.reader(self.unquote, self.check, partial(self._misfit, tables.time))
        self.build_events = compiler.finishing(BUILD, "_build_events")

    def takes(self, draft: Draft) -> bool:
        """Whether the stream takes this row."""
        return self._draft_where is None or unpadded(draft[self._draft_where]) in self._values

    def check(self, columns: Iterable[Column]) -> None:
        """Raise RowUnusable for the first column whose value does not fit. Two of one name are both checked."""
        for column in columns:
            for field in self.tables.own:
                if column.name == field.column and not field.type.fits(column.value):
                    if column.value is None:
                        name = f"{self.tables.stream.table}.{field.column}"
                        raise RowUnusable(f"{name} is NULL, not {field.type.words}")
                    raise self._misfit(field)

    def unquote(self, columns: Iterable[Column]) -> bool:
        """Call `unquote` for a row of the events' table."""
        return unquote(columns, self._integers)

    def _misfit(self, field: Field) -> RowUnusable:
        return ShapeUnusable(f"{self.tables.stream.table}.{field.column} is not {field.type.words}")

    def dead_letter(self, row: Row, reason: str) -> DeadLetter:
        """Keeps the row that no event can be made of, with the columns that events are made from."""
        columns, identity = self._keep(row.columns), self._keep(row.identity)
        # The letter has its own position.
        kept = structs.replace(row, columns=columns, identity=identity, commit_lsn=0, ordinal=0)
        joins = self.tables.joins_of(row.table)
        unquote(kept.columns, {name for join in joins for name in join.integers} if joins else self._integers)
        known = self.tables.identity
        event_id = None if joins else self.identity_in(kept.columns)  # a dimension may have a column of that name, too
        return DeadLetter(
            sink=None,
            position=Position(row.commit_lsn, row.ordinal),
            event_id=event_id if known.type.fits(event_id) else None,
            reason=reason,
            payload=_encode_row(kept),
        )

    def _keep(self, columns: Iterable[Column]) -> list[Column]:
        """In one order: a row looks the same from the stream and from the table, and is kept once.

        Other columns, such as raw_payload, may be nobody's business.
        """
        kept = self._kept
        return sorted((column for column in columns if column.name in kept), key=lambda column: kept.index(column.name))

    def build(
        self,
        drafts: Sequence[Draft],
        contents: Sequence[Mapping[Any, Content]],
        events: list[Event],
        was: Mapping[Position, Id] = NONE,
    ) -> list[DeadLetter]:
        """Append the events of drafts to `events`; returned are letters for rows that no event can be made of.

        `contents`: those of each dimension, as for `build_events`; `was`: former identities by the row's position.
        """
        begun = len(events)
        with suppress(DerivedUnusable):
            self.build_events(drafts, *contents, events)
            return []
        del events[begun:]
        refused = []
        for draft in drafts:
            try:
                self.build_events([draft], *contents, events)
            except DerivedUnusable as exc:
                refused.append(self._refused(draft, str(exc), was))
        return refused

    def _refused(self, draft: Draft, reason: str, was: Mapping[Position, Id]) -> DeadLetter:
        commit_lsn, ordinal, *values = draft
        texts = (str(value) if isinstance(value, datetime) else value for value in values)
        columns = [Column(field.column, value) for field, value in zip(self.tables.own, texts, strict=True)]
        former = was.get(Position(commit_lsn, ordinal))
        action, identity = ("I", []) if former is None else ("U", [Column(self.tables.identity.column, former)])
        row = Row(action, self.tables.schema, self.tables.events, columns, identity, commit_lsn, ordinal)
        return self.dead_letter(row, reason)

    def complete(self, row: Row, found: Mapping[str, Any] | None) -> bool:
        """Give an update the columns that it lacks because they are long and did not change; whether it has all now.

        They are in its old row, or in `found`, the row as it is now.
        """
        names = {column.name for column in row.columns}
        known = {column.name: column.value for column in row.identity} | dict(found or {})
        lacking = [field.column for field in self.tables.own if field.column not in names]
        row.columns += [Column(name, known[name]) for name in lacking if name in known]
        return all(name in known for name in lacking)

    def identity_in(self, columns: Iterable[Column]) -> Id | None:
        """The identity that is among these columns; None: there is none."""
        name = self.tables.identity.column
        return next((column.value for column in columns if column.name == name), None)

    def deletion(self, row: Row) -> Event:
        """The event of a row that is gone. Raises RowUnusable."""
        fields = self._old(row)
        json = msgspec.json.encode({field.name: self._show_old[field](value) for field, value in fields.items()})
        key = fields.get(self.tables.key, self.tables.key.type.python())
        return self._gone(row.commit_lsn, row.ordinal, fields[self.tables.identity], key, None, json)

    def former(self, row: Row) -> Id:
        """The identity that the row had before this change. Raises RowUnusable."""
        return self._old(row)[self.tables.identity]

    def _old(self, row: Row) -> dict[Field, Any]:
        """What fits of what it was: a row that no event could be made of still had an identity."""
        self.unquote(row.identity)
        old = {column.name: column.value for column in row.identity}
        known = (field for field in self.tables.own if field.column in old)
        fields = {field: old[field.column] for field in known if field.type.fits(old[field.column])}
        if self.tables.identity not in fields:
            raise self._misfit(self.tables.identity)
        return fields

    def tells(self, row: Row) -> bool:
        """Whether it says which row it was before."""
        try:
            self.former(row)
        except RowUnusable:
            return False
        return True

    def stored_event(self, letter: DeadLetter) -> Event:
        """The event that a sink refused, from its JSON, or from what `change` made of it. Raises RowUnusable."""
        try:
            stored = self._stored.decode(letter.payload)
        except msgspec.MsgspecError as exc:
            raise RowUnusable(f"the dead letter's payload is no event: {exc}") from exc
        begins, marked, _ = letter.payload.rpartition(b',"_operation":')
        json = begins + b"}" if marked else letter.payload
        commit_lsn, ordinal = letter.replay_position
        if stored.time is None or stored.operation == "delete":
            return self._gone(commit_lsn, ordinal, stored.identity, stored.key, None, json)
        try:
            ts_us = microseconds(datetime.fromisoformat(stored.time))
        except ValueError:
            ts_us = None  # infinite, or outside Python's years, as it was
        event = self.compiler.event(commit_lsn, ordinal, stored.identity, stored.key, ts_us, json, *self.compiler.label)
        if isinstance(event, RowChange):
            event.was = stored.was
        return event


class RowReader:
    """Reads inserted rows. Remembers where the columns stood in the last one and verifies that they still do.

    Comparing the names costs half of what a dict of the row does, and no column that was added, dropped or renamed
    meanwhile can give a wrong value.
    """

    def __init__(self, codec: Codec) -> None:
        self._tables = codec.tables
        self.places = tuple(range(len(codec.tables.own)))
        self.read: Callable[[Row], Draft] = partial(codec.read, self)
        """The row as a draft. Raises RowUnusable."""

    def read_again(self, row: Row) -> Draft:
        """The table has another shape now: find the columns by name."""
        places = {column.name: place for place, column in enumerate(row.columns)}
        for field in self._tables.own:
            if field.column not in places:
                what = f"{self._tables.stream.table} has no column {field.column}"
                raise ShapeUnusable(f"{what}; expected {field.type.words}")
        self.places = tuple(places[field.column] for field in self._tables.own)
        return self.read(row)


def unquote(columns: Iterable[Column], integers: Collection[str]) -> bool:
    """Integers of a domain type, which wal2json quotes, become integers; whether there were any."""
    found = False
    for column in columns:
        if column.name in integers and type(column.value) is str and _integer(column.value):
            column.value, found = int(column.value), True
    return found


@cache
def codec_of(tables: Tables) -> Codec:
    """Compiled once."""
    return Codec(tables)


def _stored(tables: Tables) -> Any:
    """The type of what is read again from the JSON of an event or of a change: identity, key, time, what happened."""
    roles = {"identity": tables.identity, "key": tables.key, "time": tables.time}
    identity, key, time = ((name, field.type.python) for name, field in roles.items())
    fields: list[Any] = [identity, key, time]
    if tables.stream.follows:  # of a row that is gone the replica identity may tell no more
        fields = [identity, (*key, key[1]()), ("time", str | None, None)]
    fields += [("operation", Literal["upsert", "delete"], "upsert"), ("was", identity[1] | None, None)]
    names = {name: field.name for name, field in roles.items()} | {"operation": "_operation", "was": "_was"}
    return msgspec.defstruct("Stored", fields, rename=names, gc=False)


_encode_row = msgspec.json.Encoder(decimal_format="number").encode


def stored_row(letter: DeadLetter) -> Row:
    """The row that `dead_letter` kept. Raises RowUnusable."""
    try:
        row = decode_row(letter.payload)
    except ValueError as exc:
        problem = exc if isinstance(exc, msgspec.MsgspecError) else type(exc).__name__  # others quote the payload
        raise RowUnusable(f"the dead letter's payload is no row: {problem}") from None
    row.commit_lsn, row.ordinal = letter.replay_position
    return row
