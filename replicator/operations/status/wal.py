"""What PostgreSQL keeps for the slot: how it grows, how long that goes well, and what to do before it is lost."""

from __future__ import annotations

import time
from collections import deque

from msgspec import structs

from replicator.contracts.errors import command
from replicator.contracts.events import Pause
from replicator.operations.status.form import WalStatus
from replicator.operations.status.text import outlook, size
from replicator.source.slot import SlotState

FORECAST_SECONDS = 120.0
"""What the forecast looks back to. PostgreSQL lets the WAL of a busy slot go in steps, every 15 s or so: half of this
is some of them."""

FORECAST_BEGINS_SECONDS = 30.0
"""With less, a step is taken for growth."""

HARDLY_USED, NEARLY_USED = 0.2, 0.8
"""Of max_slot_wal_keep_size: below the one a growth is no warning, above the other any is."""

SOON_SECONDS = 3600.0
"""What loses the slot so soon is told: a pause without an end, or WAL that grows. Time enough for somebody to come."""


class WalForecast:
    """How the WAL that is kept has grown over the last minutes, by the server's clock."""

    def __init__(self) -> None:
        self._seen: deque[SlotState] = deque()

    def see(self, state: SlotState | None) -> WalStatus:
        """What follows from this look and those before; one that is shown again changes nothing."""
        if state is None or state.restart_lsn is None:
            self._seen.clear()
            return WalStatus(lost_in_seconds=0.0 if state and state.wal_status == "lost" else None)
        self._remember(state)
        growth = self._growth()
        return WalStatus(
            kept_bytes=state.retained_bytes,
            limit_bytes=state.limit_bytes,
            written_bytes_per_second=_written(self._seen[0], self._seen[-1]),
            growth_bytes_per_second=growth,
            lost_in_seconds=_lost_in_seconds(state, growth),
        )

    def _remember(self, state: SlotState) -> None:
        last = self._seen[-1] if self._seen else None
        if last and (state.server_time < last.server_time or state.server_lsn < last.server_lsn):
            self._seen.clear()  # another server, or its clock was set
        if not self._seen or state.server_time > self._seen[-1].server_time:
            self._seen.append(state)
        while state.server_time - self._seen[0].server_time > FORECAST_SECONDS:
            self._seen.popleft()

    def _growth(self) -> float | None:
        """Between the least of the older half and of the newer: the steps in between are no growth."""
        first, last = self._seen[0], self._seen[-1]
        if not any(state.active_pid for state in self._seen):
            return _written(first, last)  # nobody lets any of it go
        seconds = last.server_time - first.server_time
        if seconds < FORECAST_BEGINS_SECONDS:
            return None
        middle = first.server_time + seconds / 2
        older = min(_needed_bytes(state) for state in self._seen if state.server_time < middle)
        newer = min(_needed_bytes(state) for state in self._seen if state.server_time >= middle)
        return round((newer - older) / (seconds / 2), 1)


def _needed_bytes(state: SlotState) -> int:
    return state.server_lsn - (state.restart_lsn or state.server_lsn)


def _written(first: SlotState, last: SlotState) -> float | None:
    """Bytes of WAL a second; None: there was only one look."""
    seconds = last.server_time - first.server_time
    return round((last.server_lsn - first.server_lsn) / seconds, 1) if seconds else None


def _lost_in_seconds(state: SlotState, growth: float | None) -> float | None:
    """The next checkpoint after that removes what the slot needs."""
    if state.safe_wal_size is None:
        return 0.0 if state.wal_status == "lost" else None
    if state.safe_wal_size <= 0:
        return 0.0
    return round(state.safe_wal_size / growth) if growth and growth > 0 else None


NO_PROBLEM = ("", "")


def danger(state: SlotState | None) -> tuple[str, str]:
    """That PostgreSQL removes WAL which the slot needs: problem and cure, else NO_PROBLEM."""
    if state is None or state.wal_status not in ("unreserved", "lost"):
        return NO_PROBLEM
    is_lost = state.wal_status == "lost"
    again = f"run {command('drop-slot')}, then {command('init --accept-gap')}, which prints the backfill command"
    if state.invalidation_reason not in (None, "wal_removed"):
        problem = f"the slot's WAL is {state.wal_status}: PostgreSQL gave the slot up ({state.invalidation_reason})"
        return problem, f"Correct what it names, then {again}"
    does = "has removed what it still needed" if is_lost else "removes what it still needs"
    problem = f"the slot's WAL is {state.wal_status}: PostgreSQL {does} (max_slot_wal_keep_size)"
    catch_up = "Check that `run` catches up, and raise max_slot_wal_keep_size: if the slot is lost, events are missing"
    return problem, f"Raise that setting, then {again}" if is_lost else catch_up


def running_out(wal: WalStatus) -> tuple[str, str]:
    """That the slot will be lost soon, likewise. A burst on an allowance that is hardly used is no problem."""
    kept, limit, seconds = wal.kept_bytes or 0, wal.limit_bytes, wal.lost_in_seconds
    soon = seconds is not None and seconds < SOON_SECONDS and kept >= HARDLY_USED * (limit or 0)
    if not limit or not (soon or kept >= NEARLY_USED * limit):
        return NO_PROBLEM
    when = f"; the slot is {outlook(wal)}" if seconds is not None else ""
    problem = f"PostgreSQL keeps {size(kept)} of WAL for the slot, and at most {size(limit)}{when}"
    cure = f"{command('status')} names the sink that is behind. Repair it, or raise max_slot_wal_keep_size."
    return problem, cure


def standing_still(wal: WalStatus, safe_wal_bytes: int | None) -> WalStatus:
    """The forecast for a slot that does not move from now on."""
    rate = wal.written_bytes_per_second
    lost_in_seconds = None if safe_wal_bytes is None or not rate else max(0, safe_wal_bytes) / rate
    return structs.replace(wal, growth_bytes_per_second=rate, lost_in_seconds=lost_in_seconds)


def loses_slot(sink: str, pause: Pause, wal: WalStatus) -> tuple[str, str]:
    """That this pause lasts longer than PostgreSQL keeps the WAL, likewise."""
    left = SOON_SECONDS if pause.until is None else pause.until - time.time()
    if wal.lost_in_seconds is None or wal.lost_in_seconds >= left:
        return NO_PROBLEM
    problem = (
        f"sink {sink} is paused, and the slot is {outlook(wal)} (max_slot_wal_keep_size):"
        " when it is lost, all sinks lack events"
    )
    return problem, f"{command(f'resume {sink}')}, or raise that setting"
