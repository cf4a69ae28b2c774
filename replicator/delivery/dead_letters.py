"""Keeps dead letters: on disk before their position counts as written, and of each sink no more than the bound.

They come from lanes whose sink refuses an event, and from `pipeline.py` and `backfill.py` for rows that no event can be
made of; both try again (`retry.py`) while they can't be kept. The commands list, replay and drop them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest

from msgspec import structs

from replicator.contracts.errors import CheckpointError
from replicator.contracts.events import DeadLetter, LetterCounts, Origin, format_lsn
from replicator.contracts.fields import Stream
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Sink
from replicator.contracts.stores import DeadLetterBox
from replicator.delivery.retry import Trouble

REASONS = 8
"""Of a sink that are told apart: a destination may word each refusal differently."""

log = logging.getLogger(__name__)


class DeadLetters:
    """Those of one slot that come one way."""

    def __init__(self, store: DeadLetterBox, settings: CoreSettings, origin: Origin = "stream") -> None:
        self.stored = LetterCounts()
        """How many are on disk, as of the last look."""
        self.trouble = Trouble()
        """Why that look failed: an idle replicator asks the checkpoint database nothing else."""
        self.reasons: dict[str, Counter[str]] = {}
        """By sink (empty: of rows) why those were refused that came since the program began; without row values."""
        self.limit = settings.dead_letters_max
        """The most that are kept of one sink, and of rows."""
        self._store = store
        self._slot = settings.slot
        self._origin = origin
        self._turn = asyncio.Lock()  # lanes count and add one after the other

    async def keep(self, letters: Sequence[DeadLetter], details: Sequence[str] = ()) -> None:
        """Make them durable. Raises DeadLettersFull, CheckpointUnavailable: their position does not count then.

        `details` are their reasons for the log, where a letter's own may quote the event.
        """
        if self._origin == "backfill":
            letters = [_of_backfill(letter) for letter in letters]
        async with self._turn:
            self.stored = await asyncio.to_thread(self._store.add_dead_letters, self._slot, letters, self.limit)
        for letter, detail in zip_longest(letters, details):
            owner = f"of sink {letter.sink}" if letter.sink else "of a row"
            why, at = detail or letter.reason, place(letter)
            fields = {"sink": letter.sink, "lsn": at, "event_id": letter.event_id, "code": "R514"}
            self._count(letter.sink or "", why)
            log.error("dead letter %s at %s (event %s): %s", owner, at, letter.event_id, why, extra=fields)

    def _count(self, sink: str, reason: str) -> None:
        reasons = self.reasons.setdefault(sink, Counter())
        reasons[reason if reason in reasons or len(reasons) < REASONS else "other reasons"] += 1

    async def look(self) -> None:
        """See how many there are: others drop them. What can't be seen now stays as it was."""
        try:
            self.stored = await asyncio.to_thread(self._store.count_dead_letters, self._slot)
        except CheckpointError as exc:
            self.trouble.say(exc)
        else:
            self.trouble.clear()


def is_for(letter: DeadLetter, sink: Sink) -> bool:
    """Whether the letter is for this sink; one that was kept while the sink had its former name, too.

    From one stream to several, or back, the sinks get other names: `redis` is `redis/orders` then. Without the stream's
    name an event's fields tell which stream it is of; a row's table does.
    """
    if letter.sink is None:
        return not sink.context.stream_option or _of_table(letter, sink.stream)
    if letter.sink in {sink.name, f"{sink.kind}/{sink.stream.name}"}:
        return True
    return letter.sink == sink.kind and _has_fields(letter, sink.stream)


def _of_table(letter: DeadLetter, stream: Stream) -> bool:
    found = _payload(letter)
    return f"{found.get('schema')}.{found.get('table')}" == stream.table


def _has_fields(letter: DeadLetter, stream: Stream) -> bool:
    names = {name for name in _payload(letter) if not name.startswith("_")}  # `events.change` adds those
    fields, identity = {field.name for field in stream.fields}, stream.identity
    return identity.name in names and names <= fields and identity.type.fits(letter.event_id)


def _payload(letter: DeadLetter) -> Mapping[str, object]:
    """Empty if it is none that this release has written."""
    with suppress(ValueError):
        if isinstance(found := json.loads(letter.payload), dict):
            return found
    return {}


def place(letter: DeadLetter) -> str:
    """Where its row stands in the stream, as `16/B374D848#12`; without a position, which way it came."""
    if letter.position is None:
        return letter.origin
    return f"{format_lsn(letter.position.commit_lsn)}#{letter.position.ordinal}"


def _of_backfill(letter: DeadLetter) -> DeadLetter:
    """The letter without the page's position: it is identified by its event's id.

    So an event is kept once, however often it is backfilled and refused, and replaying it replaces no newer version.
    """
    position = letter.position if letter.event_id is None else None
    return structs.replace(letter, origin="backfill", position=position)
