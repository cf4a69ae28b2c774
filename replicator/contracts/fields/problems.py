"""What is wrong with a declaration, as far as it can tell by itself; whether the tables are so is `check`'s to say."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from inspect import iscoroutinefunction, signature
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

from replicator.contracts.fields.parts import Derived, Dimension, Field, Role, Where
from replicator.contracts.fields.types import BIGINT, TEXT, TIMESTAMPTZ, UUID, Type

if TYPE_CHECKING:
    from replicator.contracts.fields.stream import Stream

_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_TABLE = re.compile(r"([a-z_][a-z0-9_]*)\.([a-z_][a-z0-9_]*)")

MOST_DIMENSIONS = 4
"""The name of their copies has room for so many."""

IDENTIFYING = {BIGINT.postgres, UUID.postgres, TEXT.postgres}
"""PostgreSQL's types that an identity and a key may have."""


class _Takes(NamedTuple):
    """What an argument takes."""

    words: str
    fits: Callable[[Any], bool]


def _one(kind: type, words: str) -> _Takes:
    return _Takes(words, lambda value: isinstance(value, kind))


def _several(kind: type, words: str) -> _Takes:
    return _Takes(words, lambda value: isinstance(value, tuple) and all(isinstance(one, kind) for one in value))


def _or_none(takes: _Takes) -> _Takes:
    return _Takes(takes.words, lambda value: value is None or takes.fits(value))


def _among(*values: str) -> _Takes:
    return _Takes(" or ".join(f'"{value}"' for value in values), lambda value: value in values)


_TEXT = _one(str, "a text")
_TAKES: Mapping[str, Mapping[str, _Takes]] = {
    "Stream": {
        "name": _TEXT,
        "table": _TEXT,
        "fields": _several(Field, "a tuple of Field(…)"),
        "dimensions": _several(Dimension, "a tuple of Dimension(…), with a comma behind the only one"),
        "updates": _among("ignore", "upsert"),
        "deletes": _among("ignore", "delete"),
        "where": _or_none(_one(Where, "Where(field, values)")),
        "clickhouse_table": _TEXT,
        "redis_name": _TEXT,
    },
    "Field": {
        "name": _TEXT,
        "type": _one(Type, "a type, such as TEXT, TEXT.nullable() or numeric(12, 2)"),
        "column": _TEXT,
        "joined": _TEXT,
        "of": _or_none(_one(Dimension, "a Dimension")),
        "derived": _or_none(_one(Derived, "Derived(function, of=(…))")),
        "role": _or_none(_one(Role, "Role.IDENTITY, Role.KEY or Role.TIME")),
    },
    "Derived": {
        "function": _Takes("a plain function", lambda value: callable(value) and not iscoroutinefunction(value)),
        "of": _several(str, "a tuple of names of fields, with a comma behind the only one"),
        "postgres": _TEXT,
    },
    "Dimension": {"table": _TEXT, "key": _TEXT, "on": _TEXT},
    "Where": {"field": _TEXT, "values": _several(object, "a tuple of values, with a comma behind the only one")},
}
"""By class and argument. Nobody has to run a type checker on a declaration."""


def problems(stream: Stream) -> Iterator[str]:
    """What is wrong with a declaration, the first thing first."""
    yield from _of_arguments(stream)
    yield from _of_names(stream)
    for role in Role:
        count = sum(field.role is role for field in stream.fields)
        if count != 1:
            yield f"{count or 'no'} fields have the role {role.name}; exactly one has to"
    yield from _of_roles(stream)
    yield from _of_sources(stream)
    yield from _of_dimensions(stream)
    yield from _of_where(stream)


def _of_arguments(stream: Stream) -> Iterator[str]:
    yield from _unfit(stream, "Stream", "")
    for field in stream.fields:
        yield from _unfit(field, "Field", f" of the field {field.name}")
        if field.derived:
            yield from _unfit(field.derived, "Derived", f" of Derived of the field {field.name}")
    for dimension in stream.dimensions:
        yield from _unfit(dimension, "Dimension", f" of the dimension {dimension.table}")
    if stream.where:
        yield from _unfit(stream.where, "Where", " of Where")


