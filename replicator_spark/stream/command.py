"""The command `stream`: the replicator's `run`, whose sinks write on a cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from typing import TYPE_CHECKING

from replicator.cli.arguments import load_app
from replicator.cli.stream import begin, replicate
from replicator.contracts.errors import ClusterFailed
from replicator_spark.arguments import Conf, Master

if TYPE_CHECKING:
    from replicator_spark.session import Cluster
    from replicator_spark.stream.desk import Desk

MANUAL = """\
Replicate until SIGTERM or Ctrl-C; the nodes of a cluster write to the sinks.

It is `replicator run`: the same slot, checkpoint, promise and commands beside it. One takes over from the other, and
while one runs, the other waits as the standby. What a node or an executor loses is written again.

Every node needs the same program and the driver's settings of the sinks; a node whose settings differ is refused.
Spark's own end is this program's: it ends with exit code 1, for whoever starts it again.
"""

DEFAULTS = {
    "spark.task.maxFailures": "1",  # the lane repeats, and counts what it repeats
}
"""What `--conf` may change, beside `session.DEFAULTS`."""

log = logging.getLogger("replicator.spark")


async def stream(master: Master = None, conf: Conf = None) -> int:
    """Replicate until SIGTERM or Ctrl-C; the nodes of a cluster write to the sinks."""
    from replicator_spark.nodes import refuse_single
    from replicator_spark.session import Cluster
    from replicator_spark.settings import pairs, refuse, refuse_retries
    from replicator_spark.stream.carrier import on_cluster
    from replicator_spark.stream.desk import Desk

    stopping = begin()
    options = {**DEFAULTS, **pairs(conf or [])}
    app = load_app()
    refuse_single(app.sinks)
    refuse(options, app.sinks)  # before Spark shows it
    names = [sink.name for sink in app.sinks]
    starting = asyncio.to_thread(Cluster, f"replicator {app.settings.slot}", master, options)
    cluster = await _unless(stopping, starting)
    if cluster is None:
        return 0
    try:
        refuse(cluster.conf, app.sinks)
        refuse_retries(cluster.conf, app.sinks)
        desk = Desk(cluster, names)
        app = app._replace(sinks=[on_cluster(sink, desk) for sink in app.sinks], carrier=desk.carrier)
        return await _watched(desk, replicate(app, stopping))
    finally:
        await asyncio.to_thread(cluster.close)


async def _unless(stopping: asyncio.Event, starting: Coroutine[None, None, Cluster]) -> Cluster | None:
    """The cluster. None: it is to stop first; Spark's process ends with this one."""
    start, stop = asyncio.create_task(starting), asyncio.create_task(stopping.wait())
    await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    return await start if start.done() else None


async def _watched(desk: Desk, work: Coroutine[None, None, int]) -> int:
    """Its exit code. When Spark ends it drains as at a signal, and fails."""
    watching = asyncio.create_task(desk.watch())
    watching.add_done_callback(_stop)
    try:
        code = await work
    finally:
        watching.remove_done_callback(_stop)
        watching.cancel()
        await asyncio.wait([watching])
    failure = None if watching.cancelled() else watching.exception()
    if isinstance(failure, ClusterFailed):  # it is in the log
        return failure.exit_code
    if failure:
        raise failure
    return code


def _stop(watching: asyncio.Task[None]) -> None:
    failure = watching.exception()
    log.critical("%s", failure)
    os.kill(os.getpid(), signal.SIGTERM)
