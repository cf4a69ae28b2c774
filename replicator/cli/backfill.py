"""`python backfill.py --start ... --end ...`: a stretch of history through the same enrichment into the same sinks.

This is the command line, the progress and the summary; `enrichment/history.py` reads, `delivery/backfill.py` carries,
`delivery/lane.py` and `sinks` write, as they do for the stream.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple, NoReturn

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from checkpoint_store import SqlCheckpointStore
from enrichment import EngagementHistory, EngagementLedger, create_history
from replicator.cli.commands import stop_on_signals
from replicator.contracts.errors import ReplicatorError, SinkError, SinkUnavailable, SourceError, SourceUnavailable
from replicator.contracts.ledger import EventCounter
from replicator.contracts.settings import CoreSettings, load
from replicator.contracts.sink import CountsByHour, HasCounter, Mode, Sink
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.backfill import Backfill, BackfillProgress
from replicator.delivery.lane import Lane
from replicator.operations.logs import configure_logging
from replicator.reconcile.counts import unseen
from sinks import create_sinks, known_sinks, sink_names

MANUAL = """\
Sends every event with start <= event_ts < end, with today's content, through the same enrichment into the same sinks,
beside the running replicator or without it. Slot and checkpoint are not touched. Repeating it changes nothing that is
right already: ClickHouse replaces an event's row by the same, Redis counts an event once and keeps the newest one.
"""
EPILOG = """\
Events that are committed while it runs are the stream's: to fill a gap, let the new slot be there first
(`python -m replicator init --accept-gap`). In ClickHouse the backfill's view of an event replaces the stream's, and
a later backfill's replaces it; so after a content row was corrected, a backfill brings the correction.

It reads page by page, each in a short transaction of its own. An index on (event_ts, id) makes each page cost what it
holds; without one the rows from the range's first to its last event are read once, in the order of their primary key:
  CREATE INDEX CONCURRENTLY engagement_events_event_ts_id ON public.engagement_events (event_ts, id);

SIGTERM and Ctrl-C stop it in good order; --resume goes on there, and also after a crash or a kill.
Settings are the replicator's environment variables: see `python -m replicator --help` and the README.

Exit codes: 0 done, 1 failed or interrupted, 2 unusable arguments or settings.
"""

PAGE_ROWS = 5_000  # 10 MB of ours and some 50 ms of PostgreSQL's time; larger ones gain nothing
MOST = 1_000_000  # rows a page: what memory may hold
DEFAULT_SINKS = ("clickhouse", "redis")  # the HTTP API is somebody else's
PROGRESS_SECONDS = 0.5  # a bar that lives
LINE_SECONDS = 10.0  # a log that can be read

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

log = logging.getLogger("replicator.backfill")


class Parts(NamedTuple):
    """Everything that the arguments and the settings come to."""

    args: argparse.Namespace
    settings: CoreSettings
    history: EngagementHistory
    sinks: list[Sink]
    store: CheckpointStore
    task: str
    """What an interrupted run is found by."""


# -- arguments ---------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """What is wrong with the arguments, without all that could be right."""

    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="backfill.py",
        description=MANUAL,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_range(parser)
    parser.add_argument(
        "--sinks",
        type=_sinks,
        default=DEFAULT_SINKS,
        metavar="NAMES",
        help=f"of {sink_names()}, separated by commas (default: {','.join(DEFAULT_SINKS)})",
    )
    add_pace(parser)
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of this range was")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: how many events an hour, and how many of them the sinks lack",
    )
    return parser


def add_range(parser: argparse.ArgumentParser) -> None:
    """From when to when."""
    when = "ISO 8601, e.g. 2026-01-08T09:00:00, 2026-01-08T10:00:00+01:00 or 2026-01-08; without a zone it is UTC"
    parser.add_argument("--start", type=_time, required=True, metavar="TIME", help=f"first moment: {when}")
    parser.add_argument("--end", type=_time, required=True, metavar="TIME", help="first moment after it, likewise")


def add_pace(parser: argparse.ArgumentParser) -> None:
    """How much at once, and how fast."""
    parser.add_argument(
        "--batch-size", type=count, default=PAGE_ROWS, metavar="N", help=f"rows a page (default: {PAGE_ROWS})"
    )
    parser.add_argument("--rate", type=count, metavar="N", help="events a second at most (default: no limit)")


def _time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no ISO 8601 time such as 2026-01-08T09:00:00") from None


def _sinks(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or not known_sinks().keys() >= set(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or more of {sink_names()}, separated by commas")
    return names


def count(text: str) -> int:
    """A number of rows, of events, of seconds."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= MOST):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MOST}")
    return int(text)


