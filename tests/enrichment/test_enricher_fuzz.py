"""Rows of any columns and values: an event or a dead letter at its position, and the rows beside it go on."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from replicator.contracts.events import Position, Row
from tests.support.rows import GOOD, NAMES, columns_of, enricher, insert, rows


@given(st.lists(rows() | st.builds(insert, id=st.just(1)), max_size=8))
@example([Row("I", "public", "engagement_events", columns_of([*GOOD.items(), ("id", "x")]))])
@example([Row("I", "public", "engagement_events", columns_of([("id", "x"), *GOOD.items()]))])
@example([insert(id=True), insert(id=1)])
@example([insert(), Row("I", "public", "engagement_events", columns_of([*GOOD.items(), ("user_id", 2**64)]))])
@example([Row("I", "public", "engagement_events", columns_of([*(GOOD | {"id": "x"}).items(), ("id", 5)]))])
@example([Row("I", "public", "engagement_events", columns_of([*(GOOD | {"user_id": 2**64}).items(), ("user_id", 5)]))])
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
