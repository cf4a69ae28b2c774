"""`check`: is everything in order? A line each, with the cure. Changes nothing anywhere.

`server.py` looks at PostgreSQL, the enricher at the tables, the sinks at their destinations.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, Self

import msgspec

from replicator.contracts.enricher import Enricher
from replicator.contracts.errors import CheckpointAbsent, ReplicatorError, SourceUnusable, command
from replicator.contracts.events import Finding, Pause, format_lsn
from replicator.contracts.settings import CoreSettings, open_to_all, secret_files, variable
from replicator.contracts.sink import Sink
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.retry import CANCEL_SECONDS
from replicator.operations import server
from replicator.operations.exposure import secrets_in_clear
from replicator.operations.http import exposed, unavailable
from replicator.operations.status.collect import ask_replicator, differences
from replicator.operations.status.parts import clocks
from replicator.operations.status.wal import danger
from replicator.source import slot as slots
from replicator.source.stream import Source
from replicator.source.takeover import Beginning, pauses, recall

CHECK_SECONDS = 10.0
"""For each part. Whoever asks wants to know now; writes have more patience, and settings for it."""

GIVE_UPS = 3
"""The first time psycopg asks a silent server to end the query, and has to be stopped at that."""

log = logging.getLogger(__name__)


async def findings(
    settings: CoreSettings, enricher: Enricher, sinks: Sequence[Sink], store: CheckpointStore
) -> AsyncIterator[Finding]:
    """Everything, in the same order each time; never raises for what it finds. All are asked at once."""
    reached = [Finding(True, warning) for warning in filter(None, [exposed(settings.admin_listen)])]
    readable = open_to_all([*secret_files(), *store.files()])
    for finding in (*reached, *readable, *secrets_in_clear(settings, sinks)):
        yield finding
    fresh = False  # nothing was begun: what `init` makes need not be there
    paused: dict[str, Pause] = {}
    async with _Asked() as asked:
        found: list[server.Server] = []
        postgres = asked.ask("PostgreSQL", lambda: _postgres(settings, found), variable("postgres_dsn"))
        checkpoint = variable("checkpoint_url")
        no_store = await asked.ask("checkpoint database", lambda: _kept(settings, sinks, store, paused), checkpoint)
        others = [
            asked.ask(f"sink {sink.name}", sink.check, _addresses(sink)) for sink in sinks if sink.name not in paused
        ]
        others.append(asked.ask("the running replicator", lambda: _running(settings, paused), ""))
        for finding in await postgres:
            yield finding
        if found:  # else one cause, one line: neither slot nor tables can be looked at
            others.insert(0, asked.ask("tables", enricher.check, variable("postgres_dsn")))
        for finding in no_store:
            yield finding
        if found and found[0].may_stream and not no_store:
            beginning = asked.ask("checkpoint", lambda: _beginning(settings, sinks, store), checkpoint)
            for finding in await beginning:
                fresh = fresh or finding.made_by_init
                yield finding
        said = set[Finding]()  # the sinks of two streams may say the same of one server
        for other in others:
            for finding in await other:
                if finding not in said:
                    said.add(finding)
                    yield finding._replace(ok=finding.ok or (fresh and finding.made_by_init))


async def require_source(settings: CoreSettings, enricher: Enricher) -> None:
    """Raise SourceError for what `findings` refuses of PostgreSQL and its tables: before that `init` makes nothing."""
    found = await server.look(settings.postgres_dsn.get_secret_value(), settings)
    looked = (*found.findings, *await _checked("tables", enricher.check, variable("postgres_dsn")))
    if refused := [finding for finding in looked if not (finding.ok or finding.made_by_init)]:
        what = "; ".join(finding.what for finding in refused)
        cure = "; ".join(dict.fromkeys(finding.cure for finding in refused if finding.cure))
        raise SourceUnusable(problem=f"{what}. Nothing was made", cure=cure)


async def _postgres(settings: CoreSettings, found: list[server.Server]) -> Sequence[Finding]:
    found.append(await server.look(settings.postgres_dsn.get_secret_value(), settings))
    return found[0].findings


async def _kept(
    settings: CoreSettings, sinks: Sequence[Sink], store: CheckpointStore, paused: dict[str, Pause]
) -> Sequence[Finding]:
    """The sinks that are to be left alone; the others learn what they remembered. It has findings of its own later."""
    with suppress(CheckpointAbsent):  # `init` makes it
        names = [sink.name for sink in sinks]
        paused.update(await asyncio.to_thread(pauses, store, settings.slot, names, time.time()))
        await asyncio.to_thread(recall, store, settings.slot, sinks)
    return []


async def _running(settings: CoreSettings, paused: Mapping[str, Pause]) -> Sequence[Finding]:
    """What it may not do, and what the replicator of this slot says of itself if it runs here."""
    found = [Finding(True, f"{pause.describe(name, None)}, and not asked") for name, pause in paused.items()]
    live, why = await ask_replicator(settings)
    if live is None and settings.admin_listen and (taken := await unavailable(settings.admin_listen)):
        found.append(Finding(False, f"{taken.problem}; {why}", taken.cure))  # `run` would end with it
    if live and not live.reasons:
        found.append(Finding(True, f"the running replicator is {'the standby' if live.standby else 'ready'}"))
    reasons = live.reasons if live else ()
    found += [Finding(False, f"the running replicator is not ready: {reason}") for reason in reasons]
    return [*found, *(Finding(False, difference) for difference in differences(live))]


def _addresses(sink: Sink) -> str:
    """The settings that say where it leads."""
    return " or ".join(variable(name) for name in type(sink.settings).model_fields if name.endswith(("_url", "_dsn")))


class _Asked:
    """Questions that are asked at once. What nobody waits for any more at the end is given up."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Sequence[Finding]]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)  # each gives up what it has asked

    def ask(
        self, name: str, check: Callable[[], Awaitable[Sequence[Finding]]], leads: str
    ) -> asyncio.Task[Sequence[Finding]]:
        """As `_checked`."""
        self._tasks.append(asyncio.create_task(_checked(name, check, leads)))
        return self._tasks[-1]


