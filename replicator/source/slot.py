"""The replication slot: look at it, make it, drop it; is the stream still continuous with our checkpoint?

Works on any asynchronous psycopg connection to the database, the replication connection included; `source.py` reads
the stream. What psycopg raises when the connection is lost is the caller's to translate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime

import msgspec
import psycopg
from msgspec import structs
from psycopg import sql

from replicator.contracts.errors import (
    SlotInUse,
    SlotInvalid,
    SlotLost,
    SlotMissing,
    SourceUnavailable,
    SourceUnusable,
    StreamGap,
)
from replicator.contracts.events import Checkpoint, Lsn, format_lsn, parse_lsn

PLUGIN = "wal2json"

_WRONG_STATE = "55000"  # object_not_in_prerequisite_state: wal_level
_NO_FILE = "58P01"  # undefined_file: the plugin's library
_NO_RIGHT = "42501"  # insufficient_privilege
_TOO_MANY = "53400"  # configuration_limit_exceeded: max_replication_slots
_IN_USE = "55006"  # object_in_use
_PASSING = ("08", "57")  # classes: the connection was lost, the server shuts down


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which cluster, and which of its histories, the LSNs belong to."""

    system_identifier: str
    timeline: int


class SlotState(msgspec.Struct, frozen=True, kw_only=True):
    """One row of pg_replication_slots, with the server's position at the same moment."""

    plugin: str | None
    database: str | None
    own_database: str
    active_pid: int | None
    restart_lsn: Lsn | None
    confirmed_lsn: Lsn | None
    wal_status: str | None
    """`reserved`, `extended`, `unreserved`, `lost`."""
    safe_wal_size: int | None
    """Bytes that can still be written before the slot is in danger; None without max_slot_wal_keep_size."""
    two_phase: bool
    """Whether prepared transactions are told before they are committed (never, before PostgreSQL 14)."""
    server_lsn: Lsn
    server_time: float
    """The server's clock at the same moment, Unix seconds."""

    @property
    def lag_bytes(self) -> int:
        """WAL that nobody has confirmed yet."""
        return self.server_lsn - (self.confirmed_lsn or self.server_lsn)

    @property
    def retained_bytes(self) -> int:
        """WAL on PostgreSQL's disk because of this slot."""
        return self.server_lsn - (self.restart_lsn or self.server_lsn)


# On a standby (PostgreSQL 16+ can decode there) the replayed position is the server's.
_SERVER_LSN = """
SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
"""

_INSPECT = f"""
SELECT plugin, database, current_database(), active_pid, restart_lsn, confirmed_flush_lsn, wal_status, safe_wal_size,
       coalesce((to_jsonb(slot) ->> 'two_phase')::bool, false), ({_SERVER_LSN}), extract(epoch FROM clock_timestamp())
FROM pg_replication_slots AS slot WHERE slot_name = {{slot}}
"""  # noqa: S608  a constant of ours; {slot} becomes a quoted literal


async def identify(connection: psycopg.AsyncConnection) -> Identity:
    """IDENTIFY_SYSTEM; the connection must be a replication connection."""
    row = await (await connection.execute("IDENTIFY_SYSTEM")).fetchone()
    if row is None:
        raise SourceUnusable(
            problem="IDENTIFY_SYSTEM gave no row", cure="Connect to PostgreSQL itself, not to a pooler"
        )
    return Identity(system_identifier=str(row[0]), timeline=int(row[1]))


async def inspect(connection: psycopg.AsyncConnection, slot: str) -> SlotState | None:
    """The slot as it is now; None when there is none of that name."""
    # Literals, not parameters: a replication connection speaks only the simple query protocol.
    row = await (await connection.execute(sql.SQL(_INSPECT).format(slot=sql.Literal(slot)))).fetchone()
    if row is None:
        return None
    return SlotState(
        plugin=row[0],
        database=row[1],
        own_database=row[2],
        active_pid=row[3],
        restart_lsn=_lsn(row[4]),
        confirmed_lsn=_lsn(row[5]),
        wal_status=row[6],
        safe_wal_size=row[7],
        two_phase=row[8],
        server_lsn=_lsn(row[9]) or 0,
        server_time=float(row[10]),
    )


async def look(dsn: str, slot: str, who: str, timeout_seconds: int) -> SlotState | None:
    """`inspect` over a connection of its own, in a bounded time. Raises SourceUnavailable."""
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            await psycopg.AsyncConnection.connect(dsn, autocommit=True, application_name=who) as connection,
        ):
            return await inspect(connection, slot)
    except TimeoutError as exc:
        raise SourceUnavailable(detail=f"no answer in {timeout_seconds} s") from exc
    except psycopg.Error as exc:
        raise SourceUnavailable(detail=str(exc).strip().partition("\n")[0]) from exc


async def create(connection: psycopg.AsyncConnection, slot: str) -> None:
    """Make the slot, once the transactions that run have ended. Raises SourceUnusable when the server is not set up."""
    query = sql.SQL("SELECT pg_create_logical_replication_slot({}, {})")
    try:
        await connection.execute(query.format(sql.Literal(slot), sql.Literal(PLUGIN)))
    except psycopg.errors.DuplicateObject:
        return  # another replicator was quicker; whether the slot fits is for verify() to say
    except psycopg.Error as exc:
        if exc.sqlstate is None or exc.sqlstate.startswith(_PASSING):
            raise
        raise unusable(exc.sqlstate, str(exc.diag.message_primary)) from exc


