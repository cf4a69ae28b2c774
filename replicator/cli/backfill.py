"""`backfill`: a range of time from PostgreSQL through the same enrichment into the same sinks.

This is the progress and the summary; `enrichment/history/` reads, `delivery/backfill.py` delivers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import typer

from replicator.cli import arguments as arg
from replicator.cli.arguments import iso, load_one
from replicator.cli.stream import say_what_stops, stop_on_signals
from replicator.contracts.errors import SinkUnavailable, command
from replicator.contracts.events import counted
from replicator.operations.logs import configure_logging

if TYPE_CHECKING:
    from enrichment import RangeHistory
    from replicator.app import App
    from replicator.contracts.settings import CoreSettings
    from replicator.delivery.backfill import Backfill, BackfillProgress
    from replicator.delivery.lane import Lane

BAR_SECONDS = 0.5  # a bar that moves
LINE_SECONDS = 10.0  # a log that can be read

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

log = logging.getLogger(__name__)


MANUAL = """\
Send the events of a range of time to the sinks again.

It sends every event with start <= time < end, joined with today's rows, beside the running replicator or without it.
The time is event_ts, or what REPLICATOR_STREAM declares. It touches neither slot nor checkpoint. Repeating it is
safe: ClickHouse replaces an event's row, Redis counts an event once and keeps the newest one.

Events committed while it runs come through the stream. To fill a gap, make the new slot first
(`init --accept-gap`). After a joined row was corrected, a backfill brings the correction to ClickHouse.

It reads page by page, each in a short transaction. With an index on time and identity, a page reads only its own
rows. If there is none, the log has the statement that makes it.

