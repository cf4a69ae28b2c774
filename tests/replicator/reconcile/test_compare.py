"""The comparison without servers: what differs is found however it is distributed."""

from __future__ import annotations

import random

import pytest

from enrichment.ledger import _moment
from replicator.contracts.ledger import Digest
from replicator.reconcile import compare
from replicator.reconcile.compare import Comparison, candidate_ids, chunk_by_size, differing, prime_from
from tests.support.ledgers import Place, event

START_US, END_US = 0, 1_000_000_000


async def found_by(source: Place, destination: Place) -> list[int]:
    """All candidates, in order."""
    comparison = Comparison(source, destination, START_US, END_US)
    found: list[int] = []
    async for ids, start_us, end_us in comparison.candidates():
        assert START_US <= start_us < end_us <= END_US
        assert len(ids) <= compare.CHUNK
        found += ids
    return sorted(found)


@pytest.mark.parametrize("spread", [1, 1_000, 900_000_000], ids=["one moment", "a millisecond", "all of the range"])
@pytest.mark.parametrize("cheap", [True, False])
async def test_what_differs_is_found(spread: int, *, cheap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the events lie in time, with never more of them in memory than allowed."""
    monkeypatch.setattr(compare, "FETCHED_EVENTS", 500)
    monkeypatch.setattr(compare, "PART_EVENTS", 50)
    monkeypatch.setattr(compare, "QUERY_EVENTS", 1_000)
    chance = random.Random(7)  # noqa: S311  not a secret
    rows = [event(number, chance.randrange(spread)) for number in range(5_000)]
    wrong = {17: rows[17]._replace(hash=1), 18: event(18, rows[18].ts_us + 1)}
    there = [wrong.get(row.id, row) for row in rows if row.id not in {4_000, 4_001}] + [event(9_999, spread // 2)]
    source, destination = Place(rows, slices_are_cheap=cheap), Place(there)
    assert [17, 18, 4_000, 4_001, 9_999] == sorted({*await found_by(source, destination)})
    assert max(source.largest, destination.largest) <= 600
    pieces = sum(len(part.buckets) > 1 and part.modulus == 1 for part in source.asked)
    assert pieces >= 5 or not cheap or spread < 5


async def test_everything_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty destination: all ids, in chunks."""
    monkeypatch.setattr(compare, "FETCHED_EVENTS", 500)
    monkeypatch.setattr(compare, "PART_EVENTS", 50)
    monkeypatch.setattr(compare, "CHUNK", 100)
    rows = [event(number, number % 3) for number in range(3_000)]
    source = Place(rows)
    assert list(range(3_000)) == await found_by(source, Place([]))
    assert source.largest <= 600
    assert list(range(3_000)) == await found_by(Place([]), Place(rows))


async def test_equal_asks_for_digests_only() -> None:
    """Each side once; outside the range nothing is looked at."""
    rows = [event(number, number) for number in range(100)]
    source, destination = Place([*rows, event(500, END_US)]), Place([*rows, event(501, -1)])
    assert [] == await found_by(source, destination)
    assert (1, 1) == (len(source.asked), len(destination.asked))
    assert [] == await found_by(Place([]), Place([]))


def test_candidates_are_all_that_differs() -> None:
    """Missing, different, under another key, extra."""
    wanted = [event(1), event(2), event(3), event(4)]
    found = [event(1), event(2, value=9), event(4, key=2), event(5)]
    assert [2, 3, 4, 5] == candidate_ids(wanted, found)


def test_digests_differ_in_number_or_sum() -> None:
    """The larger number of events tells what it costs to look at them."""
    wanted = {1: Digest(5, 50), 2: Digest(1, 1), 3: Digest(2, 2)}
    found = {1: Digest(5, 50), 2: Digest(1, 2), 4: Digest(7, 7)}
    assert {2: 1, 3: 2, 4: 7} == differing(wanted, found)


def test_chunks_are_full_and_no_fuller() -> None:
    """One that is too large for any stands alone."""
    assert [(1, 2), (3,), (4, 5)] == list(chunk_by_size({1: 4, 2: 6, 3: 99, 4: 1, 5: 1}, 10))
    assert [] == list(chunk_by_size({}, 10))


def test_primes() -> None:
    """At least 2."""
    assert [2, 2, 3, 5, 11, 101] == [prime_from(number) for number in (0, 2, 3, 4, 8, 98)]


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "J2440588 00:00:00.000000+00"),
        (-1, "J2440587 23:59:59.999999+00"),
        (253_402_300_800_000_000, "J5373485 00:00:00.000000+00"),
    ],
)
def test_moments_for_postgresql(us: int, text: str) -> None:
    """To the microsecond, and past the year 9999."""
    assert text == _moment(us)
