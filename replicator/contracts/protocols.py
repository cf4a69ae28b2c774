"""The contracts between the parts. Nobody inherits from these; the docstrings are the contract.

`pipeline` drives an `Enricher`, `backfill` a `History`, one `lane.Lane` a `Sink`, `reconcile` compares `Ledger`s,
and `pipeline.commit` alone saves checkpoints to the `CheckpointStore`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from replicator.contracts.events import Checkpoint, DeadLetter, Event, Finding, Lsn, Position, Refusal, Row


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


class Digest(NamedTuple):
    """What two places can agree on cheaply about some events."""

    events: int
    sum: int
    """Of 60 bits of the MD5 of every event's fields as text."""


class Held(NamedTuple):
    """One event as a place has it."""

    id: int
    ts_us: int
    key: int
    """With the two before it what the event is known by; see `events.Event`."""
    hash: int
    """60 bits of the MD5 of its fields as text."""
    lsn: int = 0
    """Of the view that the place has; 0 at the source."""


class Part(NamedTuple):
    """Some events of a range: those in certain buckets of time, and of these the ids with certain remainders."""

    origin_us: int
    width_us: int
    buckets: tuple[int, ...]
    """Ascending; number n begins at `origin_us + n * width_us`."""
    modulus: int = 1
    remainders: tuple[int, ...] = (0,)
    """Of `id` divided by `modulus`, never negative."""

    @property
    def start_us(self) -> int:
        """Where the first bucket begins."""
        return self.origin_us + self.buckets[0] * self.width_us

    @property
    def end_us(self) -> int:
        """Where the last one ends."""
        return self.origin_us + (self.buckets[-1] + 1) * self.width_us


class Ledger(Protocol):
    """A place that can say which events it has; `reconcile.py` compares two. Times are microseconds since 1970.

    Raises what a `History` or a `Sink` raises.
    """

    sliced: bool
    """Whether a piece of a range costs a piece of the effort; otherwise a range is asked for as a whole."""

    async def span(self, start_us: int, end_us: int) -> tuple[int, int, int]:
        """How many events there are with `start <= ts < end`, the first one's time and the last one's (else 0)."""

    async def by_time(self, part: Part) -> dict[int, Digest]:
        """Digests of the buckets; the buckets are consecutive, those without events are absent."""

    async def by_id(self, part: Part) -> dict[int, Digest]:
        """Digests of all remainders in one bucket; those without events are absent."""

    async def held(self, part: Part) -> list[Held]:
        """The events themselves, in any order."""

    async def find(self, ids: Sequence[int], start_us: int, end_us: int) -> list[Held]:
        """Those with these ids and `start <= ts < end`."""


class SourceLedger(Ledger, Protocol):
    """The tables themselves."""

    async def lsn(self) -> Lsn:
        """Every commit that was visible before is before this."""

    async def next_transaction(self) -> int:
        """A number above those of all transactions that have one."""

    async def oldest_transaction(self) -> int:
        """Those with lower numbers have ended, and their rows can be seen if they ever will."""

    def ids(self, start_us: int, end_us: int) -> AsyncIterator[Sequence[int]]:
        """Of all events of the range, in chunks."""

    def counts(self) -> AsyncIterator[Sequence[tuple[int, int]]]:
        """`(key, events)` for every key, over all times that a timestamp can tell, by key, in chunks."""

    async def counts_of(self, keys: Sequence[int]) -> dict[int, int]:
        """The same for some keys; those without events are absent."""

    def picked(self, ids: Sequence[int]) -> History:
        """These events, for the sinks."""


class Counts(Protocol):
    """A place that counts events by key, each once."""

    async def counts(self, keys: Sequence[int]) -> list[int]:
        """The count of each; 0 for one that is not there."""

    def keys(self) -> AsyncIterator[Sequence[int]]:
        """Everything that has a count, in chunks, in any order, some of them perhaps twice."""

    async def unseen(self, ids: Sequence[int]) -> list[int]:
        """Those of the events that were not counted yet."""


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
    resumes: bool
    """Set before `open`: it was written to before, says the checkpoint. One that finds nothing there can say so."""

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
        """Store it whatever was there: an operator accepted a gap. Sinks not named are removed.

        Dead letters lose their position, which may be another event's from now on.
        """

    def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter], most: int | None = None) -> dict[str, int]:
        """Store them in one database transaction. One that is there already (slot, sink, position) is kept once.

        Returns how many there are then, by sink. Raises DeadLettersFull, with nothing stored, when a sink would have
        more than `most` and has some already: what comes together is kept as a whole, so that nobody waits in vain.
        """

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
