"""`python -m replicator reconcile --start ... --end ...`: do ClickHouse and Redis have what PostgreSQL has?

`reconcile/compare.py` compares, `enrichment/ledger.py`, `sinks/clickhouse/ledger.py` and `sinks/redis/ledger.py` say
what is there, `replicator/delivery/backfill.py` mends. This is the command line and what it tells.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import logging
import sys
import time
from collections.abc import Sequence

from checkpoint_store import SqlCheckpointStore
from enrichment import EngagementLedger
from enrichment.engagement import microseconds
from replicator.cli import commands
from replicator.cli.backfill import PAGE_ROWS, OneLineParser, add_range, count, iso, once
from replicator.contracts.errors import SettingsError
from replicator.contracts.events import Lsn
from replicator.contracts.ledger import EventCounter
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Mode, Sink
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.backfill import Backfill, Stage
from replicator.reconcile import compare
from replicator.reconcile.compare import SETTLE_SECONDS, SETTLED, Comparison, Settled, Stream, Tally, Verdict
from sinks import create_sinks
from sinks.clickhouse.ledger import ClickHouseLedger
from sinks.clickhouse.sink import ClickHouseSink
from sinks.redis.sink import RedisSink

MANUAL = """\
Compares the events with start <= event_ts < end in PostgreSQL with those in ClickHouse, field by field: counts and
checksums of stretches of time, computed inside both, then the events of the stretches that differ. And with Redis: was
each of these events counted, and is content:count:* of every content, over all times, no less than the number of its
events? (More is told and is no difference: deleted rows stay counted. This part reads the whole table.)

It runs beside the replicator: what differs is looked at again when the slot has passed the place in the WAL at which
PostgreSQL was read, and only what differs then is told. REPLICATOR_SLOT must be the slot that feeds these sinks.
Events that wait as dead letters are missing too.

content_type, length_seconds and engagement_pct are what the content was when the event was committed, or when it was
backfilled, which PostgreSQL does not know any more. They are compared with today's content only --with-content.
"""
EPILOG = """\
--repair sends the events that are missing or different through the same enrichment into ClickHouse, and those that were
not counted into Redis. Counts that are too low although every event is marked as counted are made right by
`python -m replicator rebuild-redis --from-empty`.
--delete-extra also deletes from ClickHouse what PostgreSQL does not have. Events that PostgreSQL no longer keeps, of a
dropped partition for instance, are such: choose the range accordingly.

