"""Brings events to one sink: tries again, halves what is refused, and finds out whether an event is at fault.

`lane.py` decides what is written when, `retry.py` what an error means, `evidence.py` what a refusal proves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

from replicator.contracts.closing import release
from replicator.contracts.errors import (
    BatchRefused,
    BatchTooLarge,
    SinkBroken,
    SinkContradicts,
    SinkEmptied,
    SinkError,
    SinkMisconfigured,
    SinkRefusesAll,
    SinkUnavailable,
    frames,
)
from replicator.contracts.events import Event, Refusal, SinkPosition
from replicator.contracts.sink import Mode, Sink
from replicator.delivery.evidence import ENOUGH, SUSPICIOUS, Evidence
from replicator.delivery.queue import Room, Write, weigh
from replicator.delivery.retry import (
    COMPLAINT_SECONDS,
    HELD,
    OPERATOR_SECONDS,
    RETRYABLE,
    Stopped,
    Trouble,
    backoff,
    retry,
    wait,
)

PROBE_SECONDS = 1.0
"""Pause after the first probe that was refused; it doubles up to `OPERATOR_SECONDS`."""

log = logging.getLogger(__name__)

T = TypeVar("T")


class Suspect(NamedTuple):
    """An event that was refused alone."""

    event: Event
    refused: BatchRefused
    asked: int
    """The newest request then."""


class Writer:
    """Writes to one sink until it has everything, or an event is proved to be at fault."""

    def __init__(
        self,
        sink: Sink,
        room: Room,
        trouble: Trouble,
        stopping: asyncio.Event,
        *,
        mode: Mode,
        longest: float,
        scout: Callable[[], Sequence[Event]],
    ) -> None:
        """`scout` gives an event that waits, to be asked while nothing is taken."""
        self.room = room
        self._sink = sink
        self._trouble = trouble
        self._stopping = stopping
        self._mode = mode
        self._longest = longest
        self._scout = scout
        self._evidence = Evidence()
        self._asking = asyncio.Lock()
        self._holds = False
        self._unwell = False  # what `look` found
        self.lost: SinkEmptied | None = None
        """What the sink had and has no more, by its last `look`."""
        self.opening_since = 0.0
        """When it was asked to open and has not answered; 0.0: it has."""
        self._recovered = 0  # the newest request when it last took something again after refusing everything
        self._only_in_parts = 0
        self._said_at = -COMPLAINT_SECONDS
        self._told: Write | None = None
        self._broken: set[type[BaseException]] = set()

    async def open(self, start: SinkPosition | None) -> None:
        """Open the sink; one that never wrote anything is made first."""
        await self.retry(lambda: self._open(start))

    def look(self) -> None:
        """Tell what the sink has to say of itself, although nothing is written, and when it is over."""
        try:
            with self._known():
                self._sink.look()
        except (*RETRYABLE, SinkError) as exc:
            if not self._unwell:
                self._trouble.begin()
            self._unwell = True
            self.lost = exc if isinstance(exc, SinkEmptied) else None
            self._trouble.say(exc)
        else:
            self.lost = None
            if self._unwell:
                self._trouble.end()
            self._unwell = False

    async def close(self) -> None:
        """Release its connections. It may be opened again."""
        await release({f"sink {self._sink.name}": self._sink.close})

    async def retry(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until it succeeds. A command that runs once ends with what only an operator can mend."""
        retried = RETRYABLE if self._mode is Mode.BACKFILL else (*RETRYABLE, *HELD)
        renewed = partial(self._renewed, call)
        return await retry(renewed, self._trouble, self._longest, stopping=self._stopping, retried=retried)

    async def _renewed(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call it, and again at once if secrets were rotated meanwhile."""
        settings = self._sink.settings
        try:
            return await call()
        except SinkMisconfigured:
            await self._sink.refresh()
            if self._sink.settings is settings:
                raise
            return await call()

    async def write(self, write: Write) -> list[Refusal]:
        """Write all of it, in parts where it is refused; the events that become dead letters."""
        refusals: list[Refusal] = []
        suspects: list[Suspect] = []
        parts: list[Sequence[Event]] = [write.events]
        halved: BatchRefused | None = None
        while parts:
            part = parts.pop()
            try:
                refusals += await self._ask_in_turn(part, write)
            except BatchRefused as exc:
                if len(part) == 1:
                    suspects.append(Suspect(part[0], exc, self._evidence.asked))
                    continue
                if halved is None or isinstance(exc, BatchTooLarge):
                    halved = exc
                    self._say_halving(exc, part, write)
                parts += halves(part)
        if suspects:
            refusals += await self._examine(suspects, write)
        if halved is None:
            self._only_in_parts = 0
        else:
            self._end_halving(halved, write, len(suspects), len(refusals))
        return refusals

    def _say_halving(self, exc: BatchRefused, part: Sequence[Event], write: Write) -> None:
        if not isinstance(exc, BatchTooLarge) and time.monotonic() - self._said_at > COMPLAINT_SECONDS:
            self._said_at, self._told = time.monotonic(), write
            message = "sink %s refuses %d events at once (%s): the lane sends parts of them to find those at fault"
            fields = {"sink": self._sink.name, "code": exc.code}
            log.warning(message, self._sink.name, len(part), exc.detail, extra=fields)

    def _end_halving(self, exc: BatchRefused, write: Write, suspects: int, refused: int) -> None:
        self._only_in_parts = 0 if suspects else self._only_in_parts + 1
        if self._only_in_parts > 1 and not isinstance(exc, BatchTooLarge):  # it takes all of them, but never at once
            self.room.shrink(len(write.events), weigh(write.events))
        if self._told is write:
            message = "sink %s took %d of those %d events in parts; dead letters: %d"
            total = len(write.events)
            log.info(message, self._sink.name, total - refused, total, refused)
            self._told = None

    # -- one request ---------------------------------------------------------------------------------------------

    async def _open(self, start: SinkPosition | None) -> None:
        self.opening_since = time.monotonic()
        try:
            with self._known():
                if start is None and self._mode is Mode.LIVE:
                    for line in await self._sink.create():
                        log.info("%s", line)
                await self._sink.open(start, self._mode)
        except BatchRefused as exc:  # there are no events that could be at fault
            raise SinkUnavailable(sink=self._sink.name, detail=exc.detail) from exc
        finally:
            self.opening_since = 0.0

    async def _ask_in_turn(self, events: Sequence[Event], write: Write) -> Sequence[Refusal]:
        """The same, and wait while the sink takes nothing from anybody."""
        if self._holds or self._evidence.refused >= SUSPICIOUS:
            await self._until_taken(self._evidence.asked)
        try:
            return await self._ask(events, write)
        except BatchRefused:
            self._evidence.refused += 1
            raise

    async def _ask(self, events: Sequence[Event], write: Write | None = None) -> Sequence[Refusal]:
        """Give them to the sink until it answers. Raises BatchRefused."""
        return await self.retry(partial(self._ask_once, events, write))

    async def _ask_once(self, events: Sequence[Event], write: Write | None) -> Sequence[Refusal]:
        number = self._evidence.ask()
        began = time.monotonic()
        if write:
            write.asked_at = began
        try:
            with self._known():
                refusals = checked(events, await self._sink.write(events))
        except BatchTooLarge:
            if write and len(events) > 1:
                self.room.shrink(len(events), weigh(events), time.monotonic() - began)
            raise
        finally:
            if write:
                write.asked_at = 0.0
        unfit = {refusal.event.id for refusal in refusals}
        if taken := [event for event in events if event.id not in unfit] if unfit else events:
            self._evidence.take(number, taken)
            self.room.grow(len(events))
        return refusals

    @contextmanager
    def _known(self) -> Iterator[None]:
        """What the sink does not know becomes SinkBroken, with its traceback once in the log."""
        try:
            yield
        except (*RETRYABLE, *HELD, BatchRefused, MemoryError):
            raise
        except (Exception, asyncio.CancelledError) as exc:
            # Where nobody cancels us it is the sink's own, that got out.
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and (task is None or task.cancelling()):
                raise
            name = type(exc).__name__
            if type(exc) not in self._broken:  # without its message, which may have anything in it
                self._broken.add(type(exc))
                fields = {"sink": self._sink.name, "code": SinkBroken.code}
                log.error("sink %s raised %s\n%s", self._sink.name, name, frames(exc), extra=fields)
            raise SinkBroken(sink=self._sink.name, detail=name) from exc

    # -- whose fault it is ---------------------------------------------------------------------------------------

    async def _examine(self, suspects: list[Suspect], write: Write) -> list[Refusal]:
        """Ask for each alone until it is taken, or it is proved that the destination will not have it."""
        refusals: list[Refusal] = []
        since, repeats, doubted = suspects[-1].asked, 0, 0
        while suspects and (repeats < ENOUGH or self._evidence.doubtful):
            if not self._evidence.doubtful:
                await self._until_taken(since)
            again = [await self._ask_again(suspect, write, refusals) for suspect in suspects]
            suspects = [suspect for suspect in again if suspect]
            repeats += 1
            if suspects and self._evidence.doubtful:
                since, repeats = self._evidence.asked, 0
                if not doubted:
                    self._trouble.begin()
                self._trouble.say(SinkContradicts(sink=self._sink.name, detail=suspects[0].refused.detail))
                await self._pause(backoff(doubted, self._longest))
                doubted += 1
        if doubted:
            self._trouble.end()
        return refusals + [Refusal(event, refused.reason, refused.detail) for event, refused, _ in suspects]

    async def _pause(self, seconds: float) -> None:
        """Raises Stopped when a stop ends it."""
        await wait(self._stopping, seconds)
        if self._stopping.is_set():
            raise Stopped

    async def _ask_again(self, suspect: Suspect, write: Write, refusals: list[Refusal]) -> Suspect | None:
        """It with its newest refusal; None if it was taken."""
        try:
            refusals += await self._ask([suspect.event], write)
        except BatchRefused as exc:
            return Suspect(suspect.event, exc, self._evidence.asked)
        if suspect.asked > self._recovered:  # else it was refused with everything else
            self._evidence.contradict()
        return None

    async def _until_taken(self, since: int) -> None:
        """Return once a request was taken that began after that one. One asks for all, ever more rarely."""
        async with self._asking:
            failed = 0
            while not self._evidence.taken_since(since):
                await self._pause(0)
                detail = await self._probe(failed)
                if self._evidence.taken_since(since):
                    break
                if not failed:
                    self._holds = True
                    self._trouble.begin()
                self._trouble.failures += 1
                self._trouble.say(SinkRefusesAll(sink=self._sink.name, detail=detail))
                await self._pause(min(PROBE_SECONDS * 2 ** min(failed, 5), OPERATOR_SECONDS, self._longest))
                failed += 1
            if failed:
                self._holds, self._recovered = False, self._evidence.asked
                self._trouble.end()

    async def _probe(self, failed: int) -> str:
        """Ask for something that it took before, or that waits; why it was refused."""
        witness = self._evidence.witness(self._sink.max_events)
        try:
            await self._ask(witness if witness and failed % 2 == 0 else self._scout())
        except BatchRefused as exc:
            return exc.detail
        return "there is nothing else that it could take"


def checked(events: Sequence[Event], returned: Iterable[object]) -> list[Refusal]:
    """What a sink has returned. Raises TypeError: it is broken if that is anything else than refusals of these."""
    answers = [*returned]
    refusals = [answer for answer in answers if isinstance(answer, Refusal)]
    if len(refusals) < len(answers):
        raise TypeError
    if refusals and not {refusal.event.id for refusal in refusals} <= {event.id for event in events}:
        raise TypeError
    return refusals


def halves(events: Sequence[Event]) -> list[Sequence[Event]]:
    """The second half and the first, as a stack has them."""
    middle = len(events) // 2
    return [events[middle:], events[:middle]]


async def write_once(sink: Sink, events: Sequence[Event]) -> list[Refusal]:
    """Write without retries; what is refused alone is returned. For commands that leave it where it is."""
    try:
        return checked(events, await sink.write(events))
    except BatchRefused as exc:
        if len(events) == 1:
            return [Refusal(events[0], exc.reason, exc.detail)]
    second, first = halves(events)
    return await write_once(sink, first) + await write_once(sink, second)
