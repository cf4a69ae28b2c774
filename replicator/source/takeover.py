"""Where to begin: the slot and the checkpoint, taken together. One answer for `run`, `init` and `check`.

`slot.py` decides whether the two are continuous, `stream.py` connects, `pipeline.py` starts the stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
from msgspec import structs

from replicator.contracts.errors import (
    PROGRAM,
    CheckpointAbsent,
    CheckpointBackward,
    CheckpointMissing,
    ReplicatorError,
    SinkBroken,
    SinkEmptied,
    SinkLeftOut,
    SlotInUse,
    SlotInvalid,
    SlotMissing,
    SlotWaits,
    SourceUnavailable,
    StreamGap,
    TablesUnfit,
)
from replicator.contracts.events import Checkpoint, Pause, Position, SinkPosition, format_lsn
from replicator.contracts.sink import Rebuildable, Sink
from replicator.contracts.stores import CheckpointStore, TaskProgress
from replicator.source import slot as slots
from replicator.source.server import Identity, lost_by_restore
from replicator.source.stream import Source

log = logging.getLogger(__name__)

MARGIN_SECONDS = 3600
"""How much earlier than the gap a backfill begins: longer than nearly every transaction, and repeating costs little."""
EVERYTHING = "0001-01-01"
"""Where a backfill of all times begins."""
NOT_DATED = "it is unknown since when it lacks events: this sends all of them"
LOST = (
    "the sinks may have events that PostgreSQL lost in the failover or restore, and it may give their ids again. When"
    " the replicator has caught up, this makes ClickHouse and Redis equal to PostgreSQL"
)
COPIED = "if this cluster has all that the former one had (pg_upgrade), nothing is lost. Otherwise "
EARLIER = (
    "(--start of reconcile has to be before all that was lost: if PostgreSQL was restored to an earlier time, give that"
    " time. In its range, --delete-extra deletes from ClickHouse whatever PostgreSQL does not have, also what was"
    " dropped there on purpose.)"
)
PAUSED = "paused: "
"""What a pause is found by, with the sink's name, among the tasks of the checkpoint database."""
REMEMBERED = "remembered: "
"""The same of what a sink knows its data by."""
BROKEN = "sink %s can't say what it knows its data by (%s): after a restart it may not notice that they are gone"
REPEATS = "it gets again what it has of that time, under the same id"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A slot and its checkpoint, as they are."""

    slot: str
    identity: Identity
    state: slots.SlotState | None
    """None: there is no such slot."""
    stored: Checkpoint | None
    """What is on disk, with every sink that ever wrote; None: nothing."""
    checkpoint: Checkpoint | None
    """The same with the configured sinks only: one that is left out holds nothing up."""
    was_read: bool
    """There is no checkpoint, but events were read from the slot: perhaps for a checkpoint in another database, which
    knows what the sinks lack. Here the confirmed position does not prove that these sinks have what is before it."""

    def verify(self) -> None:
        """Raise SourceError or CheckpointMissing unless everything after the checkpoint comes through the slot."""
        if self.was_read and self.state is not None:
            raise CheckpointMissing(slot=self.slot, confirmed=format_lsn(self.state.confirmed_lsn or 0))
        slots.verify(self.slot, self.state, self.identity, self.checkpoint)
        if self.stored and (names := self.left_out()):
            at, others = self.stored.sinks[names[0]].end_lsn, self.stored.end_lsn
            raise SinkLeftOut(sink=names[0], at=format_lsn(at), others=format_lsn(others))

    def left_out(self) -> list[str]:
        """Configured sinks that lack what went by while they were not."""
        return slots.left_out(self.stored, self.checkpoint.sinks) if self.stored and self.checkpoint else []

    def gap(self) -> ReplicatorError | None:
        """The gap that can be accepted. Raises SlotInUse: a running replicator's checkpoint is not replaced."""
        try:
            self.verify()
        # A lost slot is not among them: nothing can be read from it, so it has to be dropped first.
        except (SlotMissing, StreamGap, CheckpointMissing, SinkLeftOut) as exc:
            if self.state is not None and self.state.active_pid is not None:
                raise SlotInUse(slot=self.slot, pid=self.state.active_pid) from exc
            return exc
        return None


class Takeover(NamedTuple):
    """Where to begin, and what was done for it."""

    checkpoint: Checkpoint
    """On disk; the slot has everything after it."""
    found: Found
    """What was there before."""
    resumed: bool = False
    """It was there before."""
    created_slot: bool = False
    gap: Sequence[str] = ()
    """Lines for the operator who accepted a gap: what may be missing, and the command that brings it."""