Exit codes: 0 equal (or equal after --repair), 1 different or failed, 2 unusable arguments or settings.
"""
SINKS = ("clickhouse", "redis")
MENDED = "`--repair` writes what is missing or different; for a whole range a backfill is faster"
COUNTED = (
    "`--repair` counts what was not counted in this range; after Redis lost its keys"
    " `python -m replicator rebuild-redis` counts all there is"
)
COUNTED_ANEW = "counts are made right by `python -m replicator rebuild-redis --from-empty`"

log = logging.getLogger("replicator.reconcile")


def add_command(sub: argparse._SubParsersAction[OneLineParser]) -> None:
    """Its command line."""
    parser = sub.add_parser(
        "reconcile",
        help="compare PostgreSQL with ClickHouse and Redis, and mend what differs",
        description=MANUAL,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_range(parser)
    parser.add_argument(
        "--sinks", type=_sinks, default=SINKS, metavar="NAMES", help=f"of {', '.join(SINKS)} (default: both)"
    )
    parser.add_argument("--with-content", action="store_true", help="compare all fields, against today's content")
    parser.add_argument("--repair", action="store_true", help="write what is missing or different")
    parser.add_argument(
        "--delete-extra", action="store_true", help="with --repair: delete from ClickHouse what PostgreSQL has not"
    )
    parser.add_argument(
        "--wait",
        type=count,
        default=SETTLE_SECONDS,
        metavar="SECONDS",
        help=f"for the replicator to bring what was committed before, at most (default: {SETTLE_SECONDS})",
    )
    parser.set_defaults(command=reconcile)


def _sinks(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or not set(SINKS) >= set(names):
        told = f"{text!r} is not one or more of {', '.join(SINKS)}, separated by commas (the API can't be asked)"
        raise argparse.ArgumentTypeError(told)
    return names


async def reconcile(given: commands.Parts, args: argparse.Namespace) -> int:
    """Compare, mend if asked to, and tell."""
    if args.start >= args.end:
        problem = f"{iso(args.start)} is not before --end {iso(args.end)}"
        raise SettingsError(name="--start", problem=problem, expected="an earlier time")
    if args.delete_extra and not args.repair:
        raise SettingsError(name="--delete-extra", problem="it is a part of --repair", expected="both, or neither")
    ledger = EngagementLedger(given.dsn, with_content=args.with_content)
    sinks = create_sinks(args.sinks)
    store = SqlCheckpointStore(given.settings.checkpoint_url.get_secret_value())
    try:
        async with once(ledger, sinks, store):
            return await _Run(args, given.settings, ledger, store).run(sinks)
    except asyncio.CancelledError:
        print("reconcile: stopped before it was done", file=sys.stderr)
        return 1


class _Run:
    """One comparison."""

    def __init__(
        self, args: argparse.Namespace, settings: CoreSettings, ledger: EngagementLedger, store: CheckpointStore
    ) -> None:
        self._args = args
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._range = (microseconds(args.start), microseconds(args.end))
        self._stream = Stream(settings.postgres_dsn.get_secret_value(), settings.slot, args.wait)
        self._left = 0
        """What differs, and was not mended."""
        self._found = 0

    async def run(self, sinks: Sequence[Sink]) -> int:
        """All of them; the exit code."""
        started = time.monotonic()
        await self._ledger.open()
        if self._args.repair:
            await self._see_that_it_can_be_mended(sinks)
        for sink in sinks:
            if isinstance(sink, ClickHouseSink):
                await sink.open(None, Mode.BACKFILL)
                await self._clickhouse(sink)
            elif isinstance(sink, RedisSink):
                await self._redis(sink)
        if self._left and self._stream.trouble:
            print(f"what differs may still be under way: {self._stream.trouble}")
        outcome = "different" if self._left else "equal after the repair" if self._found else "equal"
        print(f"{outcome}, {time.monotonic() - started:.1f} s")
        return int(bool(self._left))

    async def _see_that_it_can_be_mended(self, sinks: Sequence[Sink]) -> None:
        """Before anything is written or deleted."""
        history = self._ledger.picked([])
        try:
            await history.open()
        finally:
            await history.close()
        for sink in sinks:
            await sink.open(None, Mode.BACKFILL)

    # -- ClickHouse ------------------------------------------------------------------------------------------------

    async def _clickhouse(self, sink: ClickHouseSink) -> None:
        ledger = sink.ledger(with_content=self._args.with_content)
        settled = Settled(self._ledger, ledger, self._stream, self._args.wait)
        comparison = Comparison(self._ledger, ledger, *self._range, progress=log.info)
        missing, different, extra, left = Tally(), Tally(), Tally(), Tally()
        async for ids, start_us, end_us in comparison.suspects():
            verdict, lsn = await settled.look(ids, start_us, end_us)
            missing.add(verdict.missing)
            different.add(row.id for row in verdict.different)
            extra.add(row.id for row in verdict.extra)
            if verdict and self._args.repair:
                await self._mend(sink, ledger, verdict, lsn, certain=settled.certain)
                verdict, _ = await settled.look(ids, start_us, end_us)
            left.add(verdict.missing)
            left.add(row.id for row in (*verdict.different, *verdict.extra))
        there, here = comparison.events
        meanwhile = " (more came meanwhile)" if there != here and not (missing.count or extra.count) else ""
        print(f"clickhouse  {there} events in PostgreSQL, {here} in ClickHouse{meanwhile}")
        self._tell("clickhouse", {"missing": missing, "different": different, "extra": extra}, left)
        if (missing.count or different.count) and not self._args.repair:
            print(f"clickhouse  {MENDED}")
        if extra.count and left.count and not self._args.delete_extra:
            print("clickhouse  extra events are deleted by --repair --delete-extra")
        if not settled.certain:
            print("clickhouse  extra events may be of a transaction that is still open, and are not deleted")

    async def _mend(
        self, sink: ClickHouseSink, ledger: ClickHouseLedger, verdict: Verdict, read_at: Lsn, *, certain: bool
    ) -> None:
        if self._args.delete_extra and certain:
            # A view that claims to be newer than PostgreSQL (of another cluster, from before a failover) would stay.
            newer = [row for row in verdict.different if row.lsn >= read_at]
            if doomed := [*verdict.extra, *newer]:
                await ledger.delete(doomed)
        await self._write(sink, sorted({*verdict.missing, *(row.id for row in verdict.different)}))

    # -- Redis -----------------------------------------------------------------------------------------------------

    async def _redis(self, sink: RedisSink) -> None:
        ledger = sink.counter()
        uncounted, left = Tally(), Tally()
        async for suspects in compare.unseen(self._ledger, ledger, *self._range):
            ids = await compare.settled_unseen(self._ledger, ledger, self._stream, suspects)
            uncounted.add(ids)
            if ids and self._args.repair:
                await self._write(sink, ids)
                ids = await ledger.unseen(ids)
            left.add(ids)
        self._tell("redis", {"not counted": uncounted}, left)
        low = await self._counts(ledger)
        if left.count or (low and (uncounted.count or await _is_empty(ledger))):
            print(f"redis       {COUNTED}")
        elif low:
            print(f"redis       {COUNTED_ANEW}")

    async def _counts(self, ledger: EventCounter) -> int:
        """How many are too low."""
        suspects = array.array("q")  # 8 bytes each
        async for key in compare.suspicious_counts(self._ledger, ledger):
            suspects.append(key)
        low, above = Tally(), Tally()
        for at in range(0, len(suspects), SETTLED):
            some = suspects[at : at + SETTLED]
            wrong = await compare.wrong_counts(self._ledger, ledger, self._stream, some)
            low.add(one for one in wrong if not one.above)
            above.add(one for one in wrong if one.above)
        self._found += low.count
        self._left += low.count
        print(f"redis       counts too low {low}")
        if above.count:
            print(f"redis       counts above PostgreSQL's, of rows that it has deleted or wrong: {above}")
        return low.count

    # -- both ------------------------------------------------------------------------------------------------------

    def _tell(self, sink: str, kinds: dict[str, Tally], left: Tally) -> None:
        for kind, tally in kinds.items():
            self._found += tally.count
            print(f"{sink:<11} {kind} {tally}")
        self._left += left.count
        if self._args.repair and any(tally.count for tally in kinds.values()):
            print(f"{sink:<11} left after the repair {left}")

    async def _write(self, sink: Sink, ids: Sequence[int]) -> None:
        """These events, with today's content, as a backfill writes them."""
        if not ids:
            return
        await asyncio.to_thread(self._store.create)
        history = self._ledger.picked(ids)
        stage = Stage(place="0", events=0, total=len(ids))
        run = Backfill(
            self._settings,
            history,
            [sink],
            self._store,
            task="reconcile",
            stage=stage,
            page_rows=PAGE_ROWS,
            rate=None,
        )
        try:
            await run.run()
        finally:
            await history.close()


async def _is_empty(ledger: EventCounter) -> bool:
    """Whether it counts nothing at all."""
    async for keys in ledger.keys():
        if keys:
            return False
    return True
