"""Counts are wrong only if no order of events explains them, and an event was not counted only if it had its time."""

from __future__ import annotations

import pytest

from replicator.reconcile.recheck import recheck_counts, stray_counts, unseen, wrong_counts
from tests.support.ledgers import Counted, Passing, Place, event


async def test_counts_may_be_anything_in_between() -> None:
    """From what was there before the slot passed to what is there afterwards."""
    source = Place([event(number, key=number % 3) for number in range(30)])
    slot = Passing(lambda: source.rows.extend(event(number, key=1) for number in range(30, 33)))
    counted = Counted({0: 10, 1: 12, 2: 11, 7: 1})
    wrong = await recheck_counts(source, counted, slot, [0, 1, 2, 7])
    assert ["2 has 11 instead of 10", "7 has 1 instead of 0"] == list(map(str, wrong))
    assert all(one.found > one.most for one in wrong)
    counted.found[1] = 14
    slot = Passing()
    [one] = await recheck_counts(source, counted, slot, [1])
    assert "1 has 14 instead of 13" == str(one)
    counted.found[1] = 12
    [one] = await recheck_counts(source, counted, slot, [1])
    assert ("1 has 12 instead of 13", False) == (str(one), one.found > one.most)


@pytest.mark.parametrize("count", range(2, 7))
async def test_counts_may_fall_meanwhile(count: int) -> None:
    """Rows were deleted: a count is right that is between what there was and what there is."""
    source = Place([event(number, key=1) for number in range(5)])
    slot = Passing(lambda: source.rows.__delitem__(slice(2)))
    wrong = await recheck_counts(source, Counted({1: count}), slot, [1])
    assert ([] if count in range(3, 6) else [f"1 has {count} instead of 3 to 5"]) == list(map(str, wrong))


async def test_every_key_of_the_source_is_looked_at() -> None:
    """One that only the source has, and one that differs. One that the source no longer has is no difference."""
    source = Place([event(number, key=key) for number, key in enumerate((1, 1, 2, 3))])
    counted = Counted({1: 2, 2: 5, 9: 1})
    found = [str(one) async for wrong in wrong_counts(source, counted, Passing()) for one in wrong]
    assert ["2 has 5 instead of 1", "3 has 0 instead of 1"] == found


async def test_keys_of_which_the_source_has_no_row() -> None:
    """Each with a count is one, unless a row of it is there by the time that the slot has passed; and each once."""
    source = Place([event(1, key=1)])
    slot = Passing(lambda: source.rows.append(event(2, key=8)))
    known: set[int] = set()
    assert [] == [wrong async for some in wrong_counts(source, Counted({1: 1}), slot, known) for wrong in some]
    strays = stray_counts(source, Counted({9: 2, 7: 0, 1: 5, 8: 1, 6: -1}), slot, known)
    assert ["9 has 2 instead of 0", "6 has -1 instead of 0"] == [str(wrong) async for some in strays for wrong in some]


async def test_what_is_brought_meanwhile_is_counted() -> None:
    """With a slot to wait for, an event that was not counted gets a second look."""
    source, counted = Place([event(number, number) for number in range(5)]), Counted({}, seen=[0, 1])
    assert [[2, 3, 4]] == [ids async for ids in unseen(source, counted, 0, 10)]
    slot = Passing(lambda: counted.seen.add(3))
    assert [[2, 4]] == [ids async for ids in unseen(source, counted, 0, 10, slot)]
    assert [100] == slot.waited_for