def _warn(waits: SlotWaits) -> None:
    log.warning("%s", waits, extra={"code": waits.code})


class Beginning:
    """Takes one slot for the configured sinks."""

    def __init__(
        self,
        source: Source,
        store: CheckpointStore,
        slot: str,
        sinks: Sequence[Sink],
        waits: Callable[[SlotWaits], None] = _warn,
    ) -> None:
        """`waits` is told what a new slot waits for."""
        self.saving = asyncio.Lock()
        """Held while a checkpoint is saved, so that `load` sees it either before or after."""
        self._source = source
        self._store = store
        self._slot = slot
        self._sinks = sinks
        self._waits = waits
        self._memories = dict[str, str]()  # by sink, as they are kept
        self._broken: set[str] = set()  # names of sinks that failed to say what they remember

    async def load(self) -> Checkpoint | None:
        """The stored checkpoint with the configured sinks only."""
        return self._configured(await self._load())

    async def look(self) -> Found:
        """Connect and look; nothing is changed. Raises SourceError, CheckpointError."""
        identity, state = await self._source.connect()
        read = state is not None and await self._source.was_read()
        stored = await self._load()  # after the slot: another replicator saves before it reads, and before it confirms
        if stored and stored.timeline != identity.timeline:
            identity = structs.replace(identity, branches=await self._source.branches(identity.timeline))
        return Found(
            slot=self._slot,
            identity=identity,
            state=state,
            stored=stored,
            checkpoint=self._configured(stored),
            was_read=read and stored is None,
        )

    async def take(self, *, accept_gap: bool = False, fit: Callable[[], Awaitable[None]] | None = None) -> Takeover:
        """A slot and a checkpoint that fit together; what is missing is made, the slot if `fit` does not raise.

        Raises SourceError or CheckpointMissing when they do not fit, unless the operator accepts that.
        """
        found = await self.look()
        gap = found.gap() if accept_gap else None
        if isinstance(gap, SinkLeftOut):
            return await self._rejoin(found)
        if gap:  # as on the first start; what makes a slot unusable with no checkpoint is still an error
            found = structs.replace(found, checkpoint=None, was_read=False)
        found.verify()
        if found.stored is not None and found.checkpoint is not None:
            await self._date_absences(found.stored)
            return Takeover(self._on_timeline(found.checkpoint, found.identity), found, resumed=True)
        if found.state is None and not gap and fit:
            try:
                await fit()
            except TablesUnfit as exc:
                raise exc.before_the_slot() from None
        state = found.state or await self._source.create_slot(self._waits)
        if state is None or state.confirmed_lsn is None:
            raise SlotInvalid(slot=self._slot, problem="it vanished while it was being taken")
        first = Checkpoint(  # can repeat events, loses none
            slot=self._slot,
            system_identifier=found.identity.system_identifier,
            timeline=found.identity.timeline,
            end_lsn=state.confirmed_lsn,
            sinks={},
            # What was committed before a new slot was made is not this slot's to bring.
            committed_at=0.0 if found.state else state.server_time,
        )
        try:
            await asyncio.to_thread(self._store.replace if gap else self._store.save, first)
        except CheckpointBackward as exc:  # two that start together on a new slot: the other one is on its way
            raise SourceUnavailable(
                problem="another replicator took the slot first", detail=str(exc.stored), cure="`run` looks again"
            ) from exc
        lines = list(describe(found, first, state, self._sinks)) if gap else []
        return Takeover(first, found, created_slot=found.state is None, gap=lines)

    async def _rejoin(self, found: Found) -> Takeover:
        """Sinks that were left out begin where the slot is; the others lack nothing, and nothing changes for them."""
        assert found.checkpoint  # noqa: S101  it says that they were left out
        assert found.state  # noqa: S101  likewise
        end_lsn, sinks, since = found.checkpoint.end_lsn, dict(found.checkpoint.sinks), {}
        for name in found.left_out():
            sinks[name] = structs.replace(sinks[name], end_lsn=end_lsn)
            at = await asyncio.to_thread(self._store.load_progress, self._slot, _absence(name))
            since[name] = _known(float(at or 0), found.state.server_time)
        checkpoint = structs.replace(found.checkpoint, sinks=sinks)
        await asyncio.to_thread(self._store.save, checkpoint)
        back = [sink for sink in self._sinks if sink.name in since]
        lines = [
            f"sink {sink.name} begins after {format_lsn(end_lsn)}; what was committed since"
            f" {slots.when(since[sink.name])} may be missing there, the other sinks lack nothing"
            for sink in back
        ]
        lines += ["To bring it:", *_backfills(since, found.state.server_time, back)]
        return Takeover(checkpoint, found, resumed=True, gap=lines)

    async def _date_absences(self, stored: Checkpoint) -> None:
        """Keep since when a sink is left out, before the others go on: the checkpoint's own time goes with them."""
        for name in stored.sinks.keys() - {sink.name for sink in self._sinks}:
            if stored.dated and stored.sinks[name].end_lsn >= stored.end_lsn:
                save = self._store.save_progress
                await asyncio.to_thread(save, self._slot, _absence(name), str(stored.dated))

    def starts(self, checkpoint: Checkpoint) -> dict[str, SinkPosition]:
        """Where each configured sink continues; one without a position begins at the checkpoint."""
        end_lsn = checkpoint.end_lsn  # one that was left out, and lacks nothing, is as far as the others
        starts = {name: structs.replace(at, end_lsn=max(at.end_lsn, end_lsn)) for name, at in checkpoint.sinks.items()}
        for name in (sink.name for sink in self._sinks if sink.name not in starts):
            starts[name] = SinkPosition(position=Position(0, 0), end_lsn=checkpoint.end_lsn)
            at = format_lsn(checkpoint.end_lsn)
            log.info("sink %s has no position: it begins after %s", name, at, extra={"sink": name, "lsn": at})
        return starts

    def _on_timeline(self, checkpoint: Checkpoint, identity: Identity) -> Checkpoint:
        """The checkpoint as a position in the server's own timeline, which shares its history."""
        if branch := identity.branches.get(checkpoint.timeline):
            log.info(
                "timeline %s of PostgreSQL continues %s from %s, and has everything up to the checkpoint's %s",
                *(identity.timeline, checkpoint.timeline, format_lsn(branch), format_lsn(checkpoint.end_lsn)),
            )
        return structs.replace(checkpoint, timeline=identity.timeline)

    async def pauses(self) -> dict[str, Pause]:
        """The configured sinks that are paused."""
        names = [sink.name for sink in self._sinks]
        return await asyncio.to_thread(pauses, self._store, self._slot, names, time.time())

    async def recall(self) -> None:
        """Give the sinks back what they remembered in an earlier run."""
        self._memories = await asyncio.to_thread(recall, self._store, self._slot, self._sinks)

    async def remember(self) -> None:
        """Keep what the sinks remember, where it has changed. Raises CheckpointError."""
        for sink in self._sinks:
            if sink.name in self._broken:
                continue
            try:
                memory = sink.remember()
            except Exception as exc:  # noqa: BLE001  a sink of another package may raise anything
                self._broken.add(sink.name)
                _tell_broken(sink, exc)
                continue
            if memory != self._memories.get(sink.name, ""):
                await asyncio.to_thread(keep_memory, self._store, self._slot, sink.name, memory)
                self._memories[sink.name] = memory

    async def accept_losses(self) -> list[str]:
        """Forget what sinks are known to have lost, but for those that say it themselves until they are made again."""
        await self.recall()
        accepted = []
        for sink in self._sinks:
            try:
                sink.look()
            except SinkEmptied:
                if not isinstance(sink, Rebuildable):
                    await asyncio.to_thread(keep_memory, self._store, self._slot, sink.name, "")
                    accepted.append(sink.name)
        return accepted

    async def _load(self) -> Checkpoint | None:
        async with self.saving:
            with suppress(CheckpointAbsent):  # nothing is stored
                return await asyncio.to_thread(self._store.load, self._slot)
            return None

    def _configured(self, stored: Checkpoint | None) -> Checkpoint | None:
        configured = {sink.name for sink in self._sinks}
        sinks = {name: at for name, at in stored.sinks.items() if name in configured} if stored else {}
        return stored and structs.replace(stored, sinks=sinks)


