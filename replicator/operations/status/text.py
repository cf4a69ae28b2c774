"""The status as JSON, and as text for people."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec

from replicator.contracts.events import counted
from replicator.contracts.sink import Carrier
from replicator.operations.logs import printable
from replicator.operations.status.form import (
    CheckpointStatus,
    DeadLetterStatus,
    NotificationStatus,
    SinkStatus,
    SlotStatus,
    Status,
    WalStatus,
)

SHORT_SECONDS = 60.0
"""A time is shown with a decimal below."""

NO_ROW = "0/0#0"


def as_json(status: Status) -> str:
    """For programs."""
    return json.dumps(msgspec.to_builtins(status), indent=2)  # in ASCII, whatever the terminal's encoding


def as_text(status: Status) -> str:
    """For people: a line a thing, what is wrong first."""
    state = status.standby and f"standby: {printable(status.standby)}"
    state = state or ("ready" if status.replicator else "not asked: REPLICATOR_ADMIN_LISTEN is off")
    if status.reasons:
        state = "NOT READY: " + "\n             ".join(map(printable, status.reasons))
    lines = [f"replicator   {state}", *_stopped_text(status)]
    if status.replicator and status.replicator.carrier:
        lines.append(f"  writes     are carried out by {carrier_text(status.replicator.carrier)}")
    lines += durable(status)
    for name, sink in status.sinks.items():
        lines += [f"sink         {name}: {_sink_text(sink)}", *_below_sink(sink, status)]
    return "\n".join(
        [*lines, f"dead letters {_letters_text(status.dead_letters)}", *_untold_text(status.notifications)]
    )


def durable(status: Status) -> Iterator[str]:
    """Slot and checkpoint: what a restart goes on from."""
    yield f"slot         {status.slot.name}: {_slot_text(status.slot)}{_wal_text(status.wal)}"
    yield f"checkpoint   {_checkpoint_text(status.checkpoint)}"


def _below_sink(sink: SinkStatus, status: Status) -> Iterator[str]:
    if sink.end_lsn is not None:
        row = "" if sink.position == NO_ROW else f" (row {sink.position})"
        yield f"  at         {sink.end_lsn}{row}"
    if sink.paused:
        yield f"  paused     {until(sink)}"
    if sink.trouble:
        lasting = "" if sink.trouble_seconds is None else f"for {span(sink.trouble_seconds)}"
        said = "" if sink.trouble in status.reasons else printable(sink.trouble)
        yield f"  trouble    {': '.join(filter(None, (lasting, said)))}"


def _untold_text(told: NotificationStatus | None) -> Iterator[str]:
    """That people are not told; nothing while they are."""
    if told and told.trouble:
        lost = f", {told.lost} lost" if told.lost else ""
        yield f"notify       {told.waiting} waiting{lost}: {printable(told.trouble)}"
    if told and told.heartbeat_trouble:
        yield f"heartbeat    {printable(told.heartbeat_trouble)}"


def _stopped_text(status: Status) -> Iterator[str]:
    live = status.replicator
    if live and live.reading_stopped and status.sinks:
        slowest = max(status.sinks, key=lambda name: status.sinks[name].waiting or 0)
        yield f"  reading stopped: {size(live.held_bytes)} wait for sink {slowest}"


def _slot_text(slot: SlotStatus) -> str:
    if slot.server_lsn is None:
        return "unknown"
    reader = f"read by process {slot.active_pid}" if slot.active_pid else "NOBODY READS IT"
    kept = f"{size(slot.retained_bytes)}, safe for {size(slot.safe_wal_bytes)} more"
    if slot.wal_status == "lost":
        kept = "not all that the slot needs"
    elif slot.safe_wal_bytes is None:
        kept = f"{size(slot.retained_bytes)}, no limit (max_slot_wal_keep_size)"
    elif slot.safe_wal_bytes <= 0:
        kept = f"{size(slot.retained_bytes)}, no longer safe"
    if slot.confirmed_lsn is None:
        return f"{reader}, nothing is confirmed yet"
    return (
        f"{reader}, WAL {slot.wal_status}, PostgreSQL {slot.server_version}\n"
        f"  confirmed  {slot.confirmed_lsn}, {size(slot.lag_bytes)} behind {slot.server_lsn}\n"
        f"  WAL kept   {kept}"
    )


def _wal_text(wal: WalStatus) -> str:
    return f"\n  forecast   {outlook(wal)}" if wal.lost_in_seconds else ""


def outlook(wal: WalStatus) -> str:
    """How long PostgreSQL keeps the WAL that the slot needs. Nobody says it in other words."""
    growth = wal.growth_bytes_per_second
    rate = f"{size(round(growth or 0))}/s"
    if wal.lost_in_seconds is not None:
        return f"lost in {span(wal.lost_in_seconds)}, growing by {rate}" if wal.lost_in_seconds else "no longer safe"
    if wal.kept_bytes is None:
        return "not known yet"
    if wal.limit_bytes is None:
        grows = f"growing by {rate}" if growth and growth > 0 else "without a reader it fills the disk"
        return f"no limit (max_slot_wal_keep_size); {grows}"
    return "how fast it grows is not known yet" if growth is None else "safe: it does not grow"


def _checkpoint_text(checkpoint: CheckpointStatus) -> str:
    if checkpoint.end_lsn is None:
        return "unknown" if checkpoint.trouble else "none yet"
    return f"{checkpoint.end_lsn}, saved {checkpoint.saved_seconds_ago} s ago"


def _sink_text(sink: SinkStatus) -> str:
    if sink.end_lsn is None:
        return "no position yet"
    bound = "at most " if sink.lag_seconds and (sink.paused or sink.waiting is None) else ""  # docs/reference/status.md
    seconds = "an unknown time" if sink.lag_seconds is None else f"{bound}{lag(sink.lag_seconds)}"
    waiting = "" if sink.waiting is None else f", {counted(sink.waiting, 'event')} waiting"
    return f"{size(sink.lag_bytes)} and {seconds} behind{waiting}"


def until(sink: SinkStatus) -> str:
    """Of a sink that is paused: how long."""
    return f"until {sink.paused_until or 'somebody resumes it'}"


def _letters_text(letters: DeadLetterStatus | None) -> str:
    if letters is None:
        return "unknown"
    counts = [f"{count} of {name}" for name, count in letters.sinks.items()]
    counts += [counted(letters.rows, "row")] if letters.rows else []
    return f"{', '.join(counts) or 'none'} (at most {letters.limit} of each sink)"


def carrier_text(carrier: Carrier) -> str:
    """Who it is, and what it has."""
    has = f"{counted(carrier.executors, 'executor')}, {counted(carrier.cores, 'core')}"
    return f"{printable(carrier.name)} ({has})"


def size(count: int | None) -> str:
    """For people."""
    if count is None:
        return "an unknown amount"
    power = min(len(str(abs(count))) - 1, 12) // 3  # of 1,000
    return f"{count / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def lag(seconds: float) -> str:
    """A short time with a decimal, a longer one in its largest fitting unit."""
    return f"{seconds:.1f} s" if seconds < SHORT_SECONDS else span(seconds)


def span(seconds: float) -> str:
    """A time in its largest fitting unit."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
