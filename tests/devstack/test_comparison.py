"""The demo's comparison: it must see every kind of difference, or the demo proves nothing."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from devstack.comparison import Verdict, compare_events, compare_redis
from devstack.demo import report

EXPECTED: dict[int, dict[str, Any]] = {
    1: {"event_id": 1, "content_id": 7, "event_ts": "2026-01-08T14:21:52.000001Z", "engagement_pct": 0},
    2: {"event_id": 2, "content_id": 7, "event_ts": "2026-01-08T14:21:53.000000Z", "engagement_pct": None},
}
REFERENCE = Verdict("PostgreSQL", 2, "", [])


def found(*event_ids: int, **changed: Any) -> list[dict[str, Any]]:
    """What a sink holds: copies of these events, with fields of its own and some of them changed."""
    return [EXPECTED[event_id] | {"_lsn": 5} | changed for event_id in event_ids]


def test_a_sink_that_has_the_same_events_agrees() -> None:
    """Order, more columns, repeats and the way that a number is written don't matter."""
    same = found(2, 1, 2)
    same[1]["engagement_pct"] = Decimal("0.00")
    verdict = compare_events("API", EXPECTED, same)
    assert (2, []) == (verdict.events, verdict.differences)
    assert 0 == report([REFERENCE, verdict])


@pytest.mark.parametrize(
    ("events", "difference"),
    [
        (found(1), "event 2 is missing"),
        ([*found(1, 2), {"event_id": 3}], "event 3 is not in PostgreSQL"),
        ([*found(1, 2), *found(2, engagement_pct=Decimal("0.01"))], "event 2: engagement_pct is 0.01 and not None"),
        ([*found(1), {"event_id": 2, "content_id": 7, "event_ts": "2026-01-08T14:21:53.000000Z"}],
         "event 2: engagement_pct is missing and not None"),
    ],
)  # fmt: skip
def test_a_sink_that_differs_fails_the_demo(
    events: list[dict[str, Any]], difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lost, an invented, a changed event (even if a right copy is there too), a lost field: named, exit code 1."""
    verdict = compare_events("API", EXPECTED, events)
    assert [difference] == verdict.differences
    assert 1 == report([REFERENCE, verdict])
    assert f"API: {difference}" in capsys.readouterr().out


def test_redis_is_compared_by_content() -> None:
    """Each content's count, and its newest event by time."""
    last = {7: EXPECTED[2]}
    assert [] == compare_redis(EXPECTED, {7: 2}, last).differences
    assert ["content 7 counts 3 and not 2"] == compare_redis(EXPECTED, {7: 3}, last).differences
    moved = ["content 7 counts 0 and not 2", "content 8 counts 2 and not 0"]
    assert moved == compare_redis(EXPECTED, {8: 2}, last).differences
    assert compare_redis(EXPECTED, {7: 2}, {7: EXPECTED[1]}).differences
    assert compare_redis(EXPECTED, {7: 2}, {}).differences


def test_nothing_at_all_is_no_success() -> None:
    """If PostgreSQL has no event, the demo has shown nothing."""
    assert 1 == report([Verdict("PostgreSQL", 0, "", []), Verdict("API", 0, "", [])])
