"""Where events come from: an `Enricher` makes them from the rows of the slot, a `History` from the rows in the tables.

Nobody inherits from these; the docstrings are the contract. `pipeline.py` drives the one, `delivery/backfill.py` the
other; `enrichment` implements both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from replicator.contracts.events import Checkpoint, ContentChange, DeadLetter, Event, Finding, Lsn, Position, Row
from replicator.contracts.stores import Contents

Shortcut: TypeAlias = Callable[[memoryview | bytes, Lsn, int], Event | None]
"""From an insert's message, its commit LSN and its ordinal to the very event that `Enricher.enrich` would make of its
row. None: the row has to go there. It changes nothing and raises nothing."""

Tell: TypeAlias = Callable[[Sequence[DeadLetter]], Awaitable[None]]
"""Keeps dead letters; when it returns, they are durable."""


class Enriched(NamedTuple):
    """What an enricher made of some rows."""

    events: list[Event]
    """In the order of the rows."""
    refused: list[DeadLetter]
    """Rows no event can be made of (stage `row`), with their position and what is wrong."""


class ContentChanges(NamedTuple):
    """What a checkpoint keeps of the contents."""

    contents: str | None
    """See `Checkpoint.contents`."""
    changes: Sequence[ContentChange]


class Enricher(Protocol):
    """Turns rows of the slot's tables into events. Knows the tables; nothing in `replicator` does."""

    @property
    def tables(self) -> Sequence[tuple[str, str]]:
        """What the slot must carry, as of the last `look`: schema and name of each table."""

    @property
    def ignored(self) -> Mapping[str, int]:
        """Rows that make no event by their nature, counted by action (`U`, `D`, `T`); only ever grows."""

    async def look(self, record: str | None, after: Lsn, tell: Tell | None = None) -> History | None:
        """See what the tables are, before a stream begins after this position.

        `record` is what `record` gave in an earlier run. Returns what the stream can't show because the tables were
        different meanwhile; None: nothing. What nobody can show any more, rows that went without a delete, it tells.
        Raises TablesUnfit (asked again until they fit), SourceUnavailable; `record` is to be kept then, too.
        """

    async def open(self, store: Contents | None = None, checkpoint: Checkpoint | None = None) -> None:
        """Load what events need: as of the checkpoint, if the store has a copy of it, and else as of now.

        Raises SourceUnavailable (tried again), SourceUnusable, CheckpointError.
        """

    def changed(self, before: Lsn) -> ContentChanges:
        """What a checkpoint at this position has to keep of the contents; every row before it went through `enrich`."""

    def saved(self, end_lsn: Lsn) -> None:
        """The store has what `changed` gave for this position."""

    async def fit(self) -> None:
        """Are the tables what events are made of? Before there is a slot; nothing is remembered. Raises as `look`."""

    async def verify(self) -> Lsn:
        """A position of the WAL up to which the tables were seen to be as at the last `look`; it is read first.

        Raises TablesChanged when they are not, TablesUnsettled while that is not known, SourceUnavailable.
        """

    def accept(self) -> None:
        """What `verify` has seen is what the next `look` compares with. Every sink has what the last one returned."""

    def record(self) -> str:
        """What was accepted last, or seen by `look` since, for the `look` of another process; empty: nothing."""

    def shortcut(self) -> Shortcut | None:
        """The quick way for ordinary inserts, until any other method is called; None while there is none.

        A row may take it only while `enrich` has had all earlier ones, or they took it too: it knows the contents as
        `enrich` left them.
        """

    async def enrich(self, rows: Sequence[Row], before: Sequence[Event] = ()) -> Enriched:
        """Events for the rows that make one, behind those that the shortcut made `before` them.

        Called with every row and event of the stream once, in stream order, from one task. Rows may be repeated after a
        reconnect and must give the same events. A refused row is about the row only once its commit is verified.
        Raises SourceUnavailable when a look-up can't be made now: the same rows are then given again; no state may have
        changed.
        """

    async def restore(self, letters: Sequence[DeadLetter]) -> Enriched:
        """Events for dead letters, for a replay: from the event's JSON, or, for `enrichment`'s, from the row anew.

        Order is kept; `refused` are those that still make no event. Raises SourceUnavailable.
        """

    async def history(self, emptied: Sequence[str] = ()) -> str:
        """What stands in the tables already and so never comes through a new slot, with the command that brings it.

        `emptied` are the sinks that lack it though the slot is an old one: what they keep it in was made now. In words
        for the operator; empty when there is nothing. Raises SourceUnavailable.
        """

    async def origin(self) -> str:
        """Where the events come from: cluster and database, in words for the operator; empty if that can't be known.

        The same after a failover to a standby, another after a restore from a dump. Raises SourceUnavailable.
        """

    async def check(self) -> list[Finding]:
        """Preflight: do the tables have what is needed? Never raises for a finding."""

    async def close(self) -> None:
        """Release connections. Safe to call twice, and without `open`."""


class Page(NamedTuple):
    """A stretch of history, read in one snapshot."""

    enriched: Enriched
    """As from the stream; may be empty. Every position in it is after that of the page before."""
    position: Position
    """The last event's; without any, one between the page before and the next."""
    place: str
    """Where the next page begins, in the history's own words."""


class History(Protocol):
    """Reads what stands in the tables already, as the stream would have told it. Knows the tables.

    An event's `commit_lsn` is after the commit of every row that its page's snapshot sees, so this view replaces the
    stream's. It is where the WAL ended right after the snapshot was taken; where rows change, a position before every
    commit that the snapshot does not see, so that the stream replaces this view.
    """

    async def open(self) -> None:
        """Connect, and look at the tables. Raises SourceUnavailable or SourceUnusable."""

    async def begin(self) -> tuple[str, int]:
        """The place of the first page, and how many events there are. Raises as `open`."""

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        """The page that begins there, of at most so many rows; None at the end.

        Raises as `open`; the same page may then be read again, and a place may be read from in another process.
        """

    async def close(self) -> None:
        """Release connections. Safe to call twice."""
