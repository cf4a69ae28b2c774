"""Looks at the slot from outside every few seconds, so that a pipeline that stands still can't look healthy.

`pipeline.py` knows what was confirmed, PostgreSQL alone knows how far the server is. `status/` has the form in
which both are shown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import msgspec
from msgspec import structs

from replicator import __version__
from replicator.contracts.errors import CheckpointError, SourceError, command
from replicator.contracts.events import ACTIONS, Checkpoint, Lsn, Position, counted, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.lane import Lane
from replicator.delivery.retry import Trouble
from replicator.delivery.tables.catch_up import READING
from replicator.operations.notices.notifier import Notifier
from replicator.operations.notices.ring import Notices, Reason
from replicator.operations.notices.rule import PATIENCE_SECONDS
from replicator.operations.status import form, parts, wal
from replicator.operations.status.collect import STALL_SECONDS
from replicator.operations.status.text import size
from replicator.pipeline import STARTING, Pipeline
from replicator.source import slot as slots
from replicator.source.connection import Dsn
from replicator.source.server import given_up, shuts_down
from replicator.source.slot import SlotState

LOOK_SECONDS = 5.0
"""One cheap query; a third of Prometheus's usual scrape interval."""
LOOK_AGAIN_SECONDS = 1.0
"""While there is nothing to see: a slot that was just made, a server that comes up."""
LOOK_OLD_SECONDS = 30.0
"""A look, the checkpoint database's part included, takes 20 s at most: an older one means that it hangs."""
TROUBLE_SECONDS = 10.0
"""A sink may take nothing this long before it is a reason; one that turns us away is one at once. The checkpoint
database may be silent as long: it gives up a lock after 5 s, and a slow disk takes less."""
UNSAVED_SECONDS = 20.0
"""More than the pauses between two checkpoints: a look at the tables, which comes before, may be slow."""
NOTICE_SECONDS = 1.0
"""What begins and ends is noticed within it. A look at what is in memory takes some 20 us."""
UNASKED = "The replicator has not looked at the slot yet"
BEGINNING = frozenset({STARTING, UNASKED})
"""Not ready, and nothing is wrong."""
NEARLY = 0.8
"""Of the bound on dead letters: what is left is time to act."""
BEAT_SECONDS = 60.0
"""A line of the log so often while something comes or waits: a day has 1,440 of them at most."""
RESTLESS = 3
"""Times that the stream may not break in STALL_SECONDS: a restart of PostgreSQL breaks it once or twice."""

log = logging.getLogger(__name__)


