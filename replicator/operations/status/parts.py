"""Slot, checkpoint and sinks, each in the form of its part."""

from __future__ import annotations

import time

from replicator.contracts.events import Checkpoint, Lsn, SinkPosition, format_lsn
from replicator.operations.status.form import CheckpointStatus, SinkStatus, SlotStatus
from replicator.operations.status.wal import NO_PROBLEM, danger
from replicator.source.slot import SlotState

CLOCK_SECONDS = 10.0
"""How far two clocks may differ: within so much the window in Redis is right."""


def of_slot(name: str, state: SlotState | None, trouble: str = "") -> SlotStatus:
    """What PostgreSQL says of it; None: nothing."""
    if state is None:
        return SlotStatus(name=name, trouble=trouble)
    return SlotStatus(
        name=name,
        trouble=trouble or ". ".join(filter(None, danger(state))) or in_the_way(state) or _unfinished(state),
        server_version=state.server_version,
        active_pid=state.active_pid,
        wal_status=state.wal_status,
        confirmed_lsn=None if state.confirmed_lsn is None else format_lsn(state.confirmed_lsn),
        server_lsn=format_lsn(state.server_lsn),
        lag_bytes=None if state.confirmed_lsn is None else state.lag_bytes,
        retained_bytes=state.retained_bytes,
        safe_wal_bytes=state.safe_wal_size,
    )


def _unfinished(state: SlotState) -> str:
    """That it is still being made; else empty."""
    if state.confirmed_lsn is not None or state.plugin is None or state.active_pid is None:
        return ""
    return f"process {state.active_pid} makes the slot, and waits for the transactions that run to end"


def in_the_way(state: SlotState | None) -> str:
    """That commits in PostgreSQL wait for our sinks; else empty."""
    if state is None or not state.commits_wait:
        return ""
    return (
        "synchronous_standby_names makes the replicator a synchronous standby: commits in PostgreSQL wait for the"
        " sinks. Name the physical standbys in it, without `*`"
    )


def clocks(state: SlotState | None) -> tuple[str, str]:
    """That our clock and PostgreSQL's are not one: problem and cure, else NO_PROBLEM."""
    if state is None or abs(seconds := state.clock_ahead_seconds) < CLOCK_SECONDS:
        return NO_PROBLEM
    way = "ahead of" if seconds > 0 else "behind"
    problem = f"this machine's clock is {abs(seconds):.0f} s {way} that of PostgreSQL"
    return f"{problem}: the window in Redis, lags and `--last` go by it", "Set both by NTP"


def foreign_reader(name: str, state: SlotState | None, stored: Checkpoint | None) -> str:
    """That whoever reads the slot keeps no checkpoint here: what it confirms, no sink of ours may have; else empty.

    The checkpoint was loaded after the look at the slot: it is saved before anything is confirmed.
    """
    if state is None or state.active_pid is None or (stored and stored.end_lsn >= (state.confirmed_lsn or 0)):
        return ""
    return (
        f"process {state.active_pid} reads replication slot {name}, and the checkpoint database does not follow:"
        " that process is not a replicator, or has another REPLICATOR_CHECKPOINT_URL"
    )


def of_checkpoint(stored: Checkpoint | None, state: SlotState | None, trouble: str = "") -> CheckpointStatus:
    """As stored; None: nothing is."""
    if stored is None:
        return CheckpointStatus(trouble=trouble)
    return CheckpointStatus(
        end_lsn=format_lsn(stored.end_lsn),
        lag_bytes=lag_bytes(stored.end_lsn, state),
        saved_seconds_ago=ago(stored.updated_at),
        system_identifier=stored.system_identifier,
        timeline=stored.timeline,
    )


def of_sink(at: SinkPosition, state: SlotState | None, lag_seconds: float | None = None) -> SinkStatus:
    """Where it is."""
    return SinkStatus(
        end_lsn=format_lsn(at.end_lsn),
        position=f"{format_lsn(at.position.commit_lsn)}#{at.position.ordinal}",
        lag_bytes=lag_bytes(at.end_lsn, state),
        lag_seconds=lag_seconds,
    )


def lag_bytes(lsn: Lsn, state: SlotState | None) -> int | None:
    """Bytes of WAL from there to the server's end; None: unknown."""
    return None if state is None else max(0, state.server_lsn - lsn)


def ago(at: float) -> float:
    """Seconds since then, for people."""
    return round(max(0.0, time.time() - at), 1)
