"""Ledgers in memory: two sides of a comparison without servers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import TypeVar

from replicator.contracts.enricher import History
from replicator.contracts.events import Lsn
from replicator.contracts.ledger import Digest, EventDigest, Slice
from replicator.reconcile.recheck import Underway

T = TypeVar("T")


def event(number: int, ts_us: int = 0, key: int = 1, value: int = 0) -> EventDigest:
    """With a hash of everything that it is."""
    digest = hashlib.md5(f"{number} {ts_us} {key} {value}".encode(), usedforsecurity=False).digest()
    return EventDigest(number, ts_us, key, int.from_bytes(digest[:8], "big") >> 4)


class Place:
    """A `ledger.SourceLedger` and `SinkLedger` in memory. Remembers how much was asked for at once."""

    def __init__(self, rows: Sequence[EventDigest], *, slices_are_cheap: bool = True) -> None:
        self.rows = list(rows)
        self.slices_are_cheap = slices_are_cheap
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

    async def digests(self, part: Slice) -> dict[int, Digest]:
        """See `ledger.Ledger`."""
        return _digests((bucket if part.modulus == 1 else left, row) for bucket, left, row in self._in(part))

    async def events(self, part: Slice) -> list[EventDigest]:
        """See `ledger.Ledger`."""
        found = [row for _, left, row in self._in(part) if left in part.remainders]
        self.largest = max(self.largest, len(found))
        return found

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        """See `ledger.Ledger`."""
        return [row for row in self._between(start_us, end_us) if row.id in set(ids)]

    async def delete(self, doomed: Sequence[EventDigest]) -> None:
        """See `ledger.SinkLedger`."""
        self.rows = [row for row in self.rows if row not in doomed]

    async def open(self) -> None:
        """It is open."""

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
        """See `ledger.SourceLedger`."""
        return _chunk([row.id for row in self._between(start_us, end_us)])

    def counts(self) -> AsyncIterator[Sequence[tuple[int, int]]]:
        """See `ledger.SourceLedger`."""
        return _chunk(sorted(Counter(row.key for row in self.rows).items()))

    async def counts_of(self, keys: Sequence[int]) -> dict[int, int]:
        """See `ledger.SourceLedger`."""
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


async def _chunk(rows: list[T]) -> AsyncIterator[list[T]]:
    yield rows


class Passing(Underway):
    """A slot that passes at once, after `brings` has run: what the replicator does meanwhile."""

    def __init__(self, brings: Callable[[], None] = lambda: None) -> None:
        super().__init__("", "slot", 0)
        self.waited_for: list[Lsn] = []
        self._brings = brings

    async def delivered(self, lsn: Lsn) -> None:
        """At once."""
        self.waited_for.append(lsn)
        self._brings()


class Counted:
    """`ledger.EventCounter` in memory."""

    def __init__(self, counts: dict[int, int], seen: Collection[int] = ()) -> None:
        self.found = counts
        self.seen = set(seen)

    async def counts(self, keys: Sequence[int]) -> list[int]:
        """See `ledger.EventCounter`."""
        return [self.found.get(key, 0) for key in keys]

    async def unseen(self, ids: Sequence[int]) -> list[int]:
        """See `ledger.EventCounter`."""
        return [one for one in ids if one not in self.seen]

    async def keys(self) -> AsyncIterator[Sequence[int]]:
        """See `ledger.EventCounter`: some of them come twice."""
        yield [*self.found]
        yield [*self.found][:2]
