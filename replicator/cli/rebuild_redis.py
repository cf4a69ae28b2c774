"""`python -m replicator rebuild-redis`: all of Redis's keys again, from what stands in PostgreSQL.

It is a backfill of all times into Redis alone, with `backfill.py`'s progress and summary. The seen bits make it exact
beside the stream: an event that is visible when its page is read is counted by whoever comes first, and one that is
committed later is the stream's. That holds if Redis lost its keys before the rebuild began; the generation, a word in
Redis, tells whether it did so again since.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Awaitable

from checkpoint_store import SqlCheckpointStore
from enrichment import BEGINNING, END, create_history
from replicator.cli import commands
from replicator.cli.backfill import OneLineParser, Parts, add_pace, carry, once
from replicator.contracts.errors import SettingsError
from replicator.reconcile.repair import rebuild
from sinks import create_sinks

MANUAL = """\
Makes content:count:*, content:last:*, the rankings and the seen bits again after Redis has lost them (a flush, a crash
without persistence, a new server), from all rows of PostgreSQL, while the replicator runs or without it. The replicator
need not be stopped: each event is counted once, whoever brings it. Until it is done counts are too low.

Events that Redis has marked as seen are not counted again: where keys are not missing but wrong, they stay wrong.
--from-empty asks, then deletes all of the replicator's keys first, in one moment (some 1 us a key in which Redis serves
nobody), and then makes them again. What is no longer in PostgreSQL is then no longer counted.

SIGTERM and Ctrl-C stop it in good order; --resume goes on there, also after a crash or a kill, unless Redis was emptied
again or restarted since: then it begins at the beginning.

Exit codes: 0 done, 1 failed or interrupted, 2 unusable arguments.
"""
QUESTION = (
    "Delete all of the replicator's keys in Redis? Counts are too low until all are made again, and what PostgreSQL no"
    " longer has is not counted any more."
)


def add_command(sub: argparse._SubParsersAction[OneLineParser]) -> None:
    """Its command line."""
    parser = sub.add_parser(
        "rebuild-redis",
        help="make all of Redis's keys again from PostgreSQL, while the replicator runs",
        description=MANUAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted rebuild was")
    parser.add_argument(
        "--from-empty",
        action="store_true",
        help="first delete every key of ours, because what is there is wrong (not only missing)",
    )
    parser.add_argument("--yes", action="store_true", help="don't ask before --from-empty deletes")
    add_pace(parser)
    parser.set_defaults(command=rebuild_redis)


async def rebuild_redis(given: commands.Parts, args: argparse.Namespace) -> int:
    """Backfill all times into Redis."""
    if args.resume and args.from_empty:
        raise SettingsError(name="--resume", problem="--from-empty begins anew", expected="one of the two")
    if args.from_empty and not args.yes and not commands.agreed(QUESTION):
        return 1
    history = create_history(given.dsn, BEGINNING, END)
    sinks = create_sinks(["redis"])
    store = SqlCheckpointStore(given.settings.checkpoint_url.get_secret_value())
    parts = Parts(args, given.settings, history, sinks, store, "rebuild-redis")
    try:
        async with once(history, sinks, store):
            return await _rebuild(parts)
    except asyncio.CancelledError:
        print("rebuild-redis: stopped before anything was written", file=sys.stderr)
        return 1


async def _rebuild(parts: Parts) -> int:
    def fill(generation: str) -> Awaitable[int]:
        return carry(parts._replace(task=f"rebuild-redis {generation}"), _to_go_on(parts.args))

    empty = _show_deleted if parts.args.from_empty else None
    return await rebuild(parts.sinks[0], parts.history, parts.store, fill, empty)


def _show_deleted(keys: int) -> None:
    print(f"deleted     {keys} keys", flush=True)


def _to_go_on(args: argparse.Namespace) -> str:
    rate = ["--rate", str(args.rate)] if args.rate else []
    return shlex.join(["python", "-m", "replicator", "rebuild-redis", *rate, "--resume"])
