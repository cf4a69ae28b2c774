"""How a stream is declared: a `Stream` names its table, and every field once, with its type.

What reads, encodes, stores and compares events is made from it. Ours is `enrichment/contract.py`; sinks are given it.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from replicator.contracts.fields.types import BIGINT, TEXT, TIMESTAMPTZ, UUID, Type

_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_TABLE = re.compile(r"([a-z_][a-z0-9_]*)\.([a-z_][a-z0-9_]*)")

MOST_DIMENSIONS = 4
"""The name of their copies has room for so many."""

NAMES = {BIGINT.postgres, UUID.postgres, TEXT.postgres}
"""By PostgreSQL's type: what an identity, and a key, may be."""


class Role(Enum):
    """What a field is to the event. Each role is one field's."""

    IDENTITY = auto()
    KEY = auto()
    TIME = auto()


@dataclass(frozen=True)
class Derived:
    """A field that is computed from others, and NULL when one of them is."""

    function: Callable[..., object]
    of: tuple[str, ...]
    """The fields that are its arguments; none of them is derived."""
    shortcut: str = ""
    """Python: `<expression> if <condition>`, the same for ordinary values. The hot path has no time for a call."""
    postgres: str = ""
    """The same in SQL, with `{name}` for an argument; empty: `reconcile` does not compare the field."""


@dataclass(frozen=True)
class Dimension:
    """A table of which an event takes over columns: those of the row whose `key` is the event's field `on`."""

    table: str
    key: str
    on: str = ""
    """Empty: the field has the key's name."""

    def __post_init__(self) -> None:
        if not self.on:
            object.__setattr__(self, "on", self.key)


@dataclass(frozen=True)
class Field:
    """One field of the event: a `column` of the table (its own name by default), of a `joined` one, or `derived`."""

    name: str
    type: Type
    column: str = ""
    joined: str = ""
    of: Dimension | None = None
    """Which dimension the joined column is of; where there is one alone, it need not be said."""
    derived: Derived | None = None
    role: Role | None = None

    def __post_init__(self) -> None:
        if not (self.column or self.joined or self.derived):
            object.__setattr__(self, "column", self.name)


@dataclass(frozen=True)
class Where:
    """Only the rows whose field, a column of the table, has one of these values."""

    field: str
    values: tuple[str | int | bool, ...]


class StreamUnusable(ValueError):
    """A declaration that can't be used. The text says what is wrong with it, in one line."""


@dataclass(frozen=True)
class Stream:
    """What an event is: a row of a table, with its fields in the order that every destination sees."""

    name: str
    """Its table in ClickHouse, and the beginning of its keys in Redis."""
    table: str
    """`schema.table`."""
    fields: tuple[Field, ...]
    dimensions: tuple[Dimension, ...] = ()
    """At most four. A table may be two of them, joined on different fields."""
    updates: Literal["ignore", "upsert"] = "ignore"
    deletes: Literal["ignore", "delete"] = "ignore"
    """What an update and a delete of a row mean; ignored ones are counted."""
    where: Where | None = None
    """Which rows it takes; None: all."""
    destination: str = ""
    """Another name for the table in ClickHouse."""
    noun: str = ""
    """Another word for its keys in Redis."""

    def __post_init__(self) -> None:
        if problem := next(_problems(self), None):
            raise StreamUnusable(f"stream {self.name!r}: {problem}")

    @property
    def identity(self) -> Field:
        """What makes two events the same."""
        return self.field(Role.IDENTITY)

    @property
    def key(self) -> Field:
        """What the event is about."""
        return self.field(Role.KEY)

    @property
    def time(self) -> Field:
        """When it happened."""
        return self.field(Role.TIME)

    @property
    def follows(self) -> bool:
        """Whether rows that change are followed; else a row counts when it is inserted, and never again."""
        return self.updates == "upsert" or self.deletes == "delete"

    def joins(self, field: Field) -> Dimension | None:
        """The dimension of a joined field; None: it is not joined, or does not say of which."""
        alone = self.dimensions[0] if len(self.dimensions) == 1 else None
        return (field.of or alone) if field.joined else None

    def field(self, role: Role) -> Field:
        """The field of that role."""
        return next(field for field in self.fields if field.role is role)

    def compared(self, *, with_joined: bool) -> tuple[Field, ...]:
        """What reconcile's checksum is made of: all fields, or those that do not change with the joined row."""
        joined = {field.name for field in self.fields if field.joined}
        of = {field.name: field.derived.of if field.derived else (field.name,) for field in self.fields}
        known = (field for field in self.fields if not field.derived or field.derived.postgres)
        return tuple(field for field in known if with_joined or joined.isdisjoint(of[field.name]))


def _problems(stream: Stream) -> Iterator[str]:
    """What is wrong with a declaration, the first thing first."""
    yield from _problems_of_names(stream)
    for role in Role:
        count = sum(field.role is role for field in stream.fields)
        if count != 1:
            yield f"{count or 'no'} fields have the role {role.name}; exactly one has to"
    yield from _problems_of_roles(stream)
    yield from _problems_of_sources(stream)
    yield from _problems_of_dimensions(stream)
    yield from _problems_of_where(stream)


