"""The comparison without servers: what differs is found however it is distributed, and nothing is told too early."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from enrichment.ledger import _moment
from replicator.contracts.events import Lsn
from replicator.contracts.ledger import Digest, EventDigest, Slice
from replicator.contracts.stream import History
from replicator.reconcile import compare as reconcile
from replicator.reconcile.compare import (
    Comparison,
    Settled,
    Stream,
    Tally,
    differing,
    judge,
    packed,
    prime_from,
    suspects,
)

START_US, END_US = 0, 1_000_000_000


def event(number: int, ts_us: int = 0, key: int = 1, value: int = 0) -> EventDigest:
    """With a hash of everything that it is."""
    digest = hashlib.md5(f"{number} {ts_us} {key} {value}".encode(), usedforsecurity=False).digest()
    return EventDigest(number, ts_us, key, int.from_bytes(digest[:8], "big") >> 4)


class Place:
    """A `ledger.SourceLedger` in memory, as far as events go. Remembers how much was asked for at once."""

    def __init__(self, rows: Sequence[EventDigest], *, sliced: bool = True) -> None:
        self.rows = list(rows)
        self.sliced = sliced
        self.largest = 0
        self.asked: list[Slice] = []
        self.wal = 100
        self.open_transaction = 0

    def _between(self, start_us: int, end_us: int) -> list[EventDigest]:
        return [row for row in self.rows if start_us <= row.ts_us < end_us]

    def _in(self, part: Slice) -> list[tuple[int, int, EventDigest]]:
        self.asked.append(part)
        placed = (
            ((row.ts_us - part.origin_us) // part.width_us, row.id % part.modulus, row)
            for row in self._between(part.start_us, part.end_us)
        )
        return [(bucket, left, row) for bucket, left, row in placed if bucket in part.buckets]

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        """See `ledger.Ledger`."""
        times = [row.ts_us for row in self._between(start_us, end_us)]
        return len(times), min(times, default=0), max(times, default=0)

    async def by_time(self, part: Slice) -> dict[int, Digest]:
        """See `ledger.Ledger`."""
        return _digests((bucket, row) for bucket, _, row in self._in(part))

    async def by_id(self, part: Slice) -> dict[int, Digest]:
        """See `ledger.Ledger`."""
        return _digests((left, row) for _, left, row in self._in(part))

    async def held(self, part: Slice) -> list[EventDigest]:
        """See `ledger.Ledger`."""
        found = [row for _, left, row in self._in(part) if left in part.remainders]
        self.largest = max(self.largest, len(found))
        return found

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        """See `ledger.Ledger`."""
        return [row for row in self._between(start_us, end_us) if row.id in set(ids)]

    async def lsn(self) -> Lsn:
        """See `ledger.SourceLedger`."""
        return self.wal

    async def next_transaction(self) -> int:
        """See `ledger.SourceLedger`."""
        return 50

    async def oldest_transaction(self) -> int:
        """See `ledger.SourceLedger`."""
        return self.open_transaction or 51

    def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[int]]:
        """Not asked for."""
        raise NotImplementedError

    def counts(self) -> AsyncIterator[Sequence[tuple[int, int]]]:
        """Not asked for."""
        raise NotImplementedError

    async def counts_of(self, keys: Sequence[int]) -> dict[int, int]:
        """How many events each has."""
        return {key: sum(row.key == key for row in self.rows) for key in keys}

    def picked(self, ids: Sequence[int]) -> History:
        """Not asked for."""
        raise NotImplementedError


def _digests(rows: object) -> dict[int, Digest]:
    found: dict[int, Digest] = {}
    for group, row in rows:  # type: ignore[attr-defined]  # pairs
        events, total = found.get(group, Digest(0, 0))
        found[group] = Digest(events + 1, total + row.hash)
    return found


class Passing(Stream):
    """The stream, and what it does while it is waited for."""

    def __init__(self, brings: Callable[[], None] = lambda: None) -> None:
        super().__init__("", "slot", 0)
        self.waited_for: list[Lsn] = []
        self._brings = brings

    async def passed(self, lsn: Lsn) -> None:
        """At once."""
        self.waited_for.append(lsn)
        self._brings()


async def found_by(source: Place, destination: Place) -> list[int]:
    """All suspects, in order."""
    comparison = Comparison(source, destination, START_US, END_US, progress=lambda _: None)
    found: list[int] = []
    async for ids, start_us, end_us in comparison.suspects():
        assert START_US <= start_us < end_us <= END_US
        assert len(ids) <= reconcile.SETTLED
        found += ids
    return sorted(found)


# -- finding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1, 1_000, 900_000_000], ids=["one moment", "a millisecond", "all of the range"])
@pytest.mark.parametrize("sliced", [True, False])
async def test_what_differs_is_found(spread: int, *, sliced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the events lie in time, with never more of them in memory than allowed."""
    monkeypatch.setattr(reconcile, "FETCHED", 500)
    monkeypatch.setattr(reconcile, "PART_EVENTS", 50)
    monkeypatch.setattr(reconcile, "SLICE_EVENTS", 1_000)
    chance = random.Random(7)  # noqa: S311  not a secret
    rows = [event(number, chance.randrange(spread)) for number in range(5_000)]
    wrong = {17: rows[17]._replace(hash=1), 18: event(18, rows[18].ts_us + 1)}
    there = [wrong.get(row.id, row) for row in rows if row.id not in {4_000, 4_001}] + [event(9_999, spread // 2)]
    source, destination = Place(rows, sliced=sliced), Place(there)
    assert [17, 18, 4_000, 4_001, 9_999] == sorted({*await found_by(source, destination)})
    assert max(source.largest, destination.largest) <= 600
    pieces = sum(len(part.buckets) > 1 and part.modulus == 1 for part in source.asked)
    assert pieces >= 5 or not sliced or spread < 5


async def test_everything_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty destination: all ids, in chunks."""
    monkeypatch.setattr(reconcile, "FETCHED", 500)
    monkeypatch.setattr(reconcile, "PART_EVENTS", 50)
    monkeypatch.setattr(reconcile, "SETTLED", 100)
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


# -- judging -------------------------------------------------------------------------------------------------------


def test_missing_different_extra() -> None:
    """By identity: under another key an event is missing and extra."""
    wanted = [event(1), event(2), event(3), event(4)]
    found = [event(1), event(2, value=9), event(4, key=2), event(5)]
    verdict = judge(wanted, found)
    assert [3, 4] == verdict.missing
    assert [2] == [row.id for row in verdict.different]
    assert [4, 5] == [row.id for row in verdict.extra]
    assert [2, 3, 4, 5] == suspects(wanted, found)
    assert not judge(wanted, [row._replace(lsn=7) for row in wanted])


async def test_what_is_under_way_is_no_difference() -> None:
    """The destination gets it before it is asked, since the stream was waited for."""
    destination = Place([event(1)])
    stream = Passing(lambda: destination.rows.append(event(2)))
    verdict, lsn = await Settled(Place([event(1), event(2)]), destination, stream, 0).look([1, 2], 0, 1)
    assert not verdict
    assert ([100], 100) == (stream.waited_for, lsn)


async def test_what_was_committed_meanwhile_is_not_extra() -> None:
    """The destination has it before the source was asked first: it is asked again."""
    source = Place([event(1)])
    stream = Passing(lambda: source.rows.append(event(2)))
    settled = Settled(source, Place([event(1), event(2), event(3)]), stream, 0)
    verdict, _ = await settled.look([1, 2, 3], 0, 1)
    assert ([], [], [3]) == (verdict.missing, verdict.different, [row.id for row in verdict.extra])
    assert settled.certain


async def test_an_open_transaction_makes_extra_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the one that brings it."""
    monkeypatch.setattr(reconcile, "LOOK_SECONDS", 0.0)
    source = Place([])
    source.open_transaction = 49
    settled = Settled(source, Place([event(3)]), Passing(), 0)
    verdict, _ = await settled.look([3], 0, 1)
    assert [3] == [row.id for row in verdict.extra]
    assert not settled.certain


class Counted:
    """`ledger.EventCounter` in memory."""

    def __init__(self, counts: dict[int, int]) -> None:
        self.found = counts

    async def counts(self, keys: Sequence[int]) -> list[int]:
        """See `ledger.EventCounter`."""
        return [self.found.get(key, 0) for key in keys]

    async def keys(self) -> AsyncIterator[Sequence[int]]:
        """See `ledger.EventCounter`."""
        yield list(self.found)

    async def unseen(self, ids: Sequence[int]) -> list[int]:
        """The odd ones."""
        return [one for one in ids if one % 2]


async def test_counts_may_be_anything_in_between() -> None:
    """From what was there before the stream passed to what is there afterwards."""
    source = Place([event(number, key=number % 3) for number in range(30)])
    stream = Passing(lambda: source.rows.extend(event(number, key=1) for number in range(30, 33)))
    counted = Counted({0: 10, 1: 12, 2: 11, 7: 1})
    wrong = await reconcile.wrong_counts(source, counted, stream, [0, 1, 2, 2, 7])
    assert ["2 has 11 instead of 10", "7 has 1 instead of 0"] == list(map(str, wrong))
    assert all(one.above for one in wrong)
    counted.found[1] = 14
    stream = Passing()
    [one] = await reconcile.wrong_counts(source, counted, stream, [1])
    assert "1 has 14 instead of 13" == str(one)
    counted.found[1] = 12
    [one] = await reconcile.wrong_counts(source, counted, stream, [1])
    assert ("1 has 12 instead of 13", False) == (str(one), one.above)


# -- pieces --------------------------------------------------------------------------------------------------------


def test_digests_differ_in_number_or_sum() -> None:
    """The larger number of events tells what it costs to look at them."""
    wanted = {1: Digest(5, 50), 2: Digest(1, 1), 3: Digest(2, 2)}
    found = {1: Digest(5, 50), 2: Digest(1, 2), 4: Digest(7, 7)}
    assert {2: 1, 3: 2, 4: 7} == differing(wanted, found)


def test_packs_are_full_and_no_fuller() -> None:
    """One that is too large for any stands alone."""
    assert [(1, 2), (3,), (4, 5)] == list(packed({1: 4, 2: 6, 3: 99, 4: 1, 5: 1}, 10, 9))
    assert [(1, 2), (3,)] == list(packed(dict.fromkeys((1, 2, 3), 0), 10, 2))
    assert [] == list(packed({}, 10, 9))


def test_primes() -> None:
    """At least 2."""
    assert [2, 2, 3, 5, 11, 101] == [prime_from(number) for number in (0, 2, 3, 4, 8, 98)]


def test_a_tally_shows_the_first_and_counts_all() -> None:
    """Whatever it is given at once."""
    tally = Tally()
    assert "0" == str(tally)
    tally.add([3, 4])
    assert "2: 3, 4" == str(tally)
    tally.add(range(100, 120))
    assert str(tally).startswith("22: 3, 4, 100, ")
    assert str(tally).endswith(", 117 and 2 more")


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