async def _checked(name: str, check: Callable[[], Awaitable[Sequence[Finding]]], leads: str) -> Sequence[Finding]:
    """What it finds, or that it is silent; `leads` are the settings that say where it leads.

    A sink of another package may raise and return anything: the others are looked at all the same.
    """

    async def ask() -> Sequence[Finding] | BaseException:
        try:
            return [_finding(found) for found in await check()]
        except (Exception, SystemExit) as exc:  # noqa: BLE001  it is told below
            return exc

    asked = asyncio.create_task(ask())
    try:  # no time-out around it: psycopg would first ask a silent server, for 10 s, to end the query
        await asyncio.wait([asked], timeout=CHECK_SECONDS)
    finally:
        ended = asked.done()
        await _give_up(asked)
    if not ended:
        silent = f"{name}: its check has not ended within {CHECK_SECONDS:g} s"
        return [Finding(False, silent, f"Check whether what {leads or 'it asks'} leads to answers at all")]
    answer = asyncio.CancelledError() if asked.cancelled() else asked.result()
    if isinstance(answer, ReplicatorError):
        return [Finding(False, answer.problem, answer.cure)]
    if isinstance(answer, BaseException):
        log.debug("the check of %s failed", name, exc_info=answer)
        problem = f"{name}: its check failed in an unexpected way ({type(answer).__name__})"
        return [Finding(False, problem, "REPLICATOR_LOG_LEVEL=debug shows where; report it to its author")]
    return answer


async def _give_up(asked: asyncio.Task[Any]) -> None:
    """It closes its connections. One that does not end is left: a sink of another package may go on for ever."""
    for _ in range(GIVE_UPS):
        asked.cancel()
        if not asked.done():
            await asyncio.wait([asked], timeout=CANCEL_SECONDS)


def _finding(found: object) -> Finding:
    if isinstance(found, Finding):
        return msgspec.convert(tuple(found), Finding)
    raise TypeError("a check returns findings")


async def _beginning(settings: CoreSettings, sinks: Sequence[Sink], store: CheckpointStore) -> list[Finding]:
    """Slot and checkpoint. Raises when the two don't fit together."""
    with closing(Source(settings.postgres_dsn.get_secret_value(), settings.slot)) as source:
        found = await Beginning(source, store, settings.slot, sinks).look()
    found.verify()
    stored = found.stored
    if stored:  # a write that changes nothing: can there be any?
        await asyncio.to_thread(store.save_progress, settings.slot, "check", None)
    at = f"at {format_lsn(stored.end_lsn)}" if stored else "empty: the first start begins at the slot's position"
    return [Finding(True, f"checkpoint database: {at}"), _slot(settings, found.state)]


def _slot(settings: CoreSettings, state: slots.SlotState | None) -> Finding:
    name = settings.slot
    if state is None:
        return Finding(
            True, f"replication slot {name}: not there yet", f"{command('init')} makes it", made_by_init=True
        )
    for problem, cure in (danger(state), clocks(state)):
        if problem:
            return Finding(False, f"replication slot {name}: {problem}", cure)
    reader = f"read by process {state.active_pid}" if state.active_pid else "nobody reads it"
    what = f"replication slot {name}: {reader}, {state.wal_status}, {state.lag_bytes} bytes behind"
    if state.failover is False and settings.failover_slot:
        cure = f"If PostgreSQL has standbys: stop `run`, then {command('init')}, then start it again"
        return Finding(True, f"{what}; standbys keep no copy of it", cure)
    return Finding(True, f"{what}; standbys keep a copy of it" if state.failover else what)
