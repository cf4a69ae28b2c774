"""Does it really differ, or is it still on its way? A second look at what `compare.py` found."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

from replicator.contracts.events import Lsn, format_lsn
from replicator.contracts.ledger import EventDigest, Ledger, SourceLedger
from replicator.reconcile.compare import Candidates
from replicator.source import slot as slots

POLL_SECONDS = 0.2
LOOK_TIMEOUT_SECONDS = 10


class Verdict(NamedTuple):
    """How some events differ."""

    missing: list[int]
    """Ids that only the source has."""
    different: list[EventDigest]
    """As the destination has them, with another hash than at the source."""
    extra: list[EventDigest]
    """Only the destination has them."""
    read_at: Lsn = 0
    """The source was read before this WAL position."""

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.missing or self.different or self.extra)


def diff(wanted: Iterable[EventDigest], found: Iterable[EventDigest]) -> Verdict:
    """Compare event by event. An event is known by id, time and key."""
    source = {row[:3]: row for row in wanted}
    there = {row[:3]: row for row in found}
    return Verdict(
        missing=sorted(row.id for known, row in source.items() if known not in there),
        different=[row for known, row in there.items() if known in source and source[known].hash != row.hash],
        extra=[row for known, row in there.items() if known not in source],
    )


class SlotWaiter:
    """Waits until the replicator has delivered what was committed before, which the slot tells."""

    def __init__(self, dsn: str, slot: str, patience_seconds: float) -> None:
        self.gave_up = ""
        """Why it no longer waits: differences may then still be on their way."""
        self._dsn = dsn
        self._slot = slot
        self._patience_seconds = patience_seconds

    async def wait(self, lsn: Lsn) -> None:
        """Return when every sink has everything committed before `lsn`, or when `gave_up` says why not."""
        deadline = time.monotonic() + self._patience_seconds
        while not self.gave_up:
            state = await slots.look(self._dsn, self._slot, "replicator reconcile", LOOK_TIMEOUT_SECONDS)
            confirmed = (state.confirmed_lsn or 0) if state else 0
            if confirmed >= lsn:
                return
            behind = f"slot {self._slot} has come to {format_lsn(confirmed)} and not to {format_lsn(lsn)}"
            if state is None:
                self.gave_up = f"there is no slot {self._slot}"
            elif state.active_pid is None:
                self.gave_up = f"no replicator runs, {behind}"
            elif time.monotonic() > deadline:
                self.gave_up = f"{behind} in {self._patience_seconds:.0f} s"
            else:
                await asyncio.sleep(POLL_SECONDS)


class Recheck:
    """The second look."""

    def __init__(self, source: SourceLedger, destination: Ledger, slot: SlotWaiter, patience_seconds: float) -> None:
        self.certain = True
        """No transaction is still open that may have written what seems to be extra."""
        self._source = source
        self._destination = destination
        self._slot = slot
        self._patience_seconds = patience_seconds

    async def verdict(self, candidates: Candidates) -> Verdict:
        """How these events differ once nothing is on its way any more.

        The destination must have what the source showed before the slot passed. The source must show what the
        destination has, as soon as the transactions that are open now have ended: with synchronous replication a
        commit is streamed before it is visible.
        """
        wanted = await self._source.find(*candidates)
        read_at = await self._source.lsn()
        await self._slot.wait(read_at)
        verdict = diff(wanted, await self._destination.find(*candidates))
        if verdict.extra:
            await self._transactions_end()
            late = await self._source.find([row.id for row in verdict.extra], *candidates[1:])
            verdict = verdict._replace(extra=diff(late, verdict.extra).extra)
        return verdict._replace(read_at=read_at)

    async def _transactions_end(self) -> None:
        until, deadline = await self._source.next_transaction(), time.monotonic() + self._patience_seconds
        while self.certain and await self._source.oldest_transaction() < until:
            self.certain = time.monotonic() < deadline
            await asyncio.sleep(POLL_SECONDS)
