"""The types of fields: how each kind of value looks in wal2json, in PostgreSQL's SQL, in ClickHouse in a checksum."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

EXACT_DIGITS_MAX = 76
"""What ClickHouse's widest decimal holds."""


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
    read: str = ""
    """SQL that gives the value as wal2json does; empty: a cast."""
    declared: str = ""
    """The source column's type with its digits, where it has any."""
    shown: str = "{0}"
    """Python source for what the event's JSON has of `{0}`; `enrichment/events/compiled.py` has the functions."""
    limits: str = ""
    """SQL for whether a value fits that is not NULL; empty: the column's type tells."""
    fit: Callable[[object], bool] | None = field(default=None, compare=False)
    """Whether a value fits that is not NULL; None: its Python type tells. Two functions are never equal, and two
    `numeric(12, 2)` are."""
    form: Callable[[str], bool] | None = field(default=None, compare=False)
    """Whether a text is one of this type; None: any is. Only of what a function gives: PostgreSQL's own always is."""

    def nullable(self) -> Type:
        """The same, or NULL. A NULL is `~` in a checksum, where text begins with its length."""
        if self.optional:
            return self
        return replace(
            self,
            words=f"{self.words} or NULL",
            clickhouse=_nullable(self.clickhouse),
            postgres_line=f"coalesce(({self.postgres_line})::text, '~')",
            clickhouse_line=f"ifNull({self.clickhouse_line}, '~')",
            optional=True,
            shown=self.shown if self.shown == "{0}" else f"(None if {{0}} is None else {self.shown})",
        )

    def low_cardinality(self) -> Type:
        """The same, for a text with few different values: ClickHouse keeps a dictionary of them."""
        if not self.is_long:
            raise ValueError(f"low_cardinality() is for text, and this is {self.words}")
        if self.clickhouse.startswith("LowCardinality"):
            return self
        return replace(self, clickhouse=f"LowCardinality({self.clickhouse})")

    def fits(self, value: object) -> bool:
        """Whether a value, as wal2json gives it, is of this type. Of a date, a time, a uuid: whether it is a text."""
        if value is None:
            return self.optional
        if self.fit is not None:
            return self.fit(value)
        return type(value) is self.python and (not isinstance(value, int) or INT64_MIN <= value <= INT64_MAX)

    def made(self, value: object) -> bool:
        """Whether what a function of the declaration gave is of this type, its text included."""
        return self.fits(value) and (self.form is None or value is None or self.form(str(value)))

    @property
    def is_long(self) -> bool:
        """Whether a value may have any length."""
        return "String" in self.clickhouse

    def select(self, expression: str) -> str:
        """SQL for the value as wal2json gives it."""
        return self.read.format(expression) if self.read else f"{expression}::{self.postgres}"

    def usable(self, expression: str) -> str:
        """SQL for whether an event can be made with the value; empty: with any. Of NaN wal2json gives NULL."""
        given = self.select(expression) if self.python in {Decimal, float} else expression
        if self.limits:
            return f"CASE WHEN {given} IS NULL THEN {self.optional} ELSE {self.limits.format(expression)} END"
        return "" if self.optional else f"{given} IS NOT NULL"


def _nullable(clickhouse: str) -> str:
    inner = clickhouse.removeprefix("LowCardinality(")
    return f"Nullable({clickhouse})" if inner == clickhouse else f"LowCardinality(Nullable({inner[:-1]}))"


def _moment(more: str) -> Callable[[str], bool]:
    """Of a day, and more, as PostgreSQL writes it."""
    known = re.compile(rf"(\d{{4,}})-(\d\d)-(\d\d){more}( BC)?", re.ASCII)

    def form(text: str) -> bool:
        if text in {"infinity", "-infinity"}:
            return True
        if not (found := known.fullmatch(text)):
            return False
        year, month, day = (int(found[number]) for number in (1, 2, 3))
        try:
            date(2000 + (1 - year if found[found.re.groups] else year) % 400, month, day)  # the calendar repeats
        except ValueError:
            return False
        return year > 0

    return form


_CLOCK = r" (?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?"
_is_uuid = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
_is_hexadecimal = re.compile("([0-9a-f]{2})*").fullmatch

BIGINT = Type("a 64-bit integer", int, "bigint", "Int64", "{0}", "toString({0})")


def _textual(words: str, postgres: str, read: str = "{0}::text", select: str = "") -> Type:
    lines = f"length({read}) || ':' || {read}", "concat(toString(lengthUTF8({0})), ':', {0})"
    return Type(words, str, postgres, "String", *lines, read=select)


WRITTEN = "CASE WHEN {0} IS NOT NULL THEN concat({0}) END"
"""As the type's output function writes it, and so the slot. A cast differs: of an inet or a char(9), for two."""