def pauses(store: TaskProgress, slot: str, sinks: Iterable[str], now: float) -> dict[str, Pause]:
    """Those of the sinks that are paused. One whose time is over is none any more. Raises CheckpointError."""
    kept = {sink: store.load_progress(slot, f"{PAUSED}{sink}") for sink in sinks}
    found = {sink: msgspec.json.decode(text, type=Pause) for sink, text in kept.items() if text}
    return {sink: pause for sink, pause in found.items() if not pause.is_over(now)}


def keep_pause(store: TaskProgress, slot: str, sink: str, pause: Pause | None) -> None:
    """Durably; None: it is over. Raises CheckpointError."""
    store.save_progress(slot, f"{PAUSED}{sink}", msgspec.json.encode(pause).decode() if pause else None)


def recall(store: TaskProgress, slot: str, sinks: Sequence[Sink]) -> dict[str, str]:
    """Give the sinks what they remembered in an earlier run; in this one they know better. Returns what is kept."""
    kept = {sink.name: store.load_progress(slot, f"{REMEMBERED}{sink.name}") or "" for sink in sinks}
    for sink in sinks:
        try:
            if kept[sink.name] and not sink.remember():
                sink.recall(kept[sink.name])
        except Exception as exc:  # noqa: BLE001  a sink of another package may raise anything
            _tell_broken(sink, exc)
    return kept


