"""How a stream ended, and whether streams end again and again without coming further. `stream.py` reads them."""

from __future__ import annotations

import re
import time

from psycopg import pq
from psycopg.errors import Diagnostic

from replicator.contracts.errors import SlotUndecodable, SourceUnavailable, StreamEnded, StreamStuck
from replicator.contracts.events import Mark, format_lsn

STUCK_TIMES = 3
"""Once is an accident and twice can be a restart. What PostgreSQL says it can't decode is sure the second time."""

_INTERVENTION = "57"  # class operator_intervention: a query that was cancelled, a shutdown


class Breaks:
    """The ends of one source's streams."""

    def __init__(self) -> None:
        self.count = 0
        """How many broke since the program began."""
        self.stuck = ""
        """That and why they come no further; empty while they do."""
        self._furthest = Mark()
        self._times = 0
        self._since = 0.0  # time.monotonic()

    def moved(self, mark: Mark) -> None:
        """The stream was read up to here; what it repeats after a reconnect is not further."""
        if mark.position > self._furthest.position or mark.end_lsn > self._furthest.end_lsn:
            self._furthest = self._furthest.later(mark)
            self._times, self.stuck = 0, ""

    def broke(self, error: SourceUnavailable) -> SourceUnavailable:
        """Count it. Returns the error to raise: the same one, or that there is no progress."""
        self.count += 1
        self._times += 1
        if self._times == 1:
            self._since = time.monotonic()
        if self._times < (2 if isinstance(error, SlotUndecodable) else STUCK_TIMES):
            return error
        place = max(self._furthest.end_lsn, self._furthest.position.commit_lsn)
        seconds = time.monotonic() - self._since
        stuck = StreamStuck(lsn=format_lsn(place), times=self._times, seconds=seconds, last=error)
        self.stuck = str(stuck)
        return stuck


def end_of_stream(result: pq.abc.PGresult | None, slot: str, received: str) -> SourceUnavailable:
    """Why PostgreSQL ended it: an ERROR is about what it decodes, anything else about the connection."""
    if result is None:
        return StreamEnded(detail="without a reason")
    said = Diagnostic(result)
    sqlstate, message = said.sqlstate or "", said.message_primary or "without a reason"
    if said.severity_nonlocalized != "ERROR" or sqlstate.startswith(_INTERVENTION):
        return StreamEnded(detail=message)
    places = re.findall(r"\b[0-9A-F]{1,8}/[0-9A-F]{1,8}\b", said.context or "")  # "…, associated LSN 0/1B89F68"
    detail = f"{', '.join(filter(None, (message, said.message_detail)))} (SQLSTATE {sqlstate})"
    return SlotUndecodable(slot=slot, lsn=places[-1] if places else f"{received} or later", detail=detail)
