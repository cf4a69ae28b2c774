"""The contracts between the parts. Nobody inherits from these; the docstrings are the contract.

`pipeline` drives an `Enricher`, `backfill` a `History`, one `fan_out.Lane` a `Sink`, and `pipeline.commit` alone saves
checkpoints to the `CheckpointStore`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from replicator.events import Checkpoint, DeadLetter, Event, Finding, Position, Refusal, Row


class Enriched(NamedTuple):
    """What an enricher made of some rows."""

    events: list[Event]
    """In the order of the rows."""
    refused: list[DeadLetter]
    """Rows no event can be made of (`sink='enrichment'`), with their position and what is wrong."""


class Enricher(Protocol):
    """Turns rows of the slot's tables into events. Knows the tables; nothing in `replicator` does."""

    tables: Sequence[str]
    """What the slot must carry, schema-qualified, e.g. `public.engagement_events`."""

    @property
    def ignored(self) -> Mapping[str, int]:
        """Rows that make no event by their nature, counted by action (`U`, `D`, `T`); only ever grows."""

    async def open(self) -> None:
        """Connect. Raises SourceUnavailable (tried again) or SourceUnusable."""

    async def enrich(self, rows: Sequence[Row]) -> Enriched:
        """Events for the rows that make one.

        Called with every row of the stream once, in stream order, from one task. Rows may be repeated after a
        reconnect and must give the same events. Raises SourceUnavailable when a look-up can't be made now: the same
        rows are then given again; no state may have changed.
        """

    async def restore(self, letters: Sequence[DeadLetter]) -> Enriched:
        """Events for dead letters, for a replay: from the event's JSON, or, for `enrichment`'s, from the row anew.

        Order is kept; `refused` are those that still make no event. Raises SourceUnavailable.
        """

    async def history(self) -> str:
        """What stands in the tables already and so never comes through a new slot, with the command that brings it.

        In words for the operator; empty when there is nothing. Raises SourceUnavailable.
        """

    async def check(self) -> list[Finding]:
        """Preflight: do the tables have what is needed? Never raises for a finding."""

    async def close(self) -> None:
        """Release connections. Safe to call twice, and without `open`."""


class Page(NamedTuple):
    """A stretch of history, read in one snapshot."""

    enriched: Enriched
    """As from the stream; may be empty. Every position in it is behind that of the page before."""
    position: Position
    """The last event's; without any, one between the page before and the next."""
    place: str
    """Where the next page begins, in the history's own words."""


class History(Protocol):
    """Reads what stands in the tables already, as the stream would have told it. Knows the tables.

    An event's `commit_lsn` is where the WAL ended right after its page's snapshot was taken: behind the commit of every
    row that the snapshot sees, so this view replaces the stream's, and before that of every row it does not see.
    """

    async def open(self) -> None:
        """Connect, and look at the tables. Raises SourceUnavailable or SourceUnusable."""

    async def begin(self) -> tuple[str, int]:
        """The place of the first page, and how many events there are. Raises as `open`."""

    async def read(self, place: str, behind: Position, rows: int) -> Page | None:
        """The page that begins there, of at most so many rows; None at the end.

        Raises as `open`; the same page may then be read again, and a place may be read from in another process.
        """

    async def close(self) -> None:
        """Release connections. Safe to call twice."""


class Sink(Protocol):
    """A destination. A lane calls `write` with consecutive events and decides about retries."""

    name: str
    """As in REPLICATOR_SINKS; the key of its position in the checkpoint."""
    max_events: int
    """The most events one `write` gets."""
    linger_seconds: float
    """How long a lane may wait for `max_events` to gather; 0: write what is there."""
    concurrency: int
    """How many `write` calls may run at once; above 1 their order is not kept."""
    max_repeats: int | None
    """The most events that a crash may make it see twice, at least `max_events`: so many may be written, or being
    written, past the checkpoint on disk. None: no bound, because a repeat changes nothing there."""

    async def create(self) -> list[str]:
        """Make what the destination needs (a table), if it is missing. Idempotent. A line for each thing done."""

    async def check(self) -> list[Finding]:
        """Preflight: reachable, writable, of the right shape? Leaves no trace. Never raises for a finding."""

    async def open(self) -> None:
        """Connect. Raises as `write` does; called again until it succeeds."""

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """Make `events` durable at the destination, except those returned, which it will never take.

        Called again with the very same events after SinkUnavailable or SinkMisconfigured, and with overlapping
        stretches after a restart: the effect must be the same as of one call, as far as the destination allows.
        May be cancelled at any await; the events then count as not written.

        Raises:
            SinkUnavailable: the destination can't take them now (network, timeout, overload). Tried again.
            SinkMisconfigured: it turns *us* away (credentials, address, rights). Tried again slowly, loudly.
            SinkUnusable: it can never work like this (table missing, wrong shape). Stops the program.
        """

    async def close(self) -> None:
        """Release connections. Safe to call twice, and without `open`."""


class CheckpointStore(Protocol):
    """Keeps checkpoints and dead letters, durably: a call that has returned survives a power cut.

    All methods block (they are called in a thread) and raise CheckpointError when the database fails.
    """

    def create(self) -> list[str]:
        """Make or upgrade the schema. Idempotent. A line for each thing done; CheckpointUnusable if it is newer."""

    def load(self, slot: str) -> Checkpoint | None:
        """The slot's checkpoint with all its sinks' positions; None when there is none."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Store it in one database transaction.

        Raises CheckpointBackward when `end_lsn`, or a sink's position or end_lsn, is behind the stored one.
        Sinks that are stored and not named stay as they are.
        """

    def replace(self, checkpoint: Checkpoint) -> None:
        """Store it whatever was there: an operator accepted a gap. Sinks not named are removed."""

    def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter]) -> None:
        """Store them in one database transaction. One that is there already (slot, sink, position) is kept once."""

    def dead_letters(self, slot: str, sink: str | None = None, after_id: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Oldest first; the page behind `after_id`."""

    def count_dead_letters(self, slot: str) -> dict[str, int]:
        """How many there are, by sink; sinks without any are absent."""

    def drop_dead_letters(self, slot: str, ids: Sequence[int]) -> int:
        """Remove these; how many there were."""

    def load_progress(self, slot: str, task: str) -> str | None:
        """What was saved last for a task beside the stream (a backfill), in its own words; None when nothing is."""

    def save_progress(self, slot: str, task: str, progress: str | None) -> None:
        """Store it, in one database transaction; None: the task is done, forget it. No checkpoint is touched."""

    def close(self) -> None:
        """Release connections. Safe to call twice."""
