"""How two places that hold the same events are compared: `reconcile` asks each for digests, then for the events.

`enrichment/ledger.py` is PostgreSQL's side; a sink that `reconcile` can ask has one too (`sink.HasLedger`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from replicator.contracts.events import Lsn
from replicator.contracts.stream import History


class Digest(NamedTuple):
    """What two places can agree on cheaply about some events."""

    events: int
    sum: int
    """Of 60 bits of the MD5 of every event's fields as text."""


class EventDigest(NamedTuple):
    """One event as a place has it."""

    id: int
    ts_us: int
    key: int
    """With the two before it what the event is known by; see `events.Event`."""
    hash: int
    """60 bits of the MD5 of its fields as text."""
    lsn: int = 0
    """Of the view that the place has; 0 at the source."""


class Slice(NamedTuple):
    """Some events of a range: those in certain buckets of time, and of these the ids with certain remainders."""

    origin_us: int
    width_us: int
    buckets: tuple[int, ...]
    """Ascending; number n begins at `origin_us + n * width_us`."""
    modulus: int = 1
    remainders: tuple[int, ...] = (0,)
    """Of `id` divided by `modulus`, never negative."""

    @property
    def start_us(self) -> int:
        """Where the first bucket begins."""
        return self.origin_us + self.buckets[0] * self.width_us

    @property
    def end_us(self) -> int:
        """Where the last one ends."""
        return self.origin_us + (self.buckets[-1] + 1) * self.width_us


class Ledger(Protocol):
    """A place that can say which events it has; `reconcile.py` compares two. Times are microseconds since 1970.

    Raises what a `History` or a `Sink` raises.
    """

    sliced: bool
    """Whether a piece of a range costs a piece of the effort; otherwise a range is asked for as a whole."""

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        """How many events there are with `start <= ts < end`, the first one's time and the last one's (else 0)."""

    async def by_time(self, part: Slice) -> dict[int, Digest]:
        """Digests of the buckets; the buckets are consecutive, those without events are absent."""

    async def by_id(self, part: Slice) -> dict[int, Digest]:
        """Digests of all remainders in one bucket; those without events are absent."""

    async def held(self, part: Slice) -> list[EventDigest]:
        """The events themselves, in any order."""

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[EventDigest]:
        """Those with these ids and `start <= ts < end`."""


class SourceLedger(Ledger, Protocol):
    """The tables themselves."""

    async def lsn(self) -> Lsn:
        """Every commit that was visible before is before this."""

    async def next_transaction(self) -> int:
        """A number above those of all transactions that have one."""

    async def oldest_transaction(self) -> int:
        """Those with lower numbers have ended, and their rows can be seen if they ever will."""

    def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[int]]:
        """Of all events of the range, in chunks."""

    def counts(self) -> AsyncIterator[Sequence[tuple[int, int]]]:
        """`(key, events)` for every key, over all times that a timestamp can tell, by key, in chunks."""

    async def counts_of(self, keys: Sequence[int]) -> dict[int, int]:
        """The same for some keys; those without events are absent."""

    def picked(self, ids: Sequence[int]) -> History:
        """These events, for the sinks."""


class EventCounter(Protocol):
    """A place that counts events by key, each once."""

    async def counts(self, keys: Sequence[int]) -> list[int]:
        """The count of each; 0 for one that is not there."""

    def keys(self) -> AsyncIterator[Sequence[int]]:
        """Everything that has a count, in chunks, in any order, some of them perhaps twice."""

    async def unseen(self, ids: Sequence[int]) -> list[int]:
        """Those of the events that were not counted yet."""
