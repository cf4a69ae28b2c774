"""Keeps dead letters: on disk before their position counts as written, and of each sink no more than the bound.

A lane that refuses (`lane.py`) and rows that no event can be made of (`pipeline.py`) come here; `commands.py` lists,
replays and drops them in a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence

from replicator.contracts.errors import CheckpointError, CheckpointUnavailable
from replicator.contracts.events import DeadLetter, LetterCounts, format_lsn
from replicator.contracts.settings import CoreSettings
from replicator.contracts.stores import CheckpointStore
from replicator.delivery.lane import backoff

log = logging.getLogger(__name__)


class DeadLetters:
    """Those of one slot."""

    def __init__(self, store: CheckpointStore, settings: CoreSettings) -> None:
        self.stored = LetterCounts()
        """How many are on disk, as of the last look."""
        self.limit = settings.dead_letters_max
        """The most that are kept of one sink, and of rows."""
        self._store = store
        self._settings = settings
        self._turn = asyncio.Lock()  # lanes count and add one after the other

    async def keep(self, letters: Sequence[DeadLetter]) -> None:
        """Make them durable; until they are, their position does not count as written. Raises DeadLettersFull."""
        async with self._turn:
            for attempt in itertools.count():
                try:
                    self.stored = await asyncio.to_thread(
                        self._store.add_dead_letters, self._settings.slot, letters, self.limit
                    )
                except CheckpointUnavailable as exc:
                    log.error("%s", exc)
                    await asyncio.sleep(backoff(attempt, self._settings.retry_max_seconds))
                else:
                    break
        for letter in letters:
            owner = f"of sink {letter.sink}" if letter.sink else "of a row"
            log.error("dead letter %s at %s (event %s): %s", owner, place(letter), letter.event_id, letter.reason)

    async def look(self) -> None:
        """See how many there are: others drop them. What can't be seen now stays as it was."""
        try:
            self.stored = await asyncio.to_thread(self._store.count_dead_letters, self._settings.slot)
        except CheckpointError as exc:
            log.debug("%s", exc)  # who saves the checkpoint says it


def place(letter: DeadLetter) -> str:
    """Where its row stands in the stream, as `16/B374D848#12`; without a position, which way it came."""
    if letter.position is None:
        return letter.origin
    return f"{format_lsn(letter.position.commit_lsn)}#{letter.position.ordinal}"
