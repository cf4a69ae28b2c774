"""A sink that keeps the contract, and one for each way to break it. The suite runs on them in a pytest of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs
from pydantic import SecretStr

from enrichment import EVENT
from replicator.contracts.errors import BatchRefused, SinkUnavailable
from replicator.contracts.events import Event, Finding, Id, Position, Refusal, RowChange, SinkPosition, unfolded
from replicator.contracts.settings import Settings, load
from replicator.contracts.sink import Mode, Sink, SinkContext
from sinks.testing import Destination, conformance, decode
from sinks.testing.changes import ChangesConformance

conformance.PATIENCE_SECONDS = 2.0


class Server:
    """What they write to."""

    def __init__(self) -> None:
        self.rows: list[tuple[Id, bytes]] = []
        self.versions: dict[Id, int] = {}
        """Of rows that change, deleted ones too."""
        self.is_up = True
        self.refused: Event | None = None
        self.speaks = threading.Event()
        self.speaks.set()

    def put(self, event: Event) -> None:
        """One event, unless it is there."""
        if event.id not in dict(self.rows):
            self.rows.append((event.id, event.json))

    def change(self, event: Event) -> None:
        """One row is there as it is now, or is gone; unless a later change of it is known."""
        if self.versions.get(event.id, -1) < event.version:
            self.versions[event.id] = event.version
            self.rows = [row for row in self.rows if row[0] != event.id]
            self.rows += [] if event.deleted else [(event.id, event.json)]


server = Server()


class FaultySettings(Settings):
    """A secret."""

    faulty_token: SecretStr = SecretStr("hunter2")


class FaultySink(Sink):
    """This one keeps the contract."""

    name, max_events, concurrency, settings_class = "faulty", 20, 2, FaultySettings
    takes_any_stream = True
    settings: FaultySettings
    file: int | None = None

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:  # noqa: ARG002
        self.reach()
        self.file = self.file or os.open("/dev/null", os.O_RDONLY)

    async def check(self) -> list[Finding]:
        return [Finding(server.is_up, "the server", "" if server.is_up else "Start it")]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        for event in unfolded(events, self.stream.identity.name):
            if event.ts_us is not None or event.deleted:
                await self.put(event)
        return [Refusal(event, "it never ends") for event in events if event.ts_us is None and not event.deleted]

    async def put(self, event: Event) -> None:
        """As the server answers it."""
        await asyncio.sleep(0)
        self.reach()
        while not server.speaks.is_set():  # noqa: ASYNC110  another thread may set it
            await asyncio.sleep(0.01)
        if server.refused and server.refused.id == event.id:
            raise BatchRefused(sink=self.name, detail="error 400", reason=f"bad event {event.json!r}")
        self.keep(event)

    def keep(self, event: Event) -> None:
        """At the server."""
        if self.stream.follows:
            server.change(event)
        else:
            server.put(event)

    def reach(self) -> None:
        """Raise what an outage means."""
        if not server.is_up:
            raise SinkUnavailable(sink=self.name, detail="no answer")

    async def close(self) -> None:
        if self.file:
            os.close(self.file)
        self.file = None


class Swallows(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        try:
            return await super().write(events)
        except SinkUnavailable:
            return []


class RaisesTheDriversError(FaultySink):
    def reach(self) -> None:
        if not server.is_up:
            raise ConnectionError("no answer")


class OpensRaw(FaultySink):
    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
        try:
            await super().open(start, mode)
        except SinkUnavailable:
            raise ConnectionError("no answer") from None


class ReturnsTooEarly(FaultySink):
    later: tuple[Event, ...] = ()

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        self.later += tuple(events)
        return []

    async def close(self) -> None:
        await super().write(self.later)
        self.later = ()
        await super().close()


class WritesInTheBackground(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        self.task = asyncio.ensure_future(super().write(events))
        return []

    async def close(self) -> None:
        if self.file:
            await self.task
        await super().close()


class Truncates(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        return await super().write(events[:10])


class Reorders(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        return [*reversed(await super().write([*reversed(events)]))]


class Alters(FaultySink):
    async def put(self, event: Event) -> None:
        await super().put(Event(event.commit_lsn, event.ordinal, event.id, event.key, event.ts_us, event.json.lower()))


class ReturnsNothing(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        refusals = await super().write(events)
        return refusals or None  # type: ignore[return-value]  # its author has no type checker


class RefusesTheWrongOne(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        refusals = await super().write(events)
        return [Refusal(events[0], refusal.reason) for refusal in refusals]


class RefusesWhatFits(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        refused = [event for event in events if event.id < 0]
        others = await super().write([event for event in events if event.id >= 0])
        return [*(Refusal(event, "no") for event in refused), *others]


class RefusesForgetfully(FaultySink):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.refused = set[int]()

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        new = [refusal for refusal in await super().write(events) if refusal.event.id not in self.refused]
        self.refused |= {refusal.event.id for refusal in new}
        return new


class DropsWhatIsRefused(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        try:
            return await super().write(events)
        except BatchRefused as exc:
            return [Refusal(event, exc.reason) for event in events]


class QuotesRows(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        try:
            return await super().write(events)
        except BatchRefused:
            raise BatchRefused(sink=self.name, detail=f"bad: {events[0].json.decode()}") from None


class SaysItsKind(FaultySink):
    """Where a slot has several streams, nobody knows which of its sinks that is."""

    def reach(self) -> None:
        if not server.is_up:
            raise SinkUnavailable(sink="faulty", detail="no answer")


class TellsItsSecret(FaultySink):
    def reach(self) -> None:
        if not server.is_up:
            raise SinkUnavailable(
                sink=self.name, detail=f"no answer to {self.settings.faulty_token.get_secret_value()}"
            )


class ForgetsOnRetry(FaultySink):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen = set[int]()

    async def put(self, event: Event) -> None:
        if event.id not in self.seen:
            self.seen.add(event.id)
            await super().put(event)


class Repeats(FaultySink):
    async def put(self, event: Event) -> None:
        await super().put(event)
        server.rows.append((event.id, event.json))


class ForgetsAtARestart(FaultySink):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen = set[int]()

    async def put(self, event: Event) -> None:
        self.reach()
        if event.id not in self.seen:
            server.rows.append((event.id, event.json))
        self.seen.add(event.id)


class LooksBeforeItWrites(FaultySink):
    async def put(self, event: Event) -> None:
        self.reach()
        known = dict(server.rows)
        await asyncio.sleep(0)
        if event.id not in known:
            server.rows.append((event.id, event.json))


class GoesByPosition(FaultySink):
    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
        self.position = start.position if start else Position(0, 0)
        await super().open(start, mode)

    async def put(self, event: Event) -> None:
        if Position(event.commit_lsn, event.ordinal) > self.position:
            await super().put(event)


class CanNotBeCancelled(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        try:
            return await super().write(events)
        except asyncio.CancelledError:
            return []


class HoldsTheLoop(FaultySink):
    async def put(self, event: Event) -> None:
        while not server.speaks.is_set():
            time.sleep(0.01)  # noqa: ASYNC251  that is the breach
        await super().put(event)


class LeavesFilesOpen(FaultySink):
    async def close(self) -> None:
        return


class LeavesATask(FaultySink):
    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
        await super().open(start, mode)
        self.task = asyncio.ensure_future(asyncio.sleep(3600))


class ClosesOnce(FaultySink):
    async def close(self) -> None:
        os.close(self.file or -1)
        self.file = None


class StaysClosed(FaultySink):
    closed = False

    async def close(self) -> None:
        self.closed = self.closed or self.file is not None
        await super().close()

    def reach(self) -> None:
        super().reach()
        if self.closed:
            raise SinkUnavailable(sink=self.name, detail="it is closed")


class ChecksNothing(FaultySink):
    async def check(self) -> list[Finding]:
        return [Finding(True, "all is well")]


class ChecksByWriting(FaultySink):
    async def check(self) -> list[Finding]:
        if server.is_up:
            server.rows.append((0, b'{"event_id":0}'))
        return await super().check()


class IgnoresDeletes(FaultySink):
    async def put(self, event: Event) -> None:
        if not event.deleted:
            await super().put(event)


class KeepsTheFirstVersion(FaultySink):
    def keep(self, event: Event) -> None:
        server.put(event)


class GoesByArrival(FaultySink):
    def keep(self, event: Event) -> None:
        server.versions.pop(event.id, None)
        super().keep(event)


class ForgetsWhatIsDeleted(FaultySink):
    def keep(self, event: Event) -> None:
        super().keep(event)
        if event.deleted:
            server.versions.pop(event.id, None)


class ForgetsDeletesOfNothing(FaultySink):
    def keep(self, event: Event) -> None:
        if not event.deleted or event.id in server.versions:
            super().keep(event)


class GoesByTheCommit(FaultySink):
    def keep(self, event: Event) -> None:
        server.versions = {row: version | 2**64 - 1 for row, version in server.versions.items()}
        super().keep(event)


class ComparesVersionsAsText(FaultySink):
    def keep(self, event: Event) -> None:
        known = server.versions.get(event.id)
        if known is None or f"{known >> 64}/{known % 2**64}" < f"{event.commit_lsn}/{event.ordinal}":
            server.versions.pop(event.id, None)
            super().keep(event)


class LeavesFormerIdentities(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        same = [structs.replace(event, was=None) if isinstance(event, RowChange) else event for event in events]
        return await super().write(same)


class RefusesDeletes(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        refusals = await super().write(events)
        return [*refusals, *(Refusal(event, "it has no time") for event in events if event.deleted)]


class RefusesEveryChange(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        refusals = await super().write(events)
        return [Refusal(event, "with the other") for event in events] if refusals and self.stream.follows else refusals


class DropsAChangeThatIsRefused(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        try:
            return await super().write(events)
        except BatchRefused:
            if self.stream.follows:
                return []
            raise


class DeletesTwice(FaultySink):
    async def put(self, event: Event) -> None:
        if event.deleted and event.id in server.versions and event.id not in dict(server.rows):
            raise BatchRefused(sink=self.name, detail="there is no such row")
        await super().put(event)


class LooksBeforeItChanges(FaultySink):
    async def put(self, event: Event) -> None:
        self.reach()
        known = server.versions.get(event.id, -1)
        await asyncio.sleep(0)
        if known < event.version:
            server.versions.pop(event.id, None)
            self.keep(event)


class CanNotBeCancelledInAChange(FaultySink):
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        try:
            return await super().write(events)
        except asyncio.CancelledError:
            if self.stream.follows:
                return []
            raise


class WritesAnotherStream(FaultySink):
    """Of its destination: it makes sinks for one stream, whatever it is asked to."""

    def __init__(self, given: FaultySettings, context: SinkContext) -> None:
        super().__init__(given, replace(context, stream=EVENT))


BREACHES: dict[type[FaultySink], str] = {
    Swallows: "test_an_outage_is_unavailable_and_ends",
    RaisesTheDriversError: "test_an_outage_is_unavailable_and_ends",
    OpensRaw: "test_a_start_in_an_outage_is_unavailable_and_ends",
    ReturnsTooEarly: "test_what_is_written_is_there_exactly",
    WritesInTheBackground: "test_what_is_written_is_there_exactly",
    Truncates: "test_what_is_written_is_there_exactly",
    Reorders: "test_the_order_is_kept",
    Alters: "test_what_is_written_is_there_exactly",
    ReturnsNothing: "test_what_is_written_is_there_exactly",
    RefusesTheWrongOne: "test_what_it_can_not_hold_is_refused_alone",
    RefusesWhatFits: "test_what_is_written_is_there_exactly",
    RefusesForgetfully: "test_what_it_can_not_hold_is_refused_alone",
    DropsWhatIsRefused: "test_what_it_refuses_is_raised",
    QuotesRows: "test_what_it_refuses_is_raised",
    SaysItsKind: "test_an_outage_is_unavailable_and_ends",
    TellsItsSecret: "test_an_outage_is_unavailable_and_ends",
    ForgetsOnRetry: "test_an_outage_is_unavailable_and_ends",
    Repeats: "test_what_is_written_is_there_exactly",
    ForgetsAtARestart: "test_events_that_come_again_change_nothing",
    LooksBeforeItWrites: "test_writes_may_run_side_by_side",
    GoesByPosition: "test_events_of_old_positions_are_written",
    CanNotBeCancelled: "test_a_write_may_be_cancelled_anywhere",
    HoldsTheLoop: "test_a_silent_destination_does_not_hold_the_loop",
    LeavesFilesOpen: "test_what_is_closed_is_released_and_may_be_opened_again",
    LeavesATask: "test_what_is_closed_is_released_and_may_be_opened_again",
    ClosesOnce: "test_open_close_create_and_check_leave_no_trace",
    StaysClosed: "test_what_is_closed_is_released_and_may_be_opened_again",
    ChecksNothing: "test_an_outage_is_unavailable_and_ends",
    ChecksByWriting: "test_open_close_create_and_check_leave_no_trace",
    IgnoresDeletes: "test_changes_of_one_write",
    KeepsTheFirstVersion: "test_each_change_is_there_when_it_is_written",
    GoesByArrival: "test_an_earlier_version_replaces_no_later_one",
    ForgetsWhatIsDeleted: "test_changes_that_come_again_change_nothing",
    ForgetsDeletesOfNothing: "test_an_earlier_version_replaces_no_later_one",
    GoesByTheCommit: "test_changes_of_one_write",
    ComparesVersionsAsText: "test_each_change_is_there_when_it_is_written",
    LeavesFormerIdentities: "test_each_change_is_there_when_it_is_written",
    RefusesDeletes: "test_changes_of_one_write",
    RefusesEveryChange: "test_a_change_that_it_can_not_hold_is_refused_alone",
    DropsAChangeThatIsRefused: "test_a_change_that_it_refuses_is_raised",
    DeletesTwice: "test_changes_that_come_again_change_nothing",
    LooksBeforeItChanges: "test_changes_may_be_written_side_by_side",
    CanNotBeCancelledInAChange: "test_a_write_of_changes_may_be_cancelled_anywhere",
    WritesAnotherStream: "test_changes_of_one_write",
}
"""The breach, and the test that is there for it. Others may fail, too."""


class Place(Destination):
    """The server, and the sink that breaks the contract in one way; None: the installed one."""

    keeps_order = True

    def __init__(self, breach: type[FaultySink] | None) -> None:
        super().__init__(EVENT)
        self.breach = breach
        server.__init__()  # type: ignore[misc]  # it is empty again

    def follow(self) -> None:
        if self.breach and BREACHES[self.breach] not in vars(ChangesConformance):
            pytest.skip("its breach shows in other tests")
        super().follow()

    def sink(self) -> Sink:
        return self.breach(load(FaultySettings), self.context) if self.breach else super().sink()

    def read(self) -> Iterable[dict[str, Any]]:
        return [decode(json) for _, json in server.rows]

    @contextmanager
    def outage(self) -> Iterator[None]:
        server.is_up = False
        yield
        server.is_up = True

    @contextmanager
    def silence(self) -> Iterator[None]:
        server.speaks.clear()
        yield
        server.speaks.set()

    @contextmanager
    def refusal(self, event: Event) -> Iterator[None]:
        server.refused = event
        yield
        server.refused = None


@pytest.fixture(params=[None, *BREACHES], ids=lambda breach: breach.__name__ if breach else "Honest")
def destination(request: pytest.FixtureRequest) -> Destination:
    """Of each of them."""
    return Place(request.param)