class Answers:
    """Passes a store's calls on, and knows how long the oldest has waited: one that hangs raises nothing."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = cast("CheckpointStore", self)
        """What to call instead."""
        self._store = store
        self._asked: dict[object, float] = {}

    def __getattr__(self, name: str) -> Callable[..., object]:
        call = getattr(self._store, name)

        def ask(*arguments: object, **named: object) -> object:
            key = object()
            self._asked[key] = time.monotonic()
            try:
                return call(*arguments, **named)
            finally:
                del self._asked[key]

        return ask

    def awaited(self) -> str:
        """That the database is silent; empty while it is not."""
        asked = [*self._asked.values()]
        seconds = time.monotonic() - min(asked) if asked else 0.0
        silent = f"the checkpoint database has not answered for {seconds:.0f} s; nothing is confirmed meanwhile"
        return silent if seconds >= TROUBLE_SECONDS else ""


class Watchdog:
    """What is known of the slot and of the pipeline, together."""

    def __init__(
        self, pipeline: Pipeline, dsn: Dsn, settings: CoreSettings, answers: Answers, decisive: Mapping[str, str]
    ) -> None:
        self.pipeline = pipeline
        self.slot: SlotState | None = None
        """As of the last look."""
        self.trouble = UNASKED
        """Why the slot can't be seen; empty when it can."""
        self.notices = Notices()
        """What was wrong lately."""
        self.notifier = Notifier(settings, self.notices, lambda: not (self.standby or self.found()))
        """Tells people who do not look."""
        self._cure = self._code = ""
        self._dsn = dsn
        self._name = settings.slot
        self._settings = dict(decisive)
        self._answers = answers
        self._unsaved_seconds = (
            settings.checkpoint_interval_seconds + settings.feedback_interval_seconds + UNSAVED_SECONDS
        )
        self._at: tuple[Lsn | None, Position | None] = (None, None)
        self._moved_at = self._looked_at = self._saved_at = time.monotonic()
        self._saved: Checkpoint | None = None
        self._said = dict[tuple[str, str], Trouble]()  # what the log has of reasons, by kind and subject
        self._holder = ""
        self._silent_since = dict[str, float]()  # of each sink that has let a write wait too long, until it takes one
        self._shutting_down = self._given_up = 0  # looks in a row that found it so
        self._forecast = wal.WalForecast()
        self._told_at, self._told = time.monotonic(), dict[str, int]()  # events written by each sink until then
        self._breaks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    async def run(self) -> None:
        """Look until cancelled; never raises for what it sees."""
        while True:
            try:
                self.slot = await slots.look(self._dsn, self._name, "replicator watchdog")
                self.trouble = "" if self.slot else f"replication slot {self._name} does not exist"
                self._cure, self._code, self._shutting_down = "", "", 0
                self._let_go_of_nothing()
            except SourceError as exc:
                self.trouble, self._cure, self._code = str(exc), exc.advice, exc.code
                await self._let_go()
            await self.pipeline.letters.look()
            self._holder = await self.foreign_holder() if self.standby else ""
            self._watch()
            self._beat()
            await asyncio.sleep(LOOK_AGAIN_SECONDS if self.trouble else LOOK_SECONDS)

    async def _let_go(self) -> None:
        """PostgreSQL never waits for the sinks when it shuts down; at the first look they may be about to finish."""
        if await self.pipeline.source.is_refused():
            self._shutting_down += 1
            if self._shutting_down > 1:
                log.warning("%s", shuts_down(), extra={"code": "R212"})
                self.pipeline.source.let_go()

    def _let_go_of_nothing(self) -> None:
        """A network may drop a connection and say nothing: PostgreSQL has given it up then, and we wait for ever."""
        source, slot = self.pipeline.source, self.slot
        unread = slot is not None and slot.active_pid is None
        # A healthy stream is not silent: it is asked for a keepalive. At the first look it may have just begun.
        silent = source.connected and source.silent_seconds >= TROUBLE_SECONDS
        self._given_up = self._given_up + 1 if unread and silent else 0
        if self._given_up > 1:
            log.warning("%s", given_up(), extra={"code": "R214"})
            source.let_go()

    @property
    def standby(self) -> str:
        """That it waits for its turn, and for whom; empty when it reads, or has read."""
        trouble = self.pipeline.trouble
        return trouble.message if trouble.standby and self.pipeline.checkpoint is None else ""

    @property
    def is_up(self) -> bool:
        """It reads, or waits for its turn."""
        return bool(self.standby) or self.pipeline.source.connected

    def state(self) -> str:
        """In a line."""
        return self.standby or next(iter(self.reasons()), "reading")

    async def foreign_holder(self) -> str:
        """That whoever reads the slot is none of ours, as far as that can be known; else empty."""
        try:
            return parts.foreign_reader(self._name, self.slot, await self.pipeline.stored())
        except CheckpointError as exc:
            return str(exc)

    def status(self) -> form.Status:
        """Everything, as of now."""
        pipeline, letters, slot = self.pipeline, self.pipeline.letters, self.slot_now()
        return form.Status(
            reasons=self.reasons(),
            standby=self.standby,
            replicator=form.ReplicatorStatus(
                version=__version__,
                carrier=pipeline.source.carrier,
                connected=pipeline.source.connected,
                confirmed_lsn=format_lsn(pipeline.source.confirmed),
                verified_lsn=format_lsn(pipeline.verification.lsn),
                verified_seconds_ago=round(pipeline.verification.seconds, 1),
                rows=pipeline.rows,
                refused_rows=pipeline.dead_letters,
                ignored_rows={ACTIONS[action]: count for action, count in pipeline.enricher.ignored.items()},
                held_bytes=pipeline.fan_out.held_bytes,
                reading_stopped=pipeline.fan_out.reading_stopped,
                settings=self._settings,
            ),
            slot=parts.of_slot(self._name, slot, self.trouble),
            wal=self._forecast.see(self.slot),
            checkpoint=parts.of_checkpoint(pipeline.checkpoint, slot),
            sinks={lane.name: self._sink(lane, slot) for lane in pipeline.fan_out.every},
            dead_letters=form.DeadLetterStatus(**structs.asdict(letters.stored), limit=letters.limit),
            notifications=self.notifier.status(),
        )

    def slot_now(self) -> SlotState | None:
        """The slot as of the last look. What was read since was written since: a sink that lacks it is behind."""
        slot = self.slot
        return slot and structs.replace(slot, server_lsn=max(slot.server_lsn, self.pipeline.source.received))

    def _sink(self, lane: Lane, slot: SlotState | None) -> form.SinkStatus:
        pause = self.pipeline.pauses.get(lane.name)
        trouble, seconds = self._trouble(lane)
        return structs.replace(
            parts.of_sink(lane.reached, slot, round(self.lag_seconds(lane), 3)),
            trouble=trouble,
            trouble_seconds=round(seconds, 1),
            paused=pause.describe(lane.name, lane.reached) if pause else "",
            paused_until=pause.end if pause else None,
            events=lane.stats.events,
            writes=lane.stats.writes,
            retries=lane.trouble.failures,
            dead_letters=lane.stats.dead_letters,
            waiting=lane.waiting,
            in_flight=lane.in_flight,
            write_events=lane.room.events,
        )

    def lag_seconds(self, lane: Lane) -> float:
        """How long ago the oldest event that the sink lacks was committed; 0.0 when it has all that was read.

        While reading has stopped, a sink that has all of that may lack more: then the age of the newest that it has. A
        paused one lacks whatever was read since.
        """
        if lane in self.pipeline.fan_out.paused:
            read_on = self.pipeline.source.received > lane.mark.end_lsn
            known = lane.mark.committed_at or (self.pipeline.checkpoint.committed_at if self.pipeline.checkpoint else 0)
            return max(0.0, time.time() - known) if read_on and known else 0.0
        if lane.waiting or not self.pipeline.fan_out.full:
            return lane.lag_seconds()
        return max(0.0, time.time() - lane.mark.committed_at)

    def _watch(self) -> None:
        self._looked_at = time.monotonic()
        self._forecast.see(self.slot)
        # Inside a long transaction the slot can't move, but the slowest sink does.
        fan_out, confirmed = self.pipeline.fan_out, self.slot.confirmed_lsn if self.slot else None
        moves = self.pipeline.source.received if fan_out.paused else confirmed
        at = (moves, fan_out.slowest.mark.position if fan_out.lanes else None)
        if at != self._at or not self._lag_bytes():
            self._moved_at = time.monotonic()
        self._at = at
        self._unsaved()
        self._breaks.append((time.monotonic(), self.pipeline.source.breaks.count))
        while time.monotonic() - self._breaks[0][0] > STALL_SECONDS:
            self._breaks.popleft()
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", msgspec.json.encode(self.status()).decode())

    def _beat(self) -> None:
        """Log once a minute how it goes; nothing while nothing comes and nothing waits."""
        seconds = time.monotonic() - self._told_at
        if seconds < BEAT_SECONDS:
            return
        self._told_at += seconds
        goes = {
            lane.name: {
                "events_per_second": round(self._rate(lane, seconds), 1),
                "lag_seconds": round(self.lag_seconds(lane), 1),
            }
            for lane in self.pipeline.fan_out.lanes
        }
        if any(value for of_sink in goes.values() for value in of_sink.values()):
            form = "{} {events_per_second} events/s, {lag_seconds} s behind".format
            said = "; ".join(form(name, **of_sink) for name, of_sink in goes.items())
            log.info("the last minute: %s", said, extra={"sinks": goes})

    def _rate(self, lane: Lane, seconds: float) -> float:
        before, self._told[lane.name] = self._told.get(lane.name, 0), lane.stats.events
        return (lane.stats.events - before) / seconds

    def _lag_bytes(self) -> int:
        """What waits; for a paused sink PostgreSQL keeps more, and that is meant to stand still."""
        if self.slot and self.pipeline.fan_out.paused:
            return max(0, self.slot.server_lsn - self.pipeline.source.received)
        return self.slot.lag_bytes if self.slot else 0

    def _stalled(self) -> str:
        """That and why the slot stands still while there is something to read; else empty."""
        seconds = time.monotonic() - self._moved_at
        if self.trouble or seconds < STALL_SECONDS or not self._lag_bytes():  # what was seen last may be long over
            return ""
        return f"the slot has not moved for {seconds:.0f} s while {size(self._lag_bytes())} of WAL wait: {self._why()}"

    def _why(self) -> str:
        source, fan_out, stored = self.pipeline.source, self.pipeline.fan_out, self.pipeline.checkpoint
        if reading := self.pipeline.trouble.message or source.breaks.stuck:
            return reading
        if not fan_out.lanes:
            return "no sink is open"
        if self.pipeline.verification.trouble:
            return self.pipeline.verification.trouble.message
        if stored and stored.end_lsn < min(source.received, fan_out.slowest.mark.end_lsn):  # neither sinks nor source
            return "the checkpoint is not saved; the log says why"
        if waiting := [lane for lane in fan_out.lanes if lane.waiting]:
            lane = min(waiting, key=lambda lane: (lane.mark.end_lsn, lane.mark.position))
            waits = f"sink {lane.name} is the slowest, with {counted(lane.waiting, 'event')} waiting"
            return lane.trouble.message or waits
        # The sinks are caught up. Connecting again would not help: PostgreSQL would start decoding over.
        pid, away = (self.slot.active_pid, self.slot.away) if self.slot else (None, None)
        does = f"waits for {away}, which synchronized_standby_slots names and no standby reads"
        reader = f"process {pid} {does if away else 'decodes a large transaction or hangs'}"
        reader = reader if pid else "no process of it reads the slot"
        return f"PostgreSQL has sent nothing for {source.silent_seconds:.0f} s, {reader}"

    def _unsaved(self) -> str:
        """That and why sinks have moved on and no checkpoint was saved since; else empty."""
        pipeline, now = self.pipeline, time.monotonic()
        stored = pipeline.checkpoint
        reached = {lane.name: lane.reached for lane in pipeline.fan_out.every}
        if stored is None or stored is not self._saved or stored.sinks == reached:
            self._saved, self._saved_at = stored, now
        if pipeline.saving.seconds() >= TROUBLE_SECONDS:
            return pipeline.saving.message
        seconds = now - self._saved_at
        if seconds < self._unsaved_seconds:
            return ""
        return pipeline.verification.trouble.message or f"no checkpoint has been saved for {seconds:.0f} s"

    def _stale(self) -> str:
        seconds = time.monotonic() - self._looked_at
        return f"slot and checkpoint database were last seen {seconds:.0f} s ago" if seconds >= LOOK_OLD_SECONDS else ""

    def _restless(self) -> str:
        """That the stream breaks as soon as it runs: between two breaks it looks healthy."""
        breaks = self.pipeline.source.breaks.count - self._breaks[0][1]
        return f"the stream broke {breaks} times in a minute; the log says why" if breaks >= RESTLESS else ""

    def _stuck(self) -> str:
        """That each stream ends where the one before did, while there is something to read; else empty."""
        return self.pipeline.source.breaks.stuck if self._lag_bytes() else ""

    def pauses(self) -> list[str]:
        """Of sinks that get nothing because somebody wants it so: nothing is wrong, and nobody should forget it."""
        known = self.pipeline.pauses
        lanes = [lane for lane in self.pipeline.fan_out.paused if lane.name in known]
        return [known[lane.name].describe(lane.name, lane.reached) for lane in lanes]

    def reasons(self) -> list[str]:
        """What is wrong; empty when nothing is. A standby for which all is well has none."""
        return [reason.text for reason in self.found()]

    def found(self) -> list[Reason]:
        """The same, with what each is about. The stream and the look meet the same trouble: it is told once.

        So is a slot that stands still for a reason that is told.
        """
        found: dict[str, Reason] = {}
        for reason in (*self._of_stream(), *self._of_sinks(), *self._of_checkpoint(), *self._of_slot()):
            if reason.text and not any(reason.text.endswith(told) for told in found):
                found[reason.text] = reason if reason.text.endswith(reason.cure) else reason._replace(cure="")
        return [*found.values()]

    def _of_stream(self) -> Iterator[Reason]:
        name, pipeline = self._name, self.pipeline
        if self.standby:
            yield Reason("standby", name, self._holder)
        else:
            reading = pipeline.trouble
            text = reading.message or self._stuck() or self._restless()
            yield Reason("stream", name, text, reading.cure, reading.code)
        tables, catch_up = pipeline.verification.trouble, pipeline.verification.catch_up
        yield Reason("tables", name, tables.message, tables.cure, tables.code)
        yield Reason("catch-up", name, catch_up.reason, catch_up.trouble.cure, catch_up.trouble.code)
        yield Reason("slot", name, self.trouble, self._cure, self._code)

    def _of_sinks(self) -> Iterator[Reason]:
        for lane in self.pipeline.fan_out.every:
            text, seconds = self._trouble(lane)
            shown = text if lane.trouble.needs_operator or seconds >= TROUBLE_SECONDS else ""
            yield Reason("sink", lane.name, shown, lane.trouble.cure, lane.trouble.code)
        seen = self._forecast.see(self.slot)
        for name, pause in self.pipeline.pauses.items():
            yield Reason.cured("pause", name, *wal.loses_slot(name, pause, seen))

    def _trouble(self, lane: Lane) -> tuple[str, float]:
        """Why the sink takes nothing, and for how long; a write without an answer counts once it has waited long.

        A timeout that ends such a wait is the same trouble: it must not look well for as long again.
        """
        silent, now = lane.unanswered_seconds(), time.monotonic()
        if silent >= TROUBLE_SECONDS:
            self._silent_since.setdefault(lane.name, now - silent)
        elif not lane.trouble:
            self._silent_since.pop(lane.name, None)
        since = self._silent_since.get(lane.name)
        seconds = lane.trouble.seconds() if since is None else now - since
        waits = f"sink {lane.name} has not answered for {silent:.0f} s" if silent >= TROUBLE_SECONDS else ""
        return lane.trouble.message or waits, seconds

    def _of_checkpoint(self) -> Iterator[Reason]:
        letters = self.pipeline.letters.trouble
        saving = self.pipeline.saving
        yield Reason("checkpoint", self._name, self._unsaved(), saving.cure, saving.code)
        yield Reason("database", self._name, self._answers.awaited())
        shown = letters.message if letters.seconds() >= TROUBLE_SECONDS else ""
        yield Reason("database", self._name, shown, letters.cure, letters.code)

    def _of_slot(self) -> Iterator[Reason]:
        yield Reason("stall", self._name, self._stalled())
        yield Reason("look", self._name, self._stale())
        yield Reason.cured("wal", self._name, *wal.danger(self.slot))
        yield Reason("commits", self._name, parts.in_the_way(self.slot))
        yield Reason.cured("clocks", self._name, *parts.clocks(self.slot))

    def warnings(self) -> Iterator[Reason]:
        """What will be wrong if nobody does anything. It is no reason not to be ready."""
        stored, limit = self.pipeline.letters.stored, self.pipeline.letters.limit
        for name, count in (*stored.sinks.items(), ("", stored.rows)):
            if count >= NEARLY * limit:
                owner, which = (f"sink {name}", f"--sink {name}") if name else ("the stream", "--stage row")
                problem = f"{count} dead letters: at {limit} {owner} waits until some are replayed or dropped"
                cure = f"{command(f'dead-letters list {which}')} says why they were refused."
                yield Reason.cured("dead letters", name or self._name, problem, cure)
        yield from self.notifier.warnings()
        running_out = Reason.cured("wal runs out", self._name, *wal.running_out(self._forecast.see(self.slot)))
        if running_out.text:
            yield running_out

    async def notice(self) -> None:
        """Keep the notices as things are, until cancelled."""
        while True:
            self.take_notice()
            await asyncio.sleep(NOTICE_SECONDS)

    def take_notice(self) -> None:
        """Of what is wrong now."""
        found, warnings = [reason for reason in self.found() if reason.text not in BEGINNING], [*self.warnings()]
        self.notices.see([*found, *warnings])
        self._say(dict.fromkeys(found, logging.ERROR) | dict.fromkeys(warnings, logging.WARNING))

    def _say(self, reasons: Mapping[Reason, int]) -> None:
        """Log at its level each that no other part has logged: whoever has only the log learns of all of them."""
        told = {trouble.message for trouble in self._logged()} | {READING}
        unsaid = {reason.key: reason for reason in reasons if reason.text not in told}
        lasting = self.notices.lasting
        for key in self._said.keys() - unsaid.keys():
            self._said.pop(key).end(well=key not in lasting)
        for key, reason in unsaid.items():
            if time.time() - lasting[key].began_at >= PATIENCE_SECONDS.get(reason.kind, 0.0):
                trouble = Trouble(over=_over(reason), code=reason.code, level=reasons[reason])
                self._said.setdefault(key, trouble).say(reason.text)

    def _logged(self) -> Iterator[Trouble]:
        """All that log by themselves."""
        pipeline = self.pipeline
        yield from (pipeline.trouble, pipeline.saving, pipeline.letters.trouble)
        yield from (pipeline.verification.trouble, pipeline.verification.catch_up.trouble)
        yield from (lane.trouble for lane in pipeline.fan_out.every)
        yield from self.notifier.troubles


def _over(reason: Reason) -> Callable[[float], str]:
    return lambda seconds: f"over after {seconds:.0f} s: {reason.problem}"
