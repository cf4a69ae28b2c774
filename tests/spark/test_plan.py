"""A range in slices, without a server: where it is cut, and how far it is."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from enrichment import Slice
from enrichment.history.pages import cuts
from replicator.contracts.stores import Task
from replicator.delivery.backfill import BackfillProgress
from replicator.operations.page.beside import Running, running
from replicator_spark.backfill.plan import EVENTS_A_SLICE, MOST_SLICES, Plan, begun, kept, usual_slices

NINE = datetime(2026, 1, 8, 9, tzinfo=UTC)


@given(some.lists(some.integers(1, 1000), max_size=200), some.integers(1, 50))
def test_slices_are_of_about_one_size(counts: list[int], most: int) -> None:
    """No more than asked for, in order, each at least its share; only the last may be smaller."""
    spans = [(count, str(number)) for number, count in enumerate(counts)]
    bounds = [0, *map(int, cuts(spans, most)), len(counts)]
    sizes = [sum(counts[low:high]) for low, high in pairwise(bounds)]
    assert len(sizes) <= most
    assert bounds == sorted(bounds)
    share = sum(counts) / most
    assert all(share <= size < share + 1000 for size in sizes[:-1])
    assert sum(counts) == sum(sizes)


@pytest.mark.parametrize(
    ("events", "slices"), [(0, 1), (1, 1), (EVENTS_A_SLICE, 1), (EVENTS_A_SLICE + 1, 2), (10**10, MOST_SLICES)]
)
def test_how_many_slices_there_are(events: int, slices: int) -> None:
    """One for each 250,000 events, within bounds."""
    assert slices == usual_slices(events)


def test_a_plan_is_kept_as_text() -> None:
    """With the places of slices that have begun; those that are done are not left."""
    plan = begun([Slice(start=NINE, end=NINE.replace(hour=10), place=str(number)) for number in range(3)], 30)
    assert [0, 1, 2] == plan.left
    reached = BackfillProgress(place="there", events=7, total=30)
    plan.shares[1] = msgspec.structs.replace(plan.shares[1], reached=reached, done=True)
    again = msgspec.json.decode(kept(plan), type=Plan)
    assert plan == again
    assert [0, 2] == again.left
    assert (7, 30) == (again.written.events, again.written.total)


def test_the_page_shows_it_as_any_backfill() -> None:
    """Its parts together, by its own name."""
    plan = begun([Slice(start=NINE, end=NINE.replace(hour=10), place=str(number)) for number in range(3)], 30)
    reached = BackfillProgress(place="x", events=6, total=30)
    plan.shares[1] = msgspec.structs.replace(plan.shares[1], reached=reached)
    [shown] = running([Task("spark backfill a b http,redis", kept(plan), 100.0)], 101.0)
    assert Running("spark backfill into http,redis", "a to b", 6, 30, None) == shown