SIGTERM and Ctrl-C finish the writes in flight. --resume continues from there, also after a crash.
"""


async def backfill(
    start: arg.Start = None,
    end: arg.End = None,
    last: arg.Last = None,
    sinks: arg.Sinks = None,
    stream: arg.StreamName = None,
    batch_size: arg.BatchSize = arg.PAGE_ROWS,
    rate: arg.Rate = None,
    resume: arg.Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write nothing: count events by hour, and those the sinks lack")
    ] = False,
    as_json: arg.Json = False,
) -> int:
    """Send the events of a range of time to the sinks again."""
    from enrichment import RangeHistory
    from sinks import known_sinks

    when = arg.time_range(start, end, last)
    chosen = arg.sinks_of(sinks, known_sinks(), stream)
    app = load_one(stream, chosen)
    names = ",".join(sorted(sink.name for sink in app.sinks))
    options = arg.pace(batch_size, rate) + app.tables.stream_option
    run = Run(
        app=app,
        history=RangeHistory(app.dsn, when.start, when.end, tables=app.tables),
        task=f"backfill {iso(when.start)} {iso(when.end)} {names}",
        batch_size=batch_size,
        rate=rate,
        resume=resume,
        again=command(f"backfill {when} --sinks {shlex.quote(','.join(chosen))}{options} --resume"),
        as_json=as_json,
    )
    async with app.closing(run.history):
        return await (_dry_run(run, when) if dry_run else deliver(run))


class Run(NamedTuple):
    """One backfill, or one rebuild."""

    app: App
    history: RangeHistory
    task: str
    """What an interrupted run is found by."""
    batch_size: int
    rate: int | None
    resume: bool
    again: str
    """The command that continues it."""
    as_json: bool = False
    slices: int | None = None
    """Of a cluster."""


async def require_usable(run: Run) -> None:
    """Open source and sinks, before anything is written."""
    from replicator.contracts.sink import Mode

    await run.history.open()
    for sink in run.app.sinks:
        with suppress(SinkUnavailable):  # the lane waits for it; one that can't be written to ends the run now
            await sink.open(None, Mode.BACKFILL)


async def deliver(run: Run) -> int:
    """The whole range, from its beginning or where an interrupted run was; 1 if it was stopped before the end."""
    from replicator.delivery.backfill import Backfill

    await require_usable(run)
    work = Backfill(
        run.app.settings,
        run.history,
        run.app.sinks,
        run.app.store,
        task=run.task,
        start=await _begin(run),
        page_rows=run.batch_size,
        rate=run.rate,
    )

    def stop() -> None:
        say_what_stops(work.fan_out.lanes, run.app.settings.drain_timeout_seconds)
        work.stop()

    stop_on_signals(stop)
    before, started = work.written, time.monotonic()
    done = False
    showing = asyncio.create_task(_show_progress(work, run.app.settings))
    try:
        done = await work.run()
    finally:
        showing.cancel()
        with suppress(asyncio.CancelledError):
            await showing
        sinks = {lane.name: _of_sink(lane) for lane in work.fan_out.lanes}
        found = summary(before, work.written, time.monotonic() - started, work.rows_refused, sinks)
        say_end(found, done=done, as_json=run.as_json, again=run.again)
    return 0 if done else 1


def say_end(summary: dict[str, Any], *, done: bool, as_json: bool, again: str) -> None:
    """Print what was done; if it was stopped, also the command that goes on."""
    if as_json:
        print(json.dumps({"outcome": "done" if done else "stopped", **summary}))
    else:
        print("\n".join(_summary_lines(summary)))
    if not done:
        print(f"not finished; to continue: {again}", file=sys.stderr)


async def _begin(run: Run) -> BackfillProgress:
    """Where to begin. Nothing is written before the range was read once."""
    from replicator.delivery.backfill import BackfillProgress

    if (saved := await interrupted(run)) is not None:
        return msgspec.json.decode(saved, type=BackfillProgress)
    place, total = await run.history.begin()
    await asyncio.to_thread(run.app.store.create)
    return BackfillProgress(place=place, events=0, total=total)


async def interrupted(run: Run) -> str | None:
    """Where the run was that is to be resumed; None: it starts at the beginning."""
    if not run.resume:
        return None
    store = run.app.store
    await asyncio.to_thread(store.create)
    saved = await asyncio.to_thread(store.load_progress, run.app.settings.slot, run.task)
    if saved is None:
        log.info("there is no interrupted backfill of this range into these sinks: it starts at the beginning")
    return saved


# -- what is shown -----------------------------------------------------------------------------------------------


async def _show_progress(work: Backfill, settings: CoreSettings) -> None:
    """A bar on a terminal, a line now and then elsewhere."""
    first, started = work.written, time.monotonic()
    if sys.stderr.isatty():
        await _show_bar(work, settings)
    while True:
        await asyncio.sleep(LINE_SECONDS)
        print(progress(first, work.written, time.monotonic() - started), file=sys.stderr, flush=True)


async def _show_bar(work: Backfill, settings: CoreSettings) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    first, started = work.written, time.monotonic()
    rate = TextColumn("{task.fields[rate]:,.0f}/s")
    columns = (TextColumn("backfill"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        configure_logging(settings.log_level, settings.log_format, settings.slot)  # its lines go above the bar
        task = bar.add_task("", total=first.total, rate=0.0)

        def move() -> None:
            events = work.written.events
            bar.update(task, completed=events, rate=(events - first.events) / (time.monotonic() - started))

        try:
            while True:
                move()
                await asyncio.sleep(BAR_SECONDS)
        finally:
            move()


def progress(first: BackfillProgress, now: BackfillProgress, seconds: float) -> str:
    """How far it is, `seconds` after it was at `first`."""
    rate = (now.events - first.events) / seconds
    left = f"{(now.total - now.events) / rate:.0f} s left" if rate else "no progress yet"
    percent = 100 * now.events // max(1, now.total)
    return f"backfill: {now.events} of {now.total} events ({percent} %), {rate:.0f}/s, {left}"


def summary(
    before: BackfillProgress, now: BackfillProgress, seconds: float, rows_refused: int, sinks: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The form of `--json`."""
    return {
        "events": now.events - before.events,
        "events_before": before.events,
        "events_total": now.total,
        "seconds": round(seconds, 1),
        "rows_refused": rows_refused,
        "sinks": sinks,
    }