def _unfit(part: object, kind: str, where: str) -> Iterator[str]:
    for name, takes in _TAKES[kind].items():
        if not takes.fits(value := getattr(part, name)):
            shown = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
            yield f"{name}{where} is {shown}; it takes {takes.words}"


def _of_names(stream: Stream) -> Iterator[str]:
    for name in filter(None, (stream.name, stream.clickhouse_table, stream.redis_name)):
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


def _of_roles(stream: Stream) -> Iterator[str]:
    for field in (stream.identity, stream.key, stream.time):
        if not field.column or field.type.optional:
            yield f"the field {field.name} has a role, so it has to be a column that is never NULL"
    for field in (stream.identity, stream.key):
        if field.type.postgres not in IDENTIFYING:
            yield f"the field {field.name} is {field.type.words}; an identity and a key are BIGINT, UUID or TEXT"
    if stream.time.type.postgres != TIMESTAMPTZ.postgres:
        yield f"the field {stream.time.name} is {stream.time.type.words}; the time is a TIMESTAMPTZ"


def _of_sources(stream: Stream) -> Iterator[str]:
    plain = {field.name: field for field in stream.fields if not field.derived}
    for field in stream.fields:
        if sum(map(bool, (field.column, field.joined, field.derived))) > 1:
            yield f"the field {field.name} has more than one source; it is a column, joined or derived"
        if field.joined and not field.type.optional:
            yield f"the field {field.name} is joined, so it has to be nullable: there may be no such row"
        yield from _of_derived(field, plain)
    columns = Counter(field.column for field in stream.fields if field.column)
    yield from (f"{count} fields are the column {name}" for name, count in columns.items() if count > 1)


def _of_derived(field: Field, plain: Mapping[str, Field]) -> Iterator[str]:
    if not (derived := field.derived):
        return
    if not derived.of:
        yield f"the field {field.name} is derived from nothing; it takes the names of fields"
    for name in derived.of:
        if name not in plain:
            yield f"the field {field.name} is derived from {name}, which is no column's field"
        elif plain[name].type.optional and not field.type.optional:
            yield f"the field {field.name} is derived from {name}, which may be NULL, so it has to be nullable, too"
    yield from _of_sql(field, derived)
    with suppress(ValueError):  # some functions of C can't say it
        try:
            signature(derived.function).bind(*derived.of)
        except TypeError:
            yield f"the function of the field {field.name} can't be called with {', '.join(derived.of)}"


def _of_sql(field: Field, derived: Derived) -> Iterator[str]:
    try:
        named = [name for _, name, _, _ in Formatter().parse(derived.postgres) if name is not None]
    except ValueError:
        yield f"the SQL of the field {field.name} has a brace too many; it takes {{name}} for an argument"
    else:
        for name in named:
            if name not in derived.of:
                yield f"the SQL of the field {field.name} has {{{name}}}, which is none of its arguments (of=…)"


def _of_dimensions(stream: Stream) -> Iterator[str]:
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
            what = "which is no column's field of type BIGINT or UUID (on=…)"
            yield f"{dimension.table} is joined on {dimension.on}, {what}"
    yield from _of_joined(stream)


def _of_joined(stream: Stream) -> Iterator[str]:
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
    yield from _of_joined_types(stream)


def _of_joined_types(stream: Stream) -> Iterator[str]:
    """A column has one type, in whichever dimensions it is."""
    types = {field.name: field.type for field in stream.fields}
    columns = [(dimension, dimension.key, types[dimension.on]) for dimension in stream.dimensions]
    columns += [(of, field.joined, field.type) for field in stream.fields if (of := stream.joins(field))]
    found: dict[tuple[str, str], str] = {}
    for dimension, name, kind in columns:
        source = kind.declared or kind.postgres
        if found.setdefault((dimension.table, name), source) != source:
            yield f"the column {name} of {dimension.table} has two types"


def _of_where(stream: Stream) -> Iterator[str]:
    if (where := stream.where) is None:
        return
    field = next((field for field in stream.fields if field.name == where.field and field.column), None)
    if field is None or field.type.python not in {str, int, bool}:
        yield f"its condition is on {where.field}, which has to be a column's field: a text, an integer or a boolean"
    elif None in where.values or not where.values or not all(map(field.type.fits, where.values)):
        yield f"its condition on {where.field} has values that are not {field.type.words}, or none"
