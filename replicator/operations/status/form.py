"""The one form of the status: for people, programs, /status and /metrics.

A part that could not be read has a `trouble` and None for its values.
"""

from __future__ import annotations

from msgspec import Struct, structs

from replicator import __version__
from replicator.contracts.sink import Carrier


class SlotStatus(Struct, frozen=True, kw_only=True):
    """The replication slot, by PostgreSQL."""

    name: str
    trouble: str = ""
    server_version: str | None = None
    active_pid: int | None = None
    wal_status: str | None = None
    confirmed_lsn: str | None = None
    server_lsn: str | None = None
    lag_bytes: int | None = None
    retained_bytes: int | None = None
    safe_wal_bytes: int | None = None


class WalStatus(Struct, frozen=True, kw_only=True):
    """What PostgreSQL keeps for the slot, and how long that goes well. None: unknown, or there is no limit."""

    kept_bytes: int | None = None
    limit_bytes: int | None = None
    written_bytes_per_second: float | None = None
    """Of the whole server: what is kept grows so fast while the slot does not move."""
    growth_bytes_per_second: float | None = None
    """Negative while the slot catches up."""
    lost_in_seconds: float | None = None


class CheckpointStatus(Struct, frozen=True, kw_only=True):
    """The durable position. Without an `end_lsn` and without trouble nothing has been saved yet."""

    trouble: str = ""
    end_lsn: str | None = None
    lag_bytes: int | None = None
    saved_seconds_ago: float | None = None
    system_identifier: str | None = None
    timeline: int | None = None


class SinkStatus(Struct, frozen=True, kw_only=True):
    """One sink. Without an `end_lsn` it has no position yet; the running process has the counters."""

    trouble: str = ""
    trouble_seconds: float | None = None
    paused: str = ""
    """That it gets nothing because somebody wants it so; nothing is wrong then. Empty while it gets everything."""
    paused_until: str | None = None
    """When the pause ends, RFC 3339 in UTC; None without a pause, and of a pause without an end."""
    end_lsn: str | None = None
    position: str | None = None
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    events: int | None = None
    writes: int | None = None
    retries: int | None = None
    dead_letters: int | None = None
    waiting: int | None = None
    in_flight: int | None = None
    write_events: int | None = None


class DeadLetterStatus(Struct, frozen=True, kw_only=True):
    """Dead letters that are kept, and the most that may be of one sink and of rows."""

    rows: int
    sinks: dict[str, int]
    limit: int


class ReplicatorStatus(Struct, frozen=True, kw_only=True):
    """The running process; its counters begin with it."""

    version: str
    carrier: Carrier | None = None
    connected: bool
    confirmed_lsn: str
    verified_lsn: str
    verified_seconds_ago: float
    rows: int
    refused_rows: int
    ignored_rows: dict[str, int]
    held_bytes: int
    reading_stopped: bool
    settings: dict[str, str] = {}


class NotificationStatus(Struct, frozen=True, kw_only=True):
    """Messages to REPLICATOR_NOTIFY_URL, and calls of REPLICATOR_HEARTBEAT_URL."""

    trouble: str = ""
    heartbeat_trouble: str = ""
    sent: int = 0
    waiting: int = 0
    lost: int = 0


class Status(Struct, frozen=True, kw_only=True):
    """Everything that an operator asks first. docs/reference/status.md says what each field means."""

    version: str = __version__
    ready: bool = True
    """Nobody sets it: it follows from `reasons`."""
    reasons: list[str]
    """`Watchdog.reasons` finds them in a running process; `collect` adds what is seen from outside."""
    standby: str = ""
    """That it waits for its turn, and for whom. `/readyz` is not ready then, although nothing is wrong."""
    replicator: ReplicatorStatus | None
    slot: SlotStatus
    wal: WalStatus = WalStatus()
    checkpoint: CheckpointStatus
    sinks: dict[str, SinkStatus]
    dead_letters: DeadLetterStatus | None
    notifications: NotificationStatus | None = None

    def __post_init__(self) -> None:
        structs.force_setattr(self, "ready", not self.reasons)