def _of_sink(lane: Lane) -> dict[str, Any]:
    refused = lane.stats.dead_letters
    return {"written": lane.stats.events - refused, "new": lane.sink.new_events, "dead_letters": refused}


def _summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    """For people."""
    events, seconds = summary["events"], max(0.1, summary["seconds"])  # as it is shown
    resumed = f", {summary['events_before']} before" if summary["events_before"] else ""
    speed = f"{seconds:.1f} s, {events / seconds:.0f}/s"
    yield f"read        {counted(events, 'event')} of {summary['events_total']}{resumed}, {speed}"
    for name, sink in summary["sinks"].items():
        known = "" if sink["new"] is None else f" ({sink['new']} new, {sink['written'] - sink['new']} already there)"
        refused = f", {counted(sink['dead_letters'], 'dead letter')}" if sink["dead_letters"] else ""
        yield f"{name:<11} {sink['written']} written{known}{refused}"
    if summary["rows_refused"]:
        yield f"rows        {summary['rows_refused']} that no event can be made of, kept as dead letters"


# -- dry run -----------------------------------------------------------------------------------------------------


async def _dry_run(run: Run, when: arg.TimeRange) -> int:
    """Events by hour, beside those of the sinks that can be asked."""
    from replicator.contracts.sink import CountsByHour

    start, end = ((moment - EPOCH) // MICROSECOND for moment in when)
    source, lacks, counts = Counter(await run.history.hours()), {}, {}
    for sink in run.app.sinks:
        if isinstance(sink, CountsByHour):
            counts[sink.name] = hours = Counter(await sink.hours(start, end))
            lacks[sink.name] = {"missing": (source - hours).total(), "extra": (hours - source).total()}
        else:
            lacks[sink.name] = await _uncounted(run, sink, start, end)
    columns = {"postgresql": source, **counts}
    rows = [
        {"hour": iso(EPOCH + timedelta(seconds=hour)), **{name: hours[hour] for name, hours in columns.items()}}
        for hour in sorted({hour for hours in columns.values() for hour in hours})
    ]
    found = {"outcome": "dry run", "events": source.total(), "hours": rows, "sinks": lacks}
    print(json.dumps(found) if run.as_json else "\n".join(_table(found, list(columns))))
    return 0


async def _uncounted(run: Run, sink: Any, start_us: int, end_us: int) -> dict[str, Any]:
    """How many events a sink has not counted; empty if it can't be asked."""
    from enrichment import TableLedger
    from replicator.contracts.sink import HasCounter
    from replicator.reconcile.recheck import unseen

    if not isinstance(sink, HasCounter):
        return {}
    ledger = TableLedger(run.app.dsn, tables=run.app.tables, with_content=False)
    try:
        await ledger.open()
        return {"not_counted": sum([len(ids) async for ids in unseen(ledger, sink.counter(), start_us, end_us)])}
    except SinkUnavailable as exc:
        return {"error": exc.detail}
    finally:
        await ledger.close()


def _table(found: dict[str, Any], names: list[str]) -> Iterator[str]:
    width = max(12, *map(len, names))
    yield "  ".join([f"{'hour':<20}", *(f"{name:>{width}}" for name in names)])
    for row in found["hours"]:
        hour, *counts = row.values()
        yield "  ".join([hour, *(f"{count:>{width}}" for count in counts)]) + (
            "" if len({*counts}) == 1 else "  differs"
        )
    yield "; ".join([counted(found["events"], "event"), *_findings(found["sinks"]), "nothing was written"])


def _findings(sinks: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, sink in sinks.items():
        if "missing" in sink:
            yield f"{sink['missing']} missing in {name}"
            if sink["extra"]:
                yield f"{sink['extra']} too many there"
        elif "not_counted" in sink:
            yield f"{sink['not_counted']} not counted in {name}"
        else:
            yield f"{name} does not answer" if "error" in sink else f"{name} can't be asked"
