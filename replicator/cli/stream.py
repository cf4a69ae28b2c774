"""`run`, `init` and `drop-slot`: the commands that own the slot."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec import structs

from replicator.cli.arguments import USUAL_SINKS, Yes, confirmed, load_app
from replicator.contracts.errors import (
    Overtaken,
    ReplicatorError,
    SettingsError,
    SinkError,
    SlotInUse,
    SourceError,
    SourceUnusable,
    TablesUnfit,
    command,
)
from replicator.contracts.events import Checkpoint, format_lsn
from replicator.operations.notices import systemd

if TYPE_CHECKING:
    from replicator.app import App
    from replicator.contracts.sink import Sink
    from replicator.contracts.stores import CheckpointStore
    from replicator.delivery.lane import Lane
    from replicator.operations.control.server import Control
    from replicator.operations.watchdog import Watchdog
    from replicator.source.takeover import Beginning, Takeover

SHOW_CURSOR = "\x1b[?25h"

log = logging.getLogger(__name__)


async def run() -> int:
    """Replicate until SIGTERM or Ctrl-C (the default command).

    The first time it also does what `init` does. While another process reads the slot, this one waits as the standby.
    A second signal ends it at once.
    """
    stopping = begin()
    return await replicate(load_app(), stopping)


def begin() -> asyncio.Event:
    """From the first line on: what follows takes a while. The event is set when it shall stop."""
    _raise_descriptor_limit()
    stopping = asyncio.Event()
    stop_on_signals(stopping.set)
    return stopping


async def replicate(app: App, stopping: asyncio.Event) -> int:
    """Do it with this app; the exit code."""
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
    return 0


async def _replicate(app: App, stopping: asyncio.Event) -> None:
    from replicator.app.running import Running
    from replicator.cli.inspect import shown_settings
    from replicator.cli.operate.follow import trace_beside
    from replicator.operations.control.address import socket_path
    from replicator.operations.control.pauses import Pauses
    from replicator.operations.control.server import Control
    from replicator.operations.follow.tail import view
    from replicator.operations.http import Admin
    from replicator.operations.page.live import Live

    running = Running(app)
    pipeline, watchdog, store = running.pipeline, running.watchdog, running.store

    def stop() -> None:
        stopping.set()
        systemd.tell("STOPPING=1")
        say_what_stops(pipeline.fan_out.lanes, app.settings.drain_timeout_seconds)
        pipeline.stop()

    stop_on_signals(stop)
    if stopping.is_set():
        return
    logging.getLogger().addHandler(watchdog.notices.handler)
    streams = [tables.stream.name for tables in app.streams]
    page = Live(watchdog, store, app.settings.slot, shown_settings(app.settings_classes()), streams)
    admin = Admin(watchdog, app.settings.admin_listen, page, partial(trace_beside, app, store))
    await admin.start()
    act, show = Pauses(watchdog, app.settings, store).act, partial(view, pipeline.fan_out.taps)
    control = Control(socket_path(app.settings, app.store), act, show)
    try:
        await running.run(_beside(watchdog, app.store, control))
    except Overtaken:
        raise
    except Exception as exc:
        await watchdog.notifier.say_end(exc, app.store)
        raise
    finally:
        logging.getLogger().removeHandler(watchdog.notices.handler)
        await admin.stop()


def _beside(watchdog: Watchdog, store: CheckpointStore, control: Control) -> dict[str, Callable[[], Awaitable[None]]]:
    """What tells others, and does what they ask for."""
    notifier = watchdog.notifier
    return {
        "what is to be told": notifier.watch,
        "notifications": notifier.send,
        "the heartbeat": notifier.beat,
        "the end of the last run": partial(notifier.say_again, store),
        "the service manager": partial(systemd.keep_told, watchdog.state, lambda: watchdog.is_up),
        "pause, resume, retry and tail": control.run,
    }


def _raise_descriptor_limit() -> None:
    """To what the system allows: the usual 1,024 are soon gone, and sinks need them more than whoever asks."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # not everywhere may it be without bound
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stop_on_signals(stop_work: Callable[[], object]) -> None:
    """The first SIGTERM, SIGINT or SIGHUP drains; the second SIGTERM or SIGINT ends the program at once."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            # Not the system's own way: process 1 of a container would ignore it.
            signal.signal(number, lambda number, _: os._exit(128 + number))
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may go while it drains
        if sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)  # a progress bar hides it, and may not get to its end
        stop_work()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup`
            loop.add_signal_handler(number, stop)


def say_what_stops(lanes: Sequence[Lane], seconds: float) -> None:
    """What the drain waits for, in the log."""
    names = ", ".join(lane.name for lane in lanes if lane.writing)
    if names:
        log.info("stopping: waiting up to %g s for writes to %s; a second signal ends it at once", seconds, names)
    else:
        log.info("stopping")


async def init(
    accept_gap: Annotated[
        bool,
        typer.Option(
            "--accept-gap",
            help="if slot and checkpoint no longer fit together: begin at the slot's position, and print the backfill"
            " command for the events in between. If they fit: accept what a sink is known to have lost",
        ),
    ] = False,
) -> int:
    """Make the table, the checkpoint database and the slot.

    It makes only what is missing, so you can run it again. It makes nothing while `check` fails for PostgreSQL or its
    tables. It prints the backfill command for older rows.
    """
    from replicator.source.takeover import Beginning

    app = load_app()
    async with app.closing():
        emptied = await _make(app)
        with closing(app.source()) as source:
            beginning = Beginning(source, app.store, app.settings.slot, app.sinks)
            taken = await beginning.take(accept_gap=accept_gap)
            kept = await source.keep_on_standbys()
        slot, end = taken.checkpoint.slot, format_lsn(taken.checkpoint.end_lsn)
        if taken.created_slot:
            await _copy_contents(app, taken.checkpoint)
            print(f"made replication slot {slot}")
        if kept:
            print(f"standbys keep a copy of replication slot {slot} from now on")
        if accept_gap and not taken.gap:  # who accepts a gap may not know of a loss, which is larger
            await _accept_losses(beginning, taken)
        if accept_gap and taken.resumed and not taken.gap:
            print(f"there is no gap: the slot has everything after the checkpoint, {end}")
        print(f"slot {slot}: replication begins after {end}")
        lacking = () if taken.created_slot else emptied
        print("\n".join(taken.gap or await _older_rows(app, lacking)))
    return 0


async def _make(app: App) -> list[str]:
    """Make and print what checkpoint and sinks need; the sinks that lacked something. Raises what `check` refuses."""
    from replicator.operations.check import require_source

    await require_source(app.settings, app.enricher)
    for line in await asyncio.to_thread(app.store.create):
        print(line)
    emptied = []
    for sink in app.sinks:
        if lines := await _created(sink):
            print("\n".join(lines))
            emptied.append(sink.name)
    return emptied


async def _older_rows(app: App, lacking: Sequence[str]) -> list[str]:
    """How a backfill brings them. Those of other packages are none of its usual sinks, and lack the rows as well."""
    from sinks import BUILT_IN

    if not (older := await app.enricher.history(lacking)):
        return ["no older rows: nothing to backfill"]
    names = [*dict.fromkeys(sink.kind for sink in app.sinks)]
    if lacking or not (others := [name for name in names if name not in BUILT_IN]):
        return [older]
    named = ",".join(name for name in names if name in (*USUAL_SINKS, *others))
    return [older, f"Without --sinks {named} it leaves out {', '.join(others)}."]


async def _accept_losses(beginning: Beginning, taken: Takeover) -> None:
    if taken.found.state and (pid := taken.found.state.active_pid):  # it knows the losses, and would keep them again
        print(f"process {pid} reads the slot: what its sinks have lost is accepted only while it is stopped")
        return
    for name in await beginning.accept_losses():
        print(f"accepted that sink {name} lacks what it lost")


async def _copy_contents(app: App, checkpoint: Checkpoint) -> None:
    """As of the new slot: what is committed before the first `run` has these. If that can't be, `run` does it."""
    with suppress(TablesUnfit, SourceUnusable):
        await app.enricher.look(None, checkpoint.end_lsn)
        await app.enricher.open(app.store, checkpoint)
        checkpoint = structs.replace(checkpoint, contents=app.enricher.changed(checkpoint.end_lsn).contents)
        await asyncio.to_thread(app.store.save, checkpoint)


async def _created(sink: Sink) -> list[str]:
    """What it makes. A sink of another package may raise anything, and its text may hold a secret."""
    try:
        return [*map(str, await sink.create())]
    except (ReplicatorError, MemoryError):
        raise
    except Exception as exc:
        log.debug("sink %s could not make what it needs", sink.name, exc_info=True)
        problem = f"sink {sink.name} failed in an unexpected way ({type(exc).__name__})"
        raise SinkError(sink.name, problem, "REPLICATOR_LOG_LEVEL=debug shows where; report it to its author") from exc


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
            try:
                await source.drop_slot()
            except SlotInUse as exc:  # its own cure is for a standby
                raise SourceError(exc.problem, "To drop the slot, stop that process first") from exc
    print(f"dropped replication slot {slot}; {command('init --accept-gap')} makes a new one")
    return 0
