"""The replication slot: what it is like, and whether the stream is still continuous with the checkpoint.

Looks over any connection to the database; `stream.py` makes and drops slots, `server.py` compares histories,
`takeover.py` decides where to begin.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import suppress

import msgspec
from psycopg import rows, sql

from replicator.contracts.errors import SlotInvalid, SlotLost, SlotMissing, SlotWaits, SourceError, StreamGap
from replicator.contracts.events import Checkpoint, Lsn, format_lsn, utc
from replicator.source.connection import Connection, Dsn, answering, connect
from replicator.source.server import Identity, chooses, parted
from replicator.source.wal2json import PLUGIN


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
    """True if prepared transactions are decoded before they commit."""
    failover: bool | None = None
    """Whether standbys keep a copy of the slot, so that a promoted one has it; None before PostgreSQL 17."""
    invalidation_reason: str | None = None
    """Why the slot is lost, from PostgreSQL 17 on: `wal_removed`, `rows_removed`, `wal_level_insufficient`,
    `idle_timeout`."""
    commits_wait: bool = False
    """synchronous_standby_names chooses the stream: a commit may wait until the sinks have what came before it. Whether
    it does now, only a role with pg_read_all_stats is told."""
    away: str | None = None
    """Slots of synchronized_standby_slots that no standby reads now: PostgreSQL, from 17 on, sends nothing that these
    have not received."""
    server_lsn: Lsn
    segment_bytes: int = 16 * 1024**2
    """A WAL file's size."""
    server_time: float
    """The server's clock at the same moment, Unix seconds."""
    clock_ahead_seconds: float = 0.0
    """How far this machine's clock is ahead of that one, at least; negative: behind it."""
    recovered_at: float | None = None
    """When the newest commit was made, by the same clock, that the server has from its primary or archive; None: it has
    none, or was restarted since."""
    server_version: str

    @property
    def lag_bytes(self) -> int:
        """WAL that is not confirmed yet."""
        return self.server_lsn - (self.confirmed_lsn or self.server_lsn)

    @property
    def retained_bytes(self) -> int:
        """The WAL files on PostgreSQL's disk from the oldest that the slot needs, as `sql/slot_lag.sql` counts them."""
        if self.restart_lsn is None:
            return 0
        files = self.server_lsn // self.segment_bytes - self.restart_lsn // self.segment_bytes + 1
        return files * self.segment_bytes

    @property
    def limit_bytes(self) -> int | None:
        """As much as that may become before the slot is in danger; None: there is no limit but the disk."""
        if self.restart_lsn is None or self.safe_wal_size is None:
            return None
        return self.server_lsn + self.safe_wal_size - self.restart_lsn // self.segment_bytes * self.segment_bytes


LOOK_TIMEOUT_SECONDS = 10.0
"""For `look`, connecting included."""

_INSPECT = """
SELECT plugin, database, current_database() AS own_database, active_pid, wal_status, safe_wal_size, two_phase,
       -- columns that not every version has
       (to_jsonb(s) ->> 'failover')::bool AS failover, to_jsonb(s) ->> 'invalidation_reason' AS invalidation_reason,
       (SELECT string_agg(standby, ', ')
        FROM regexp_split_to_table(current_setting('synchronized_standby_slots', true), '[[:space:],]+') AS standby
        WHERE standby <> '' AND to_jsonb(s) ->> 'failover' = 'true'
          AND NOT EXISTS (SELECT FROM pg_replication_slots p WHERE p.slot_name = standby AND p.active)) AS away,
       current_setting('synchronous_standby_names') AS synchronous_standby_names,
       (restart_lsn - '0/0')::int8 AS restart_lsn, (confirmed_flush_lsn - '0/0')::int8 AS confirmed_lsn,
       -- on a standby the replayed position is the server's
       ((CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END) - '0/0')::int8
           AS server_lsn,
       (SELECT setting::int8 FROM pg_settings WHERE name = 'wal_segment_size') AS segment_bytes,
       extract(epoch FROM clock_timestamp())::float8 AS server_time,
       extract(epoch FROM pg_last_xact_replay_timestamp())::float8 AS recovered_at,
       split_part(current_setting('server_version'), ' ', 1) AS server_version
FROM pg_replication_slots s WHERE slot_name = {}
"""


async def inspect(connection: Connection, slot: str) -> SlotState | None:
    """The slot as it is now; None when there is none of that name."""
    # A literal, not a parameter: a replication connection speaks only the simple query protocol.
    cursor = connection.cursor(row_factory=rows.dict_row)
    asked = time.time()
    row = await (await cursor.execute(sql.SQL(_INSPECT).format(sql.Literal(slot)))).fetchone()
    if row is None:
        return None
    ahead = max(0.0, asked - row["server_time"]) + min(0.0, time.time() - row["server_time"])
    ours = {"commits_wait": chooses(row.pop("synchronous_standby_names"), slot), "clock_ahead_seconds": ahead}
    return msgspec.convert(row | ours, SlotState)


async def look(dsn: Dsn, slot: str, who: str) -> SlotState | None:
    """`inspect` over a connection of its own, in a bounded time. Raises SourceUnavailable, SourceUnusable."""
    async with answering(slot, LOOK_TIMEOUT_SECONDS), await connect(dsn, who) as connection:
        return await inspect(connection, slot)


