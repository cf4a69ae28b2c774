"""A lane's mark under chance: reconnects, empty batches, pieces, failures, refusals, writes side by side, a catch-up.

Whatever happens, the sink has everything up to the mark, the mark never goes back, and no more is repeated than may be.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import cast

import pytest

from replicator.contracts.errors import CheckpointUnavailable, SinkUnavailable
from replicator.contracts.events import DeadLetter, Event, LetterCounts, Mark, Position, Refusal, SinkPosition
from replicator.contracts.settings import CoreSettings
from replicator.contracts.stores import DeadLetterBox
from replicator.delivery.dead_letters import DeadLetters
from replicator.delivery.fan_out import FanOut
from replicator.delivery.lane import Lane
from sinks.testing import MemorySink

SETTINGS = CoreSettings.model_validate({"retry_max_seconds": 0.01})
START = SinkPosition(position=Position(0, 0), end_lsn=0)
TRANSACTIONS = 60
END = TRANSACTIONS * 10 + 5
REPEATS = 8


class Box:
    """Keeps dead letters, at every second try."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []
        self.tries = 0

    def add_dead_letters(self, _slot: str, letters: Sequence[DeadLetter], _most: int) -> LetterCounts:
        """Away, or durable."""
        self.tries += 1
        if self.tries % 2:
            raise CheckpointUnavailable(detail="away")
        self.letters += letters
        return LetterCounts()


class World:
    """Transactions, in chunks that end anywhere, for a sink of concurrency 2 and one that may repeat little."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311  not a secret
        self.events = [
            Event(number * 10, ordinal, number * 100 + ordinal, 1, 0, b"{}")
            for number in range(1, TRANSACTIONS + 1)
            for ordinal in range(1, self.chance.randint(0, 6) + 1)
        ]
        self.box = Box()
        self.sinks = [
            MemorySink(name="wide", max_events=4, concurrency=2, refused=self.some(self.events, 5)),
            MemorySink(name="once", max_events=3, max_repeats=REPEATS, unfit=self.some(self.events, 5)),
        ]
        for sink in self.sinks:
            sink.steps = [self.step for _ in range(10_000)]
        self.fan_out = FanOut(SETTINGS, DeadLetters(cast("DeadLetterBox", self.box), SETTINGS), limit_bytes=2_000)
        self.seen = dict.fromkeys(["wide", "once"], Mark())
        self.saved: dict[str, SinkPosition] = {}
        self.beside = 0

    def some(self, events: Sequence[Event], count: int) -> list[int]:
        """Ids of some of them."""
        return [event.id for event in self.chance.sample(events, count)]

    async def step(self, _: Sequence[Event]) -> Sequence[Refusal]:
        """Slow, or away."""
        for _turn in range(self.chance.randint(0, 5)):
            await asyncio.sleep(0)
        if self.chance.random() < 0.2:
            raise SinkUnavailable(sink="a sink", detail="away")
        return ()

    async def read(self) -> None:
        """The stream to its end, in spite of connections that break: then it is repeated from the last save."""
        while not await self.stream(min((at.end_lsn for at in self.saved.values()), default=0)):
            pass

    async def stream(self, end_lsn: int) -> bool:
        """From there on, until it breaks or all is read."""
        position, chunk = Position(0, 0), list[Event]()
        for number in range(end_lsn // 10 + 1, TRANSACTIONS + 1):
            for event in (event for event in self.events if event.commit_lsn == number * 10):
                position = Position(event.commit_lsn, event.ordinal)
                chunk.append(event)
                if self.chance.random() < 0.3:  # a chunk that ends inside the transaction
                    await self.put(chunk, Mark(position, end_lsn, number - 1))
                    chunk = []
            end_lsn = number * 10 + 5
            if self.chance.random() < 0.6:
                await self.put(chunk, Mark(position, end_lsn, number))
                chunk = []
            if number < TRANSACTIONS and self.chance.random() < 0.05:
                return False
        await self.put(chunk, Mark(position, end_lsn, TRANSACTIONS))
        return True

    async def put(self, events: list[Event], mark: Mark) -> None:
        """As the pipeline does."""
        await self.fan_out.room()
        if mark.end_lsn < END and self.chance.random() < 0.2:  # rows of the tables, for more than one write
            ids = range(self.beside, self.beside + self.chance.randint(1, 9))
            self.fan_out.put([Event(0, 0, -1 - number, 1, 0, b"{}") for number in ids], None)
            self.beside = ids.stop
        self.fan_out.put(events, mark)
        self.check()
        await asyncio.sleep(0)

    async def commit(self) -> None:
        """Save now and then, and then the lanes hear of it."""
        while True:
            await self.fan_out.progress()
            self.check()
            if self.chance.random() < 0.5 or any(lane.awaiting_checkpoint for lane in self.fan_out.lanes):
                saved = {lane.name: lane.reached for lane in self.fan_out.lanes}
                await asyncio.sleep(0.001)
                self.saved = saved
                self.fan_out.saved(saved)
            if all(lane.mark.end_lsn == END for lane in self.fan_out.lanes):
                return
            await self.fan_out.checkpoint_wanted(0.001)

    def check(self) -> None:
        """What has to be true at any moment."""
        for lane in self.fan_out.lanes:
            mark, before = lane.mark, self.seen[lane.name]
            assert before == before.later(mark) or mark == before.later(mark), "no part goes back"
            self.seen[lane.name] = mark
            done = {event.id for event in self.kept(lane)}
            due = [
                event
                for event in self.events
                if (event.commit_lsn, event.ordinal) <= mark.position or event.commit_lsn < mark.end_lsn
            ]
            assert done.issuperset(event.id for event in due), f"{lane.name} lacks something before {mark}"
        once = self.fan_out.lanes[1]
        at = self.saved.get("once", START).position
        repeated = [event for event in self.kept(once) if (event.commit_lsn, event.ordinal) > at]
        assert len(repeated) <= REPEATS

    def kept(self, lane: Lane) -> list[Event]:
        """What its sink has, or a dead letter has for it."""
        letters = {letter.event_id for letter in self.box.letters if letter.sink == lane.name}
        sink = cast("MemorySink", lane.sink)
        return [event for event in self.events if event.id in sink.events or event.id in letters]


@pytest.mark.parametrize("seed", range(12))
async def test_the_sink_has_everything_up_to_the_mark(seed: int) -> None:
    """At every moment; and in the end everything is written, once as far as nothing failed, and no memory is held."""
    world = World(seed)
    world.fan_out.open(world.sinks, dict.fromkeys(["wide", "once"], START))

    async def work() -> None:
        reading = asyncio.create_task(world.read())
        await world.commit()
        await reading

    async with asyncio.timeout(10):
        assert await world.fan_out.run(work()) is None
    world.check()
    for lane, sink in zip(world.fan_out.lanes, world.sinks, strict=True):
        assert world.events == world.kept(lane)
        assert set(range(-world.beside, 0)) <= sink.events.keys()
        if not sink.refused:  # else what it took was a witness now and then
            assert len(sink.taken) == len({*sink.taken}), "nothing is written again: the stream's repeats are left out"
    assert 0 == world.fan_out.held_bytes


def test_a_clock_that_was_ahead_is_forgotten() -> None:
    """A mark has the commit time of its own place; where that is unknown, of the place before."""
    ahead, then, unknown = Mark(Position(1, 1), 2, 9e9), Mark(Position(3, 1), 4, 5.0), Mark(Position(0, 0), 6)
    assert Mark(Position(3, 1), 4, 5.0) == ahead.later(then) == then.later(ahead)
    assert Mark(Position(3, 1), 6, 5.0) == then.later(unknown)
