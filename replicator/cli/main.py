"""`python -m replicator`: the command line, and the one place where everything is put together.

`commands.py` has what each command does; `pipeline.py` is what `run` runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor

from checkpoint_store import SqlCheckpointStore
from enrichment import EnrichmentSettings, create_enricher
from replicator.cli import commands, reconcile
from replicator.cli import rebuild_redis as rebuild
from replicator.cli.backfill import OneLineParser
from replicator.cli.commands import Parts
from replicator.contracts.errors import Overtaken, ReplicatorError, SettingsError
from replicator.contracts.events import Stage
from replicator.contracts.settings import CoreSettings, load, unknown
from replicator.operations.logs import configure_logging
from sinks import create_sinks, known_sinks, settings_classes

MANUAL = """\
Reads a PostgreSQL logical replication slot (wal2json), enriches every new row of engagement_events with its content,
and writes it to ClickHouse, Redis and an HTTP API. PostgreSQL is told that a position is flushed only after every sink
has it and the checkpoint is on disk.

first time:   python -m replicator check     what is missing, a line each with the cure
              python -m replicator init      makes the ClickHouse table, the checkpoint database and the slot
              python -m replicator           runs until SIGTERM or Ctrl-C
at 3 a.m.:    python -m replicator status    where the slot, the checkpoint and every sink are
              psql -f sql/slot_lag.sql       the same from PostgreSQL's side
"""
EPILOG = """\
Settings are environment variables (a .env file is read too; any of them also as NAME_FILE): REPLICATOR_POSTGRES_DSN,
REPLICATOR_SLOT, REPLICATOR_SINKS, REPLICATOR_CLICKHOUSE_URL, REPLICATOR_REDIS_URL, REPLICATOR_HTTP_URL,
REPLICATOR_CHECKPOINT_URL, REPLICATOR_ADMIN_LISTEN and more: the README has the table.

Exit codes: 0 done, 1 failed, 2 unusable arguments or settings.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python -m replicator",
        description=MANUAL,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=commands.run)
    sub = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=OneLineParser)
    sub.add_parser("run", help="replicate until SIGTERM or Ctrl-C (the default)").set_defaults(command=commands.run)
    init = sub.add_parser("init", help="make ClickHouse table, checkpoint database and slot; harmless twice")
    init.add_argument(
        "--accept-gap",
        action="store_true",
        help="if slot and checkpoint no longer fit together: begin where the slot is now. What is between is missing"
        " until a backfill, whose command is printed",
    )
    init.set_defaults(command=commands.init)
    sub.add_parser("check", help="is everything as it has to be? exit 1 if not").set_defaults(command=commands.check)
    status = sub.add_parser("status", help="slot, lag, checkpoint, sinks, dead letters")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(command=commands.status)
    _add_dead_letters(sub)
    rebuild.add_command(sub)
    reconcile.add_command(sub)
    drop = sub.add_parser("drop-slot", help="drop the slot: PostgreSQL no longer keeps WAL for it")
    drop.add_argument("--yes", action="store_true", help="don't ask")
    drop.set_defaults(command=commands.drop_slot)
    return parser


def _add_dead_letters(sub: argparse._SubParsersAction[OneLineParser]) -> None:
    letters = sub.add_parser("dead-letters", help="what a sink refused for good: list, replay or drop it")
    actions = letters.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, command, text in (
        ("list", commands.list_dead_letters, "show them, oldest first"),
        ("replay", commands.replay_dead_letters, "give them to their sink again; those it takes are dropped"),
        ("drop", commands.drop_dead_letters, "forget them"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "--sink",
            choices=[*known_sinks()],
            help="only this sink's",
        )
        action.add_argument(
            "--stage",
            type=Stage,
            choices=[*Stage],
            metavar="STAGE",
            help="only `row` (no event could be made of it, for every sink) or `event` (one sink refused it)",
        )
        action.add_argument(
            "--id", dest="ids", type=int, action="append", default=[], metavar="N", help="only number N"
        )
        if name == "drop":
            action.add_argument("--yes", action="store_true", help="don't ask")
        action.set_defaults(command=command)


class _Threads(ThreadPoolExecutor):
    """For calls that block. The end does not wait for one that hangs on a silent server: its write counts as undone."""

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:  # noqa: ARG002  asyncio asks to wait
        """Begin nothing more."""
        super().shutdown(wait=False, cancel_futures=cancel_futures)


async def _run(command: Coroutine[None, None, int]) -> int:
    asyncio.get_running_loop().set_default_executor(_Threads())
    return await command


def _name_unknown_settings() -> None:
    for name in unknown([CoreSettings, EnrichmentSettings, *settings_classes()]):
        logging.getLogger(__name__).warning("%s is no setting, nobody reads it: the README's table has them all", name)


def _tell(command: object, exc: ReplicatorError) -> None:
    """A line of the log where there is one: whoever collects it should have the last line, too."""
    if command is commands.run and not isinstance(exc, SettingsError):
        logging.getLogger("replicator").critical("%s", exc)
    else:
        print(f"replicator: {exc}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    args = build_parser().parse_args(arguments)
    try:
        settings = load(CoreSettings)
        configure_logging(settings.log_level, settings.log_format)
        if args.command in (commands.run, commands.check):
            _name_unknown_settings()
        parts = Parts(
            settings=settings,
            enricher=create_enricher(settings.postgres_dsn.get_secret_value()),
            sinks=create_sinks(settings.sinks),
            store=SqlCheckpointStore(settings.checkpoint_url.get_secret_value()),
        )
        code = asyncio.run(_run(args.command(parts, args)))
        sys.stdout.flush()
    except Overtaken as exc:
        logging.getLogger(__name__).warning("%s", exc)
        logging.shutdown()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  ourselves, as we were called
    except ReplicatorError as exc:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()  # what was done before it; os._exit would drop it
        _tell(args.command, exc)
        return exc.exit_code
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` closed it; nothing left to say
        return 1
    finally:
        logging.shutdown()
    return code
