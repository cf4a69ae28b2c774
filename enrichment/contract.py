"""The engagement event: every field once, and how the metrics are computed.

What reads a row, encodes an event, selects from the tables, creates the table in ClickHouse and compares the two is
made from `EVENT`. A new column of `engagement_events` is one more line here. Another stream is a file like this one,
named in REPLICATOR_STREAM.
"""

from __future__ import annotations

import msgspec

from replicator.contracts.fields import BIGINT, TEXT, TIMESTAMPTZ, Derived, Dimension, Field, Role, Stream, decimal

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

EVENT = Stream(
    "engagement",
    "public.engagement_events",
    fields=(
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
    ),
    dimensions=(Dimension("public.content", key="content_id"),),
    clickhouse_table="events_enriched",
    redis_name="content",
)
