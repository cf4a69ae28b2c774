"""Has every event been counted, and is every count right? Each is looked at twice, like the events in `recheck.py`."""

from __future__ import annotations

import array
from collections.abc import AsyncIterator, Sequence

from replicator.contracts.ledger import EventCounter, SourceLedger
from replicator.reconcile.compare import CHUNK, QUERY_EVENTS
from replicator.reconcile.recheck import SlotWaiter
from replicator.reconcile.report import WrongCount


async def unseen(
    source: SourceLedger, counter: EventCounter, start_us: int, end_us: int, slot: SlotWaiter | None = None
) -> AsyncIterator[list[int]]:
    """Ids of events that were not counted, in chunks; with `slot`, even after the replicator had time to bring them."""
    for start, end in await _stretches(source, start_us, end_us):
        found = array.array("q")  # 8 bytes each; no query is open while they are worked on
        async for ids in source.ids(start, end):
            found.extend(await counter.unseen(ids))
        for at in range(0, len(found), CHUNK):
            chunk = list(found[at : at + CHUNK])
            if slot is not None:
                await slot.wait(await source.lsn())
                chunk = await counter.unseen(chunk)
            yield chunk


async def _stretches(source: SourceLedger, start_us: int, end_us: int) -> list[tuple[int, int]]:
    """The range in pieces of some QUERY_EVENTS, if it is cheaper to read only a piece."""
    events, first, last = await source.span(start_us, end_us)
    if not events:
        return []
    pieces = -(-events // QUERY_EVENTS) if source.slices_are_cheap else 1
    width = -(-(last + 1 - first) // pieces)
    return [(start, min(start + width, last + 1)) for start in range(first, last + 1, width)]


async def wrong_counts(
    source: SourceLedger, counter: EventCounter, slot: SlotWaiter
) -> AsyncIterator[list[WrongCount]]:
    """Counts of the source's keys that don't agree with it, over all times, in chunks."""
    keys = array.array("q")
    async for chunk in source.counts():
        found = await counter.counts([key for key, _ in chunk])
        keys.extend(key for (key, events), count in zip(chunk, found, strict=True) if events != count)
    for at in range(0, len(keys), CHUNK):
        yield await recheck(source, counter, slot, keys[at : at + CHUNK])


async def recheck(
    source: SourceLedger, counter: EventCounter, slot: SlotWaiter, keys: Sequence[int]
) -> list[WrongCount]:
    """Counts below what the source had before the slot passed, or above what it has afterwards."""
    least = await source.counts_of(keys)
    await slot.wait(await source.lsn())
    found = await counter.counts(keys)
    most = await source.counts_of(keys)
    counts = (
        WrongCount(key, count, least.get(key, 0), most.get(key, 0)) for key, count in zip(keys, found, strict=True)
    )
    return [wrong for wrong in counts if not wrong.least <= wrong.found <= wrong.most]