MAKING_SECONDS = 3.0
"""A new slot that takes longer waits for a transaction; afterwards how often it is looked for which one."""
_BLOCKERS = """
-- The transactions that a process waits for: a new slot waits for one after the other. One that is prepared has no
-- process.
SELECT w.transactionid::text, h.pid, p.gid
FROM pg_locks w
LEFT JOIN pg_locks h ON h.locktype = 'transactionid' AND h.transactionid = w.transactionid AND h.granted
LEFT JOIN pg_prepared_xacts p ON p.transaction = w.transactionid
WHERE w.pid = {} AND w.locktype = 'transactionid' AND NOT w.granted
"""


async def watch_making(dsn: Dsn, slot: str, pid: int, waits: Callable[[SlotWaits], None]) -> None:
    """Tell, every few seconds until cancelled, which transaction the process that makes the slot waits for."""
    while True:
        await asyncio.sleep(MAKING_SECONDS)
        with suppress(SourceError):  # of another connection: whoever makes the slot meets it, too
            async with answering(slot, LOOK_TIMEOUT_SECONDS), await connect(dsn, "replicator init") as connection:
                found = await connection.execute(sql.SQL(_BLOCKERS).format(sql.Literal(pid)))
                for transaction, holder, gid in await found.fetchall():
                    waits(SlotWaits(slot=slot, **_waits_for(transaction, holder, gid)))


def _waits_for(transaction: str, holder: int | None, gid: str | None) -> dict[str, str]:
    if gid is not None:
        which = f"prepared transaction {gid!r} (transaction {transaction}, pg_prepared_xacts)"
        cure = "If it was forgotten: COMMIT PREPARED or ROLLBACK PREPARED, in the database where it was prepared"
    else:
        which = f"transaction {transaction} of process {holder or 'unknown'} (pg_stat_activity)"
        cure = f"If it was forgotten: SELECT pg_terminate_backend({holder or '…'})"
    return {"waits": f"it waits for {which} to end", "cure": cure}


def verify(slot: str, state: SlotState | None, identity: Identity, checkpoint: Checkpoint | None) -> None:
    """Raise unless reading from the slot gives everything after the checkpoint.

    Without a checkpoint any healthy slot that was made for these sinks is right: it begins where the slot was last
    confirmed, which can repeat events but lose none. `Found.was_read` says when that is in doubt.
    """
    # Every sink has what was committed before. One that was left out was not dated.
    since = when(checkpoint.dated if checkpoint and not behind(checkpoint) else 0.0)
    if checkpoint is not None and (problem := parted(identity, checkpoint)):
        raise StreamGap(slot=slot, problem=problem, since=since)
    if state is None:
        if checkpoint is not None:
            raise SlotMissing(slot=slot, checkpoint=format_lsn(checkpoint.end_lsn), since=since)
        return
    if problem := _misfit(state):
        raise SlotInvalid(slot=slot, problem=problem)
    if state.confirmed_lsn is None and state.active_pid is not None:
        maker = f"process {state.active_pid} makes it, and waits for the transactions that run to end"
        cure = "`run` waits until it is there; pg_stat_activity shows which transactions are old"
        raise SlotWaits(slot=slot, waits=maker, cure=cure)
    if state.wal_status == "lost" or state.restart_lsn is None:
        read = format_lsn(checkpoint.end_lsn) if checkpoint else "an unknown position"
        raise SlotLost(slot=slot, reason=state.invalidation_reason, checkpoint=read, since=since)
    if checkpoint is not None and (problem := _gap(state, checkpoint)):
        raise StreamGap(slot=slot, problem=problem, since=since)


def _misfit(state: SlotState) -> str:
    if state.plugin is None:
        return "it is a physical slot, not a logical one"
    if state.plugin != PLUGIN or state.database != state.own_database:
        return f"it is for plugin {state.plugin} in database {state.database}, not for {PLUGIN} in this one"
    if state.two_phase:
        return "it was made with two_phase = true and sends transactions before they are committed"
    return ""


def _gap(state: SlotState, checkpoint: Checkpoint) -> str:
    end = format_lsn(checkpoint.end_lsn)
    # A running replicator moves the checkpoint, perhaps past where the server was at the look.
    if state.active_pid is None and state.server_lsn < checkpoint.end_lsn:
        return f"the server is at {format_lsn(state.server_lsn)}, behind the checkpoint's {end} (an older backup)"
    if state.confirmed_lsn is not None and state.confirmed_lsn > checkpoint.end_lsn:
        confirmed = format_lsn(state.confirmed_lsn)
        return (
            f"it was confirmed up to {confirmed}, past the checkpoint's {end} (made again, or another program read it)"
        )
    return ""


def behind(checkpoint: Checkpoint) -> list[str]:
    """Sinks that were not configured while the others went on."""
    return [name for name, at in checkpoint.sinks.items() if at.end_lsn < checkpoint.end_lsn]


def left_out(stored: Checkpoint, names: Collection[str]) -> list[str]:
    """Those of these sinks that lack rows which went by while they were not configured.

    A row that went by is in the position of some sink that is stored, configured today or not.
    """
    newest = max((at.position.commit_lsn for at in stored.sinks.values()), default=0)
    return [name for name in behind(stored) if name in names and newest >= stored.sinks[name].end_lsn]


def when(moment: float) -> str:
    """A Unix time in UTC, to the second, as it can be typed; 0.0: it is not known."""
    return utc(moment) if moment else "an unknown time"
