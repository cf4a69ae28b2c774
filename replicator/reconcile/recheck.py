"""Does it really differ, or is it still on its way? A second look at events and counts that seem wrong."""

from __future__ import annotations

import array
import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, MutableSequence, Sequence
from typing import Any, NamedTuple

from replicator.contracts.events import Id, Lsn, format_lsn
from replicator.contracts.ledger import EventCounter, EventDigest, Ledger, SourceLedger
from replicator.reconcile.compare import CHUNK, QUERY_EVENTS, Candidates
from replicator.reconcile.report import WrongCount
from replicator.source import slot as slots
from replicator.source.connection import Connection, answering, connect

POLL_SECONDS = 0.2
ROUNDS = 5
"""An event that changes once a second is the same at two looks within that time."""
NOBODY = Candidates([], 0, 0)


class Verdict(NamedTuple):
    """How some events differ. An event is known by id, time and key."""

    missing: list[EventDigest]
    """Only the source has them."""
    different: list[EventDigest]
    """As the destination has them, with another hash than at the source."""
    extra: list[EventDigest]
    """Only the destination has them."""


class _Ids:
    """Any number of them; 8 bytes each, if they are integers."""

    def __init__(self) -> None:
        self._ids: MutableSequence[Any] | None = None

    def extend(self, ids: Iterable[Id]) -> None:
        """Behind those that are there."""
        new = list(ids)
        if self._ids is None and new:
            self._ids = array.array("q") if isinstance(new[0], int) else []
        if self._ids is not None:
            self._ids.extend(new)

    def chunks(self) -> Iterator[list[Id]]:
        """All of them."""
        ids = self._ids or []
        return (list(ids[at : at + CHUNK]) for at in range(0, len(ids), CHUNK))


class Underway:
    """Waits for what is on its way: to the sinks, and in transactions that are still open."""

    def __init__(self, dsn: str, slot: str, patience_seconds: float) -> None:
        self.gave_up = ""
        """Why it no longer waits for the slot: differences may then still be on their way."""
        self.certain = True
        """No transaction is still open that may have written what seems to be extra."""
        self._dsn = dsn
        self._slot = slot
        self._patience_seconds = patience_seconds

    async def delivered(self, lsn: Lsn) -> None:
        """Return when every sink has everything committed before `lsn`, or when `gave_up` says why not."""
        if self.gave_up:
            return
        deadline = time.monotonic() + self._patience_seconds
        async with answering(self._slot, None), await connect(self._dsn, "replicator reconcile") as connection:
            passed = await self._passed(connection, lsn, deadline)
            while not (passed or self.gave_up):
                await asyncio.sleep(POLL_SECONDS)
                passed = await self._passed(connection, lsn, deadline)

    async def _passed(self, connection: Connection, lsn: Lsn, deadline: float) -> bool:
        async with answering(self._slot, slots.LOOK_TIMEOUT_SECONDS):
            state = await slots.inspect(connection, self._slot)
        confirmed = (state.confirmed_lsn or 0) if state else 0
        behind = f"slot {self._slot} has come to {format_lsn(confirmed)} and not to {format_lsn(lsn)}"
        if state is None:
            self.gave_up = f"there is no slot {self._slot}"
        elif confirmed < lsn and state.active_pid is None:
            self.gave_up = f"no replicator runs, {behind}"
        elif confirmed < lsn and time.monotonic() > deadline:
            self.gave_up = f"{behind} in {self._patience_seconds:.0f} s"
        return confirmed >= lsn

    async def visible(self, source: SourceLedger) -> None:
        """Return when all transactions have ended that are open now, or when `certain` is false."""
        until, deadline = await source.next_transaction(), time.monotonic() + self._patience_seconds
        while self.certain and await source.oldest_transaction() < until:
            self.certain = time.monotonic() < deadline
            await asyncio.sleep(POLL_SECONDS)


def diff(wanted: Iterable[EventDigest], found: Iterable[EventDigest]) -> Verdict:
    """Compare event by event."""
    source = {row[:3]: row for row in wanted}
    there = {row[:3]: row for row in found}
    return Verdict(
        missing=sorted(row for known, row in source.items() if known not in there),
        different=[row for known, row in there.items() if known in source and source[known].hash != row.hash],
        extra=[row for known, row in there.items() if known not in source],
    )


