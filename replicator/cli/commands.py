"""What each command does; `__main__.py` parses the arguments and hands over the parts.

A command returns its exit code: 0 done, 1 something is not as it should be. Errors are raised (errors.py).
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from typing import NamedTuple

from replicator.contracts.errors import Overtaken, SettingsError
from replicator.contracts.events import DeadLetter, Position, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Mode, Sink
from replicator.contracts.stores import CheckpointStore
from replicator.contracts.stream import Enricher
from replicator.delivery.dead_letters import place
from replicator.operations import check as preflight
from replicator.operations import status as statuses
from replicator.operations.http import Admin
from replicator.operations.watchdog import Monitor
from replicator.pipeline import Pipeline
from replicator.source.stream import Source
from replicator.source.takeover import Beginning

PAGE = 500
"""Dead letters in memory at once."""
NOT_READY = 3
"""Exit code of `status`."""


class Parts(NamedTuple):
    """Everything that `__main__` made from the settings."""

    settings: CoreSettings
    enricher: Enricher
    sinks: list[Sink]
    store: CheckpointStore

    @property
    def dsn(self) -> str:
        """The connection string, password included."""
        return self.settings.postgres_dsn.get_secret_value()

    def source(self) -> Source:
        """A source for the slot; not connected yet."""
        return Source(self.dsn, self.settings.slot, self.enricher.tables)


@asynccontextmanager
async def _closing(parts: Parts) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await parts.enricher.close()
        for sink in parts.sinks:
            await sink.close()
        await asyncio.to_thread(parts.store.close)


# -- run ---------------------------------------------------------------------------------------------------------


async def run(parts: Parts, _args: argparse.Namespace) -> int:
    """Replicate until SIGTERM or SIGINT. The very first time it also does what `init` does."""
    told_to_stop = asyncio.Event()
    try:
        async with _closing(parts):
            await _replicate(parts, told_to_stop)
    except Overtaken:
        if not told_to_stop.is_set():  # else there is nothing to begin anew
            raise
    return 0


async def _replicate(parts: Parts, told_to_stop: asyncio.Event) -> None:
    pipeline = Pipeline(parts.settings, parts.source(), parts.enricher, parts.sinks, parts.store)

    def stop() -> None:
        told_to_stop.set()
        pipeline.stop()

    stop_on_signals(stop)
    monitor = Monitor(pipeline, parts.dsn, parts.settings.slot)
    admin = Admin(monitor, parts.settings.admin_listen)
    await admin.start()
    watching = asyncio.create_task(monitor.run())
    watching.add_done_callback(lambda _: pipeline.stop())  # blind, we would look healthy over a slot that stands
    try:
        await pipeline.run()
    finally:
        watching.cancel()
        [ended] = await asyncio.gather(watching, return_exceptions=True)
        await admin.stop()
    if isinstance(ended, Exception):
        raise ended


def stop_on_signals(stop_work: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT drains; the second one ends the program at once."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        stop_work()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


# -- init --------------------------------------------------------------------------------------------------------


async def init(parts: Parts, args: argparse.Namespace) -> int:
    """Make what is missing and say so; harmless when nothing is."""
    async with _closing(parts):
        for line in await asyncio.to_thread(parts.store.create):
            print(line)
        for sink in parts.sinks:
            for line in await sink.create():
                print(line)
        with closing(parts.source()) as source:
            beginning = Beginning(source, parts.store, parts.settings.slot, parts.sinks)
            taken = await beginning.take(accept_gap=args.accept_gap)
        slot, end = taken.checkpoint.slot, format_lsn(taken.checkpoint.end_lsn)
        if taken.created_slot:
            print(f"made replication slot {slot}")
        if args.accept_gap and taken.resumed:
            print(f"there is no gap: the slot has everything behind the checkpoint, {end}")
        print(f"slot {slot}: replication begins behind {end}")
        print("\n".join(taken.gap or [await parts.enricher.history() or "no older rows: nothing to backfill"]))
    return 0


# -- check, status, drop-slot ------------------------------------------------------------------------------------


async def check(parts: Parts, _args: argparse.Namespace) -> int:
    """Look at everything; a line each, with the cure. 1 if anything is not as it has to be."""
    failed = 0
    async with _closing(parts):
        async for finding in preflight.findings(parts.settings, parts.enricher, parts.sinks, parts.store):
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}")
            if finding.cure:
                print(f"      → {finding.cure}")
            failed += not finding.ok
    print(f"{failed} of the checks failed" if failed else "everything is as it has to be")
    return int(bool(failed))


async def status(parts: Parts, args: argparse.Namespace) -> int:
    """Where the slot, the checkpoint and every sink are. 3 if it is not ready."""
    async with _closing(parts):
        found = await statuses.collect(parts.settings, [sink.name for sink in parts.sinks], parts.store)
    print(statuses.as_json(found) if args.json else statuses.as_text(found))
    return 0 if found.ready else NOT_READY


async def drop_slot(parts: Parts, args: argparse.Namespace) -> int:
    """Drop the slot, after asking."""
    slot = parts.settings.slot
    async with _closing(parts):
        with closing(parts.source()) as source:
            _, state = await source.connect()
            if state is None:
                print(f"there is no replication slot {slot}")
                return 0
            told = f"Drop replication slot {slot}? Whatever is committed from now on is not kept for it."
            if not args.yes and not agreed(told):
                return 1
            await source.drop_slot()
    print(f"dropped replication slot {slot}; `python -m replicator init --accept-gap` makes a new one")
    return 0


def agreed(question: str) -> bool:
    """Ask on the terminal. Raises SettingsError where there is none: it takes --yes."""
    if not sys.stdin.isatty():
        raise SettingsError(
            name="standard input", problem="it is no terminal", expected="a terminal to ask on, or --yes"
        )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's own would wait for the answer first
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


# -- dead letters ------------------------------------------------------------------------------------------------


async def list_dead_letters(parts: Parts, args: argparse.Namespace) -> int:
    """Print them, oldest first, with their payload. 1 if a number that was asked for is not there."""
    found: set[int | None] = set()
    async with _closing(parts):
        async for page in _pages(parts, args):
            found.update(letter.id for letter in page)
            for letter in page:
                at = datetime.fromtimestamp(letter.created_at, UTC).isoformat(timespec="seconds")
                owner = letter.sink or "every sink"
                print(f"{letter.id}  {at}  {owner}  event {letter.event_id}  {place(letter)}  {letter.reason}")
                print(f"    {letter.payload.decode(errors='replace')}")
    return _tell_of_absent(args, found)


async def replay_dead_letters(parts: Parts, args: argparse.Namespace) -> int:
    """Give them to their sink again and drop what it takes. 1 if any is left, or not there."""
    found: set[int | None] = set()
    left: dict[int | None, str] = {}
    async with _closing(parts):
        await parts.enricher.open()
        async for page in _pages(parts, args):
            kept = await _replay(parts, page)
            taken = [letter.id for letter in page if letter.id is not None and letter.id not in kept]
            await asyncio.to_thread(parts.store.drop_dead_letters, parts.settings.slot, taken)
            print(f"{len(taken)} taken, {len(kept)} left")
            for number, reason in kept.items():
                print(f"{number} is left: {reason}")
            found.update(letter.id for letter in page)
            left |= kept
    return _tell_of_absent(args, found) or int(bool(left))


async def _replay(parts: Parts, letters: Sequence[DeadLetter]) -> dict[int | None, str]:
    """Those that are left, each with the reason; every sink that the others are for has taken them now."""
    present = {None, *(sink.name for sink in parts.sinks)}
    away = "sink {} is not among REPLICATOR_SINKS".format
    left = {letter.id: away(letter.sink) for letter in letters if letter.sink not in present}
    for sink in parts.sinks:
        mine = [letter for letter in letters if letter.sink in (sink.name, None)]
        if mine:  # another sink may be down: these letters are not for it
            refused = await _give(parts.enricher, sink, mine)
            positions = {letter.id: letter.replay_position for letter in mine}
            left |= {number: refused[at] for number, at in positions.items() if at in refused}
    return left


async def _give(enricher: Enricher, sink: Sink, letters: Sequence[DeadLetter]) -> dict[Position, str]:
    """Why the sink refuses what it does, by position."""
    await sink.open(None, Mode.BACKFILL)
    restored = await enricher.restore(letters)
    refused = {letter.replay_position: letter.reason for letter in restored.refused}
    for start in range(0, len(restored.events), sink.max_events):
        for event, reason in await sink.write(restored.events[start : start + sink.max_events]):
            refused[Position(event.commit_lsn, event.ordinal)] = reason
    return refused


async def drop_dead_letters(parts: Parts, args: argparse.Namespace) -> int:
    """Forget them, after asking. 1 if a number that was asked for is not there."""
    async with _closing(parts):
        doomed = [letter.id async for page in _pages(parts, args) for letter in page if letter.id is not None]
        if doomed and not args.yes and not agreed(f"Forget {len(doomed)} dead letters?"):
            return 1
        dropped = await asyncio.to_thread(parts.store.drop_dead_letters, parts.settings.slot, doomed)
    print(f"dropped {dropped} dead letters")
    return _tell_of_absent(args, doomed)


def _tell_of_absent(args: argparse.Namespace, found: Collection[int | None]) -> int:
    """Say what is not there, beside the output; the exit code."""
    of_sink = f" of sink {args.sink}" if args.sink else ""
    absent = sorted(set(args.ids).difference(found))
    for number in absent:
        print(f"there is no dead letter {number}{of_sink}", file=sys.stderr)
    if not found and not absent:
        print(f"no dead letters{of_sink}", file=sys.stderr)
    return int(bool(absent))


async def _pages(parts: Parts, args: argparse.Namespace) -> AsyncIterator[list[DeadLetter]]:
    """Pages of those that the arguments choose."""
    after = 0
    while page := await asyncio.to_thread(
        parts.store.dead_letters, parts.settings.slot, sink=args.sink, stage=args.stage, after_id=after, limit=PAGE
    ):
        after = page[-1].id or 0
        chosen = [letter for letter in page if not args.ids or letter.id in args.ids]
        if chosen:
            yield chosen