TEXT = _textual("text", "text", WRITTEN, WRITTEN)
JSONB = _textual("jsonb", "jsonb", select="{0}::text")
"""Its text as PostgreSQL writes it: what JSON can say and a destination can't is kept, such as long numbers."""
JSON = _textual("json", "json", select="{0}::text")
BYTEA = replace(
    _textual("bytea", "bytea", "encode({0}, 'hex')", "encode({0}, 'hex')"),
    form=lambda text: bool(_is_hexadecimal(text)),
)
"""As hexadecimal digits."""
UUID = Type(
    "a uuid", str, "uuid", "UUID", "{0}", "toString({0})", read="{0}::text", form=lambda text: bool(_is_uuid(text))
)  # fmt: skip
BOOLEAN = Type("true or false", bool, "bool", "Bool", "{0}::int", "toString(toUInt8({0}))")
DATE = Type("a date", str, "date", "Date32", "{0}::text", "toString({0})", read="{0}::text", form=_moment(""))

_MICROSECONDS = "CASE WHEN isfinite({0}) THEN (extract(epoch FROM {0}) * 1000000)::bigint::text ELSE {0}::text END"

TIMESTAMPTZ = Type(
    "a timestamp with time zone, in UTC", str, "timestamptz", "DateTime64(6, 'UTC')",
    _MICROSECONDS, "toString(toUnixTimestamp64Micro({0}))", read="{0}::timestamptz::text", shown="_rfc3339({0}, 'Z')",
    form=_moment(rf"{_CLOCK}\+00"),
)  # fmt: skip
TIMESTAMP = Type(
    "a timestamp", str, "timestamp", "DateTime64(6, 'UTC')",
    _MICROSECONDS, "toString(toUnixTimestamp64Micro({0}))", read="{0}::text", shown="_rfc3339({0}, '')",
    form=_moment(_CLOCK),
)  # fmt: skip
"""Without a time zone. ClickHouse is told that it is UTC, so that no server's own zone changes it."""


def _is_number(value: object) -> bool:
    return type(value) in (Decimal, int, float)


FINITE = "CASE WHEN {0} - {0} = 0 THEN {0} - {0} + {0} END"
"""A number as it is in JSON: without NaN and the infinities, and a zero has no sign."""


def _float(words: str, postgres: str, clickhouse: str) -> Type:
    bits = f"encode({postgres}send({FINITE}), 'hex')", "lower(hex(reverse(reinterpretAsFixedString({0}))))"
    read = f"({FINITE})::{postgres}"
    return Type(words, float, postgres, clickhouse, *bits, read=read, shown="_float({0})", fit=_is_number)


REAL = _float("a number", "float4", "Float32")
DOUBLE = _float("a number", "float8", "Float64")
"""wal2json has NULL for NaN and the infinities, and JSON has no words for them."""


def numeric(digits: int, scale: int) -> Type:
    """`numeric(digits, scale)`, digit by digit. wal2json has NULL for NaN."""
    if not 0 <= scale <= digits <= EXACT_DIGITS_MAX or digits < 1:
        raise ValueError(f"numeric({digits}, {scale}): 1 to {EXACT_DIGITS_MAX} digits, 0 to all of them a fraction")

    def fit(value: object) -> bool:
        if type(value) is int:
            return len(str(abs(value))) <= digits - scale or value == 0
        if not isinstance(value, Decimal) or not value.is_finite():
            return False
        _, written, exponent = value.as_tuple()
        beyond = -int(exponent) - scale  # digits that there is no room for, unless they are zeros
        return not (beyond > 0 and any(written[-beyond:])) and (not value or value.adjusted() < digits - scale)

    return Type(
        f"a number of {digits} digits, {scale} of them a fraction",
        Decimal,
        "numeric",
        f"Decimal({digits}, {scale})",
        f"round(({FINITE}), {scale})::text",
        f"toDecimalString({{0}}, {scale})",
        read=FINITE,
        declared=f"numeric({digits},{scale})",
        shown="_exactly({0})",
        limits=f"min_scale({{0}}) <= {scale} AND abs({{0}}) < 1e{digits - scale}",
        fit=fit,
    )


def decimal(digits: int, scale: int) -> Type:
    """An exact fraction. In PostgreSQL its expression counts units of the last digit: 1.25 is 125 at a scale of 2."""
    units = f"toInt128(toDecimal128({{0}}, {scale}) * {10**scale})"
    return Type("a number", float, "numeric", f"Decimal({digits}, {scale})", "{0}", f"toString({units})")


_NOT_AS_TEXT = {
    **dict.fromkeys(("smallint", "int2", "integer", "int", "int4", "bigint", "int8", "oid"), "BIGINT"),
    **dict.fromkeys(("numeric", "decimal"), "numeric(38, 10), or with as many digits as it needs"),
    **dict.fromkeys(("real", "float4"), "REAL"),
    **dict.fromkeys(("double precision", "float8"), "DOUBLE"),
    **dict.fromkeys(("boolean", "bool"), "BOOLEAN"),
    "bytea": "BYTEA",
}
"""Types that wal2json does not print as text, and what they are declared as."""


def as_text(postgres: str) -> Type:
    """Any other type, such as `interval`, `inet` or `text[]`, by its name in PostgreSQL: its text."""
    if own := _NOT_AS_TEXT.get(re.sub(r"\(.*\)$", "", postgres).strip().lower()):
        raise ValueError(f"as_text({postgres!r}): such a column is declared as {own}")
    return _textual(postgres, postgres, WRITTEN, WRITTEN)
