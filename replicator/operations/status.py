"""Where the slot, the checkpoint and every sink are: one form for people, programs, /status and /metrics.

A running replicator fills it in from inside (`watchdog.py`), the command `status` from outside (`collect`). A part
that could not be read has a `trouble` and None for its values.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Iterator, Sequence
from typing import TypeVar

import aiohttp
import msgspec
from msgspec import Struct, structs

from replicator import __version__
from replicator.contracts.errors import CheckpointError, SourceError, command
from replicator.contracts.events import (
    Checkpoint,
    LetterCounts,
    Lsn,
    Pause,
    SinkPosition,
    format_lsn,
    parse_lsn,
)
from replicator.contracts.settings import CoreSettings, decisive
from replicator.contracts.stores import CheckpointStore
from replicator.operations.logs import printable
from replicator.source import slot as slots
from replicator.source.slot import SlotState
from replicator.source.takeover import pauses

ADMIN_TIMEOUT_SECONDS = 2.0
"""The replicator is on this machine or not there."""

STATUS_BYTES = 1_000_000
"""Longer than any status."""

STALL_SECONDS = 60.0
"""The slot may stand still this long while there is something to read; a sink's hiccup is shorter."""

FORECAST_SECONDS = 120.0
"""What the forecast looks back to. PostgreSQL lets the WAL of a busy slot go in steps, every 15 s or so: half of this
is some of them."""
FORECAST_BEGINS_SECONDS = 30.0
"""With less, a step is taken for growth."""
HARDLY_USED, NEARLY_USED = 0.2, 0.8
"""Of max_slot_wal_keep_size: below the one a growth is no warning, above the other any is."""
LOOKS_APART_SECONDS = 1.0
"""`status` looks twice when no process runs that has looked for minutes."""

SOON_SECONDS = 3600.0
"""What loses the slot so soon is told: a pause without an end, or WAL that grows. Time enough for somebody to come."""

SHORT_SECONDS = 60.0
"""A time is shown with a decimal below."""

NO_ROW = "0/0#0"

T = TypeVar("T")


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


def of_slot(name: str, state: SlotState | None, trouble: str = "") -> SlotStatus:
    """What PostgreSQL says of it; None: nothing."""
    if state is None:
        return SlotStatus(name=name, trouble=trouble)
    return SlotStatus(
        name=name,
        trouble=trouble or in_danger(state) or in_the_way(state) or _unfinished(state),
        server_version=state.server_version,
        active_pid=state.active_pid,
        wal_status=state.wal_status,
        confirmed_lsn=None if state.confirmed_lsn is None else format_lsn(state.confirmed_lsn),
        server_lsn=format_lsn(state.server_lsn),
        lag_bytes=None if state.confirmed_lsn is None else state.lag_bytes,
        retained_bytes=state.retained_bytes,
        safe_wal_bytes=state.safe_wal_size,
    )


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


def in_danger(state: SlotState | None) -> str:
    """That PostgreSQL removes WAL which the slot needs, with the cure; else empty."""
    return ". ".join(danger(state) if state else ())


def cure_of(state: SlotState | None) -> str:
    """The end of what `in_danger` says."""
    return "".join(danger(state)[1:] if state else ())


def danger(state: SlotState) -> tuple[str, str] | tuple[()]:
    """The same in two: problem and cure."""
    if state.wal_status not in ("unreserved", "lost"):
        return ()
    is_lost = state.wal_status == "lost"
    again = f"run {command('drop-slot')}, then {command('init --accept-gap')}, which prints the backfill command"
    if state.invalidation_reason not in (None, "wal_removed"):
        problem = f"the slot's WAL is {state.wal_status}: PostgreSQL gave the slot up ({state.invalidation_reason})"
        return problem, f"Correct what it names, then {again}"
    does = "has removed what it still needed" if is_lost else "removes what it still needs"
    problem = f"the slot's WAL is {state.wal_status}: PostgreSQL {does} (max_slot_wal_keep_size)"
    catch_up = "See that `run` catches up, and raise max_slot_wal_keep_size: when it is lost, events are missing"
    return problem, f"Raise that setting, then {again}" if is_lost else catch_up


