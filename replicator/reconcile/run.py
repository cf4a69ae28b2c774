"""`reconcile` compares PostgreSQL with each sink that can be asked, and repairs what differs.

For every sink: compare, check again, repair, check what is left. A sink takes part through its capabilities
(`contracts/sink.py`); neither sinks nor tables are known here by name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from replicator.contracts.errors import SinkMisconfigured, command
from replicator.contracts.events import Id, Lsn
from replicator.contracts.ledger import EventCounter, SinkLedger, SourceLedger
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import HasCounter, HasLedger, Mode, Rebuildable, Sink
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.backfill import Backfill, BackfillProgress
from replicator.reconcile.compare import Comparison
from replicator.reconcile.recheck import Underway, Verdict, recheck, stray_counts, unseen, wrong_counts
from replicator.reconcile.report import ReconcileReport, SinkReport, WrongCount
from sinks import BUILT_IN

PAGE_ROWS = 5_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


@dataclass
class Reconcile:
    """One comparison of the events with `start <= ts < end`. The caller closes source, sinks and store."""

    settings: CoreSettings
    source: SourceLedger
    sinks: Sequence[Sink]
    store: CheckpointStore
    start: datetime
    end: datetime
    with_content: bool
    """Whether the source compares the fields that come from the content, so that the sinks do so, too."""
    repair: bool
    """Send what is missing, different or not counted."""
    delete_extra: bool
    """In a repair, delete events that the source does not have."""
    wait_seconds: float
    """How long to wait for the replicator, and for open transactions."""

    def __post_init__(self) -> None:
        dsn = self.settings.postgres_dsn.get_secret_value()
        self._underway = Underway(dsn, self.settings.slot, self.wait_seconds)
        self._range = ((self.start - EPOCH) // MICROSECOND, (self.end - EPOCH) // MICROSECOND)

    async def run(self, show: Callable[[str], None]) -> ReconcileReport:
        """Compare, and repair if asked to. `show` gets each line of the report as soon as it is known.

        Raises what a `History` or a `Sink` raises.
        """
        started = time.monotonic()
        await self.source.open()
        if self.repair:
            await self._check()
        reports: list[SinkReport] = []
        for sink in self.sinks:
            reports.append(await self._ask(sink))
            for line in reports[-1].lines():
                show(f"{sink.name:<11} {line}")
        left = any(report.left.count for report in reports)
        report = ReconcileReport(
            outcome="different" if left else "repaired" if any(one.differences for one in reports) else "equal",
            start=self.start,
            end=self.end,
            seconds=time.monotonic() - started,
            doubt=self._underway.gave_up if left else "",
            sinks=reports,
        )
        if report.doubt:
            show(f"the differences may be events that are still on their way: {report.doubt}")
        show(f"{report.outcome}, {report.seconds:.1f} s")
        return report

    async def _check(self) -> None:
        """See that everything can be read and written, before anything is written or deleted."""
        history = self.source.picked([])
        try:
            await history.open()
        finally:
            await history.close()
        for sink in self.sinks:
            await sink.open(None, Mode.BACKFILL)

    async def _ask(self, sink: Sink) -> SinkReport:
        report = SinkReport(sink=sink.name, deletes=sink.stream.deletes == "delete")
        if isinstance(sink, HasLedger):
            await sink.open(None, Mode.BACKFILL)
            await self._compare(sink, sink.ledger(with_content=self.with_content), report)
        if isinstance(sink, HasCounter):
            await self._count(sink, sink.counter(), report)
        return report

    async def _compare(self, sink: Sink, ledger: SinkLedger, report: SinkReport) -> None:
        comparison = Comparison(self.source, ledger, *self._range)
        report.add("missing")
        report.add("different")
        report.add("extra")
        async for candidates in comparison.candidates():
            verdict, read_at = await recheck(self.source, ledger, self._underway, candidates)
            report.add("missing", (row.id for row in verdict.missing))
            report.add("different", (row.id for row in verdict.different))
            report.add("extra", (row.id for row in verdict.extra))
            if self.repair and any(verdict):
                await self._apply(sink, ledger, verdict, read_at)
                verdict, _ = await recheck(self.source, ledger, self._underway, candidates)
            report.left.add(row.id for rows in verdict for row in rows)
        report.source_events, report.sink_events = comparison.events
        if not self.repair and report.has("missing", "different"):
            report.hints.append("--repair sends what is missing or different; a backfill of a whole range is faster")
        if not self.delete_extra and report.left.count and report.has("extra"):
            report.hints.append("--repair --delete-extra deletes extra events")
        if not self._underway.certain:
            report.hints.append("extra events may belong to a transaction that is still open, and are not deleted")

    async def _count(self, sink: Sink, counter: EventCounter, report: SinkReport) -> None:
        report.add("not_counted")
        async for ids in unseen(self.source, counter, *self._range, self._underway):
            report.add("not_counted", ids)
            if ids and self.repair:
                await self._send(sink, ids)
            report.left.add(await counter.unseen(ids) if self.repair else ids)
        if report.left.count:
            report.hints.append("--repair counts what was not counted in this range")
        differ = await compare_counts(self.source, counter, self._underway, report)
        if differ and isinstance(sink, Rebuildable) and sink.kind in BUILT_IN:
            rebuild, option = f"rebuild-{sink.kind}", sink.context.stream_option
            if report.has("counts_too_low"):
                report.hints.append(f"if {sink.name} has lost its data, {command(f'{rebuild}{option}')} makes it again")
            if not report.has("not_counted"):
                anew = command(f"{rebuild} --from-empty{option}")
                report.hints.append(f"if it has lost nothing, {anew} corrects the counts")

    async def _apply(self, sink: Sink, ledger: SinkLedger, verdict: Verdict, read_at: Lsn) -> None:
        """Delete what is extra, if that was asked for and is certain; send what is missing or different."""
        if self.delete_extra and self._underway.certain:
            # A version that is newer than the source (of another cluster, from before a failover) would stay.
            newer = [row for row in verdict.different if row.lsn >= read_at]
            if doomed := [*verdict.extra, *newer]:
                await ledger.delete(doomed)
        if ids := {row.id for row in (*verdict.missing, *verdict.different)}:
            await self._send(sink, sorted(ids))

    async def _send(self, sink: Sink, ids: Sequence[Id]) -> None:
        """Send these events, with today's content, as a backfill does."""
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


