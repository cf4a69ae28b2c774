"""`reconcile` and `rebuild-redis`: is everything in the sinks, and make Redis again.

`replicator/reconcile` compares and repairs. A rebuild is a backfill of all times into Redis alone. It is exact because
Redis counts an event once, whether the stream or the backfill brings it first.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec
import typer

from replicator.cli import arguments as arg
from replicator.cli.backfill import Run, deliver
from replicator.contracts.errors import SettingsError, SinkError, command

if TYPE_CHECKING:
    from replicator.app import App
    from replicator.contracts.sink import Sink

DIFFERENT = 3
WAIT_SECONDS = 60
"""How long the replicator may take to deliver what was committed before; one that keeps up takes a second."""


WithContent: TypeAlias = Annotated[
    bool, typer.Option("--with-content", help="compare all fields, joined ones with today's rows")
]
Repair: TypeAlias = Annotated[bool, typer.Option("--repair", help="write what is missing or different")]
DeleteExtra: TypeAlias = Annotated[
    bool, typer.Option("--delete-extra", help="with --repair: delete from ClickHouse what PostgreSQL does not have")
]
Wait: TypeAlias = Annotated[
    int, typer.Option(parser=arg.count, metavar="SECONDS", help="how long to wait for the replicator, 1 to 1000000")
]

RECONCILE = """\
Compare PostgreSQL with the sinks, repair what differs.

ClickHouse: it compares events with start <= time < end, field by field, through counts and checksums computed in
both databases. Redis: was each of these events counted, and is each key's count at least the number of its events?
Higher counts are differences only if deletes reach the sinks: otherwise deleted rows stay counted. This part reads
the whole table.

It runs beside the replicator. A difference is checked again when the slot has passed the position at which
PostgreSQL was read. REPLICATOR_SLOT must be the slot that feeds these sinks. Dead letters count as missing.

Joined fields, and fields derived from them, depend on the joined row at commit time (for engagement_events:
content_type, length_seconds and engagement_pct). They are compared only with --with-content, with today's row.

--repair sends what is missing or different. --delete-extra also deletes events from ClickHouse that PostgreSQL no
longer has, for instance those of a dropped partition: choose the range accordingly.
"""


async def reconcile(
    start: arg.Start = None,
    end: arg.End = None,
    last: arg.Last = None,
    sinks: arg.Sinks = None,
    stream: arg.StreamName = None,
    with_content: WithContent = False,
    repair: Repair = False,
    delete_extra: DeleteExtra = False,
    wait: Wait = WAIT_SECONDS,
    as_json: arg.Json = False,
) -> int:
    """Compare PostgreSQL with the sinks, repair what differs."""
    from enrichment import TableLedger
    from replicator.reconcile.run import Reconcile

    when = arg.time_range(start, end, last)
    if delete_extra and not repair:
        raise SettingsError(name="--delete-extra", problem="--repair is missing", expected="both, or neither")
    app = arg.load_one(stream, arg.sinks_of(sinks, _comparable(), stream))
    ledger = TableLedger(app.dsn, tables=app.tables, with_content=with_content)
    work = Reconcile(
        app.settings,
        ledger,
        app.sinks,
        app.store,
        start=when.start,
        end=when.end,
        with_content=with_content,
        repair=repair,
        delete_extra=delete_extra,
        wait_seconds=wait,
    )
    async with app.closing(ledger):
        report = await work.run((lambda _line: None) if as_json else print)
    if as_json:
        print(msgspec.json.encode(report).decode())
    return report.exit_code


def _comparable() -> list[str]:
    """The sinks that can be asked what they have. Of other packages' those that say so."""
    from replicator.contracts.sink import HasCounter, HasLedger
    from sinks import BUILT_IN, known_sinks, sink_class

    names = [*arg.USUAL_SINKS]
    for name in known_sinks():
        with suppress(SettingsError):  # whoever names it is told what is wrong with it
            if name not in BUILT_IN and issubclass(sink_class(name), HasLedger | HasCounter):
                names.append(name)
    return names


REBUILD = """\
Rebuild all of Redis's keys from PostgreSQL.

Use it when Redis has lost its keys: after a flush, a crash without persistence, on a new server. The replicator may
run meanwhile. Each event is counted once, whether the stream or the rebuild brings it. Until it is done, counts are
too low.

Events that Redis has marked as seen are not counted again, so a wrong count of such events stays wrong: at the end
all counts are compared, those too low are named, and the exit code is 3. --from-empty asks, then deletes all of the
replicator's keys atomically (which blocks Redis for about 1 us per key) and rebuilds them. Then events that
PostgreSQL no longer has are no longer counted.

SIGTERM and Ctrl-C finish the writes in flight. --resume continues from there, also after a crash, unless Redis was
emptied or restarted since: then it starts at the beginning.
"""