def running_out(wal: WalStatus) -> tuple[str, str] | tuple[()]:
    """That the slot will be lost soon, problem and cure. A burst on an allowance that is hardly used is none."""
    kept, limit, seconds = wal.kept_bytes or 0, wal.limit_bytes, wal.lost_in_seconds
    soon = seconds is not None and seconds < SOON_SECONDS and kept >= HARDLY_USED * (limit or 0)
    if not limit or not (soon or kept >= NEARLY_USED * limit):
        return ()
    when = f"; at this rate the slot is lost in {span(seconds)}" if seconds is not None else ""
    problem = f"PostgreSQL keeps {size(kept)} of WAL for the slot, of {size(limit)} that it may{when}."
    cure = f"{command('status')} names the sink that is behind. Mend it, or raise max_slot_wal_keep_size."
    return problem, cure


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


def loses_slot(sink: str, pause: Pause, lost_in_seconds: float | None) -> tuple[str, str]:
    """That this pause lasts longer than PostgreSQL keeps the WAL, and the cure; else empty."""
    left = SOON_SECONDS if pause.until is None else pause.until - time.time()
    if lost_in_seconds is None or lost_in_seconds >= left:
        return "", ""
    cure = f"{command(f'resume {sink}')}, or raise that setting"
    problem = (
        f"sink {sink} is paused, and in {span(lost_in_seconds)} PostgreSQL gives up the slot at this rate"
        " (max_slot_wal_keep_size): then all sinks lack events"
    )
    return f"{problem}. {cure}", cure


def of_checkpoint(stored: Checkpoint | None, state: SlotState | None, trouble: str = "") -> CheckpointStatus:
    """As stored; None: nothing is."""
    if stored is None:
        return CheckpointStatus(trouble=trouble)
    return CheckpointStatus(
        end_lsn=format_lsn(stored.end_lsn),
        lag_bytes=_lag_bytes(stored.end_lsn, state),
        saved_seconds_ago=_ago(stored.updated_at),
        system_identifier=stored.system_identifier,
        timeline=stored.timeline,
    )


def of_sink(at: SinkPosition, state: SlotState | None, lag_seconds: float | None = None) -> SinkStatus:
    """Where it is."""
    return SinkStatus(
        end_lsn=format_lsn(at.end_lsn),
        position=f"{format_lsn(at.position.commit_lsn)}#{at.position.ordinal}",
        lag_bytes=_lag_bytes(at.end_lsn, state),
        lag_seconds=lag_seconds,
    )


