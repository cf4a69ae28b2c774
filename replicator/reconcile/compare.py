"""Where do two ledgers differ? Digests of stretches of time first, then the events of the stretches that differ.

What this finds may still be on its way to the sink: `recheck.py` looks again. Memory holds some 50,000 events a side,
however many differ.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import NamedTuple

from replicator.contracts.events import Id
from replicator.contracts.ledger import Digest, EventDigest, Ledger, Slice

BUCKETS = 4_096
"""Of time, from the first event to the last."""
QUERY_EVENTS = 2_000_000
"""A query over so many takes some seconds: no snapshot is held for long, no timeout is met."""
FETCHED_EVENTS = 50_000
"""In memory at once, for each side: some 10 MB."""
PART_EVENTS = 5_000
"""What a bucket with more than FETCHED_EVENTS is divided into, by the remainders of its ids."""
CHUNK = 10_000
"""Ids that are checked again together."""

log = logging.getLogger(__name__)


class Candidates(NamedTuple):
    """Events that may differ, with `start <= ts < end`."""

    ids: list[Id]
    start_us: int
    end_us: int


class Comparison:
    """The events with `start <= ts < end` in two ledgers."""

    def __init__(self, source: Ledger, destination: Ledger, start_us: int, end_us: int) -> None:
        self.events = (0, 0)
        """How many each has at first."""
        self._source = source
        self._destination = destination
        self._range = (start_us, end_us)

    async def candidates(self) -> AsyncIterator[Candidates]:
        """Events that may differ, in chunks. An id comes twice only if its event has two times."""
        whole = await self._whole()
        if whole is None:
            return
        digests = await asyncio.gather(self._digests(self._source, whole), self._digests(self._destination, whole))
        buckets = differing(*digests)
        log.info("%s of %s slices of time differ", len(buckets), len(whole.buckets))
        for chunk in chunk_by_size(buckets, FETCHED_EVENTS):
            part = whole._replace(buckets=chunk)
            async for piece in self._divided(part, sum(buckets[bucket] for bucket in chunk)):
                ids = candidate_ids(*await asyncio.gather(self._source.events(piece), self._destination.events(piece)))
                for start in range(0, len(ids), CHUNK):
                    yield Candidates(ids[start : start + CHUNK], part.start_us, min(part.end_us, self._range[1]))

    async def _whole(self) -> Slice | None:
        """From the first event to the last; None when there is none."""
        spans = await asyncio.gather(self._source.span(*self._range), self._destination.span(*self._range))
        self.events = (spans[0][0], spans[1][0])
        if self.events == (0, 0):
            return None
        first = min(span[1] for span in spans if span[0])
        length = max(span[2] for span in spans if span[0]) + 1 - first
        width = -(-length // BUCKETS)
        return Slice(first, width, tuple(range(-(-length // width))))

    async def _digests(self, side: Ledger, whole: Slice) -> dict[int, Digest]:
        """Of all buckets, in as many queries as the number of events calls for."""
        queries = -(-max(self.events) // QUERY_EVENTS) if side.slices_are_cheap else 1
        size = -(-len(whole.buckets) // queries)
        found: dict[int, Digest] = {}
        for start in range(0, len(whole.buckets), size):
            part = whole._replace(buckets=whole.buckets[start : start + size])
            found |= await side.digests(part)
            if queries > 1:
                log.info("%s of %s slices of time are read", part.buckets[-1] + 1, len(whole.buckets))
        return found

    async def _divided(self, part: Slice, events: int) -> AsyncIterator[Slice]:
        """The part itself; if it is one bucket with too many events, those of its pieces that differ."""
        if events <= FETCHED_EVENTS:
            yield part
            return
        whole = part._replace(modulus=prime_from(events // PART_EVENTS))
        digests = await asyncio.gather(self._source.digests(whole), self._destination.digests(whole))
        for chunk in chunk_by_size(differing(*digests), FETCHED_EVENTS):
            yield whole._replace(remainders=chunk)


def candidate_ids(wanted: Iterable[EventDigest], found: Iterable[EventDigest]) -> list[Id]:
    """The ids of all events that are not the same on both sides."""
    return sorted({row[0] for row in {row[:4] for row in wanted} ^ {row[:4] for row in found}})


def differing(wanted: Mapping[int, Digest], found: Mapping[int, Digest]) -> dict[int, int]:
    """The groups whose digests differ, ascending, each with its number of events on the side that has more."""
    none = Digest(0, 0)
    pairs = ((group, wanted.get(group, none), found.get(group, none)) for group in sorted({*wanted, *found}))
    return {group: max(ours.events, theirs.events) for group, ours, theirs in pairs if ours != theirs}


def chunk_by_size(groups: Mapping[int, int], most: int) -> Iterator[tuple[int, ...]]:
    """Consecutive groups, together at most `most` events. A larger group stands alone."""
    chunk: list[int] = []
    size = 0
    for group, events in groups.items():
        if chunk and size + events > most:
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(group)
        size += events
    if chunk:
        yield tuple(chunk)


def prime_from(number: int) -> int:
    """The next prime. Ids that go up in steps have all its remainders, unless the step is a multiple."""
    while number < 2 or any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):  # noqa: PLR2004
        number += 1
    return number
