"""A task: writes events with this process's own sink, which stays open from task to task.

A sink here is opened as for a backfill: what goes by the clock, such as the window in Redis, is left to the driver's.
"""

from __future__ import annotations

import asyncio
import gc
import platform
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import cache
from threading import Thread
from typing import TypeVar

import msgspec

from enrichment import configured
from replicator.contracts.errors import BatchRefused, SinkUnavailable
from replicator.contracts.events import Event
from replicator.contracts.sink import Mode, Sink, SinkContext
from replicator_spark.nodes import compare, meant_by_sink
from replicator_spark.stream.wire import Answer, Errand, Report, told
from sinks import create_sinks

T = TypeVar("T")


def work(packed: bytes) -> bytes:
    """Do an errand. Raises nothing: Spark logs what a task raises, with its words."""
    return msgspec.msgpack.encode(_hands().do(msgspec.msgpack.decode(packed, type=Errand)))


class Hands:
    """The sinks of this process, and the loop that their connections live on, also between tasks."""

    def __init__(self) -> None:
        self._sinks: dict[str, tuple[int, Sink]] = {}
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, daemon=True).start()

    def do(self, errand: Errand) -> Report:
        """All its writes, side by side."""
        return self._run(self._do(errand))

    def _run(self, call: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    async def _do(self, errand: Errand) -> Report:
        try:
            sink = await self._opened(errand)
        except Exception as exc:  # noqa: BLE001  a sink of another package may raise anything
            answer = Answer(error=told(exc))
            return Report(node=platform.node(), answers=[answer] * len(errand.writes))
        before = sink.new_events
        answers = await asyncio.gather(*(_write(sink, events) for events in errand.writes))
        new = None if sink.new_events is None else sink.new_events - (before or 0)
        return Report(node=platform.node(), answers=answers, new=new)

    async def _opened(self, errand: Errand) -> Sink:
        age, sink = self._sinks.get(errand.sink, (-1, None))
        if sink is not None and age == errand.age:
            return sink
        if sink is not None:
            del self._sinks[errand.sink]
            with suppress(Exception):  # whatever was wrong with it: there is a new one
                await sink.close()
        compare(errand.meant, meant_by_sink(errand.sink, errand.meant.key))
        [made] = create_sinks([errand.sink], SinkContext(configured().stream))
        try:
            await made.open(None, Mode.BACKFILL)
        except BatchRefused as exc:  # there are no events that could be at fault
            raise SinkUnavailable(sink=made.name, detail=exc.detail) from exc
        self._sinks[errand.sink] = errand.age, made
        gc.freeze()  # Spark collects garbage after each task: with what stays that is 35 ms of CPU, without it 2
        return made


async def _write(sink: Sink, events: Sequence[Event]) -> Answer:
    try:
        refusals = [*await sink.write(events)]
    except Exception as exc:  # noqa: BLE001  likewise
        return Answer(error=told(exc))
    numbers = {id(event): number for number, event in enumerate(events)} if refusals else {}
    return Answer(refusals=[(numbers[id(event)], reason, detail) for event, reason, detail in refusals])


_hands = cache(Hands)
"""Of this process: Spark begins a task in one that had others before."""
