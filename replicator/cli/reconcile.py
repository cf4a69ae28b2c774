"""`python -m replicator reconcile --start ... --end ...`: do the sinks have what PostgreSQL has?

This is the command line; `replicator/reconcile/` does the work.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import msgspec

from checkpoint_store import SqlCheckpointStore
from enrichment import EngagementLedger
from replicator.cli import commands
from replicator.cli.backfill import OneLineParser, add_range, count, iso, once
from replicator.contracts.errors import SettingsError
from replicator.reconcile.run import WAIT_SECONDS, Reconcile
from sinks import create_sinks

MANUAL = """\
Compares the events with start <= event_ts < end in PostgreSQL and in ClickHouse, field by field: both compute counts
and checksums of stretches of time, then the events of the stretches that differ are compared. For Redis it checks that
each of these events was counted, and that content:count:* of every content is at least its number of events over all
times. (Higher counts are reported but are not differences: deleted rows stay counted. This part reads the whole table.)

The replicator may run meanwhile: what differs is checked again once the slot has passed the WAL position at which
PostgreSQL was read, and only what still differs is reported. REPLICATOR_SLOT must be the slot that feeds these sinks.
Dead letters are missing in the sinks, too.

content_type, length_seconds and engagement_pct show the content at the time when the event was committed, or was
backfilled. PostgreSQL no longer knows that, so they are compared, with today's content, only --with-content.
"""
EPILOG = """\
--repair sends the events that are missing or different to ClickHouse, through the same enrichment, and those that were
not counted to Redis. If counts are too low although every event is marked as counted, use
`python -m replicator rebuild-redis --from-empty`.
--delete-extra also deletes from ClickHouse what PostgreSQL does not have. Rows that you no longer keep in PostgreSQL,
of a dropped partition for instance, would go too: choose the range accordingly.

Exit codes: 0 equal (or equal after --repair), 1 failed, 2 unusable arguments or settings, 3 different.
"""
SINKS = ("clickhouse", "redis")


def add_command(sub: argparse._SubParsersAction[OneLineParser]) -> None:
    """Its command line."""
    parser = sub.add_parser(
        "reconcile",
        help="compare PostgreSQL with ClickHouse and Redis, and repair what differs",
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
        default=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"for the replicator to bring what was committed before, at most (default: {WAIT_SECONDS})",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=reconcile)


def _sinks(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or not set(SINKS) >= set(names):
        message = f"{text!r} is not one or more of {', '.join(SINKS)}, separated by commas (the API can't be asked)"
        raise argparse.ArgumentTypeError(message)
    return names


async def reconcile(given: commands.Parts, args: argparse.Namespace) -> int:
    """Compare, and repair if asked to."""
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
            report = await Reconcile(
                given.settings,
                ledger,
                sinks,
                store,
                start=args.start,
                end=args.end,
                with_content=args.with_content,
                repair=args.repair,
                delete_extra=args.delete_extra,
                wait_seconds=args.wait,
            ).run(_quiet if args.json else print)
    except asyncio.CancelledError:
        print("reconcile: stopped before it was done", file=sys.stderr)
        return 1
    if args.json:
        print(msgspec.json.encode(report).decode())
    return report.exit_code


def _quiet(_line: str) -> None:
    """The report comes at the end, as JSON."""
