"""The command `backfill`: its options, its checks before anything is written, its progress and its summary.

`plan.py` says how far it is, `crew.py` works it off with the tasks of `turn.py`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from replicator.cli import arguments as arg
from replicator.cli.arguments import iso, load_app
from replicator.cli.backfill import LINE_SECONDS, Run, interrupted, progress, require_usable, say_end, summary
from replicator.cli.stream import stop_on_signals
from replicator_spark.arguments import Conf, Master

if TYPE_CHECKING:
    from replicator.delivery.backfill import BackfillProgress
    from replicator_spark.backfill.crew import Crew
    from replicator_spark.backfill.plan import Plan
    from replicator_spark.backfill.turn import Order

MANUAL = """\
Send the events of a range of time to the sinks again, on many cores.

It is `replicator backfill`, with the range cut into slices that the nodes bring to the sinks side by side. What that
command promises holds here: repeating it is safe, and neither slot nor checkpoint is touched.

The driver and every node need the same program and the same settings; a node whose settings differ is refused. On the
nodes, REPLICATOR_POSTGRES_DSN may lead to a standby of the driver's database: it is read once it has replayed what was
there when the backfill began.

SIGTERM and Ctrl-C end it after the turns that run, 20 seconds or so. --resume continues there, and also after a crash.
"""

DESERTED = (
    "no executor of Spark takes it: check that the cluster runs, and has a free core and memory for it. If its Master"
    " was restarted, end this, and continue it with --resume"
)

log = logging.getLogger("replicator.spark")


def _slices(given: str | int) -> int:
    from replicator_spark.backfill.plan import MOST_SLICES

    if (number := arg.count(given)) > MOST_SLICES:
        raise typer.BadParameter(f"{number} is more than {MOST_SLICES}")
    return number


async def backfill(
    start: arg.Start = None,
    end: arg.End = None,
    last: arg.Last = None,
    sinks: arg.Sinks = None,
    slices: Annotated[
        int | None,
        typer.Option(parser=_slices, metavar="N", help="parts of the range, 1 to 1000; else one for 250,000 events"),
    ] = None,
    batch_size: arg.BatchSize = arg.PAGE_ROWS,
    rate: arg.Rate = None,
    resume: arg.Resume = False,
    master: Master = None,
    conf: Conf = None,
    as_json: arg.Json = False,
) -> int:
    """Send the events of a range of time to the sinks again, on many cores."""
    from enrichment import RangeHistory
    from replicator_spark.nodes import refuse_single
    from replicator_spark.settings import pairs, refuse
    from sinks import known_sinks

    when = arg.time_range(start, end, last)
    chosen = arg.sinks_of(sinks, known_sinks())
    options = pairs(conf or [])
    app = load_app(chosen)
    refuse_single(app.sinks)
    refuse(options, app.sinks)  # before Spark shows it
    names = ",".join(sorted(sink.name for sink in app.sinks))
    command = f"python -m replicator_spark backfill {when} --sinks {shlex.quote(','.join(chosen))}"
    run = Run(
        app=app,
        history=RangeHistory(app.dsn, when.start, when.end, tables=app.tables),
        task=f"spark backfill {iso(when.start)} {iso(when.end)} {names}",
        slices=slices,
        batch_size=batch_size,
        rate=rate,
        resume=resume,
        again=f"{command}{_options(master, conf or [], batch_size, rate)} --resume",
        as_json=as_json,
    )
    async with app.closing(run.history):
        return await _on_cluster(run, master, options)


async def _on_cluster(run: Run, master: str | None, options: dict[str, str]) -> int:
    from replicator_spark.backfill.crew import Crew
    from replicator_spark.session import Cluster
    from replicator_spark.settings import refuse

    order = await _prepare(run)
    plan = await _begin(run)
    cluster = await asyncio.to_thread(Cluster, run.task, master, options)
    try:
        refuse(cluster.conf, run.app.sinks)
        return await _deliver(run, Crew(run.app, cluster, plan, order, task=run.task))
    finally:
        await asyncio.to_thread(cluster.close)


def _options(master: str | None, conf: list[str], batch_size: int, rate: int | None) -> str:
    words = [word for option in conf for word in ("--conf", option)]
    words += ["--master", master] if master else []
    return (f" {shlex.join(words)}" if words else "") + arg.pace(batch_size, rate)


async def _prepare(run: Run) -> Order:
    """See that source and sinks can be used, before anything is written and the cluster is started."""
    from replicator_spark.backfill.turn import Order
    from replicator_spark.nodes import meant

    app = run.app
    await require_usable(run)
    for sink in app.sinks:
        await sink.close()
    names = [sink.name for sink in app.sinks]
    return Order(
        meant=await meant(names, app.dsn, secrets.token_bytes(32)),
        sinks=names,
        since=await run.history.wal_end(),
        page_rows=run.batch_size,
        rate=run.rate,
    )


async def _begin(run: Run) -> Plan:
    """Where to begin. Nothing is written before the range was read once."""
    from replicator_spark.backfill.plan import Plan, begun, usual_slices

    if (saved := await interrupted(run)) is not None:
        return msgspec.json.decode(saved, type=Plan)
    place, total = await run.history.begin()
    slices = await run.history.slices(place, run.slices or usual_slices(total))
    await asyncio.to_thread(run.app.store.create)
    return begun(slices, total)


async def _deliver(run: Run, crew: Crew) -> int:
    """Until it is done; 1 if it was stopped before."""

    def stop() -> None:
        print("stopping after the turns that run", file=sys.stderr)
        crew.stop()

    stop_on_signals(stop)
    before, started = crew.plan.written, time.monotonic()
    showing = asyncio.create_task(_show_progress(crew))
    done = False
    try:
        done = await crew.run()
    finally:
        showing.cancel()
        found = _summary(crew, before, time.monotonic() - started)
        say_end(found, done=done, as_json=run.as_json, again=run.again)
    return 0 if done else 1


async def _show_progress(crew: Crew) -> None:
    first, started = crew.plan.written, time.monotonic()
    while True:
        await asyncio.sleep(LINE_SECONDS)
        left, slices = len(crew.plan.left), len(crew.plan.shares)
        line = progress(first, crew.plan.written, time.monotonic() - started)
        hindered = f"; {DESERTED}" if await asyncio.to_thread(crew.is_deserted) else ""
        print(f"{line}, {slices - left} of {slices} slices{hindered}", file=sys.stderr, flush=True)


def _summary(crew: Crew, before: BackfillProgress, seconds: float) -> dict[str, Any]:
    """As of `replicator backfill`."""
    sinks = {
        name: {"written": written.events, "new": written.new, "dead_letters": written.dead_letters}
        for name, written in crew.sinks.items()
    }
    found = summary(before, crew.plan.written, seconds, crew.rows_refused, sinks)
    return {**found, "slices": len(crew.plan.shares)}
