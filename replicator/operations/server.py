"""`check`'s look at PostgreSQL as a server: settings, room, rights, the plugin. Its one slot is temporary.

What counts is what can be done, not what a catalog says: managed services give the right to replicate in their own way.
`check.py` goes on with the slot, the checkpoint, the tables and the sinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import psycopg
from psycopg import sql

from replicator.contracts.errors import SourceStandby
from replicator.contracts.events import Finding
from replicator.contracts.settings import CoreSettings, variable
from replicator.operations.exposure import unverified
from replicator.source.connection import Connection, Dsn, answering, connect
from replicator.source.refusals import explained, replication_cure
from replicator.source.server import chooses
from replicator.source.wal2json import OPTIONS, PLUGIN

PLUGIN_TIMEOUT_SECONDS = 5
"""A new slot waits for all running transactions; a check should not, and ends before `check` gives it up."""

OLDEST_SERVER = 140_000
"""PostgreSQL 14: the community has supported nothing older since November 2025."""

_SETTINGS = """
SELECT name, setting FROM pg_settings WHERE name IN ('max_slot_wal_keep_size', 'max_wal_size', 'wal_level',
    'max_replication_slots', 'max_wal_senders', 'idle_replication_slot_timeout',
    'synchronous_standby_names')
"""
_COUNTS = """
SELECT current_user, (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_stat_replication),
       (SELECT active FROM pg_replication_slots WHERE slot_name = {})
"""
# A temporary slot ends with the connection. Reading one change through it proves plugin, version and options.
_TRY_CREATE = "SELECT pg_create_logical_replication_slot({slot}, {plugin}, true)"
_TRY_DROP = "SELECT pg_drop_replication_slot({slot})"  # there may be room for one alone, and `init` makes its own next
_TRY_PEEK = "SELECT count(*) FROM pg_logical_slot_peek_changes({slot}, NULL, 1, {options})"


class Server(NamedTuple):
    """What was found, and whether the stream could be opened at all."""

    findings: list[Finding]
    may_stream: bool


class _Room(NamedTuple):
    """What is in use, and whether our slot is there and read (None: it is not there)."""

    role: str
    slots: int
    senders: int
    active: bool | None


async def look(dsn: Dsn, settings: CoreSettings) -> Server:
    """Raises SourceError when there is no connection."""
    async with answering(settings.slot), await connect(dsn, "replicator check") as connection:
        [(is_standby,)] = await (await connection.execute("SELECT pg_is_in_recovery()")).fetchall()
        if is_standby:
            raise SourceStandby
        values: dict[str, str] = dict(await (await connection.execute(_SETTINGS)).fetchall())
        counted = await connection.execute(sql.SQL(_COUNTS).format(sql.Literal(settings.slot)))
        room = _Room(*(await counted.fetchone() or ("?", 0, 0, None)))
        given = {
            option.keyword: (option.val or b"").decode() for option in connection.pgconn.info
        }  # environment and all
        found = [*unverified("PostgreSQL", connection.info.host, given[b"sslmode"], variable("postgres_dsn"))]
        found += _of_settings(connection.info.server_version, values, settings)
        found += _of_room(values, room)
        may_stream = room.senders < int(values["max_wal_senders"])
        if values["wal_level"] == "logical" and room.slots < int(values["max_replication_slots"]):
            tried, may_replicate = await _try_slot(connection, room.role)
            found += tried
            may_stream &= may_replicate
        return Server(found, may_stream)


def _of_settings(version: int, values: Mapping[str, str], settings: CoreSettings) -> Iterator[Finding]:
    level = values["wal_level"]
    waits = chooses(names := values["synchronous_standby_names"], settings.slot)
    sync = f"synchronous_standby_names = '{names}'{': commits would wait for the sinks' if waits else ''}"
    checks = (
        (version >= OLDEST_SERVER, f"PostgreSQL {version // 10_000}", "Upgrade to PostgreSQL 14 or newer"),
        (level == "logical", f"wal_level = {level}", "ALTER SYSTEM SET wal_level = logical, then restart PostgreSQL"),
        (not waits, sync, "Name the physical standbys in it (application_name in pg_stat_replication), without `*`"),
    )
    yield from (Finding(ok, what, "" if ok else cure) for ok, what, cure in checks)
    yield _of_wal(int(values["max_slot_wal_keep_size"]), int(values["max_wal_size"]))
    if idle := int(values.get("idle_replication_slot_timeout") or 0):
        what = f"idle_replication_slot_timeout = {idle} s: a slot that nobody reads for so long is lost"
        yield Finding(True, what, "Make it longer than any downtime of the replicator")


def _of_wal(keep_mb: int, between_checkpoints_mb: int) -> Finding:
    if keep_mb < 0:
        advice = "Fine while you monitor the disk; set a bound if losing the slot is better than a full disk"
        return Finding(True, "max_slot_wal_keep_size = -1: without a reader, WAL fills the disk", advice)
    low = keep_mb < between_checkpoints_mb
    advice = f"That is less than max_wal_size ({between_checkpoints_mb} MB). Raise it" if low else ""
    return Finding(True, f"max_slot_wal_keep_size = {keep_mb} MB: a slot that falls further behind is lost", advice)


def _of_room(values: Mapping[str, str], room: _Room) -> Iterator[Finding]:
    slots, senders = int(values["max_replication_slots"]), int(values["max_wal_senders"])
    ok = room.active is not None or room.slots < slots
    cure = "Raise max_replication_slots and restart PostgreSQL, or drop a slot that is not in use"
    yield Finding(ok, f"max_replication_slots = {slots}, {room.slots} in use", "" if ok else cure)
    ok = bool(room.active) or room.senders < senders
    cure = "Raise max_wal_senders and restart PostgreSQL, or end a reader that is not needed"
    yield Finding(ok, f"max_wal_senders = {senders}, {room.senders} in use", "" if ok else cure)


async def _try_slot(connection: Connection, role: str) -> tuple[list[Finding], bool]:
    """Make one and read it; and whether the role may replicate."""
    slot = sql.Literal(f"replicator_check_{connection.info.backend_pid}")
    options = sql.SQL(", ").join(sql.Literal(text) for pair in OPTIONS.items() for text in pair)
    may = Finding(True, f"role {role} may replicate")
    try:
        await connection.execute(sql.SQL("SET statement_timeout = {}").format(PLUGIN_TIMEOUT_SECONDS * 1_000))
        await connection.execute(sql.SQL(_TRY_CREATE).format(slot=slot, plugin=sql.Literal(PLUGIN)))
        await connection.execute(sql.SQL(_TRY_PEEK).format(slot=slot, options=options))
        await connection.execute(sql.SQL(_TRY_DROP).format(slot=slot))
    except psycopg.errors.QueryCanceled:
        cure = "Wait for the oldest transaction to end (pg_stat_activity, pg_prepared_xacts), then check again"
        what = f"{PLUGIN}: a new slot could not be made in {PLUGIN_TIMEOUT_SECONDS} s"
        return [may, Finding(False, what, cure, made_by_init=True)], True  # `init` waits longer
    except psycopg.Error as exc:
        error = await explained(exc, "", connection)
        if error.cure == replication_cure():
            return [Finding(False, f"role {role} may not replicate", replication_cure(role))], False
        return [may, Finding(False, f"{PLUGIN}: {error.detail}", error.cure)], True
    return [may, Finding(True, f"{PLUGIN} decodes with format-version 2 (release 2.0 or newer)")], True