async def compare_counts(source: SourceLedger, counter: EventCounter, underway: Underway, report: SinkReport) -> bool:
    """Put the counts over all times that are wrong into the report; whether any is left that differs."""
    report.add("counts_too_low")
    if report.deletes:
        report.add("counts_too_high")
    differ = False
    async for wrong in _all_wrong_counts(source, counter, underway, report):
        low = [one for one in wrong if one.found < one.least]
        high = [one for one in wrong if one.found > one.most]
        report.add("counts_too_low", low)
        report.add("counts_too_high", high)
        report.left.add(different := [*low, *high] if report.deletes else low)
        differ = differ or bool(different)
    return differ


async def _all_wrong_counts(
    source: SourceLedger, counter: EventCounter, underway: Underway, report: SinkReport
) -> AsyncIterator[list[WrongCount]]:
    """Of every key of the source; where rows are deleted at the sink, too, also of keys that only the sink has."""
    known: set[Id] | None = set() if report.deletes else None
    async for wrong in wrong_counts(source, counter, underway, known):
        yield wrong
    if known is None:
        return
    try:
        async for wrong in stray_counts(source, counter, underway, known):
            yield wrong
    except SinkMisconfigured as exc:
        report.hints.append(f"counts of keys that have no row in PostgreSQL were not compared: {exc.detail}")
