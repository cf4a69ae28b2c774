"""What a destination implements: subclass `Sink`, and the capabilities that it has.

A lane (`delivery/lane.py`) calls `write` with consecutive events and decides about retries; the command line asks for
capabilities with `isinstance`, and says so where a sink lacks one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple

from msgspec import Struct

from replicator.contracts.events import Event, Finding, Id, Lsn, Refusal, SinkPosition
from replicator.contracts.fields import Stream
from replicator.contracts.ledger import EventCounter, SinkLedger
from replicator.contracts.settings import Settings, fresh


class Mode(Enum):
    """On whose behalf a sink is opened."""

    LIVE = "live"
    """By the replicator that follows the slot."""
    BACKFILL = "backfill"
    """By a command beside it: what goes by the clock, such as a sliding window, is left to the replicator."""


class Carrier(Struct, kw_only=True):
    """Who carries the sinks' writes out, if it is not this process: a cluster, and what it had at the last look."""

    name: str
    executors: int = 0
    cores: int = 0
    """How many writes run at once."""


async def _unknown() -> str:
    return ""


@dataclass(frozen=True)
class SinkContext:
    """Where a sink stands. The replicator makes it; a test may with the stream alone."""

    stream: Stream
    """Whose events it gets: `context.stream.fields`."""
    stream_option: str = ""
    """What chooses its stream in a command that a message names, where the slot has several: ` --stream orders`."""
    origin: Callable[[], Awaitable[str]] = _unknown
    """Asks where the events come from (`enricher.Enricher.origin`), for a sink that must not mix two sources."""

    def named(self, kind: str) -> str:
        """What a sink of this kind is called here: `redis`, and `redis/orders` where the slot has several streams."""
        return f"{kind}/{self.stream.name}" if self.stream_option else kind


class Sink(ABC):
    """A destination. `sinks.create_sinks` makes one as `sink_class(load(sink_class.settings_class), context)`."""

    settings_class: ClassVar[type[Settings]] = Settings
    """Its options, each an environment variable; the default has none."""
    takes_any_stream: ClassVar[bool] = False
    """Whether it knows what to do with `Event.deleted` and `Event.was`, and with identities that are no numbers."""
    name: str
    """Of the class: as in REPLICATOR_SINKS. Of a sink: as in messages, and the key of its position in the checkpoint
    (`SinkContext.named`)."""
    max_events: int
    """The most events one `write` gets."""
    linger_seconds: float = 0.0
    """How long a lane may wait for `max_events` to gather; 0: write what is there, except in a backlog."""
    concurrency: int = 1
    """How many `write` calls may run at once. Above 1 their order is not kept."""
    max_repeats: int | None = None
    """The most events that a crash may make it see twice, at least `max_events`: a lane writes no more than so many
    past the checkpoint on disk. None: no bound, because a repeat changes nothing there."""
    new_events: int | None = None
    """Events written that the destination did not have before; None if it can't tell."""

    def __init__(self, settings: Settings, context: SinkContext) -> None:
        self.settings = settings
        self.context = context
        self.stream = context.stream
        self.kind = self.name
        """Its name as in REPLICATOR_SINKS."""
        self.name = context.named(self.kind)

    async def create(self) -> list[str]:
        """Make what the destination needs (a table), if it is missing. Idempotent. A line for each thing done.

        `init` calls it, and the lane of a sink that never wrote anything, before `open`. Raises as `open` does.
        """
        return []

    async def check(self) -> list[Finding]:
        """Preflight: reachable, writable, of the right shape? Leaves no trace. Never raises for a finding."""
        return []

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:  # noqa: B027  optional
        """Connect. Raises as `write` does, but no refusals; called again until it succeeds, perhaps once more later.

        `start` is the last position that the sink wrote, None if it never wrote any. A sink that finds nothing at the
        destination although it wrote before can say so.
        """

    @abstractmethod
    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """Make `events` durable at the destination, except those returned.

        Returned are events that the sink itself knows can never fit, whatever the destination says (a time that its
        format can't express): they become dead letters at once. What the destination refuses is raised.

        `events` may be empty: then nothing is written, and what the sink knows to hinder it is raised all the same.

        Called again with the very same events after an error, and with overlapping events after a restart: the effect
        must be the same as of one call, as far as the destination allows. After BatchRefused or BatchTooLarge parts of
        them come, down to single events, and an event that was taken before may come between. May be cancelled at any
        await; the events then count as not written.

        Nothing raised here ends the replicator: the lane keeps the events, and the other lanes go on. Commands that run
        once end with all but the first three.

        Raises:
            SinkUnavailable: the destination can't take them now (network, timeout, overload, every answer that is not
                known). Retried.
            BatchRefused: it refuses them, and may mean an event among them. Halved; a single event becomes a dead
                letter once others are taken and it alone is refused again and again.
            BatchTooLarge: they are too large for it or for something before it. Halved; later writes are smaller.
            SinkMisconfigured: it turns the replicator away (credentials, address, rights). Retried slowly, loudly.
            SinkUnusable: it can't work like this (table missing, wrong shape). Retried slowly, loudly.
        """

    async def carried(self, events: Sequence[Event]) -> None:  # noqa: B027  most sinks remember nothing of a write
        """Another process's sink has just written them for this one: notice what `write` would have noticed after it.

        Raises as `write` does, but no refusals; the events then count as not written.
        """

    def look(self) -> None:  # noqa: B027  a sink that only writes has nothing to say
        """Raise what is wrong although nothing is written, of a sink that keeps something right by the clock.

        From what it knows, without asking the destination: the lane calls this at least every few seconds.
        """

    def remember(self) -> str:
        """What it knows its data by, to find out after a restart whether the destination has lost them.

        It is kept beside the checkpoint within seconds of a change; changes should be rare. Empty: nothing.
        """
        return ""

    def recall(self, memory: str) -> None:  # noqa: B027  a sink that remembers nothing is told nothing
        """Before the first `open`: what `remember` said in an earlier run. What was lost then stays lost in `look`."""

    async def refresh(self) -> None:
        """Take over what NAME_FILE files hold now: the destination turned the replicator away.

        `settings` is another object if something has changed. Other calls may be under way.
        """
        found = fresh(self.settings)
        if found is not self.settings:
            self.settings = found
            await self.renew()

    async def renew(self) -> None:  # noqa: B027  a sink without secrets needs nothing
        """Go on with `settings`, in which secrets have changed."""

    async def close(self) -> None:
        """Release connections. Safe to call twice, and without `open`."""
        return


