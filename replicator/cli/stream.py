"""`run`, `init` and `drop-slot`: the commands that own the slot."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from replicator.cli.arguments import Yes, confirmed, load_app
from replicator.contracts.errors import Overtaken, ReplicatorError, SettingsError, command

if TYPE_CHECKING:
    from replicator.cli.app import App

log = logging.getLogger(__name__)


async def run() -> int:
    """Replicate until SIGTERM or Ctrl-C (the default command).

    The first time it also does what `init` does. While another process reads the slot, this one waits as the standby.
    A second signal ends it at once.
    """
    _raise_descriptor_limit()
    stopping = asyncio.Event()
    stop_on_signals(stopping.set)  # from the first line on: what follows takes a while
    app = load_app()
    for line in app.introduce():
        log.info("%s", line)
    try:
        async with app.closing():
            await _replicate(app, stopping)
    except Overtaken:
        if not stopping.is_set():  # else there is no need to start again
            raise
    except SettingsError:
        raise
    except ReplicatorError as exc:  # in the log, so that whoever collects it has the last line, too
        log.critical("%s", exc)
        return exc.exit_code
    except OSError as exc:  # never standard output's, as `main` would take it: `run` writes only the log
        raise RuntimeError(f"{type(exc).__name__} that nothing handles") from exc
    return 0


async def _replicate(app: App, stopping: asyncio.Event) -> None:
    from replicator.operations.http import Admin
    from replicator.operations.watchdog import Watchdog
    from replicator.pipeline import Pipeline

    pipeline = Pipeline(app.settings, app.source(), app.enricher, app.sinks, app.store)

    def stop() -> None:
        stopping.set()
        pipeline.stop()

    stop_on_signals(stop)
    if stopping.is_set():
        return
    watchdog = Watchdog(pipeline, app.dsn, app.settings.slot)
    admin = Admin(watchdog, app.settings.admin_listen)
    await admin.start()
    watching = asyncio.create_task(watchdog.run())
    watching.add_done_callback(lambda _: pipeline.stop())  # without it we would look healthy while the slot stands
    try:
        await pipeline.run()
    finally:
        watching.cancel()
        [ended] = await asyncio.gather(watching, return_exceptions=True)
        await admin.stop()
    if isinstance(ended, Exception):
        raise ended


def _raise_descriptor_limit() -> None:
    """To what the system allows: the usual 1,024 are soon gone, and sinks need them more than whoever asks."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # not everywhere may it be without bound
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stop_on_signals(stop_work: Callable[[], object]) -> None:
    """The first SIGTERM or SIGINT drains; the second one ends the program at once."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        stop_work()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


async def init(
    accept_gap: Annotated[
        bool,
        typer.Option(
            "--accept-gap",
            help="if slot and checkpoint no longer fit together: begin where the slot is now. What is between is"
            " missing until a backfill, whose command is printed",
        ),
    ] = False,
) -> int:
    """Make the table, the checkpoint database and the slot.

    It makes only what is missing, so running it again changes nothing. It prints the backfill command for older rows.
    """
    from replicator.contracts.events import format_lsn
    from replicator.source.takeover import Beginning

    app = load_app()
    async with app.closing():
        for line in await asyncio.to_thread(app.store.create):
            print(line)
        for sink in app.sinks:
            for line in await sink.create():
                print(line)
        with closing(app.source()) as source:
            beginning = Beginning(source, app.store, app.settings.slot, app.sinks)
            taken = await beginning.take(accept_gap=accept_gap)
        slot, end = taken.checkpoint.slot, format_lsn(taken.checkpoint.end_lsn)
        if taken.created_slot:
            print(f"made replication slot {slot}")
        if accept_gap and taken.resumed:
            print(f"there is no gap: the slot has everything after the checkpoint, {end}")
        print(f"slot {slot}: replication begins after {end}")
        print("\n".join(taken.gap or [await app.enricher.history() or "no older rows: nothing to backfill"]))
    return 0


async def drop_slot(yes: Yes = False) -> int:
    """Drop the slot, after asking.

    PostgreSQL no longer keeps WAL for it.
    """
    app = load_app()
    slot = app.settings.slot
    async with app.closing():
        with closing(app.source()) as source:
            _, state = await source.connect()
            if state is None:
                print(f"there is no replication slot {slot}")
                return 0
            if not confirmed(f"Drop replication slot {slot}? PostgreSQL keeps no more WAL for it.", yes=yes):
                return 1
            await source.drop_slot()
    print(f"dropped replication slot {slot}; {command('init --accept-gap')} makes a new one")
    return 0
