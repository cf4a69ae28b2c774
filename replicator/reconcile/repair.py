"""Makes a sink agree with the source: sends events again, deletes extra ones, or fills it from empty."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

from replicator.contracts.errors import SinkError, command
from replicator.contracts.ledger import SinkLedger, SourceLedger
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Mode, Rebuildable, Sink
from replicator.contracts.stores import CheckpointStore
from replicator.contracts.stream import History
from replicator.delivery.backfill import Backfill, BackfillProgress
from replicator.reconcile.recheck import Verdict

PAGE_ROWS = 5_000

T = TypeVar("T")


class Repair(NamedTuple):
    """Sends events from the source to a sink, as a backfill does."""

    settings: CoreSettings
    source: SourceLedger
    store: CheckpointStore

    async def check(self, sinks: Sequence[Sink]) -> None:
        """See that everything can be read and written, before anything is written or deleted."""
        history = self.source.picked([])
        try:
            await history.open()
        finally:
            await history.close()
        for sink in sinks:
            await sink.open(None, Mode.BACKFILL)

    async def apply(self, sink: Sink, ledger: SinkLedger, verdict: Verdict, *, delete: bool) -> None:
        """Send what is missing or different; with `delete`, first delete what is extra."""
        if delete:
            # A version that is newer than the source (of another cluster, from before a failover) would stay.
            newer = [row for row in verdict.different if row.lsn >= verdict.read_at]
            if doomed := [*verdict.extra, *newer]:
                await ledger.delete(doomed)
        if ids := {*verdict.missing, *(row.id for row in verdict.different)}:
            await self.send(sink, sorted(ids))

    async def send(self, sink: Sink, ids: Sequence[int]) -> None:
        """These events, with today's content."""
        await asyncio.to_thread(self.store.create)
        history = self.source.picked(ids)
        first = BackfillProgress(place="0", events=0, total=len(ids))
        run = Backfill(
            self.settings, history, [sink], self.store, task="reconcile", start=first, page_rows=PAGE_ROWS, rate=None
        )
        try:
            await run.run()
        finally:
            await history.close()


async def rebuild(
    sink: Sink,
    history: History,
    store: CheckpointStore,
    fill: Callable[[str], Awaitable[T]],
    empty: Callable[[int], None] | None = None,
) -> T:
    """Fill a `Rebuildable` sink with all of `history`, beside the stream or without it; what `fill` returns.

    It is exact because the sink counts an event once, whether the stream or the backfill brings it first, if the sink
    lost its data before. `fill` runs the backfill; it gets the sink's generation, in which alone a run may be resumed.
    With `empty` the sink's data are deleted first, once all is known to be readable and writable; it gets the number of
    keys. Raises SinkError if the sink loses its data while it is filled.
    """
    assert isinstance(sink, Rebuildable)  # noqa: S101  for mypy
    await history.open()
    await sink.open(None, Mode.BACKFILL)
    generation = await sink.generation()
    if empty is not None:
        await asyncio.to_thread(store.create)
        empty(await sink.empty())
        generation = await sink.generation()
    result = await fill(generation)
    if await sink.generation() != generation:
        detail = "it was emptied, restarted or replaced while it was filled"
        cure = f"Run {command(f'rebuild-{sink.name}')} again"
        raise SinkError(sink.name, f"sink {sink.name} failed: {detail}", cure, detail=detail)
    return result
