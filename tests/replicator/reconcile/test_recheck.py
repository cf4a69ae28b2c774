"""The second look: nothing is reported that may still be on its way."""

from __future__ import annotations

import pytest

from replicator.contracts.events import Lsn
from replicator.reconcile import recheck as module
from replicator.reconcile.compare import Candidates
from replicator.reconcile.recheck import diff, recheck
from tests.support.ledgers import Passing, Place, event


def test_missing_different_extra() -> None:
    """By identity: under another key an event is missing and extra."""
    wanted = [event(1), event(2), event(3), event(4)]
    found = [event(1), event(2, value=9), event(4, key=2), event(5)]
    verdict = diff(wanted, found)
    assert [3, 4] == [row.id for row in verdict.missing]
    assert [2] == [row.id for row in verdict.different]
    assert [4, 5] == [row.id for row in verdict.extra]
    assert not any(diff(wanted, [row._replace(lsn=7) for row in wanted]))


async def test_what_is_under_way_is_no_difference() -> None:
    """The destination gets it before it is asked, since the slot was waited for."""
    destination = Place([event(1)])
    slot = Passing(lambda: destination.rows.append(event(2)))
    verdict, read_at = await recheck(Place([event(1), event(2)]), destination, slot, Candidates([1, 2], 0, 1))
    assert not any(verdict)
    assert ([100], 100) == (slot.waited_for, read_at)


async def test_what_was_committed_meanwhile_is_not_extra() -> None:
    """The destination has it before the source was asked first: it is asked again."""
    source = Place([event(1)])
    slot = Passing(lambda: source.rows.append(event(2)))
    destination = Place([event(1), event(2), event(3)])
    verdict, _ = await recheck(source, destination, slot, Candidates([1, 2, 3], 0, 1))
    assert ([], [], [3]) == (verdict.missing, verdict.different, [row.id for row in verdict.extra])
    assert slot.certain


async def test_an_open_transaction_makes_extra_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the one that brings it."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    source = Place([])
    source.open_transaction = 49
    slot = Passing()
    verdict, _ = await recheck(source, Place([event(3)]), slot, Candidates([3], 0, 1))
    assert [3] == [row.id for row in verdict.extra]
    assert not slot.certain


async def test_a_row_that_changes_between_two_looks_is_no_difference() -> None:
    """Nor one that is gone, or has another time: nothing is sent again for it, and nothing deleted."""
    source = Place([event(1), event(2), event(3), event(4)])
    destination = Place([event(1), event(2), event(3), event(4)])
    changes = [
        [event(1, value=7), event(2), event(4, value=1)],
        [event(1, value=8), event(2, ts_us=1), event(4, value=1)],
    ]

    def change() -> None:
        source.rows = destination.rows = changes.pop(0) if changes else source.rows

    verdict, _ = await recheck(source, destination, Passing(change), Candidates([1, 2, 3, 4], 0, 1))
    assert not any(verdict)


async def test_a_row_that_never_rests_differs_and_is_not_extra() -> None:
    """To send it again harms nobody; it must not be deleted."""
    turns = iter(range(2, 100))

    class Restless(Place):
        async def lsn(self) -> Lsn:
            self.rows = destination.rows = [event(1, key=next(turns))]
            return await super().lsn()

    destination = Place([event(1)])
    verdict, _ = await recheck(Restless([event(1)]), destination, Passing(), Candidates([1], 0, 1))
    assert ([1], [], []) == ([row.id for row in verdict.missing], verdict.different, verdict.extra)
