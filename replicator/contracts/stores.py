"""What a checkpoint database keeps: checkpoints, dead letters, contents, and how far a backfill is.

Durably: a call that has returned survives a power cut. All methods block (call them in a thread) and raise
CheckpointError when the database fails. `checkpoint_store` implements all four on any SQL database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, TypeVarTuple

from replicator.contracts.errors import CheckpointUnavailable
from replicator.contracts.events import Checkpoint, ContentChange, DeadLetter, Id, LetterCounts, Stage

ANSWER_SECONDS = 10.0
"""For who only looks: a server that hangs answers nothing, and raises nothing."""

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


async def ask(call: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """What a call that changes nothing returns. Raises CheckpointError, also when it does not answer."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asyncio.to_thread(call, *arguments)
    except TimeoutError:
        raise CheckpointUnavailable(detail=f"no answer in {ANSWER_SECONDS:g} s") from None


class Checkpoints(Protocol):
    """The durable position in each slot."""

    def create(self) -> list[str]:
        """Make the tables. Idempotent. A line for each thing done. Raises CheckpointUnusable for another release's."""

    def load(self, slot: str) -> Checkpoint | None:
        """The slot's checkpoint with all its sinks' positions; None when there is none."""

    def save(
        self, checkpoint: Checkpoint, changes: Sequence[ContentChange] = (), known: Checkpoint | None = None
    ) -> None:
        """Store it in one database transaction. Sinks that are stored and not named stay as they are.

        `changes` are those of the contents from the stored checkpoint to this one, in the order of the stream: the copy
        is as of the checkpoint, always.

        `known` was saved before: an older one in its place means that the copy, and dead letters, are older, too.

        Raises CheckpointLost for that, CheckpointBackward when `end_lsn`, or a sink's position or end_lsn, is before
        the stored one, and CheckpointUnusable when the stored one belongs to another PostgreSQL cluster.
        """

    def replace(self, checkpoint: Checkpoint) -> None:
        """Store it whatever was there: an operator accepted a gap. Sinks not named are removed.

        Dead letters get the origin `restored` and lose their position, which may be another event's from now on.
        """

    def files(self) -> list[Path]:
        """What it keeps on this machine: the database and what stands beside it; none if a server has it."""

    def close(self) -> None:
        """Release connections. Safe to call twice."""


class DeadLetterBox(Protocol):
    """Rows and events that were refused for good, until an operator replays or drops them."""

    def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter], most: int | None = None) -> LetterCounts:
        """Store them in one database transaction. One that is there already is kept once.

        Two letters are the same if sink, origin and position are; without a position the event's id counts.
        Returns how many there are then. Raises DeadLettersFull, with nothing stored, when a sink, or the rows, would
        have more than `most` and has some already. A batch is stored whole even if it exceeds `most`: otherwise one
        larger than that could never be stored.
        """

    def dead_letters(
        self, slot: str, *, sink: str | None = None, stage: Stage | None = None, after_id: int = 0, limit: int = 100
    ) -> list[DeadLetter]:
        """Oldest first; the page after `after_id`. None: of any sink, of both stages."""

    def count_dead_letters(self, slot: str) -> LetterCounts:
        """How many there are now."""

    def drop_dead_letters(self, slot: str, ids: Sequence[int]) -> int:
        """Remove these; how many there were."""


class Task(NamedTuple):
    """What is saved for one task."""

    name: str
    progress: str
    updated_at: float
    """Unix time, seconds."""


class TaskProgress(Protocol):
    """How far a task beside the stream is, a backfill for instance."""

    def load_progress(self, slot: str, task: str) -> str | None:
        """What was saved last for the task, as it was given; None when nothing is."""

    def tasks(self, slot: str) -> list[Task]:
        """Everything that is saved for the slot, the newest first."""

    def save_progress(self, slot: str, task: str, progress: str | None) -> None:
        """Store it in one database transaction; None: the task is done, forget it. No checkpoint is touched."""


class Contents(Protocol):
    """A copy of the source's contents, as of the slot's checkpoint; what it is a copy of is in the checkpoint.

    An event that is read again, after any time, gets its content from here: the source has only today's. A slot
    with several streams, or dimensions, has several copies: their `slot` is called `slot/name` here.
    """

    def clear_contents(self, slot: str) -> None:
        """Begin a copy. While it is made, no checkpoint may name it."""

    def add_contents(self, slot: str, found: Mapping[Id, str]) -> None:
        """Go on with it; none of these is there yet."""

    def find_contents(self, slot: str, ids: Collection[Id]) -> dict[Id, str]:
        """Those of these ids that there are."""

    def newest_contents(self, slot: str, highest: Id, most: int) -> dict[Id, str]:
        """Those with the highest ids up to this one, highest first, at most so many."""


class CheckpointStore(Checkpoints, DeadLetterBox, TaskProgress, Contents, Protocol):
    """All four in one database."""