async def drop(connection: psycopg.AsyncConnection, slot: str) -> None:
    """Drop the slot; PostgreSQL may then throw its WAL away. Raises SlotInUse, SlotInvalid."""
    try:
        await connection.execute(sql.SQL("SELECT pg_drop_replication_slot({})").format(sql.Literal(slot)))
    except psycopg.Error as exc:
        if exc.sqlstate is None or exc.sqlstate.startswith(_PASSING):
            raise
        message = str(exc.diag.message_primary)
        if exc.sqlstate == _IN_USE:
            raise in_use(slot, message) from exc
        raise SlotInvalid(slot=slot, problem=message) from exc


def in_use(slot: str, message: str) -> SlotInUse:
    """PostgreSQL's message ends with the process that reads the slot."""
    return SlotInUse(slot=slot, pid=message.rpartition(" ")[2])


def unusable(sqlstate: str | None, message: str) -> SourceUnusable:
    """What a refusal to create or read a slot means, with its cure."""
    if "output plugin" in message:  # PostgreSQL 15.19, 16.15, 17.11, 18.6 and later: CVE-2026-6471
        return SourceUnusable(
            problem=message, cure=f"ALTER SYSTEM SET output_plugin_libraries = '{PLUGIN}', then reload"
        )
    if "recovery" in message:
        return SourceUnusable(problem=message, cure="Connect to the primary: this server is a standby")
    cures = {
        _WRONG_STATE: "Set wal_level = logical in postgresql.conf and restart PostgreSQL",
        _NO_FILE: "Install wal2json for this version of PostgreSQL (Debian: postgresql-NN-wal2json)",
        _NO_RIGHT: "Give the role its rights: ALTER ROLE … REPLICATION (see sql/roles.sql)",
        _TOO_MANY: "Raise max_replication_slots and restart PostgreSQL, or drop a slot that nobody reads",
    }
    return SourceUnusable(problem=message, cure=cures.get(sqlstate or "", "See PostgreSQL's log"))


def verify(slot: str, state: SlotState | None, identity: Identity, checkpoint: Checkpoint | None) -> None:
    """Raise unless reading from the slot gives everything behind the checkpoint.

    Without a checkpoint any healthy slot is right: it begins where the slot was last confirmed, which can repeat
    events but lose none.
    """
    since = _when(checkpoint)
    if checkpoint is not None and (problem := _elsewhere(identity, checkpoint)):
        raise StreamGap(slot=slot, problem=problem, since=since)
    if state is None:
        if checkpoint is not None:
            raise SlotMissing(slot=slot, checkpoint=format_lsn(checkpoint.end_lsn), since=since)
        return
    if problem := _misfit(state):
        raise SlotInvalid(slot=slot, problem=problem)
    if state.wal_status == "lost" or state.restart_lsn is None:
        read = format_lsn(checkpoint.end_lsn) if checkpoint else "an unknown position"
        raise SlotLost(slot=slot, wal_status=state.wal_status, checkpoint=read, since=since)
    if checkpoint is not None and (problem := _gap(state, checkpoint)):
        raise StreamGap(slot=slot, problem=problem, since=since)


def first_checkpoint(slot: str, state: SlotState | None, identity: Identity) -> Checkpoint:
    """Where to begin without a checkpoint: where the slot was confirmed last. Can repeat events, loses none."""
    if state is None or state.confirmed_lsn is None:
        raise SlotInvalid(slot=slot, problem="it vanished while it was being taken")
    return Checkpoint(
        slot=slot,
        system_identifier=identity.system_identifier,
        timeline=identity.timeline,
        end_lsn=state.confirmed_lsn,
        sinks={},
    )


def of_sinks(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint with the positions of these sinks only: one that is not configured holds nothing up."""
    return structs.replace(checkpoint, sinks={name: at for name, at in checkpoint.sinks.items() if name in names})


def _misfit(state: SlotState) -> str:
    if state.plugin is None:
        return "it is a physical slot, not a logical one"
    if state.plugin != PLUGIN or state.database != state.own_database:
        return f"it is for plugin {state.plugin} in database {state.database}, not for {PLUGIN} in this one"
    if state.two_phase:
        return "it was made with two_phase = true and tells of transactions that are not committed yet"
    return ""


def _elsewhere(identity: Identity, checkpoint: Checkpoint) -> str:
    system, timeline = identity.system_identifier, identity.timeline
    if system != checkpoint.system_identifier:
        return f"the server is system {system}, the checkpoint is of {checkpoint.system_identifier}"
    if timeline != checkpoint.timeline:
        return f"the server is on timeline {timeline}, the checkpoint is of {checkpoint.timeline} (failover or restore)"
    return ""


def _gap(state: SlotState, checkpoint: Checkpoint) -> str:
    end = format_lsn(checkpoint.end_lsn)
    # Whoever reads the slot moves the checkpoint on, past where the server was when we looked.
    if state.active_pid is None and state.server_lsn < checkpoint.end_lsn:
        return f"the server is at {format_lsn(state.server_lsn)}, behind the checkpoint's {end} (an older backup)"
    if state.confirmed_lsn is not None and state.confirmed_lsn > checkpoint.end_lsn:
        confirmed = format_lsn(state.confirmed_lsn)
        return f"it was confirmed up to {confirmed}, past the checkpoint's {end} (made again, or read by somebody else)"
    for name, sink in checkpoint.sinks.items():
        if sink.end_lsn < checkpoint.end_lsn:
            return f"sink {name} was left out after {format_lsn(sink.end_lsn)}, the others went on to {end}"
    return ""


def _when(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "an unknown time"
    return datetime.fromtimestamp(checkpoint.complete_until, UTC).isoformat(timespec="seconds")


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else parse_lsn(text)
