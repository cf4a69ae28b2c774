"""What driver and nodes send each other about writes: events there, refusals and errors back. Pure.

An error comes back as what it was, so that the lane (`delivery/writer.py`) treats it as if the sink were its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from replicator.contracts.errors import (
    BatchRefused,
    BatchTooLarge,
    ReplicatorError,
    SinkBroken,
    SinkEmptied,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    SinkUnusable,
    frames,
)
from replicator.contracts.events import Event, Refusal, RowChange
from replicator_spark.nodes import Meant

FACTS: dict[type[SinkError], tuple[str, ...]] = {
    SinkUnavailable: ("detail", "retry_after"),
    BatchRefused: ("detail", "reason"),
    BatchTooLarge: ("detail", "reason"),
    SinkMisconfigured: ("detail", "cure"),
    SinkUnusable: ("detail", "cure"),
    SinkEmptied: ("detail", "cure"),
    SinkBroken: ("detail",),
}
"""What a sink may raise, and what each is made of."""
KINDS = {kind.__name__: kind for kind in FACTS}


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """Writes of one sink for one task. Each is a write of its own, with an answer of its own."""

    sink: str
    meant: Meant
    age: int
    """A sink that was opened for a smaller one is opened anew."""
    writes: list[list[RowChange]]
    """As a node reads them. What is sent of an `Event` has the rest by default: its row never changes."""


class Told(msgspec.Struct, frozen=True):
    """An error, as it is sent."""

    kind: str
    facts: dict[str, str | float | None]
    frames: str = ""
    """Where a bug is, without its message: that may have anything in it."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one write."""

    refusals: list[tuple[int, str, str]] = []
    """The event's number in the write, the reason and the detail."""
    error: Told | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an errand."""

    node: str
    answers: list[Answer]
    new: int | None = None
    """Events that the destination did not have; None: the sink can't tell."""


def told(exc: Exception) -> Told:
    """The error as it is sent. A bug is sent by its name."""
    kind = next((kind for kind in type(exc).__mro__ if kind in FACTS), None)
    if kind is not None:
        return Told(kind.__name__, {fact: getattr(exc, fact) for fact in FACTS[kind]})
    if isinstance(exc, ReplicatorError):  # the node has other settings, or unusable ones
        return Told(SinkUnusable.__name__, {"detail": exc.problem, "cure": exc.cure})
    return Told(SinkBroken.__name__, {"detail": type(exc).__name__}, frames(exc))


def error(sink: str, found: Told) -> SinkError:
    """The error that it was."""
    facts: dict[str, object] = {**found.facts}
    return KINDS[found.kind](sink=sink, **facts)  # type: ignore[arg-type]  # `told` has named what this kind takes


def refusals(events: Sequence[Event], answer: Answer) -> list[Refusal]:
    """Of the driver's own events."""
    return [Refusal(events[number], reason, detail) for number, reason, detail in answer.refusals]