class CountsByHour(ABC):
    """A sink that can say how many events it has."""

    @abstractmethod
    async def hours(self, start_us: int, end_us: int) -> dict[int, int]:
        """Events with `start <= event_ts < end` by the start of their hour, in Unix seconds. Times in µs since 1970."""


class HasLedger(ABC):
    """A sink whose rows `reconcile` can compare with PostgreSQL's, field by field."""

    @abstractmethod
    def ledger(self, *, with_content: bool) -> SinkLedger:
        """Its rows; `with_content` also compares the fields that come from the content."""


class HasCounter(ABC):
    """A sink that counts each event once, by content."""

    @abstractmethod
    def counter(self) -> EventCounter:
        """Its counts."""


class Ranks(ABC):
    """A sink that knows which contents have the most events of late."""

    @abstractmethod
    async def top(self, most: int) -> list[tuple[Id, int]]:
        """Those contents, so many at most, and their events in the last minutes. Raises as `write`, but no refusals."""


class Held(NamedTuple):
    """What a destination has of one event."""

    there: bool
    """It has the event, or has counted it."""
    fields: Mapping[str, Any] | None = None
    """As they are there, exact; None where the destination does not keep the event itself."""
    commit_lsn: Lsn = 0
    """Of the view that it has; 0: it does not keep that."""
    notes: Sequence[str] = ()
    """What else there is to say, for people."""


class Traces(ABC):
    """A sink that can say what it has of one event."""

    @abstractmethod
    async def trace(self, event_id: Id, event: Event | None) -> Held:
        """The event of this id; `event` is as PostgreSQL has it now, None when it has none. Raises as `write`."""


class Rebuildable(ABC):
    """A sink whose whole state can be made again from PostgreSQL."""

    @abstractmethod
    async def generation(self) -> str:
        """A word that changes when the destination loses its data, is emptied, or may have gone back in time."""

    @abstractmethod
    async def filled(self, generation: str) -> None:
        """All is there again, if this is still the generation: what the sink says of lost data is over."""

    @abstractmethod
    async def empty(self) -> int:
        """Delete all of the replicator's data there, atomically; how many keys that were. It needs no `open`."""
