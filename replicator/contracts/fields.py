"""How an event is declared: a `Contract` names every field once, with its type.

What reads, encodes, stores and compares events is made from it. Ours is `enrichment/contract.py`; sinks are given it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Type:
    """A kind of value, and how it looks in each place."""

    words: str
    """What a row must hold, for messages."""
    python: type
    """What wal2json gives for it."""
    postgres: str
    """The source column's type; narrower integers and other kinds of text do as well."""
    clickhouse: str
    postgres_line: str
    clickhouse_line: str
    """SQL for the text that reconcile's checksum is made of, the same text in both; `{0}` is the value."""
    optional: bool = False

    def nullable(self) -> Type:
        """The same, or NULL. A NULL is `~` in a checksum, where text begins with its length."""
        return replace(
            self,
            words=f"{self.words} or NULL",
            clickhouse=f"Nullable({self.clickhouse})",
            postgres_line=f"coalesce(({self.postgres_line})::text, '~')",
            clickhouse_line=f"ifNull({self.clickhouse_line}, '~')",
            optional=True,
        )

    def low_cardinality(self) -> Type:
        """The same, for a column with few different values: ClickHouse keeps a dictionary of them."""
        return replace(self, clickhouse=f"LowCardinality({self.clickhouse})")

    def fits(self, value: object) -> bool:
        """Whether a value of wal2json's is of this type. Of a timestamp this only says that it is text."""
        if value is None:
            return self.optional
        return type(value) is self.python and (not isinstance(value, int) or INT64_MIN <= value <= INT64_MAX)


BIGINT = Type("a 64-bit integer", int, "bigint", "Int64", "{0}", "toString({0})")
TEXT = Type(
    "text", str, "text", "String",
    "length({0}::text) || ':' || {0}::text",
    "concat(toString(lengthUTF8({0})), ':', {0})",
)  # fmt: skip
TIMESTAMPTZ = Type(
    "a timestamp with time zone, in UTC", str, "timestamptz", "DateTime64(6, 'UTC')",
    "(extract(epoch FROM {0}) * 1000000)::bigint",
    "toString(toUnixTimestamp64Micro({0}))",
)  # fmt: skip


def decimal(digits: int, scale: int) -> Type:
    """An exact fraction. In PostgreSQL its expression counts units of the last digit: 1.25 is 125 at a scale of 2."""
    units = f"toInt128(toDecimal128({{0}}, {scale}) * {10**scale})"
    return Type("a number", float, "numeric", f"Decimal({digits}, {scale})", "{0}", f"toString({units})")


class Role(Enum):
    """What a field is to the event. Each role is one field's."""

    IDENTITY = auto()
    KEY = auto()
    TIME = auto()


@dataclass(frozen=True)
class Derived:
    """A field that is computed from others, and NULL when one of them is."""

    function: Callable[..., object]
    of: tuple[str, ...]  # the fields that are its arguments
    shortcut: str
    """Python: `<expression> if <condition>`, the same for ordinary values. The hot path has no time for a call."""
    postgres: str
    """The same in SQL, with `{name}` for an argument."""


@dataclass(frozen=True)
class Field:
    """One field of the event: a `column` of the table, of the `joined` one, or `derived`."""

    name: str
    type: Type
    column: str = ""
    joined: str = ""
    derived: Derived | None = None
    role: Role | None = None


@dataclass(frozen=True)
class Contract:
    """What an event is: its fields, in the order that every destination sees."""

    fields: tuple[Field, ...]

    def field(self, role: Role) -> Field:
        """The field of that role."""
        return next(field for field in self.fields if field.role is role)

    def compared(self, *, with_joined: bool) -> tuple[Field, ...]:
        """What reconcile's checksum is made of: all fields, or those that do not change with the joined row."""
        joined = {field.name for field in self.fields if field.joined}
        of = {field.name: field.derived.of if field.derived else (field.name,) for field in self.fields}
        return tuple(field for field in self.fields if with_joined or joined.isdisjoint(of[field.name]))
