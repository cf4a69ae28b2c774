"""Compares what the source has with what a destination has: digests first, the events only where those differ.

`Comparison` finds the ids that differ at first sight, `Settled` looks at them again once the stream has brought what
was committed before, and `judge` says what is missing, different or extra. What an event is, and where it stands, is
known to the ledgers alone (`ledger.Ledger`). Memory holds some ten thousand events at a time, however many differ.
"""

from __future__ import annotations

import array
import asyncio
import bisect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from replicator.contracts.events import Lsn, format_lsn
from replicator.contracts.ledger import Digest, EventCounter, EventDigest, Ledger, Slice, SourceLedger
from replicator.source import slot as slots

BUCKETS = 4_096
"""Of time, over the range from the first event to the last."""
SLICE_EVENTS = 2_000_000
"""A statement over so many takes some seconds, so that none is held for long and none runs into a timeout."""
FETCHED = 50_000
"""Events in memory at once, for each side: some 10 MB."""
PART_EVENTS = 5_000
"""What a bucket that differs and holds too many is divided into, by the remainders of its ids."""
REMAINDERS = 1_000
"""In one statement at most."""
SETTLED = 10_000
"""Ids that are looked at again together."""
SHOWN = 20
"""Ids that are told of each kind."""
SETTLE_SECONDS = 60
"""How long the stream may take to bring what was committed before; a replicator that keeps up takes one."""
LOOK_SECONDS = 0.2
LOOK_TIMEOUT_SECONDS = 10

T = TypeVar("T")


class Verdict(NamedTuple):
    """What about some events differs."""

    missing: list[int]
    """Ids at the source and not at the destination."""
    different: list[EventDigest]
    """As the destination has them: another hash."""
    extra: list[EventDigest]
    """At the destination and not at the source."""

    def __bool__(self) -> bool:
        """Whether anything does."""
        return bool(self.missing or self.different or self.extra)


