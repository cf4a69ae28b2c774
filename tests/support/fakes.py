"""Fakes for the faults that a real server does not produce on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from replicator.contracts.events import Checkpoint, Event, Position, Refusal, SinkPosition
from replicator.contracts.sink import Sink
from replicator.source.slot import Identity, SlotState

HERE = Identity(system_identifier="7", timeline=1)
STATE = SlotState(
    plugin="wal2json",
    database="engagement",
    own_database="engagement",
    active_pid=None,
    restart_lsn=50,
    confirmed_lsn=100,
    wal_status="reserved",
    safe_wal_size=None,
    two_phase=False,
    server_time=0.0,
    server_lsn=1000,
)
AT_200 = SinkPosition(position=Position(190, 3), end_lsn=200)
CHECKPOINT = Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=200, sinks={"redis": AT_200})

Step = Callable[[Sequence[Event]], Awaitable[Sequence[Refusal] | None]]


class FakeSink(Sink):
    """Takes everything; each write first follows the next step of the script, which may raise, wait or refuse."""

    def __init__(
        self, name: str = "fake", *, max_events: int = 100, concurrency: int = 1, max_repeats: int | None = None
    ) -> None:
        self.name = name
        self.max_events = max_events
        self.concurrency = concurrency
        self.max_repeats = max_repeats
        self.script: list[Step] = []
        self.taken: list[list[int]] = []
        """The ids of each write that was not turned away."""
        self.called = asyncio.Event()

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """Follow the script, then take everything."""
        self.called.set()
        refused = await self.script.pop(0)(events) if self.script else None
        self.taken.append([event.id for event in events])
        return refused or ()
