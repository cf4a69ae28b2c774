"""The engagement event: every field once, and how the metrics are computed.

What reads a row, encodes an event, selects from the tables, creates the table in ClickHouse and compares the two is
made from `EVENT`. A new column of `engagement_events` is one more line here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Final

import msgspec
from annotated_types import MinLen
from pydantic import BeforeValidator
from pydantic import Field as PydanticField

from replicator.contracts.errors import SettingsError
from replicator.contracts.fields import BIGINT, TEXT, TIMESTAMPTZ, Contract, Derived, Field, Role, decimal
from replicator.contracts.settings import Settings, load, split

SCHEMA: Final = "public"
EVENTS_TABLE: Final = "engagement_events"
EVENTS = f"{SCHEMA}.{EVENTS_TABLE}"
CONTENT_TABLE: Final = "content"
CONTENT = f"{SCHEMA}.{CONTENT_TABLE}"

EXACT_FLOAT_LIMIT = 10**15
"""Any decimal of up to 15 digits survives as a float, and the shortest text that gives the float back is that decimal
again. From here on the decimal is written digit by digit."""


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
    """`number / parts` as JSON shows it; `parts` is 100 or 1000."""
    if -EXACT_FLOAT_LIMIT < number < EXACT_FLOAT_LIMIT:
        return number / parts
    whole, fraction = divmod(abs(number), parts)
    digits = str(parts + fraction)[1:].rstrip("0") or "0"
    return msgspec.Raw(f"{'-' if number < 0 else ''}{whole}.{digits}".encode())


SECONDS = Derived(
    engagement_seconds,
    of=("duration_ms",),
    shortcut="duration_ms / 1000 if 0 <= duration_ms < 10**15",
    postgres="{duration_ms}",
)

PCT = Derived(
    engagement_pct,
    of=("duration_ms", "length_seconds"),
    shortcut="(duration_ms + 5 * length_seconds) // (10 * length_seconds) / 100"
    " if length_seconds > 0 and 0 <= duration_ms < 10**15",
    postgres="(round({duration_ms} / 1000.0 / nullif({length_seconds}, 0), 2) * 100)::bigint",
)

EVENT = Contract((
    Field("event_id", BIGINT, column="id", role=Role.IDENTITY),
    Field("content_id", BIGINT, column="content_id", role=Role.KEY),
    Field("user_id", BIGINT, column="user_id"),
    Field("event_type", TEXT.low_cardinality(), column="event_type"),
    Field("event_ts", TIMESTAMPTZ, column="event_ts", role=Role.TIME),
    Field("duration_ms", BIGINT.nullable(), column="duration_ms"),
    Field("device", TEXT.nullable().low_cardinality(), column="device"),
    Field("content_type", TEXT.nullable().low_cardinality(), joined="content_type"),
    Field("length_seconds", BIGINT.nullable(), joined="length_seconds"),
    Field("engagement_seconds", decimal(18, 3).nullable(), derived=SECONDS),
    Field("engagement_pct", decimal(18, 2).nullable(), derived=PCT),
))  # fmt: skip

OWN = tuple(field for field in EVENT.fields if field.column)
"""The fields that are columns of `engagement_events`."""

JOINED = tuple(field for field in EVENT.fields if field.joined)
"""The fields that are columns of `content`, which an event finds by its `KEY`."""

IDENTITY, KEY, TIME = (EVENT.field(role) for role in (Role.IDENTITY, Role.KEY, Role.TIME))

NEEDED: Final[Mapping[str, Mapping[str, str]]] = {
    CONTENT_TABLE: {KEY.column: KEY.type.postgres, **{field.joined: field.type.postgres for field in JOINED}},
    EVENTS_TABLE: {field.column: field.type.postgres for field in OWN},
}
"""Table to column to type."""


def _columns() -> Iterator[str]:
    """As REPLICATOR_COLUMNS names them."""
    for table in (EVENTS_TABLE, CONTENT_TABLE):
        yield from (column if table == EVENTS_TABLE else f"{table}.{column}" for column in NEEDED[table])


def _renamed(value: object) -> object:
    """`device=dev, content.length_seconds=length`: table to column to its name there."""
    if not isinstance(value, str):
        return value
    found: dict[str, dict[str, str]] = {}
    for pair in split(value):
        ours, _, theirs = pair.partition("=")
        table, _, column = ours.rpartition(".")
        table = table or EVENTS_TABLE
        if column not in NEEDED.get(table, {}):
            raise ValueError(f"{ours} is no column that events are made of; they are {', '.join(_columns())}")
        if found.setdefault(table, {}).setdefault(column, theirs) != theirs:
            raise ValueError(f"{ours} has two names, {found[table][column]} and {theirs}")
    for table, names in found.items():
        for theirs, count in Counter(names.get(column, column) for column in NEEDED[table]).items():
            if count > 1:
                raise ValueError(f"{theirs} of {table} would be {count} columns at once; a swap is two pairs: a=b,b=a")
    return found


class EnrichmentSettings(Settings):
    """Options of the enrichment."""

    content_cache_size: int = PydanticField(
        100_000,  # some 200 bytes each: 20 MB; a catalog that fits is never looked up again
        ge=1,
        le=100_000_000,
        description="how many contents are kept in memory, 1 to 100000000; some 200 bytes each",
    )
    columns: Annotated[dict[str, dict[str, Annotated[str, MinLen(1)]]], BeforeValidator(_renamed)] = PydanticField(
        {}, description="names of renamed columns: device=dev, content.length_seconds=length, separated by commas"
    )


def _configured() -> Mapping[str, Mapping[str, str]]:
    with suppress(SettingsError):  # whoever makes the enricher gets it
        return load(EnrichmentSettings).columns
    return {}


RENAMED: Final = _configured()
"""Table to column to the name that it has there, where that is another one. Read once: SQL is made of it."""


def named(table: str, column: str) -> str:
    """What a column is called in its table."""
    return RENAMED.get(table, {}).get(column, column)


def rows_of(table: str, source: str = "") -> str:
    """SQL for a table, or for a part of it, with its columns under our names."""
    source = source or f"{SCHEMA}.{table}"
    if table not in RENAMED:
        return source
    listed = (f'"{_escaped(named(table, column))}" AS {column}' for column in NEEDED[table])
    hidden = "xmin, tableoid, " if table == EVENTS_TABLE else ""  # content may be a view, which has none
    return f"(SELECT {hidden}{', '.join(listed)} FROM {source})"  # noqa: S608  quoted names


def _escaped(name: str) -> str:
    return name.replace('"', '""').replace("%", "%%")
