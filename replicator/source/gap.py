"""What is missing where slot and checkpoint no longer fit together: from when to when, and the command that brings it.

`slot.py` finds a gap and refuses to go on over it; an operator accepts it with `init --accept-gap`, which says this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from replicator.contracts.events import Checkpoint, format_lsn
from replicator.contracts.sink import Sink

MARGIN = timedelta(hours=1)
"""How much earlier the backfill begins: longer than nearly every transaction, and repeating costs little."""


def begins(checkpoint: Checkpoint) -> datetime:
    """Whatever was committed before is in every sink. A checkpoint of an older release knows only when it was saved."""
    return datetime.fromtimestamp(checkpoint.committed_at or checkpoint.updated_at, UTC)


def describe(stored: Checkpoint, first: Checkpoint, until: float, sinks: Sequence[Sink]) -> Iterator[str]:
    """Lines for the operator: the gap between two checkpoints, the second one made `until` (Unix seconds)."""
    since, now = begins(stored), datetime.fromtimestamp(until, UTC)
    yield (
        f"gap accepted: from {_place(stored)} to {_place(first)}; what was committed from {_iso(since)} to {_iso(now)}"
        " may be missing. To bring it:"
    )
    command = f"python backfill.py --start {_iso(since - MARGIN)} --end {_iso(now + timedelta(seconds=2))} --sinks"
    if harmless := [sink.name for sink in sinks if sink.max_repeats is None]:
        yield f"  {command} {','.join(harmless)}"
    if others := [sink.name for sink in sinks if sink.max_repeats is not None]:
        yield f"  {command} {','.join(others)}   # sees again what it has of that time, under the same event_id"
    yield (
        f"(It begins {MARGIN.total_seconds() / 3600:.0f} h earlier, because event_ts is older than the commit. Where"
        " transactions last longer, or applications set event_ts themselves, begin still earlier.)"
    )


def _place(checkpoint: Checkpoint) -> str:
    return f"{format_lsn(checkpoint.end_lsn)} (system {checkpoint.system_identifier}, timeline {checkpoint.timeline})"


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