def _lag_bytes(lsn: Lsn, state: SlotState | None) -> int | None:
    """Bytes of WAL from there to the server's end; None: unknown."""
    return None if state is None else max(0, state.server_lsn - lsn)


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
    live, live_trouble = await ask_replicator(settings)
    state, trouble = await _seen(slots.look(dsn, name, "replicator status"))
    kept, store_trouble = await _seen(asyncio.to_thread(_stored, name, sinks, store))
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
    reasons = [*dict.fromkeys(filter(None, reasons))]  # inside and outside see the same trouble
    return Status(
        reasons=reasons,
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
    if not state.active_pid:
        return ""
    if stored is None:
        problem = "has nothing of it: REPLICATOR_CHECKPOINT_URL is not the reader's"
        return f"process {state.active_pid} reads replication slot {name}, but the checkpoint database {problem}"
    seconds = _ago(stored.updated_at)
    waiting = _lag_bytes(stored.end_lsn, state)
    if live or not waiting or seconds < STALL_SECONDS:  # a replicator that can be asked knows better
        return ""
    return f"the checkpoint was saved {seconds:.0f} s ago, while {waiting} bytes wait"


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


async def ask_history(url: str) -> dict[str, list[float | None]]:
    """Events a second of each sink over the last hour, the oldest first; nothing if it does not say."""
    try:
        hour = msgspec.json.decode(await _fetch(f"{url}/history"), type=_Hour)
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
        return {}
    return {name: lines.events_per_second for name, lines in hour.sinks.items()}


class _Lines(Struct):
    events_per_second: list[float | None]


class _Hour(Struct):
    """What is used of `/history`."""

    sinks: dict[str, _Lines]


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
        return structs.replace(known, lag_bytes=_lag_bytes(parse_lsn(known.end_lsn), state))
    at = stored.sinks.get(name) if stored else None
    found = of_sink(at, state) if at else SinkStatus()
    if pause:
        found = structs.replace(found, paused=pause.describe(name, at), paused_until=pause.end)
    if not stored or not at:
        return found
    if found.lag_bytes and stored.committed_at:
        # The most that it can be: what a sink lacks was committed after the newest that all of them have.
        return structs.replace(found, lag_seconds=_ago(stored.committed_at))
    return structs.replace(found, lag_seconds=0.0 if found.lag_bytes == 0 else None)


def _ago(at: float) -> float:
    return round(max(0.0, time.time() - at), 1)


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
    lines.append(f"slot         {status.slot.name}: {_slot_text(status.slot)}{_wal_text(status.wal)}")
    lines.append(f"checkpoint   {_checkpoint_text(status.checkpoint)}")
    for name, sink in status.sinks.items():
        trouble = f": {printable(sink.trouble)}" if sink.trouble and sink.trouble not in status.reasons else ""
        trouble += f", {pause_text(sink)}" if sink.paused else ""
        if sink.trouble_seconds:
            trouble = f", in trouble for {sink.trouble_seconds:.0f} s{trouble}"
        lines.append(f"sink         {name}: {_sink_text(sink)}{trouble}")
        if sink.end_lsn is not None:
            row = "" if sink.position == NO_ROW else f" (row {sink.position})"
            lines.append(f"  at         {sink.end_lsn}{row}")
    return "\n".join(
        [*lines, f"dead letters {_letters_text(status.dead_letters)}", *_untold_text(status.notifications)]
    )


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
    safe = f"safe for {size(slot.safe_wal_bytes)} more"
    if slot.safe_wal_bytes is None:
        safe = "no longer safe" if slot.wal_status == "lost" else "no limit (max_slot_wal_keep_size)"
    if slot.confirmed_lsn is None:
        return f"{reader}, nothing is confirmed yet"
    return (
        f"{reader}, WAL {slot.wal_status}, PostgreSQL {slot.server_version}\n"
        f"  confirmed  {slot.confirmed_lsn}, {size(slot.lag_bytes)} behind {slot.server_lsn}\n"
        f"  WAL kept   {size(slot.retained_bytes)}, {safe}"
    )


def _wal_text(wal: WalStatus) -> str:
    if wal.lost_in_seconds:
        rate = size(round(wal.growth_bytes_per_second or 0))
        return f"\n  lost in    {span(wal.lost_in_seconds)}, if it goes on growing by {rate} a second"
    return ""


def _checkpoint_text(checkpoint: CheckpointStatus) -> str:
    if checkpoint.end_lsn is None:
        return "unknown" if checkpoint.trouble else "none yet"
    return f"{checkpoint.end_lsn}, saved {checkpoint.saved_seconds_ago} s ago"


def _sink_text(sink: SinkStatus) -> str:
    if sink.end_lsn is None:
        return "no position yet"
    seconds = "an unknown time" if sink.lag_seconds is None else f"{sink.lag_seconds:.1f} s"
    waiting = "" if sink.waiting is None else f", {_count(sink.waiting, 'event')} waiting"
    return f"{size(sink.lag_bytes)} and {seconds} behind{waiting}"


def pause_text(sink: SinkStatus) -> str:
    """For people; of a sink that is paused."""
    return f"paused until {sink.paused_until or 'somebody resumes it'}"


def _letters_text(letters: DeadLetterStatus | None) -> str:
    if letters is None:
        return "unknown"
    counts = [f"{count} of {name}" for name, count in letters.sinks.items()]
    counts += [_count(letters.rows, "row")] if letters.rows else []
    return f"{', '.join(counts) or 'none'} (at most {letters.limit} of each sink)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
