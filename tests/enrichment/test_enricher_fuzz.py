"""Rows of any columns and values: an event or a dead letter at its position, and the rows beside it go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from enrichment import EngagementEnricher
from enrichment.contract import OWN, EnrichmentSettings
from replicator.contracts.events import Column, Position, Row

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
NAMES = [field.column for field in OWN]

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
    columns, identity = (_columns(draw(st.one_of(ANY_COLUMNS, DAMAGED))) for _ in range(2))
    return Row(draw(st.sampled_from("IIIUDT")), schema, table, columns, identity)


def _columns(pairs: Sequence[tuple[str, Any]]) -> list[Column]:
    return [Column(name, value) for name, value in pairs]


def insert(**values: Any) -> Row:
    """An ordinary event."""
    return Row("I", "public", "engagement_events", _columns([*(GOOD | values).items()]))


class Database:
    """Knows one content; looks only for what can be one."""

    async def rows(self, _: str, parameters: Mapping[str, Any]) -> list[tuple[int, str, int]]:
        """As `enrichment.database.Database`."""
        assert all(-(2**63) <= content_id < 2**63 for content_id in parameters["ids"])
        return [(1, "video", 300)] if 1 in parameters["ids"] else []


def enricher() -> EngagementEnricher:
    """On a database of one content."""
    made = EngagementEnricher("", EnrichmentSettings.model_validate({"content_cache_size": 100}))
    made._contents._database = Database()  # type: ignore[assignment]  # noqa: SLF001  no server needed
    return made


@given(st.lists(rows() | st.builds(insert, id=st.just(1)), max_size=8))
@example([Row("I", "public", "engagement_events", _columns([*GOOD.items(), ("id", "x")]))])
@example([Row("I", "public", "engagement_events", _columns([("id", "x"), *GOOD.items()]))])
@example([insert(id=True), insert(id=1)])
@example([insert(), Row("I", "public", "engagement_events", _columns([*GOOD.items(), ("user_id", 2**64)]))])
@example([Row("I", "public", "engagement_events", _columns([*(GOOD | {"id": "x"}).items(), ("id", 5)]))])
@example([Row("I", "public", "engagement_events", _columns([*(GOOD | {"user_id": 2**64}).items(), ("user_id", 5)]))])
async def test_any_rows(batch: list[Row]) -> None:
    """Every insert is an event or a dead letter, in its place; good ones are events whatever stands beside them."""
    for ordinal, row in enumerate(batch, 1):
        row.commit_lsn, row.ordinal = 5, ordinal
    made = enricher()
    enriched = await made.enrich(batch)
    events = {Position(event.commit_lsn, event.ordinal): event for event in enriched.events}
    letters = {letter.position: letter for letter in enriched.refused}
    assert not events.keys() & letters.keys()
    assert sorted(events) == list(events)
    for row in batch:
        at = Position(row.commit_lsn, row.ordinal)
        ours = (row.schema, row.table) == ("public", "engagement_events")
        assert (ours and row.action == "I") <= (at in events or at in letters)
        if _is_good(row) or at in events:
            _assert_told(row, json.loads(events[at].json))
    for letter in letters.values():
        assert letter.stage == "row"
        assert letter.reason.startswith(("public.", "other.", "."))
        again = await made.restore([letter])  # what a replay does
        row = batch[letter.replay_position.ordinal - 1]
        if len({column.name for column in row.columns}) == len(row.columns):
            assert [] == again.events
            assert [letter] == again.refused


def _is_good(row: Row) -> bool:
    """As text: True is no number, though it equals 1."""
    return repr(row) == repr(structs.replace(insert(id=1), commit_lsn=row.commit_lsn, ordinal=row.ordinal))


def _assert_told(row: Row, fields: dict[str, Any]) -> None:
    """The event has the row's values; of two columns with a name, which wal2json never sends, those of one."""
    for name, told in (("id", "event_id"), *((name, name) for name in NAMES[1:] if name != "event_ts")):
        held = [(type(column.value), column.value) for column in row.columns if column.name == name]
        assert (type(fields[told]), fields[told]) in held


@pytest.mark.parametrize("name", NAMES)
async def test_a_bad_row_among_good_ones(name: str) -> None:
    """Its neighbours, before and after it, are events; it is kept whole, with its position."""
    bad = insert(**{name: Decimal("9" * 5_000)})
    batch = [insert(id=1), bad, insert(id=2)]
    for ordinal, row in enumerate(batch, 1):
        row.commit_lsn, row.ordinal = 5, ordinal
    enriched = await enricher().enrich(batch)
    assert [(1, 1), (3, 2)] == [(event.ordinal, event.id) for event in enriched.events]
    [letter] = enriched.refused
    assert (5, 2) == letter.position
    assert letter.reason.startswith(f"public.engagement_events.{name} is not ")
    assert b"9" * 5_000 in letter.payload
    assert "999" not in letter.reason
