"""The status from outside: the command `status` asks PostgreSQL, the checkpoint database and the running replicator."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import aiohttp
import msgspec
from msgspec import Struct, structs

from replicator import __version__
from replicator.contracts.errors import CheckpointError, SourceError, command
from replicator.contracts.events import Checkpoint, LetterCounts, Pause, parse_lsn
from replicator.contracts.settings import CoreSettings, decisive
from replicator.contracts.stores import CheckpointStore, ask
from replicator.operations.status.form import DeadLetterStatus, SinkStatus, Status, WalStatus
from replicator.operations.status.parts import ago, foreign_reader, lag_bytes, of_checkpoint, of_sink, of_slot
from replicator.operations.status.text import size
from replicator.operations.status.wal import WalForecast
from replicator.source import slot as slots
from replicator.source.slot import SlotState
from replicator.source.takeover import pauses

ADMIN_TIMEOUT_SECONDS = 2.0
"""The replicator is on this machine or not there."""

STATUS_BYTES = 1_000_000
"""Longer than any status."""

STALL_SECONDS = 60.0
"""The slot may stand still this long while there is something to read; a sink's hiccup is shorter."""

LOOKS_APART_SECONDS = 1.0
"""`status` looks twice when no process runs that has looked for minutes."""

COMMAND = re.compile("`[^`]*`")

T = TypeVar("T")


def differences(live: Status | None) -> list[str]:
    """Settings that decide what is written, and are others here than in the running replicator."""
    theirs = live.replicator.settings if live and live.replicator else {}
    says = "{} is {!r} in the running replicator and {!r} here. Correct the wrong one; `run` reads it when it starts"
    return [
        says.format(name, theirs[name], ours) for name, ours in decisive().items() if theirs.get(name, ours) != ours
    ]


async def collect(settings: CoreSettings, sinks: Sequence[str], store: CheckpointStore) -> Status:
    """All that can be known now, of the sinks with these names. Never raises for a part that does not answer."""
    dsn, name = settings.postgres_dsn.get_secret_value(), settings.slot
    (live, live_trouble), (state, trouble), (kept, store_trouble) = await asyncio.gather(
        ask_replicator(settings),
        _seen(slots.look(dsn, name, "replicator status")),
        _seen(ask(_stored, name, sinks, store)),
    )
    stored, letters, paused = kept or (None, None, {})
    if state is None and not trouble:
        but, cure = (", but its checkpoint does", "init --accept-gap") if stored else ("", "init")
        trouble = f"replication slot {name} does not exist{but}; {command(cure)} makes it"
    slot = of_slot(name, state, trouble)
    reasons = [*(live.reasons if live else ()), live_trouble, slot.trouble, store_trouble]
    if state and not (live or state.active_pid):
        reasons.append(f"no process reads replication slot {name}")
    if state and not store_trouble:
        reasons.append(_unfit(name, state, stored, live))
    if live and live.sinks:
        left_out = "the running replicator does not write to sink {}: REPLICATOR_SINKS is not the same there".format
        reasons += [left_out(sink) for sink in sinks if sink not in live.sinks]
    reasons += differences(live)
    told: dict[str, str] = {}
    for reason in filter(None, reasons):  # inside and outside see the same trouble, and may call commands differently
        told.setdefault(COMMAND.sub("", reason), reason)
    return Status(
        reasons=[*told.values()],
        standby=live.standby if live else "",
        replicator=live.replicator if live else None,
        slot=slot,
        wal=live.wal if live else await _wal(settings, state),
        checkpoint=of_checkpoint(stored, state, store_trouble),
        sinks={sink: _sink(sink, stored, state, live, paused.get(sink)) for sink in sinks},
        dead_letters=DeadLetterStatus(**structs.asdict(letters), limit=settings.dead_letters_max) if letters else None,
        notifications=live.notifications if live else None,
    )


async def _wal(settings: CoreSettings, state: SlotState | None) -> WalStatus:
    """The forecast without a replicator that has looked for minutes. Where nobody reads, two looks are enough."""
    forecast = WalForecast()
    found = forecast.see(state)
    if state is None or state.active_pid:
        return found
    await asyncio.sleep(LOOKS_APART_SECONDS)
    again, _ = await _seen(slots.look(settings.postgres_dsn.get_secret_value(), settings.slot, "replicator status"))
    return forecast.see(again) if again else found


