"""`status`: slot, lag, checkpoint, sinks and dead letters.

It asks PostgreSQL, the checkpoint database and, when it runs, the replicator itself (admin.py); whichever does not
answer is said to be missing, the rest is shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from replicator.contracts.errors import CheckpointError, SourceUnavailable
from replicator.contracts.events import Checkpoint, LetterCounts, Lsn, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.stores import CheckpointStore
from replicator.source import slot as slots
from replicator.source.slot import SlotState

ADMIN_TIMEOUT_SECONDS = 2.0
"""It is on this machine or not there."""
LOOK_TIMEOUT_SECONDS = 10
"""For PostgreSQL, connection included."""


class _Live(msgspec.Struct):
    """What a replicator says of itself (admin.py), as far as it is read here; whatever else answers is not one."""

    slot: str
    ready: bool
    reasons: list[str]
    sinks: dict[str, dict[str, Any]]


_decode_live = msgspec.json.Decoder(_Live).decode


async def collect(settings: CoreSettings, sinks: Sequence[str], store: CheckpointStore) -> dict[str, Any]:
    """Everything that is known now, as JSON values. Never raises for a part that does not answer."""
    found: dict[str, Any] = {"slot": {"name": settings.slot}, "checkpoint": None, "sinks": {}, "dead_letters": None}
    found["dead_letters_max"] = settings.dead_letters_max
    state = await _look_at_slot(settings, found)
    live = await _ask_replicator(settings, found)
    checkpoint = await _load(settings, store, found)
    if state is None:
        found["slot"].setdefault("error", _missing(checkpoint))
    if checkpoint is not None:
        found["checkpoint"] = _checkpoint(checkpoint, state)
        found["sinks"] = {name: _sink(name, checkpoint, state, live) for name in sinks}
    return found


async def _load(settings: CoreSettings, store: CheckpointStore, found: dict[str, Any]) -> Checkpoint | None:
    try:
        checkpoint = await asyncio.to_thread(store.load, settings.slot)
        found["dead_letters"] = await asyncio.to_thread(store.count_dead_letters, settings.slot)
    except CheckpointError as exc:
        found["checkpoint"] = {"error": str(exc)}
        return None
    return checkpoint


async def _look_at_slot(settings: CoreSettings, found: dict[str, Any]) -> SlotState | None:
    try:
        dsn = settings.postgres_dsn.get_secret_value()
        state = await slots.look(dsn, settings.slot, "replicator status", LOOK_TIMEOUT_SECONDS)
    except SourceUnavailable as exc:
        found["slot"]["error"] = str(exc)
        return None
    if state is None:
        return None
    found["slot"] |= {
        "active_pid": state.active_pid,
        "wal_status": state.wal_status,
        "confirmed_lsn": format_lsn(state.confirmed_lsn or 0),
        "server_lsn": format_lsn(state.server_lsn),
        "lag_bytes": state.lag_bytes,
        "retained_bytes": state.retained_bytes,
        "safe_wal_bytes": state.safe_wal_size,
    }
    return state


def _missing(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "does not exist; `python -m replicator init` makes it"
    cure = '`python -m replicator init --accept-gap` makes it (docs/operations.md, "How to mend a gap")'
    return f"does not exist, but a checkpoint of it does; {cure}"


async def _ask_replicator(settings: CoreSettings, found: dict[str, Any]) -> dict[str, Any]:
    if not settings.admin_listen:
        found["replicator"] = {"ready": None, "reasons": ["not asked: REPLICATOR_ADMIN_LISTEN is off"]}
        return {}
    address = f"REPLICATOR_ADMIN_LISTEN ({settings.admin_listen})"
    try:
        body = await _get_status(settings.admin_listen)
        slot = _decode_live(body).slot
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
        found["replicator"] = {"ready": False, "reasons": [f"no answer at {address}: not running here"]}
        return {}
    if slot != settings.slot:
        told = f"another slot's replicator, {slot}, answers at {address}"
        found["replicator"] = {"ready": False, "reasons": [told]}
        return {}
    found["replicator"] = live = msgspec.json.decode(body)
    return dict(live)


async def _get_status(address: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=ADMIN_TIMEOUT_SECONDS)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"http://{address}/status") as response,
    ):
        return await response.read()


def _checkpoint(checkpoint: Checkpoint, state: SlotState | None) -> dict[str, Any]:
    return {
        "end_lsn": format_lsn(checkpoint.end_lsn),
        "lag_bytes": _behind(checkpoint.end_lsn, state),
        "saved_seconds_ago": round(time.time() - checkpoint.updated_at, 1),
        "system_identifier": checkpoint.system_identifier,
        "timeline": checkpoint.timeline,
    }


def _sink(name: str, checkpoint: Checkpoint, state: SlotState | None, live: dict[str, Any]) -> dict[str, Any]:
    at = checkpoint.sinks.get(name)
    if at is None:
        return {"error": "has no position yet"}
    lane = live.get("sinks", {}).get(name, {})
    behind = _behind(at.end_lsn, state)
    return {
        "end_lsn": format_lsn(at.end_lsn),
        "position": f"{format_lsn(at.position.commit_lsn)}#{at.position.ordinal}",
        "lag_bytes": behind,
        "lag_seconds": lane.get("lag_seconds", _lag_seconds(checkpoint, behind)),  # a replicator that runs knows better
        "trouble": lane.get("trouble", ""),
    }


def _lag_seconds(checkpoint: Checkpoint, behind: int | None) -> float | None:
    """The most that it can be: what a sink lacks was committed after the newest that all of them have."""
    if not behind:
        return None if behind is None else 0.0
    return round(max(0.0, time.time() - (checkpoint.complete_until)), 1)


def _behind(lsn: Lsn, state: SlotState | None) -> int | None:
    return None if state is None else max(0, state.server_lsn - lsn)


def as_json(found: dict[str, Any]) -> str:
    """For programs."""
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()


def as_text(found: dict[str, Any]) -> str:
    """For people: a line a thing, what is wrong first."""
    lines = [f"replicator   {_replicator_text(found['replicator'])}"]
    slot = found["slot"]
    if "error" in slot:
        lines.append(f"slot         {slot['name']}: {slot['error']}")
    else:
        reader = f"read by process {slot['active_pid']}" if slot["active_pid"] else "NOBODY READS IT"
        lines.append(f"slot         {slot['name']}: {reader}, WAL {slot['wal_status']}")
        lines.append(f"  confirmed  {slot['confirmed_lsn']}, {_size(slot['lag_bytes'])} behind {slot['server_lsn']}")
        lines.append(f"  WAL kept   {_size(slot['retained_bytes'])}, {_safe_text(slot)}")
    lines.append(f"checkpoint   {_checkpoint_text(found['checkpoint'])}")
    lines += [f"sink         {name}: {_sink_text(sink)}" for name, sink in found["sinks"].items()]
    letters = _letters_text(found["dead_letters"])
    lines.append(f"dead letters {letters} (at most {found['dead_letters_max']} of each sink)")
    return "\n".join(lines)


def _replicator_text(replicator: dict[str, Any]) -> str:
    reasons = "; ".join(replicator["reasons"])
    if replicator["ready"] is None:
        return reasons
    return "ready" if replicator["ready"] else f"NOT READY: {reasons}"


def _safe_text(slot: dict[str, Any]) -> str:
    if slot["safe_wal_bytes"] is not None:
        return f"safe for {_size(slot['safe_wal_bytes'])} more"
    return "no longer safe" if slot["wal_status"] == "lost" else "no limit (max_slot_wal_keep_size)"


def _letters_text(letters: LetterCounts | None) -> str:
    if letters is None:
        return "unknown"
    rows = [f"{letters.rows} rows"] if letters.rows else []
    return ", ".join(rows + [f"{count} of {name}" for name, count in letters.sinks.items()]) or "none"


def _checkpoint_text(checkpoint: dict[str, Any] | None) -> str:
    if checkpoint is None:
        return "none yet"
    if "error" in checkpoint:
        return str(checkpoint["error"])
    return f"{checkpoint['end_lsn']}, saved {checkpoint['saved_seconds_ago']} s ago"


def _sink_text(sink: dict[str, Any]) -> str:
    if "error" in sink:
        return str(sink["error"])
    trouble = f": {sink['trouble']}" if sink["trouble"] else ""
    seconds = "an unknown time" if sink["lag_seconds"] is None else f"{sink['lag_seconds']} s"
    lag = f"{_size(sink['lag_bytes'])} and {seconds} behind"
    return f"{sink['end_lsn']} (row {sink['position']}), {lag}{trouble}"


def _size(count: int | None) -> str:
    if count is None:
        return "an unknown amount"
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 1000:  # noqa: PLR2004  SI units
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