def iso(moment: datetime) -> str:
    """As it is typed."""
    return moment.isoformat().replace("+00:00", "Z")


# -- work --------------------------------------------------------------------------------------------------------


async def _main(args: argparse.Namespace, settings: CoreSettings, resume: str) -> int:
    history = create_history(settings.postgres_dsn.get_secret_value(), args.start, args.end)
    sinks = create_sinks(args.sinks)
    store = SqlCheckpointStore(settings.checkpoint_url.get_secret_value())
    task = f"backfill {iso(args.start)} {iso(args.end)} {','.join(sorted(sink.name for sink in sinks))}"
    parts = Parts(args, settings, history, sinks, store, task)
    async with once(history, sinks, store):
        return await (_dry_run(parts) if args.dry_run else carry(parts, resume))


@asynccontextmanager
async def once(
    history: EngagementHistory | EngagementLedger, sinks: Sequence[Sink], store: CheckpointStore
) -> AsyncIterator[None]:
    """Around a run that is tried once: what is away is an error, a signal ends it, and nothing is left open."""
    if task := asyncio.current_task():
        stop_on_signals(partial(_cancel, task))  # until there is something to finish
    try:
        yield
    except SourceUnavailable as exc:
        raise SourceError(f"reading from PostgreSQL failed: {exc.detail}") from exc  # a one-off run does not retry
    except SinkUnavailable as exc:
        raise SinkError(exc.sink, f"sink {exc.sink} failed: {exc.detail}") from exc
    finally:
        await history.close()
        for sink in sinks:
            await sink.close()
        await asyncio.to_thread(store.close)


async def carry(parts: Parts, resume: str) -> int:
    """The whole range, from its beginning or where an interrupted run was; 1 if it was stopped before the end."""
    await parts.history.open()
    for sink in parts.sinks:
        with suppress(SinkUnavailable):  # one that is away is waited for, one that can't be written to ends it now
            await sink.open(None, Mode.BACKFILL)
    run = Backfill(
        parts.settings,
        parts.history,
        parts.sinks,
        parts.store,
        task=parts.task,
        start=await _stage(parts),
        page_rows=parts.args.batch_size,
        rate=parts.args.rate,
    )
    stop_on_signals(run.stop)
    before, started = run.written, time.monotonic()
    done = False
    showing = asyncio.create_task(_show(run, parts.settings))
    try:
        done = await run.run()
    finally:
        showing.cancel()
        with suppress(asyncio.CancelledError):
            await showing
        print("\n".join(_summary(run, before, time.monotonic() - started)))
        if not done:
            print(f"not finished; to go on: {resume}", file=sys.stderr)
    return 0 if done else 1


async def _stage(parts: Parts) -> BackfillProgress:
    """Where to begin. Nothing is written before the range was read once."""
    if parts.args.resume:
        await asyncio.to_thread(parts.store.create)
        told = await asyncio.to_thread(parts.store.load_progress, parts.settings.slot, parts.task)
        if told is not None:
            return msgspec.json.decode(told, type=BackfillProgress)
        log.info("there is no interrupted backfill of this range into these sinks: it begins at the beginning")
    place, total = await parts.history.begin()
    await asyncio.to_thread(parts.store.create)
    return BackfillProgress(place=place, events=0, total=total)


def _cancel(task: asyncio.Task[int]) -> None:
    task.cancel()


# -- what is shown -----------------------------------------------------------------------------------------------


async def _show(run: Backfill, settings: CoreSettings) -> None:
    with _progress(run.written, settings) as tell:
        try:
            while True:
                await asyncio.sleep(PROGRESS_SECONDS)
                tell(run.written)
        finally:
            tell(run.written)


