"""What a destination took and refused lately, and what that proves. Pure; `writer.py` asks.

A refusal alone proves nothing: the address may be wrong, or the API broken. An event becomes a dead letter when it was
refused alone, then the destination took others, and then it refused this event again, each time it was asked.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence

from replicator.contracts.events import Event

ENOUGH = 12
"""So many refusals in a row of one event prove that the destination means it. One that refuses half of all requests at
random does that once in 4,096 times, and seldom without taking another event that it refused meanwhile."""
DOUBT_SECONDS = 60.0
"""A destination that took what it had refused may do that again: for so long nothing becomes a dead letter."""
SUSPICIOUS = 20
"""So many refusals without one acceptance are trouble of the destination until it takes something."""
WITNESSES = 8
"""Taken events that are kept to be asked again: any two of them make a request that no API has answered before."""


class Evidence:
    """Of one destination. Requests are numbered as they begin: what began later met the newer state."""

    def __init__(self) -> None:
        self.asked = 0
        """The number of the newest request."""
        self.refused = 0
        """Requests that were refused since one was taken."""
        self._taken = 0
        self._witnesses: deque[Event] = deque(maxlen=WITNESSES)
        self._contradicted_at = -DOUBT_SECONDS

    def ask(self) -> int:
        """The number of a request that begins now."""
        self.asked += 1
        return self.asked

    def take(self, number: int, events: Sequence[Event]) -> None:
        """This request was taken, with these events."""
        self._taken = max(self._taken, number)
        self._witnesses.extend(events[-2:])
        self.refused = 0

    def taken_since(self, number: int) -> bool:
        """Whether a request was taken that began after that one."""
        return self._taken > number

    def witness(self, most: int) -> list[Event]:
        """Events that it took, to be asked again; empty when it never took any."""
        chosen = random.sample(self._witnesses, min(2, most, len(self._witnesses)))
        return sorted({event.id: event for event in chosen}.values(), key=lambda event: event.id)

    def contradict(self) -> None:
        """An event that was refused was taken."""
        self._contradicted_at = time.monotonic()

    @property
    def doubtful(self) -> bool:
        """It took what it had refused, not long ago."""
        return time.monotonic() - self._contradicted_at < DOUBT_SECONDS