async def recheck(
    source: SourceLedger, destination: Ledger, underway: Underway, candidates: Candidates
) -> tuple[Verdict, Lsn]:
    """How these events differ once nothing is on its way any more; the source was read before the WAL position.

    The destination must have what the source showed before the slot passed. The source must show what the destination
    has, as soon as the transactions that are open now have ended: with synchronous replication a commit is streamed
    before it is visible. What has changed at the source between the two looks is looked at again.
    """
    verdict, changed, read_at = await _look(source, destination, underway, candidates)
    for left in reversed(range(ROUNDS)):
        if not changed.ids:
            break
        more, changed, read_at = await _look(source, destination, underway, changed, last=not left)
        verdict = Verdict(*(known + new for known, new in zip(verdict, more, strict=True)))
    return verdict, read_at


async def _look(
    source: SourceLedger, destination: Ledger, underway: Underway, candidates: Candidates, *, last: bool = False
) -> tuple[Verdict, Candidates, Lsn]:
    """How these differ, and which of them have changed meanwhile; after the `last` look those differ, and stay."""
    wanted = await source.find(*candidates)
    read_at = await source.lsn()
    await underway.delivered(read_at)
    verdict = diff(wanted, await destination.find(*candidates))
    if verdict.extra:
        await underway.visible(source)
    ids = {row.id for rows in verdict for row in rows}
    late = await source.find(sorted(ids), *candidates[1:]) if ids else []
    changed = {row.id for row in {row for row in wanted if row.id in ids} ^ set(late)}
    if last:
        return verdict._replace(extra=[row for row in verdict.extra if row.id not in changed]), NOBODY, read_at
    steady = Verdict(*([row for row in rows if row.id not in changed] for rows in verdict))
    return steady, candidates._replace(ids=sorted(changed)), read_at


async def unseen(
    source: SourceLedger, counter: EventCounter, start_us: int, end_us: int, underway: Underway | None = None
) -> AsyncIterator[list[Id]]:
    """Ids of events that were not counted, in chunks; with `underway`, looked at again when they had time to arrive."""
    events, first, last = await source.span(start_us, end_us)
    if not events:
        return
    pieces = -(-events // QUERY_EVENTS) if source.slices_are_cheap else 1
    width = -(-(last + 1 - first) // pieces)
    for start in range(first, last + 1, width):
        found = _Ids()  # no query is open while they are worked on
        async for ids in source.ids(start, min(start + width, last + 1)):
            found.extend(await counter.unseen(ids))
        for chunk in found.chunks():
            if underway is None:
                yield chunk
            else:
                await underway.delivered(await source.lsn())
                lacking = await counter.unseen(chunk)
                there = {row.id for row in await source.find(lacking, start_us, end_us)} if lacking else set()
                yield [one for one in lacking if one in there]  # others are gone by now


async def wrong_counts(
    source: SourceLedger, counter: EventCounter, underway: Underway, known: set[Id] | None = None
) -> AsyncIterator[list[WrongCount]]:
    """Counts of the source's keys that don't agree with it, over all times, in chunks; `known` gets these keys."""
    keys = _Ids()
    async for chunk in source.counts():
        found = await counter.counts([key for key, _ in chunk])
        if known is not None:
            known.update(key for key, _ in chunk)
        keys.extend(key for (key, events), count in zip(chunk, found, strict=True) if events != count)
    for some in keys.chunks():
        yield await recheck_counts(source, counter, underway, some)


async def stray_counts(
    source: SourceLedger, counter: EventCounter, underway: Underway, known: set[Id]
) -> AsyncIterator[list[WrongCount]]:
    """The same of keys of which the source had no row: all but the known ones, which they then are, too."""
    keys = _Ids()
    async for chunk in counter.keys():
        others = [key for key in dict.fromkeys(chunk) if key not in known]
        keys.extend(key for key, count in zip(others, await counter.counts(others), strict=True) if count)
        known.update(others)
    for some in keys.chunks():
        yield await recheck_counts(source, counter, underway, some)


async def recheck_counts(
    source: SourceLedger, counter: EventCounter, underway: Underway, keys: Sequence[Id]
) -> list[WrongCount]:
    """Counts outside of what the source had before the slot passed, and what it has afterwards."""
    before = await source.counts_of(keys)
    await underway.delivered(await source.lsn())
    found = await counter.counts(keys)
    after = await source.counts_of(keys)
    bounds = ((before.get(key, 0), after.get(key, 0)) for key in keys)  # deletes make them fewer
    counts = (
        WrongCount(key, count, min(both), max(both)) for key, count, both in zip(keys, found, bounds, strict=True)
    )
    return [wrong for wrong in counts if not wrong.least <= wrong.found <= wrong.most]