async def rebuild_redis(
    from_empty: Annotated[
        bool,
        typer.Option("--from-empty", help="first delete all of the replicator's keys, because what is there is wrong"),
    ] = False,
    stream: arg.StreamName = None,
    batch_size: arg.BatchSize = arg.PAGE_ROWS,
    rate: arg.Rate = None,
    resume: arg.Resume = False,
    yes: arg.Yes = False,
) -> int:
    """Make all of Redis's keys again from PostgreSQL."""
    from enrichment import BEGINNING, END, RangeHistory

    if resume and from_empty:
        raise SettingsError(name="--resume", problem="--from-empty starts over", expected="one of the two")
    app = arg.load_one(stream, ["redis"])
    option = app.tables.stream_option
    whose = f" for the stream {app.tables.stream.name}" if option else ""
    question = (
        f"Delete all of the replicator's keys{whose} in Redis? Counts are too low until all are made again, and events"
        " that PostgreSQL no longer has are no longer counted."
    )
    if from_empty and not arg.confirmed(question, yes=yes):
        return 1
    history = RangeHistory(app.dsn, BEGINNING, END, tables=app.tables)
    again = command(f"rebuild-redis{arg.pace(batch_size, rate)}{option} --resume")
    run = Run(
        app=app, history=history, task="rebuild-redis", batch_size=batch_size, rate=rate, resume=resume, again=again
    )
    async with app.closing(history):
        return await _rebuild(run, from_empty=from_empty)


async def _rebuild(run: Run, *, from_empty: bool) -> int:
    """Fill Redis. An interrupted run is resumed only while Redis has the same data. Raises SinkError if it loses them.

    Nothing is deleted before all is known to be readable and writable.
    """
    from replicator.contracts.sink import Mode, Rebuildable
    from replicator.source.takeover import keep_memory

    [sink] = run.app.sinks
    assert isinstance(sink, Rebuildable)  # noqa: S101  for mypy
    await run.history.open()
    if from_empty:
        await asyncio.to_thread(run.app.store.create)
    else:
        await sink.open(None, Mode.BACKFILL)
    try:
        if from_empty:
            print(f"deleted     {await sink.empty()} keys", flush=True)
        generation = await sink.generation()
        code = await deliver(run._replace(task=f"rebuild-redis {generation}"))
    except asyncio.CancelledError:  # before anything is written: reading where to begin may take a while
        if from_empty:
            print(f"the keys may be deleted, and none is made again; to continue: {run.again}", file=sys.stderr)
        raise
    if await sink.generation() != generation:
        detail = "it was emptied, restarted or replaced while it was filled"
        cure = f"Run {command(f'rebuild-redis{sink.context.stream_option}')} again"
        raise SinkError(sink.name, f"sink {sink.name} failed: {detail}", cure, detail=detail)
    if code == 0:
        await sink.filled(generation)
        await asyncio.to_thread(keep_memory, run.app.store, run.app.settings.slot, sink.name, sink.remember())
        code = await _recount(run.app, sink)
    return code


async def _recount(app: App, sink: Sink) -> int:
    """Whether all is counted; else say what is not. What is marked as seen, and not counted, no rebuild makes right."""
    from enrichment import TableLedger
    from replicator.contracts.sink import HasCounter
    from replicator.reconcile.recheck import Underway
    from replicator.reconcile.report import SinkReport
    from replicator.reconcile.run import compare_counts

    assert isinstance(sink, HasCounter)  # noqa: S101  for mypy
    report = SinkReport(sink=sink.name, deletes=sink.stream.deletes == "delete")
    underway = Underway(app.settings.postgres_dsn.get_secret_value(), app.settings.slot, WAIT_SECONDS)
    ledger = TableLedger(app.dsn, tables=app.tables, with_content=False)
    try:
        differ = await compare_counts(ledger, sink.counter(), underway, report)
    finally:
        await ledger.close()
    if differ and underway.gave_up:
        report.hints.append(f"the differences may be events that are still on their way: {underway.gave_up}")
    if differ:
        fresh = command(f"rebuild-redis --from-empty{sink.context.stream_option}")
        report.hints.append(f"dead letters are not counted; if there are none, {fresh} corrects the counts")
    print("\n".join(f"{sink.name:<11} {line}" for line in report.lines()))
    return DIFFERENT if differ else 0