def _tell_broken(sink: Sink, exc: Exception) -> None:
    """Without the error's message, which may have anything in it."""
    fields = {"sink": sink.name, "code": SinkBroken.code}
    log.error(BROKEN, sink.name, type(exc).__name__, extra=fields)


def keep_memory(store: TaskProgress, slot: str, sink: str, memory: str) -> None:
    """Durably; empty: it knows nothing. Raises CheckpointError."""
    store.save_progress(slot, f"{REMEMBERED}{sink}", memory or None)


def describe(found: Found, first: Checkpoint, state: slots.SlotState, sinks: Sequence[Sink]) -> Iterator[str]:
    """Lines for the operator: the gap from what was found to `first`, made when the slot was as in `state`."""
    stored = found.stored
    if stored is None:
        yield f"everything after {_place(first)} comes through the slot; the sinks may get some of it again"
        return
    until = state.server_time
    since = _known(stored.dated, until)
    dated = set(stored.sinks).difference(slots.behind(stored)) if since else set()
    accepted = f"gap accepted: from {_place(stored)} to {_place(first)}"
    if lost_by_restore(found.identity, stored, state.server_lsn):
        same = found.identity.system_identifier == stored.system_identifier
        yield f"{accepted}; {'' if same else COPIED}{LOST}:"
        begin = min(since, state.recovered_at or since)
        for option in dict.fromkeys(sink.context.stream_option for sink in sinks):
            yield f"  {PROGRAM} reconcile {_range(begin, until)} --repair --delete-extra{option}"
            yield f"  {PROGRAM} rebuild-redis --from-empty{option}"
        yield EARLIER
        branch = found.identity.branches.get(stored.timeline, 0) if same else 0
        if first.end_lsn <= branch and dated.issuperset(sink.name for sink in sinks):
            yield "Everything else comes through the slot: nothing else is needed."
            return
    missing = f"what was committed from {slots.when(since)} to {slots.when(until)} may be missing"
    yield f"{accepted}; {missing}. To bring it:"
    yield from _backfills(dict.fromkeys(dated, since), until, sinks)


def _backfills(since: Mapping[str, float], until: float, sinks: Sequence[Sink]) -> Iterator[str]:
    """The commands that bring what sinks lack, each from its own time on."""
    groups: dict[tuple[bool, bool, float, str], list[str]] = {}
    for sink in sinks:
        begin = since.get(sink.name, 0.0)
        groups.setdefault((not begin, sink.max_repeats is not None, begin, sink.context.stream_option), []).append(
            sink.name
        )
    for (unknown, repeats, begin, option), names in sorted(groups.items()):
        notes = [NOT_DATED] * unknown + [REPEATS] * repeats
        command = f"  {PROGRAM} backfill {_range(begin, until)} --sinks {','.join(names)}{option}"
        yield "   # ".join([command, *([", ".join(notes)] if notes else [])])
    yield (
        f"(It begins {MARGIN_SECONDS // 3600} h earlier, because an event's time is older than its commit. If"
        " transactions last longer, or applications set that time themselves, choose an earlier --start.)"
    )


def _absence(sink: str) -> str:
    """What the time since when a sink is left out is found by, among the tasks of the checkpoint database."""
    return f"left out: {sink}"


def _known(since: float, until: float) -> float:
    """0.0, unknown, where PostgreSQL's clock was ahead then, or has been set back: a range ends after it begins."""
    return since if since - MARGIN_SECONDS < until else 0.0


def _range(since: float, until: float) -> str:
    start = slots.when(since - MARGIN_SECONDS) if since else EVERYTHING
    return f"--start {start} --end {slots.when(until + 2)}"


def _place(checkpoint: Checkpoint) -> str:
    return f"{format_lsn(checkpoint.end_lsn)} (system {checkpoint.system_identifier}, timeline {checkpoint.timeline})"