class Tally:
    """How many of a kind there are, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[object] = []

    def add(self, found: Iterable[object]) -> None:
        """Count these: ids, or whatever says in words what it is."""
        for one in found:
            self.count += 1
            if len(self.shown) < SHOWN:
                self.shown.append(one)

    def __str__(self) -> str:
        """How many, and which."""
        if not self.count:
            return "0"
        more = f" and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
        return f"{self.count}: {', '.join(map(str, self.shown))}{more}"


# -- pure ----------------------------------------------------------------------------------------------------------


def judge(wanted: Iterable[EventDigest], found: Iterable[EventDigest]) -> Verdict:
    """The same events at both sides, compared by their identity: id, time and key."""
    source = {row[:3]: row for row in wanted}
    there = {row[:3]: row for row in found}
    return Verdict(
        missing=sorted(row.id for known, row in source.items() if known not in there),
        different=[row for known, row in there.items() if known in source and source[known].hash != row.hash],
        extra=[row for known, row in there.items() if known not in source],
    )


def suspects(wanted: Iterable[EventDigest], found: Iterable[EventDigest]) -> list[int]:
    """The ids of all events that are not the same at both sides."""
    return sorted({row[0] for row in {row[:4] for row in wanted} ^ {row[:4] for row in found}})


def differing(wanted: Mapping[int, Digest], found: Mapping[int, Digest]) -> dict[int, int]:
    """The groups whose digests differ, ascending, each with how many events it has where it has more."""
    none = Digest(0, 0)
    return {
        group: max(wanted.get(group, none).events, found.get(group, none).events)
        for group in sorted(wanted.keys() | found.keys())
        if wanted.get(group) != found.get(group)
    }


def packed(groups: Mapping[int, int], most: int, members: int) -> Iterator[tuple[int, ...]]:
    """The groups, as many together as have no more than `most` events; a larger one stands alone."""
    pack: list[int] = []
    held = 0
    for group, events in groups.items():
        if pack and (held + events > most or len(pack) == members):
            yield tuple(pack)
            pack, held = [], 0
        pack.append(group)
        held += events
    if pack:
        yield tuple(pack)


def prime_from(number: int) -> int:
    """The next prime: the remainders of ids that go up in steps are then spread evenly, unless it is the step."""
    while number < 2 or any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):  # noqa: PLR2004
        number += 1
    return number


def sliced(part: Slice, slices: int) -> Iterator[Slice]:
    """The part's buckets, in so many pieces."""
    size = max(1, -(-len(part.buckets) // slices))
    return (part._replace(buckets=part.buckets[start : start + size]) for start in range(0, len(part.buckets), size))


# -- the first look ------------------------------------------------------------------------------------------------


class Comparison:
    """The events with `start <= ts < end` of two ledgers."""

    def __init__(
        self,
        source: Ledger,
        destination: Ledger,
        start_us: int,
        end_us: int,
        progress: Callable[[str], None],
    ) -> None:
        self.events = (0, 0)
        """How many either had when it was asked first."""
        self._sides = (source, destination)
        self._range = (start_us, end_us)
        self._progress = progress

    async def suspects(self) -> AsyncIterator[tuple[list[int], int, int]]:
        """Ids of events that may differ, and between which times, in chunks; none twice at the same time."""
        whole = await self._whole()
        if whole is None:
            return
        slices = max(1, -(-max(self.events) // SLICE_EVENTS))
        digests = await self._both(lambda side: self._digests(side, whole, slices))
        buckets = differing(*digests)
        self._progress(f"{len(buckets)} of {len(whole.buckets)} stretches of time differ")
        for pack in packed(buckets, FETCHED, BUCKETS):
            part = whole._replace(buckets=pack)
            async for smaller in self._divided(part, sum(buckets[bucket] for bucket in pack)):
                held = await self._both(lambda side, smaller=smaller: side.held(smaller))  # type: ignore[misc]  # mypy can't type a lambda's default
                ids = suspects(*held)
                for start in range(0, len(ids), SETTLED):
                    yield ids[start : start + SETTLED], part.start_us, min(part.end_us, self._range[1])

    async def _whole(self) -> Slice | None:
        """From the first event to the last; None when there is none."""
        spans = await self._both(lambda side: side.span(*self._range))
        self.events = (spans[0][0], spans[1][0])
        there = [span for span in spans if span[0]]
        if not there:
            return None
        first, behind = min(span[1] for span in there), max(span[2] for span in there) + 1
        width = max(1, -(-(behind - first) // BUCKETS))
        return Slice(first, width, tuple(range(-(-(behind - first) // width))))

    async def _digests(self, side: Ledger, whole: Slice, slices: int) -> dict[int, Digest]:
        found: dict[int, Digest] = {}
        for part in sliced(whole, slices if side.sliced else 1):
            found |= await side.by_time(part)
            if slices > 1 and side.sliced:
                self._progress(f"{part.buckets[-1] + 1} of {len(whole.buckets)} stretches of time are read")
        return found

    async def _divided(self, part: Slice, events: int) -> AsyncIterator[Slice]:
        """It, or, if that is one bucket with too many events, those of its parts that differ."""
        if events <= FETCHED:
            yield part
            return
        whole = part._replace(modulus=prime_from(events // PART_EVENTS))
        digests = await self._both(lambda side: side.by_id(whole))
        for pack in packed(differing(*digests), FETCHED, REMAINDERS):
            yield whole._replace(remainders=pack)

    async def _both(self, question: Callable[[Ledger], Awaitable[T]]) -> list[T]:
        return list(await asyncio.gather(*(question(side) for side in self._sides)))


# -- the second look -----------------------------------------------------------------------------------------------


class Stream:
    """The slot, looked at from outside: has the replicator brought what was committed before?"""

    def __init__(self, dsn: str, slot: str, patience_seconds: float) -> None:
        self.trouble = ""
        """Why that can't be waited for; then what is told may still be under way."""
        self._dsn = dsn
        self._slot = slot
        self._patience_seconds = patience_seconds

    async def passed(self, lsn: Lsn) -> None:
        """Return when every sink has what was committed before, or `trouble` says why not."""
        deadline = time.monotonic() + self._patience_seconds
        while not self.trouble:
            state = await slots.look(self._dsn, self._slot, "replicator reconcile", LOOK_TIMEOUT_SECONDS)
            confirmed = (state.confirmed_lsn or 0) if state else 0
            if confirmed >= lsn:
                return
            behind = f"slot {self._slot} has come to {format_lsn(confirmed)} and not to {format_lsn(lsn)}"
            if state is None:
                self.trouble = f"there is no slot {self._slot}"
            elif state.active_pid is None:
                self.trouble = f"no replicator runs, {behind}"
            elif time.monotonic() > deadline:
                self.trouble = f"{behind} in {self._patience_seconds:.0f} s"
            else:
                await asyncio.sleep(LOOK_SECONDS)


class Settled:
    """What really differs of some ids, and not only because it is under way."""

    def __init__(self, source: SourceLedger, destination: Ledger, stream: Stream, patience_seconds: float) -> None:
        self.certain = True
        """Extra events are: no transaction was open that may still bring them."""
        self._source = source
        self._destination = destination
        self._stream = stream
        self._patience_seconds = patience_seconds

    async def look(self, ids: Sequence[int], start_us: int, end_us: int) -> tuple[Verdict, Lsn]:
        """What was visible at the source before the stream passed it must be at the destination.

        And what is at the destination must be visible at the source, once the transactions have ended that were open
        then: with synchronous replication a commit is streamed before it can be seen.
        """
        wanted = await self._source.find(ids, start_us, end_us)
        lsn = await self._source.lsn()
        await self._stream.passed(lsn)
        found = await self._destination.find(ids, start_us, end_us)
        verdict = judge(wanted, found)
        if verdict.extra:
            await self._transactions_ended()
            late = await self._source.find([row.id for row in verdict.extra], start_us, end_us)
            verdict = verdict._replace(extra=judge(late, verdict.extra).extra)
        return verdict, lsn

    async def _transactions_ended(self) -> None:
        until, deadline = await self._source.next_transaction(), time.monotonic() + self._patience_seconds
        while self.certain and await self._source.oldest_transaction() < until:
            self.certain = time.monotonic() < deadline
            await asyncio.sleep(LOOK_SECONDS)


# -- counts --------------------------------------------------------------------------------------------------------


class WrongCount(NamedTuple):
    """A count that is not the number of events, whenever in between they are counted."""

    key: int
    found: int
    least: int
    most: int

    @property
    def above(self) -> bool:
        """Right all the same where rows were deleted at the source: they had been counted, and stay so."""
        return self.found > self.most

    def __str__(self) -> str:
        """In words."""
        wanted = self.least if self.least == self.most else f"{self.least} to {self.most}"
        return f"{self.key} has {self.found} instead of {wanted}"


async def suspicious_counts(source: SourceLedger, counted: EventCounter) -> AsyncIterator[int]:
    """Keys whose count is not what the source has at this moment, both ways round."""
    known = array.array("q")
    async for chunk in source.counts():
        found = await counted.counts([key for key, _ in chunk])
        known.extend(key for key, _ in chunk)
        for (key, events), count in zip(chunk, found, strict=True):
            if events != count:
                yield key
    async for keys in counted.keys():
        for key in keys:
            at = bisect.bisect_left(known, key)
            if at == len(known) or known[at] != key:
                yield key


async def wrong_counts(
    source: SourceLedger, counted: EventCounter, stream: Stream, keys: Sequence[int]
) -> list[WrongCount]:
    """Those that are below what was there before the stream passed, or above what is there afterwards."""
    keys = sorted(set(keys))
    least = await source.counts_of(keys)
    await stream.passed(await source.lsn())
    found = await counted.counts(keys)
    most = await source.counts_of(keys)
    looked = (
        WrongCount(key, count, least.get(key, 0), most.get(key, 0)) for key, count in zip(keys, found, strict=True)
    )
    return [wrong for wrong in looked if not wrong.least <= wrong.found <= wrong.most]


async def stretches(source: SourceLedger, start_us: int, end_us: int) -> list[tuple[int, int]]:
    """The range in pieces of some SLICE_EVENTS, if the source can read a piece alone."""
    events, first, last = await source.span(start_us, end_us)
    if not events:
        return []
    slices = -(-events // SLICE_EVENTS) if source.sliced else 1
    width = -(-(last + 1 - first) // slices)
    return [(start, min(start + width, last + 1)) for start in range(first, last + 1, width)]


async def unseen(source: SourceLedger, counted: EventCounter, start_us: int, end_us: int) -> AsyncIterator[list[int]]:
    """Ids of the range that were not counted, at first sight, in chunks. No statement is open meanwhile."""
    for start, end in await stretches(source, start_us, end_us):
        found = array.array("q")  # 8 bytes each
        async for ids in source.ids(start, end):
            found.extend(await counted.unseen(ids))
        for at in range(0, len(found), SETTLED):
            yield list(found[at : at + SETTLED])


async def settled_unseen(source: SourceLedger, counted: EventCounter, stream: Stream, ids: Sequence[int]) -> list[int]:
    """Those that the stream has not brought either."""
    await stream.passed(await source.lsn())
    return await counted.unseen(ids)
