"""`pause`, `resume` and `retry`: what is told to the running replicator, or kept for its next start."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from replicator.cli.arguments import duration, load_app, one_sink

if TYPE_CHECKING:
    from replicator.operations.control.address import Deed

SinkName: TypeAlias = Annotated[str, typer.Argument(metavar="SINK", help="one of REPLICATOR_SINKS", show_default=False)]
For: TypeAlias = Annotated[
    timedelta | None,
    typer.Option(
        "--for", parser=duration, metavar="SPAN", help="how long, such as 30m, 2h or 1d; without it until `resume`"
    ),
]


async def pause(sink: SinkName, span: For = None) -> int:
    """Give a sink nothing for a while; it misses nothing.

    The other sinks continue. PostgreSQL keeps the WAL for this one, also over restarts; the command says for how long
    it can. If no replicator runs, the pause begins with its next start.
    """
    return await _tell("pause", sink, None if span is None else span.total_seconds())


async def resume(sink: SinkName) -> int:
    """End a pause: the sink gets everything from its position on.

    The slot is read again from there. The other sinks skip what they have, and get new events when it is done.
    """
    return await _tell("resume", sink)


async def retry(sink: SinkName) -> int:
    """Try a sink in trouble again now.

    Otherwise it waits for up to REPLICATOR_RETRY_MAX_SECONDS, or as long as the destination asked for.
    """
    return await _tell("retry", sink)


async def _tell(do: Deed, sink: str, seconds: float | None = None) -> int:
    from replicator.operations.control.address import Request, socket_path
    from replicator.operations.control.client import ask, cluster
    from replicator.operations.control.pauses import act_alone

    app = load_app()
    name = one_sink(sink, app.settings.sinks, "SINK")
    async with app.closing():
        system = await cluster(app.source(), app.store, app.settings.slot)
        request = Request(do=do, sink=name, seconds=seconds, system_identifier=system)
        path = socket_path(app.settings, app.store)
        answer = await ask(path, request) or await act_alone(request, app.settings, app.store, path)
    print("\n".join(answer.lines))
    return 0 if answer.done else 1