def _problems_of_names(stream: Stream) -> Iterator[str]:
    for name in filter(None, (stream.name, stream.destination, stream.noun)):
        if not _NAME.fullmatch(name):
            yield f"{name!r} is no name; it takes up to 41 lower-case letters, digits and underscores"
    tables = dict.fromkeys([stream.table, *(dimension.table for dimension in stream.dimensions)])
    for table in tables:
        if not _TABLE.fullmatch(table):
            yield f"{table!r} is no table; it takes schema.table, in lower case"
    for name, count in Counter(field.name for field in stream.fields).items():
        if count > 1:
            yield f"{count} fields have the name {name}"
        if not _NAME.fullmatch(name) or keyword.iskeyword(name):
            what = "up to 41 lower-case letters, digits and underscores, no keyword of Python's"
            yield f"{name!r} is no field's name; it takes {what}"


def _problems_of_roles(stream: Stream) -> Iterator[str]:
    for field in (stream.identity, stream.key, stream.time):
        if not field.column or field.type.optional:
            yield f"the field {field.name} has a role, so it has to be a column that is never NULL"
    for field in (stream.identity, stream.key):
        if field.type.postgres not in NAMES:
            yield f"the field {field.name} is {field.type.words}; an identity and a key are BIGINT, UUID or TEXT"
    if stream.time.type.postgres != TIMESTAMPTZ.postgres:
        yield f"the field {stream.time.name} is {stream.time.type.words}; the time is a TIMESTAMPTZ"


def _problems_of_sources(stream: Stream) -> Iterator[str]:
    plain = {field.name: field for field in stream.fields if not field.derived}
    for field in stream.fields:
        if sum(map(bool, (field.column, field.joined, field.derived))) > 1:
            yield f"the field {field.name} has more than one source; it is a column, joined or derived"
        if field.joined and not field.type.optional:
            yield f"the field {field.name} is joined, so it has to be nullable: there may be no such row"
        for name in field.derived.of if field.derived else ():
            if name not in plain:
                yield f"the field {field.name} is derived from {name}, which is no column's field"
    columns = Counter(field.column for field in stream.fields if field.column)
    yield from (f"{count} fields are the column {name}" for name, count in columns.items() if count > 1)


def _problems_of_dimensions(stream: Stream) -> Iterator[str]:
    dimensions = stream.dimensions
    if len(dimensions) > MOST_DIMENSIONS:
        yield f"it has {len(dimensions)} dimensions; {MOST_DIMENSIONS} are the most"
    tables = {stream.table, *(dimension.table for dimension in dimensions)}
    names = Counter(table.partition(".")[2] for table in tables)
    yield from (f"{count} of its tables have the name {name}" for name, count in names.items() if count > 1)
    if any(dimension.table == stream.table for dimension in dimensions):
        yield f"{stream.table} can't be its own dimension"
    for (table, on), count in Counter((dimension.table, dimension.on) for dimension in dimensions).items():
        if count > 1:
            yield f"{table} is joined on {on} {count} times"
    own = {field.name: field.type.postgres for field in stream.fields if field.column}
    for dimension in dimensions:
        if own.get(dimension.on) not in {BIGINT.postgres, UUID.postgres}:
            what = "which is no column's field of type BIGINT or UUID"
            yield f"{dimension.table} is joined on {dimension.on}, {what}"
    yield from _problems_of_joined(stream)


def _problems_of_joined(stream: Stream) -> Iterator[str]:
    joined = [(field, stream.joins(field)) for field in stream.fields if field.joined]
    for field, dimension in joined:
        if not stream.dimensions:
            yield f"the field {field.name} is joined, and there is no dimension"
        elif dimension is None:
            yield f"the field {field.name} is joined, and does not say of which dimension (of=…)"
        elif dimension not in stream.dimensions:
            yield f"the field {field.name} is of {dimension.table}, which is not among the dimensions"
    yield from (
        f"the field {field.name} is of a dimension, and not joined"
        for field in stream.fields
        if field.of and not field.joined
    )
    for (_, name), count in Counter((dimension, field.joined) for field, dimension in joined).items():
        if count > 1:
            yield f"{count} fields are the column {name}"
    yield from _problems_of_joined_types(stream)


def _problems_of_joined_types(stream: Stream) -> Iterator[str]:
    """A column has one type, in whichever dimensions it is."""
    types = {field.name: field.type for field in stream.fields}
    columns = [(dimension, dimension.key, types[dimension.on]) for dimension in stream.dimensions]
    columns += [(of, field.joined, field.type) for field in stream.fields if (of := stream.joins(field))]
    found: dict[tuple[str, str], str] = {}
    for dimension, name, kind in columns:
        source = kind.declared or kind.postgres
        if found.setdefault((dimension.table, name), source) != source:
            yield f"the column {name} of {dimension.table} has two types"


def _problems_of_where(stream: Stream) -> Iterator[str]:
    if (where := stream.where) is None:
        return
    field = next((field for field in stream.fields if field.name == where.field and field.column), None)
    if field is None or field.type.python not in {str, int, bool}:
        yield f"its condition is on {where.field}, which has to be a column's field: a text, an integer or a boolean"
    elif not where.values or not all(map(field.type.fits, where.values)):
        yield f"its condition on {where.field} has values that are not {field.type.words}, or none"
