"""`check`: is everything as it has to be? A line each, with the cure. Changes nothing anywhere.

PostgreSQL as a source is checked here, tables by the enricher, destinations by the sinks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing

import psycopg
from psycopg import sql

from replicator.contracts.errors import CheckpointError, SourceError, SourceUnavailable, command
from replicator.contracts.events import Finding, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Sink
from replicator.contracts.stores import Checkpoints
from replicator.contracts.stream import Enricher
from replicator.operations.http import exposed
from replicator.operations.status import in_danger
from replicator.source import slot as slots
from replicator.source.connection import translated
from replicator.source.stream import Source
from replicator.source.takeover import Beginning
from replicator.source.wal2json import OPTIONS

PLUGIN_TIMEOUT_SECONDS = 10
"""A new slot waits for all running transactions; a check should not."""

OLDEST_SERVER = 140_000
"""PostgreSQL 14: the community has supported nothing older since November 2025."""

_SETTINGS = """
SELECT setting FROM pg_settings WHERE name IN ('max_slot_wal_keep_size', 'wal_level', 'wal_sender_timeout')
ORDER BY name
"""
_ROLE = "SELECT rolname, rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user"
# A temporary slot ends with the connection. Reading one change through it proves plugin, version and options.
_TRY_CREATE = "SELECT pg_create_logical_replication_slot({slot}, 'wal2json', true)"
_TRY_PEEK = "SELECT count(*) FROM pg_logical_slot_peek_changes({slot}, NULL, 1, {options})"


async def findings(
    settings: CoreSettings, enricher: Enricher, sinks: Sequence[Sink], store: Checkpoints
) -> AsyncIterator[Finding]:
    """Everything, one after the other; never raises for what it finds."""
    if warning := exposed(settings.admin_listen):
        yield Finding(True, warning)
    for finding in await asyncio.to_thread(_server, settings):
        yield finding
    async for finding in _beginning(settings, enricher, sinks, store):
        yield finding
    for check in (enricher.check, *(sink.check for sink in sinks)):
        for finding in await check():
            yield finding


def _server(settings: CoreSettings) -> list[Finding]:
    dsn = settings.postgres_dsn.get_secret_value()
    try:
        with psycopg.connect(
            dsn, autocommit=True, connect_timeout=10, application_name="replicator check"
        ) as connection:
            return list(_look(connection, settings))
    except psycopg.Error as exc:
        problem = str(exc).strip().partition("\n")[0]
        return [Finding(False, f"PostgreSQL: {problem}", "Check REPLICATOR_POSTGRES_DSN and pg_hba.conf")]


def _look(connection: psycopg.Connection, settings: CoreSettings) -> Iterator[Finding]:
    version = connection.info.server_version
    [keep_mb], [level], [timeout_ms] = connection.execute(_SETTINGS)
    name, able = connection.execute(_ROLE).fetchone() or ("?", False)
    feedback = settings.feedback_interval_seconds
    fits = int(timeout_ms) == 0 or feedback * 2_000 <= int(timeout_ms)
    role = f"role {name} {'may' if able else 'may not'} replicate"
    grant = f"ALTER ROLE {sql.Identifier(name).as_string(connection)} REPLICATION ({command('sql roles')} has them all)"
    pace = f"wal_sender_timeout = {timeout_ms} ms, feedback every {feedback:g} s"
    checks = (
        (version >= OLDEST_SERVER, f"PostgreSQL {version // 10_000}", "Upgrade to PostgreSQL 14 or newer"),
        (level == "logical", f"wal_level = {level}", "ALTER SYSTEM SET wal_level = logical, then restart PostgreSQL"),
        (able, role, grant),
        (fits, pace, "Set REPLICATOR_FEEDBACK_INTERVAL_SECONDS to half of it or less"),
    )
    yield from (Finding(ok, what, "" if ok else cure) for ok, what, cure in checks)
    if keep_mb == "-1":
        advice = "Fine while you monitor the disk; set a bound if losing the slot is better than a full disk"
        yield Finding(True, "max_slot_wal_keep_size = -1: without a reader, WAL fills the disk", advice)
    else:
        yield Finding(True, f"max_slot_wal_keep_size = {keep_mb} MB: a slot that falls further behind is lost")
    if level == "logical":
        yield _plugin(connection)


def _plugin(connection: psycopg.Connection) -> Finding:
    slot = sql.Literal(f"replicator_check_{connection.info.backend_pid}")
    options = sql.SQL(", ").join(sql.Literal(text) for pair in OPTIONS.items() for text in pair)
    try:
        connection.execute(sql.SQL("SET statement_timeout = {}").format(sql.Literal(PLUGIN_TIMEOUT_SECONDS * 1_000)))
        connection.execute(sql.SQL(_TRY_CREATE).format(slot=slot))
        connection.execute(sql.SQL(_TRY_PEEK).format(slot=slot, options=options))
    except psycopg.errors.QueryCanceled:
        cure = "Wait for the oldest transaction to end (pg_stat_activity, xact_start), then check again"
        return Finding(False, f"wal2json: a new slot could not be made in {PLUGIN_TIMEOUT_SECONDS} s", cure)
    except psycopg.Error as exc:
        return Finding(False, f"wal2json: {exc.diag.message_primary}", translated(exc).cure)
    return Finding(True, "wal2json decodes with format-version 2 (release 2.0 or newer)")


async def _beginning(
    settings: CoreSettings, enricher: Enricher, sinks: Sequence[Sink], store: Checkpoints
) -> AsyncIterator[Finding]:
    """Slot and checkpoint, and whether the two fit together."""
    try:
        with closing(Source(settings.postgres_dsn.get_secret_value(), settings.slot, enricher.tables)) as source:
            found = await Beginning(source, store, settings.slot, sinks).look()
        found.verify()
        at = f"at {format_lsn(found.stored.end_lsn)}" if found.stored else "empty: the first start begins at the slot"
        yield Finding(True, f"checkpoint database: {at}")
    except SourceUnavailable as exc:
        yield Finding(False, f"replication connection: {exc.detail}", "Allow it in pg_hba.conf (database too)")
    except (CheckpointError, SourceError) as exc:
        yield Finding(False, exc.problem, exc.cure)
    else:
        yield _slot(settings.slot, found.state)


def _slot(name: str, state: slots.SlotState | None) -> Finding:
    if state is None:
        return Finding(True, f"replication slot {name}: not there yet", f"{command('init')} makes it")
    if danger := in_danger(state):
        cure = "See that `run` catches up, and raise max_slot_wal_keep_size: when it is lost, events are missing"
        return Finding(False, f"replication slot {name}: {danger}", cure)
    reader = f"read by process {state.active_pid}" if state.active_pid else "nobody reads it"
    return Finding(True, f"replication slot {name}: {reader}, {state.wal_status}, {state.lag_bytes} bytes behind")
