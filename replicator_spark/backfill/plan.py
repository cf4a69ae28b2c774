"""How far a backfill on a cluster is: its slices and the place of each. Pure; `crew.py` works it off."""

from __future__ import annotations

from math import ceil

import msgspec
from msgspec import structs

from enrichment import Slice
from replicator.delivery.backfill import BackfillProgress

EVENTS_A_SLICE = 250_000
"""Two seconds of a core or more: all cores are busy to the end, and connecting for each slice, 0.3 s, costs little."""
MOST_SLICES = 1_000
"""Their places are one text in the checkpoint database, 300 kB."""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One slice, and how far it is."""

    slice: Slice
    reached: BackfillProgress
    done: bool = False


class Plan(msgspec.Struct, kw_only=True):
    """All slices of a range."""

    total: int
    """Events in the range, counted when it began."""
    shares: list[Share]

    @property
    def written(self) -> BackfillProgress:
        """All slices together. There is no one place."""
        return BackfillProgress(place="", events=sum(share.reached.events for share in self.shares), total=self.total)

    @property
    def left(self) -> list[int]:
        """The numbers of the slices that are not done."""
        return [number for number, share in enumerate(self.shares) if not share.done]


def usual_slices(total: int) -> int:
    """How many there are unless somebody says otherwise."""
    return min(max(1, ceil(total / EVENTS_A_SLICE)), MOST_SLICES)


def begun(slices: list[Slice], total: int) -> Plan:
    """From the beginning."""
    start = [BackfillProgress(place=part.place, events=0, total=total) for part in slices]
    return Plan(total=total, shares=[Share(slice=part, reached=at) for part, at in zip(slices, start, strict=True)])


def kept(plan: Plan) -> str:
    """As it is saved: how far all of it is stands there as of any backfill, for the page."""
    return msgspec.json.encode({**structs.asdict(plan.written), "shares": plan.shares}).decode()