@contextmanager
def _progress(stage: BackfillProgress, settings: CoreSettings) -> Iterator[Callable[[BackfillProgress], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines(stage)
        return
    rate = TextColumn("{task.fields[rate]:,.0f}/s")
    columns = (TextColumn("backfill"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        configure_logging(settings.log_level, settings.log_format)  # its lines go above the bar
        task = bar.add_task("", total=stage.total, completed=stage.events, rate=0.0)
        yield lambda now: bar.update(task, completed=now.events, rate=_rate(stage, now, started))


def _rate(first: BackfillProgress, now: BackfillProgress, started: float) -> float:
    """Events a second on average, since `started` by time.monotonic."""
    return (now.events - first.events) / max(1e-9, time.monotonic() - started)


class _Lines:
    """Progress as lines; called far more often than it prints."""

    def __init__(self, stage: BackfillProgress) -> None:
        self._first = stage
        self._started = self._printed = time.monotonic()

    def __call__(self, stage: BackfillProgress) -> None:
        """Print, if it is time again."""
        now = time.monotonic()
        if now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        rate = _rate(self._first, stage, self._started)
        left = f"{(stage.total - stage.events) / rate:.0f} s left" if rate else "no progress yet"
        percent = 100 * stage.events // max(1, stage.total)
        told = f"backfill: {stage.events} of {stage.total} events ({percent} %), {rate:.0f}/s, {left}"
        print(told, file=sys.stderr, flush=True)


def _summary(run: Backfill, before: BackfillProgress, seconds: float) -> Iterator[str]:
    events = run.written.events - before.events
    resumed = f", {before.events} before" if before.events else ""
    yield f"read        {events} events of {run.written.total}{resumed}, {seconds:.1f} s, {events / seconds:.0f}/s"
    for lane in run.fan_out.lanes:
        yield f"{lane.name:<11} {_written(lane)}"
    if run.rows_refused:
        yield f"rows        {run.rows_refused} dead letters: no event can be made of the row"


def _written(lane: Lane) -> str:
    taken = lane.stats.events - lane.stats.dead_letters
    new = lane.sink.new_events
    known = "" if new is None else f" ({new} new, {taken - new} already there)"
    refused = f", {lane.stats.dead_letters} dead letters" if lane.stats.dead_letters else ""
    return f"{taken} written{known}{refused}"


async def _dry_run(parts: Parts) -> int:
    """Events an hour, beside what the sinks have that can be asked for that."""
    source = await parts.history.hours()
    first, end = (round(moment.timestamp() * 1_000_000) for moment in (parts.args.start, parts.args.end))
    found = {sink.name: await sink.hours(first, end) for sink in parts.sinks if isinstance(sink, CountsByHour)}
    print("  ".join([f"{'hour':<20}", f"{'postgresql':>12}", *(f"{name:>12}" for name in found)]))
    for hour in sorted(source.keys() | {hour for hours in found.values() for hour in hours}):
        counts = [source.get(hour, 0), *(hours.get(hour, 0) for hours in found.values())]
        label = iso(EPOCH + timedelta(seconds=hour))
        print("  ".join([label, *(f"{count:>12}" for count in counts)]), "" if len({*counts}) == 1 else " differs")
    told = [f"{sum(source.values())} events"]
    for name, hours in found.items():
        told.append(f"{sum((Counter(source) - Counter(hours)).values())} missing in {name}")
        if extra := sum((Counter(hours) - Counter(source)).values()):
            told.append(f"{extra} too many there")
    for sink in parts.sinks:
        if isinstance(sink, HasCounter):
            try:
                told.append(f"{await _uncounted(parts, sink.counter(), first, end)} not counted in {sink.name}")
            except SinkUnavailable:
                told.append(f"{sink.name} does not answer")
        elif sink.name not in found:
            told.append(f"{sink.name} can't be asked")
    print("; ".join([*told, "nothing was written"]))
    return 0


async def _uncounted(parts: Parts, counter: EventCounter, start_us: int, end_us: int) -> int:
    ledger = EngagementLedger(parts.settings.postgres_dsn.get_secret_value(), with_content=False)
    try:
        await ledger.open()
        return sum([len(ids) async for ids in unseen(ledger, counter, start_us, end_us)])
    finally:
        await ledger.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    args = parser.parse_args(given)
    if args.start >= args.end:
        parser.error(f"--start {iso(args.start)} is not before --end {iso(args.end)}")
    resume = shlex.join(["python", "backfill.py", *(word for word in given if word != "--resume"), "--resume"])
    try:
        settings = load(CoreSettings)
        configure_logging(settings.log_level, settings.log_format)
        return asyncio.run(_main(args, settings, resume))
    except ReplicatorError as exc:
        print(f"backfill.py: {exc}", file=sys.stderr)
        return exc.exit_code
    except asyncio.CancelledError:
        print("backfill.py: stopped before anything was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second one
        return 1
    finally:
        logging.shutdown()
