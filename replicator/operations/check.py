"""`check`: is everything in order? A line each, with the cure. Changes nothing anywhere.

`server.py` looks at PostgreSQL, the enricher at the tables, the sinks at their destinations.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import closing, suppress

from replicator.contracts.enricher import Enricher
from replicator.contracts.errors import CheckpointError, ReplicatorError, SourceError, SourceUnusable, command
from replicator.contracts.events import Finding, Pause, format_lsn
from replicator.contracts.settings import CoreSettings, open_to_all, secret_files
from replicator.contracts.sink import Sink
from replicator.contracts.stores import CheckpointStore
from replicator.operations import server
from replicator.operations.exposure import secrets_in_clear
from replicator.operations.http import exposed, unavailable
from replicator.operations.status.collect import ask_replicator, differences
from replicator.operations.status.parts import clocks
from replicator.operations.status.wal import danger
from replicator.source import slot as slots
from replicator.source.stream import Source
from replicator.source.takeover import Beginning, pauses, recall

CHECK_SECONDS = 120.0
"""Ours have time-outs of their own. One of another package may wait without end."""

log = logging.getLogger(__name__)


async def findings(
    settings: CoreSettings, enricher: Enricher, sinks: Sequence[Sink], store: CheckpointStore
) -> AsyncIterator[Finding]:
    """Everything, one after the other; never raises for what it finds."""
    reached = [Finding(True, warning) for warning in filter(None, [exposed(settings.admin_listen)])]
    readable = open_to_all([*secret_files(), *store.files()])
    for finding in (*reached, *readable, *secrets_in_clear(settings, sinks)):
        yield finding
    fresh = False  # nothing was begun: what `init` makes need not be there
    paused = await _pauses(settings, sinks, store)
    with suppress(CheckpointError):  # its own line says so
        await asyncio.to_thread(recall, store, settings.slot, sinks)
    checks = {f"sink {sink.name}": sink.check for sink in sinks if sink.name not in paused}
    try:
        found = await server.look(settings.postgres_dsn.get_secret_value(), settings)
    except SourceError as exc:  # one cause, one line: neither slot nor tables can be looked at
        yield Finding(False, exc.problem, exc.cure)
    else:
        for finding in found.findings:
            yield finding
        if found.may_stream:
            for finding in await _checked("checkpoint", lambda: _beginning(settings, sinks, store)):
                fresh = fresh or finding.made_by_init
                yield finding
        checks = {"tables": enricher.check, **checks}
    async for finding in _looked(checks):
        yield finding._replace(ok=finding.ok or (fresh and finding.made_by_init))
    async for finding in _running(settings, paused):
        yield finding


async def require_source(settings: CoreSettings, enricher: Enricher) -> None:
    """Raise SourceError for what `findings` refuses of PostgreSQL and its tables: before that `init` makes nothing."""
    found = await server.look(settings.postgres_dsn.get_secret_value(), settings)
    looked = (*found.findings, *await _checked("tables", enricher.check))
    if refused := [finding for finding in looked if not (finding.ok or finding.made_by_init)]:
        what = "; ".join(finding.what for finding in refused)
        cure = "; ".join(dict.fromkeys(finding.cure for finding in refused if finding.cure))
        raise SourceUnusable(problem=f"{what}. Nothing was made", cure=cure)


async def _pauses(settings: CoreSettings, sinks: Sequence[Sink], store: CheckpointStore) -> dict[str, Pause]:
    """Sinks that are to be left alone."""
    with suppress(CheckpointError):  # its own line says so
        return await asyncio.to_thread(pauses, store, settings.slot, [sink.name for sink in sinks], time.time())
    return {}


async def _running(settings: CoreSettings, paused: Mapping[str, Pause]) -> AsyncIterator[Finding]:
    """What it may not do, and what the replicator of this slot says of itself if it runs here."""
    for name, pause in paused.items():
        yield Finding(True, f"{pause.describe(name, None)}, and not asked")
    live, why = await ask_replicator(settings)
    if live is None and settings.admin_listen and (taken := await unavailable(settings.admin_listen)):
        yield Finding(False, f"{taken.problem}; {why}", taken.cure)  # `run` would end with it
    if live and not live.reasons:
        yield Finding(True, f"the running replicator is {'the standby' if live.standby else 'ready'}")
    for reason in live.reasons if live else ():
        yield Finding(False, f"the running replicator is not ready: {reason}")
    for difference in differences(live):
        yield Finding(False, difference)


async def _looked(checks: Mapping[str, Callable[[], Awaitable[Sequence[Finding]]]]) -> AsyncIterator[Finding]:
    """What they find, each finding once: the sinks of two streams may say the same of one server."""
    said = set[Finding]()
    for name, check in checks.items():
        for finding in await _checked(name, check):
            if finding not in said:
                said.add(finding)
                yield finding


async def _checked(name: str, check: Callable[[], Awaitable[Sequence[Finding]]]) -> Sequence[Finding]:
    """What it finds. A sink of another package may raise anything: the others are looked at all the same."""
    try:
        async with asyncio.timeout(CHECK_SECONDS) as clock:
            return [_finding(found) for found in await check()]  # it may return anything, too
    except ReplicatorError as exc:
        return [Finding(False, exc.problem, exc.cure)]
    except Exception as exc:
        if clock.expired():
            return [
                Finding(
                    False,
                    f"{name}: its check has not ended within {CHECK_SECONDS:.0f} s",
                    "Check whether it answers at all",
                )
            ]
        log.debug("the check of %s failed", name, exc_info=True)
        problem = f"{name}: its check failed in an unexpected way ({type(exc).__name__})"
        return [Finding(False, problem, "REPLICATOR_LOG_LEVEL=debug shows where; report it to its author")]


def _finding(found: object) -> Finding:
    if isinstance(found, Finding):
        return found
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
