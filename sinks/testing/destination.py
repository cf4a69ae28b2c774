"""Where a sink writes, as the conformance suite sees it: its author says how to look at it, and how to break it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby
from typing import Any, ClassVar

import msgspec

from replicator.contracts.events import Event, SinkPosition
from replicator.contracts.fields import BIGINT, INT64_MAX, INT64_MIN, TEXT, TIMESTAMPTZ, Field, Role, Stream
from replicator.contracts.sink import Mode, Sink, SinkContext
from sinks import create_sinks

SAMPLE_TIME = datetime(2026, 1, 8, 14, 21, 52, 123_456, tzinfo=UTC)
SAMPLE_TEXT = 'ü "two"\\\n\t日本 🎬'
CHANGING = Stream(
    "parcels",
    "public.parcels",
    (
        Field("parcel_id", TEXT, role=Role.IDENTITY),
        Field("depot", TEXT, role=Role.KEY),
        Field("at", TIMESTAMPTZ, role=Role.TIME),
        Field("revision", BIGINT),
        Field("note", TEXT.nullable()),
    ),
    updates="upsert",
    deletes="delete",
)
"""What a sink that takes any stream gets as well: rows that change, whose identity and key are texts."""

decode: Callable[[bytes | str], dict[str, Any]] = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode
"""An event's JSON, with numbers as exact as there."""


def sample(stream: Stream, number: int, time: datetime | None = SAMPLE_TIME) -> Event:
    """Event `number`, of its own key: text in Unicode and numbers of 64 bits; every other one has nulls.

    Without a time, `event_ts` is infinity.
    """
    values: dict[str, Any] = {}
    sources = {name for field in stream.fields if field.derived for name in field.derived.of}
    for field in stream.fields:
        if field.derived:
            values[field.name] = field.derived.function(*(values[name] for name in field.derived.of))
        elif field.role is Role.TIME:
            values[field.name] = time.isoformat().replace("+00:00", "Z") if time else "infinity"
        elif field.role:
            values[field.name] = number if field.type.python is int else f"{number} {SAMPLE_TEXT}"
        elif field.type.optional and number % 2:
            values[field.name] = None
        elif field.type.python is str:
            values[field.name] = SAMPLE_TEXT
        else:
            values[field.name] = 7_000 if field.name in sources else INT64_MIN + number % 2
    ts_us = int(time.timestamp()) * 1_000_000 + time.microsecond if time else None
    of, about = values[stream.identity.name], values[stream.key.name]
    return Event(commit_lsn=100, ordinal=1, id=of, key=about, ts_us=ts_us, json=msgspec.json.encode(values))


class Destination(ABC):
    """Where a sink writes. Each test has a new one, which is empty."""

    name: ClassVar[str] = ""
    """The sink's; `pytest --sink NAME` sets it."""
    keeps_repeats = False
    """Whether an event that is written twice may be there twice, as at an HTTP API."""
    keeps_order = False
    """Whether `read` gives the events in the order in which they came."""

    def __init__(self, stream: Stream) -> None:
        numbers = [INT64_MIN, INT64_MAX, *range(1, 8)]
        self.samples = [sample(stream, number) for number in numbers]
        self.refused: Event | None = sample(stream, 100, None)
        """An event that it can't hold: this one's time is infinite. None: it holds every event."""
        self.stream = stream

    def follow(self) -> None:
        """Nothing is there yet, and what comes is of CHANGING. Only a sink that takes any stream is asked to."""
        self.stream = CHANGING
        self.refused = self.refused and sample(CHANGING, 100, None)

    @property
    def context(self) -> SinkContext:
        """What `sink` is made with: as where a slot has several streams, so that its messages have to say its name."""
        return SinkContext(self.stream, f" --stream {self.stream.name}")

    def sink(self) -> Sink:
        """A new sink that writes `stream` here, neither created nor open: that of `name`, with the settings of now."""
        return create_sinks([self.name], self.context)[0]

    @abstractmethod
    def read(self) -> Iterable[dict[str, Any]]:
        """All events that are there, each as often as it is there. Fractions are exact (Decimal).

        Of rows that change: each row that is there, as it is now; what was deleted is not.
        """

    @abstractmethod
    def outage(self) -> AbstractContextManager[None]:
        """Makes it unreachable until the end; also before a sink has made anything there."""

    def silence(self) -> AbstractContextManager[None] | None:
        """Until the end it answers nothing; None: it can't be made to. May be ended by another thread."""
        return None

    def refusal(self, event: Event) -> AbstractContextManager[None] | None:  # noqa: ARG002  for subclasses
        """Makes it refuse writes with this event until the end; None: it never refuses an event."""
        return None

    @asynccontextmanager
    async def opened(self, mode: Mode = Mode.LIVE, start: SinkPosition | None = None) -> AsyncIterator[Sink]:
        """A sink as a lane has it."""
        sink = self.sink()
        try:
            await sink.create()
            await sink.open(start, mode)
            yield sink
        finally:
            await sink.close()

    def assert_holds(self, events: Sequence[Event]) -> None:
        """These events and no others are there, in every field."""
        identity = self.stream.identity.name
        there = sorted(self.read(), key=lambda event: str(event[identity]))
        if self.keeps_repeats:
            there = [event for event, _ in groupby(there)]
        assert there == [decode(event.json) for event in sorted(events, key=lambda event: str(event.id))]
