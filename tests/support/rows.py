"""Rows of any columns and values, as hypothesis makes them, and an enricher that has no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from enrichment import EVENT, StreamEnricher, Tables, configured
from enrichment.events.codec import codec_of
from replicator.contracts.events import Column, Row

GOOD: dict[str, Any] = {
    "id": 17,
    "content_id": 1,
    "user_id": 999,
    "event_type": "play",
    "event_ts": "2026-01-08 14:21:52.123456+00",
    "duration_ms": 7000,
    "device": "web",
    "raw_payload": None,
}
EVENT_TABLES = configured()
"""Of the engagement stream."""
CODEC = codec_of(EVENT_TABLES)
NAMES = [field.column for field in EVENT_TABLES.own]

NUMBERS = st.integers() | st.sampled_from([2**63, -(2**63), 2**63 - 1, -(2**63) - 1, 10**4_299, 0, -1, 2**53 + 1])
FRACTIONS = st.decimals(allow_nan=False, allow_infinity=False).filter(
    lambda n: not str(n).lstrip("-").isdigit()
) | st.sampled_from([Decimal("9" * 5_000), Decimal("1e400")])
TIMES = st.sampled_from(
    ["infinity", "-infinity", "12026-01-08 14:21:52.5+00", "0044-03-15 12:00:00+00 BC", "2026-01-08", "24:00", "",
     "2026-01-08 14:21:52", "2026-01-08 14:21:52+01", "2026-W01-1 00:00:00+00", "9999-99-99 99:99:99+00", "٢٠٢٦-01-08"]
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | NUMBERS | FRACTIONS | TIMES | st.text() | st.lists(st.integers(), max_size=2)
)
ANY_COLUMNS = st.lists(st.tuples(st.sampled_from([*NAMES, "raw_payload"]) | st.text(max_size=5), VALUES), max_size=12)
DAMAGED = st.builds(lambda wrong: list((GOOD | wrong).items()), st.dictionaries(st.sampled_from(NAMES), VALUES))
TABLES = st.sampled_from(
    [("public", "engagement_events")] * 3 + [("public", "content"), ("other", "content"), ("", "")]
)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A row that wal2json could send, of ours or of somebody else's table, with anything in it."""
    schema, table = draw(TABLES)
    columns, identity = (columns_of(draw(st.one_of(ANY_COLUMNS, DAMAGED))) for _ in range(2))
    return Row(draw(st.sampled_from("IIIUDT")), schema, table, columns, identity)


def columns_of(pairs: Sequence[tuple[str, Any]]) -> list[Column]:
    """Columns of these names and values."""
    return [Column(name, value) for name, value in pairs]


def insert(**values: Any) -> Row:
    """An ordinary event."""
    return Row("I", "public", "engagement_events", columns_of([*(GOOD | values).items()]))


class Database:
    """Knows one content; looks only for what can be one."""

    async def rows(self, _: str, parameters: Mapping[str, Any]) -> list[tuple[int, str, int]]:
        """As `enrichment.database.Database`."""
        assert all(-(2**63) <= content_id < 2**63 for content_id in parameters["ids"])
        return [(1, "video", 300)] if 1 in parameters["ids"] else []


def enricher() -> StreamEnricher:
    """On a database of one content."""
    made = StreamEnricher("", Tables(EVENT), 100)
    made._contents[0]._database = Database()  # type: ignore[assignment]  # noqa: SLF001  no server needed
    return made
