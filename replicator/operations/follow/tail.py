"""Shows a few of the events that go through, and how many more there were. The stream never waits for a viewer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import msgspec
from msgspec import Struct

from replicator.contracts.events import Event, format_lsn
from replicator.delivery.lane import Tap

SHOWN_A_BATCH = 5
SHOWN_A_SECOND = 50
"""What people can't read, they need not get."""
WAITING = 200
"""Lines that wait for a viewer that is slow; then they are only counted."""
TICK_SECONDS = 1.0
SHOWN_BYTES = 32_768
"""Of one event; a line of the socket has room for it."""
NOTHING = msgspec.Raw(b"null")


class Seen(Struct, frozen=True, kw_only=True, tag="seen"):
    """One event that went through, or, without one, how many were not shown since the line before."""

    sink: str = ""
    """Which sink has written it; empty: it came from the slot."""
    position: str | None = None
    event: msgspec.Raw = NOTHING
    skipped: int = 0


class Viewer:
    """A tap for one sink, or for what comes from the slot."""

    def __init__(self, sink: str) -> None:
        self._sink = sink
        self._lines: asyncio.Queue[Seen] = asyncio.Queue(WAITING)
        self._skipped = self._shown = 0
        self._second = 0

    def __call__(self, sink: str, events: Sequence[Event]) -> None:
        """Take a few of them."""
        if sink != self._sink:
            return
        if (second := int(time.monotonic())) != self._second:
            self._second, self._shown = second, 0
        room = min(SHOWN_A_BATCH, SHOWN_A_SECOND - self._shown, WAITING - self._lines.qsize())
        taken = [event for event in events[: max(0, room)] if len(event.json) <= SHOWN_BYTES]
        for event in taken:
            place = f"{format_lsn(event.commit_lsn)}#{event.ordinal}"
            self._lines.put_nowait(Seen(sink=sink, position=place, event=msgspec.Raw(event.json)))
        self._shown += len(taken)
        self._skipped += len(events) - len(taken)

    async def next(self) -> Seen:
        """The next line, at least once a second: with nothing to tell, an empty one."""
        try:
            async with asyncio.timeout(TICK_SECONDS):
                return await self._lines.get()
        except TimeoutError:
            skipped, self._skipped = self._skipped, 0
            return Seen(sink=self._sink, skipped=skipped)


async def view(taps: list[Tap], sink: str) -> AsyncGenerator[Seen, None]:
    """What a viewer gets, until nobody asks any more."""
    viewer = Viewer(sink)
    taps.append(viewer)
    try:
        while True:
            yield await viewer.next()
    finally:
        taps.remove(viewer)
