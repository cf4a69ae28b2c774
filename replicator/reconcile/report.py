"""What `reconcile` found, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Literal, TypeAlias

import msgspec

from replicator.contracts.events import Id, counted

SHOWN = 20
"""How many of a kind are named; all are counted."""

Kind: TypeAlias = Literal["missing", "different", "extra", "not_counted", "counts_too_low", "counts_too_high"]
"""What can be wrong at a sink. Counts that are too high are a difference only where deletes reach it: else deleted rows
stay counted."""


class WrongCount(msgspec.Struct, frozen=True):
    """A sink's count of one key; the source had `least` to `most` events before and after the sink was asked."""

    key: Id
    found: int
    least: int
    most: int

    def __str__(self) -> str:
        wanted = self.least if self.least == self.most else f"{self.least} to {self.most}"
        return f"{self.key} has {self.found} instead of {wanted}"


class Tally(msgspec.Struct):
    """How many of a kind there are, and the first of them: event ids, or counts."""

    count: int = 0
    first: list[Id | WrongCount] = []

    def add(self, found: Iterable[Id | WrongCount]) -> None:
        """Count these."""
        for one in found:
            self.count += 1
            if len(self.first) < SHOWN:
                self.first.append(one)

    def __str__(self) -> str:
        names = f": {', '.join(map(str, self.first))}" if self.first else ""
        more = f" and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return f"{self.count}{names}{more}"


class SinkReport(msgspec.Struct):
    """One sink beside the source."""

    sink: str
    source_events: int | None = None
    """Events of the range; None if single events can't be compared. The same for `sink_events`."""
    sink_events: int | None = None
    found: dict[Kind, Tally] = {}
    """A kind that was not looked for is absent."""
    left: Tally = msgspec.field(default_factory=Tally)
    """What differs at the end."""
    hints: list[str] = []
    """What the operator can do."""
    deletes: bool = False
    """Whether a row that is deleted is deleted there, too."""

    def add(self, kind: Kind, found: Iterable[Id | WrongCount] = ()) -> None:
        """Count these; report the kind even if there are none."""
        self.found.setdefault(kind, Tally()).add(found)

    def has(self, *kinds: Kind) -> bool:
        """Whether any of a kind was found."""
        return any(self.found[kind].count for kind in kinds)

    @property
    def differences(self) -> int:
        """How many there were before a repair."""
        return sum(tally.count for kind, tally in self.found.items() if kind != "counts_too_high" or self.deletes)

    def lines(self) -> Iterator[str]:
        """For an operator."""
        if self.source_events is not None:
            late = self.source_events != self.sink_events and not self.differences
            meanwhile = " (more were added meanwhile)" if late else ""
            yield f"{counted(self.source_events, 'event')} in PostgreSQL, {self.sink_events} in {self.sink}{meanwhile}"
        yield from (f"{kind.replace('_', ' ')} {tally}" for kind, tally in self.found.items())
        if self.left.count != self.differences:
            yield f"left after the repair {self.left}"
        yield from self.hints


class ReconcileReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole comparison, and the form of `reconcile --json`."""

    outcome: Literal["equal", "repaired", "different"]
    """`repaired`: something differed, and no longer does."""
    start: datetime
    end: datetime
    seconds: float
    """How long it took."""
    doubt: str
    """Why what differs may only be on its way still; empty if it can't be."""
    sinks: list[SinkReport]

    @property
    def exit_code(self) -> int:
        """3 if anything differs at the end."""
        return 3 if self.outcome == "different" else 0
