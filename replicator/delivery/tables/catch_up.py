"""What the stream could not show because the tables were different for a while, brought beside it.

`tables/verification.py` remembers it as brought only once every sink has it; until then a crash begins it again.
"""

from __future__ import annotations

import asyncio
import logging

from replicator.contracts.enricher import History, Page
from replicator.contracts.events import Position, counted
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.queue import Batch
from replicator.delivery.retry import Trouble, retry

PAGE_ROWS = 1_000
"""Between two pages the stream has its turn."""
READING = "reading rows from the tables that the stream may have missed"

log = logging.getLogger(__name__)


class CatchUp:
    """A history to the lanes of the stream."""

    def __init__(self, fan_out: FanOut, letters: DeadLetters, longest: float) -> None:
        """`longest` bounds the pauses between two tries."""
        self.trouble = Trouble()
        """Why it does not go on."""
        self._fan_out = fan_out
        self._letters = letters
        self._longest = longest
        self._history: History | None = None
        self._underway: list[Batch] = []

    def begin(self, history: History | None) -> None:
        """This is to be brought; None: nothing."""
        self._history, self._underway = history, []
        self.trouble.clear()  # that of the stream before, whose task was cancelled

    @property
    def done(self) -> bool:
        """Every sink has all of it."""
        return self._history is None and not any(batch.holders for batch in self._underway)

    @property
    def reason(self) -> str:
        """Why sinks lack events that are older than the stream; empty when they don't."""
        return self.trouble.message or ("" if self.done else READING)

    async def run(self) -> None:
        """Bring it; the lanes are open."""
        if (history := self._history) is None:
            return
        log.info("looking in the tables for rows that the stream may have missed")
        try:
            events = await self._bring(history)
        finally:
            await history.close()
        self._history = None
        message = "%s of the tables read again; sinks get again what they had of them"
        log.info(message, counted(events, "row"))

    async def _bring(self, history: History) -> int:
        place, _ = await history.begin()
        after, events = Position(0, 0), 0
        while page := await self._read(history, place, after):
            place, after = page.place, page.position
            events += len(page.enriched.events)
            await self._put(page)
        return events

    async def _read(self, history: History, place: str, after: Position) -> Page | None:
        await self._fan_out.room()
        return await retry(lambda: history.read(place, after, PAGE_ROWS), self.trouble, self._longest)

    async def _put(self, page: Page) -> None:
        events, refused = page.enriched
        if refused:
            await retry(lambda: self._letters.keep(refused), self.trouble, self._longest)
        if events:
            self._underway = [batch for batch in self._underway if batch.holders]
            self._underway += self._fan_out.put(events, None)
        await asyncio.sleep(0)  # the lanes' turn
