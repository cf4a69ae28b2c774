"""What `reconcile` asks of two places that hold the same events: digests first, then events, then counts.

`enrichment/ledger.py` answers for PostgreSQL, a sink through `HasLedger` or `HasCounter` of `sink.py`. Times are
microseconds since 1970. Everything here raises what a `History` or a `Sink` raises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from replicator.contracts.enricher import History
from replicator.contracts.events import Id, Lsn


class Digest(NamedTuple):
    """A checksum of some events."""

    events: int
    sum: int
    """Of the events' hashes."""


class EventDigest(NamedTuple):
    """One event as one place holds it."""

    id: Id
    ts_us: int
    key: Id
    """With `id` and `ts_us` the identity of the event; see `events.Event`."""
    hash: int
    """60 bits of the MD5 of its fields as text."""
    lsn: int = 0
    """`commit_lsn` of the version that a sink holds; 0 at the source."""


class Slice(NamedTuple):
    """A subset of the events: some buckets of time and, inside them, some remainders of the identity."""

    origin_us: int
    width_us: int
    buckets: tuple[int, ...]
    """Ascending. Bucket n begins at `origin_us + n * width_us`."""
    modulus: int = 1
    remainders: tuple[int, ...] = (0,)
    """Of the identity, or of its hash if it is a text, divided by `modulus`; never negative."""

    @property
    def start_us(self) -> int:
        """Where the first bucket begins."""
        return self.origin_us + self.buckets[0] * self.width_us

    @property
    def end_us(self) -> int:
        """Where the last bucket ends."""
        return self.origin_us + (self.buckets[-1] + 1) * self.width_us


class Ledger(Protocol):
    """The events that one place holds."""

    slices_are_cheap: bool
    """True if scanning part of a range is proportionally cheaper (there is an index on time)."""

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        """Number of events with `start <= ts < end`, first time, last time; three zeros if there are none."""

    async def digests(self, part: Slice) -> dict[int, Digest]:
        """One per bucket, of consecutive buckets; with a modulus above 1, one per remainder, of a single bucket.

        Groups without events are absent. The slice's own remainders are not looked at.
        """

    async def events(self, part: Slice) -> list[EventDigest]:
        """The events of the slice, in any order."""

    async def find(self, ids: Sequence[Id], start_us: int, end_us: int) -> list[EventDigest]:
        """The events with these ids and `start <= ts < end`, in any order."""


class SinkLedger(Ledger, Protocol):
    """The events that a sink holds."""

    async def delete(self, doomed: Sequence[EventDigest]) -> None:
        """Delete exactly these, not the same ids with another time or key."""


class SourceLedger(Ledger, Protocol):
    """The events in the source tables."""

    async def open(self) -> None:
        """Connect, and see that the tables can be read."""

    async def lsn(self) -> Lsn:
        """A WAL position after every commit that was visible before this call."""

    async def next_transaction(self) -> int:
        """A number higher than that of every transaction that has one."""

    async def oldest_transaction(self) -> int:
        """The lowest number of an open transaction. The rows of lower ones are visible, or never will be."""

    def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[Id]]:
        """The ids of the events with `start <= ts < end`, in chunks."""

    def counts(self) -> AsyncIterator[Sequence[tuple[Id, int]]]:
        """`(key, number of events)` of every key over all times, ascending by key, in chunks."""

    async def counts_of(self, keys: Sequence[Id]) -> dict[Id, int]:
        """The same for these keys. Keys without events are absent."""

    def picked(self, ids: Sequence[Id]) -> History:
        """These events, ready to be sent to sinks."""


class EventCounter(Protocol):
    """A place that counts events by key, each event once."""

    async def counts(self, keys: Sequence[Id]) -> list[int]:
        """The count of each key, 0 for a key that is not there."""

    async def unseen(self, ids: Sequence[Id]) -> list[Id]:
        """Those of these events that were not counted yet."""

    def keys(self) -> AsyncIterator[Sequence[Id]]:
        """Every key that has a count, in chunks; one may come twice. Asked for only of a stream that deletes rows.

        Raises SinkMisconfigured where that is not allowed: then `reconcile` says so, and does without.
        """
