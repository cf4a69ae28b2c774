"""`trace`, `tail` and `peek`: one event through every sink, those that go through now, and those that come next."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from replicator.cli.arguments import Json, StreamName, count, event_id, load_app, load_one, one_sink
from replicator.contracts.events import Id, Position

if TYPE_CHECKING:
    from enrichment.history.pages import PickedHistory
    from replicator.app import App
    from replicator.contracts.sink import Sink
    from replicator.contracts.stores import CheckpointStore
    from replicator.operations.follow.tail import Seen
    from replicator.operations.follow.trace import Trace

DIFFERENT = 3

Limit: TypeAlias = Annotated[
    int | None, typer.Option(parser=count, metavar="N", help="end after so many events, 1 to 1000000")
]
SinkName: TypeAlias = Annotated[
    str | None,
    typer.Option("--sink", metavar="NAME", help="what this sink has written; without it, what the slot sends"),
]


async def trace(
    event: Annotated[str, typer.Argument(metavar="ID", help="an event's id; put -- before a negative one")],
    stream: StreamName = None,
    as_json: Json = False,
) -> int:
    """Find one event in PostgreSQL and in every sink.

    For each sink it says: written, waiting, dead letter, not found, differs, or unknown. A sink that can't be asked,
    such as the HTTP API, has everything up to its position. If only the joined row has changed since, the event does
    not count as different.
    """
    from enrichment import TableLedger
    from replicator.operations.follow import trace as traces

    app = load_one(stream)
    number = event_id(event, app.tables.identity.type)
    history = TableLedger(app.dsn, tables=app.tables, with_content=True).picked([number])
    async with app.closing(history):
        found = await _traced(app, number, history, app.sinks, app.store)
    print(traces.as_json(found) if as_json else "\n".join(traces.as_text(found)))
    return DIFFERENT if found.differs else 0


async def trace_beside(app: App, store: CheckpointStore, event: str, stream: str | None) -> Trace:
    """The same in the running replicator, beside the stream: with connections of its own."""
    from enrichment import TableLedger, the_one
    from replicator.app import make_sinks
    from replicator.contracts.closing import release

    tables = the_one(app.streams, stream)
    number = event_id(event, tables.identity.type)
    history = TableLedger(app.dsn, tables=tables, with_content=True).picked([number])
    sinks = [*make_sinks([sink.kind for sink in app.sinks], [tables], app.enricher, {})]
    try:
        return await _traced(app, number, history, sinks, store)
    finally:
        await release({"what reads PostgreSQL": history.close} | {f"sink {sink.name}": sink.close for sink in sinks})


async def _traced(app: App, number: Id, history: PickedHistory, sinks: Sequence[Sink], store: CheckpointStore) -> Trace:
    from replicator.operations.follow import trace as traces

    page = await history.read("0", Position(0, 0), 1)
    return await traces.follow(number, page, sinks, app.settings, store)


async def tail(sink: SinkName = None, limit: Limit = None, as_json: Json = False) -> int:
    """Show events as they pass, until Ctrl-C.

    It shows a few of each batch, at most 50 a second, and counts the others. The stream never waits for it. Without
    --sink, the events come from the slot, before any sink has them.
    """
    from replicator.operations.control.address import Answer, Request, socket_path
    from replicator.operations.control.client import cluster, watch

    app = load_app()
    name = one_sink(sink, app.settings.sinks) if sink else ""
    left = -1 if limit is None else limit
    async with app.closing():
        path = socket_path(app.settings, app.store)
        try:
            system = await cluster(app.source(), app.store, app.settings.slot)
            async with aclosing(watch(path, Request(do="tail", sink=name, system_identifier=system))) as lines:
                async for line in lines:
                    if isinstance(line, Answer):
                        print("\n".join(line.lines))
                        return 1
                    _show(line, as_json=as_json)
                    left -= line.position is not None
                    if not left:
                        return 0
        except asyncio.CancelledError:  # as it is meant to end
            return 0
    print("the replicator has ended")
    return 1


def _show(seen: Seen, *, as_json: bool) -> None:
    if seen.position is None and not seen.skipped:
        return
    event = bytes(seen.event).decode()
    if not as_json:
        print(f"{seen.position}  {event}" if seen.position else f"  … and {seen.skipped} more", flush=True)
        return
    about = {"sink": seen.sink or None, "position": seen.position, "skipped": seen.skipped}
    print(f'{json.dumps(about)[:-1]}, "event": {event}}}', flush=True)


async def peek(
    number: Annotated[int, typer.Argument(parser=count, metavar="N", help="how many rows, 1 to 1000000")] = 20,
    as_json: Json = False,
) -> int:
    """Show the next rows in the slot, without consuming them.

    It shows the rows of the tables after the confirmed position, at most N. It reads a temporary copy of the slot, so
    the replicator may run. For a moment it needs one more of max_replication_slots and of max_wal_senders.
    """
    from replicator.operations.follow import peek as peeks

    app = load_app()
    async with app.closing():
        if history := await app.enricher.look(None, 0):
            await history.close()
        found = await peeks.peek(app.dsn, app.settings.slot, app.enricher.tables, number)
    print(peeks.as_json(found) if as_json else "\n".join(peeks.as_text(found)))
    return 0