def _stored(
    slot: str, sinks: Sequence[str], store: CheckpointStore
) -> tuple[Checkpoint | None, LetterCounts, dict[str, Pause]]:
    return store.load(slot), store.count_dead_letters(slot), pauses(store, slot, sinks, time.time())


def _unfit(name: str, state: SlotState, stored: Checkpoint | None, live: Status | None) -> str:
    """That the checkpoint is not, or no longer, the one of the process that reads the slot."""
    if foreign := foreign_reader(name, state, stored):
        return foreign
    if live or stored is None or not state.active_pid:  # a replicator that can be asked knows better
        return ""
    seconds, waiting = ago(stored.updated_at), lag_bytes(stored.end_lsn, state)
    if not waiting or seconds < STALL_SECONDS:
        return ""
    return f"the checkpoint was saved {seconds:.0f} s ago, while {size(waiting)} of WAL wait"


async def _seen(call: Awaitable[T]) -> tuple[T | None, str]:
    """What the call returns, or why it does not answer."""
    try:
        return await call, ""
    except (SourceError, CheckpointError) as exc:
        return None, str(exc)


async def ask_replicator(settings: CoreSettings) -> tuple[Status | None, str]:
    """What the replicator of this slot says that runs here, or why it says nothing."""
    if not settings.admin_listen:
        return None, ""
    address = f"REPLICATOR_ADMIN_LISTEN ({settings.admin_listen})"
    live, why = await ask_address(f"http://{settings.admin_listen}", address)
    if live and live.slot.name != settings.slot:
        return None, f"the replicator of another slot, {live.slot.name}, answers at {address}"
    return live, why


async def ask_address(url: str, name: str = "") -> tuple[Status | None, str]:
    """What the replicator at this admin address says, or why it says nothing. `name` is how people know it."""
    where, name = "here" if name else "there", name or url.rpartition("@")[2]
    try:
        return msgspec.json.decode(await _fetch(f"{url}/status"), type=Status), ""
    except (aiohttp.ClientError, TimeoutError):
        return None, f"no answer at {name}: the replicator does not run {where}"
    except msgspec.DecodeError:
        return None, f"what answers at {name} is not a replicator of version {__version__}"


class Hour(Struct):
    """What is used of a sink's hour in `/history`."""

    events_per_second_now: float | None = None
    events_per_second: list[float | None] = []


class History(Struct):
    """Of every sink."""

    sinks: dict[str, Hour] = {}


async def ask_history(url: str) -> History:
    """How many events a second each sink gets; nothing if it does not say."""
    try:
        return msgspec.json.decode(await _fetch(f"{url}/history"), type=History)
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
        return History()


async def _fetch(url: str) -> bytes:
    """The beginning of the body: another program may answer there, and without an end."""
    timeout = aiohttp.ClientTimeout(ADMIN_TIMEOUT_SECONDS)
    async with aiohttp.request("GET", url, timeout=timeout, allow_redirects=False) as response:
        try:
            return await response.content.readexactly(STATUS_BYTES)
        except asyncio.IncompleteReadError as all_of_it:
            return all_of_it.partial


def _sink(
    name: str, stored: Checkpoint | None, state: SlotState | None, live: Status | None, pause: Pause | None
) -> SinkStatus:
    known = live.sinks.get(name) if live else None
    if known and known.end_lsn:
        return structs.replace(known, lag_bytes=lag_bytes(parse_lsn(known.end_lsn), state))
    at = stored.sinks.get(name) if stored else None
    found = of_sink(at, state) if at else SinkStatus()
    if pause:
        found = structs.replace(found, paused=pause.describe(name, at), paused_until=pause.end)
    if not stored or not at:
        return found
    if found.lag_bytes and stored.committed_at:
        # The most that it can be: what a sink lacks was committed after the newest that all of them have.
        return structs.replace(found, lag_seconds=ago(stored.committed_at))
    return structs.replace(found, lag_seconds=0.0 if found.lag_bytes == 0 else None)
