"""An hour of throughput and lag for each sink, in memory: 45 kB a sink, however long the process runs.

`http.py` serves it at `/history`, and the page draws it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from replicator.operations.watchdog import Watchdog

LOOK_SECONDS = 1.0
"""A look costs some microseconds; a lag that lasts as long is seen."""
STEP_SECONDS = 10
STEPS = 360
"""An hour: a point for two pixels of a wide screen."""
RECENT_LOOKS = 6
"""What the rate of the moment is made of: five seconds, as ClickHouse gets a write a second."""


class Line:
    """The hour of one sink: events a second and the largest lag of each step; None: not known."""

    def __init__(self, began: float | None = None) -> None:
        """`began`: time.monotonic() of a moment when it had no events yet; None: how many it had is not known."""
        self._steps: deque[tuple[float | None, float | None]] = deque([(None, None)] * STEPS, STEPS)
        self._step = 0  # the number of the last of them, which runs
        self._before = (0.0, 0)  # time and events at the end of the step before
        self._looks: deque[tuple[float, int]] = deque([] if began is None else [(began, 0)], RECENT_LOOKS)

    def add(self, at: float, events: int, lag_seconds: float) -> None:
        """What is so at `at`: time.monotonic(), events since the process began, and the lag."""
        if self._move_to(at):
            self._before = self._looks[-1] if self._looks else (at, events)
        self._looks.append((at, events))
        began, before = self._before
        rate = round((events - before) / (at - began), 3) if at > began else None
        self._steps[-1] = rate, max(round(lag_seconds, 3), self._steps[-1][1] or 0.0)

    def rate(self, at: float) -> float | None:
        """Events a second, of late; None: not known."""
        (began, before), (ended, events) = (self._looks[0], self._looks[-1]) if self._looks else ((at, 0), (at, 0))
        is_old = at - ended > STEP_SECONDS
        return None if is_old or ended == began else (events - before) / (ended - began)

    def hour(self, at: float) -> tuple[list[float | None], list[float | None]]:
        """Events a second and the largest lag in seconds, a value a step that has ended, the oldest first."""
        self._move_to(at)
        ended = [*self._steps][:-1]
        return [rate for rate, _ in ended], [lag for _, lag in ended]

    def _move_to(self, at: float) -> bool:
        """Begin the step of this moment; False: it was begun before. What lies between is not known."""
        step = int(at // STEP_SECONDS)
        if step <= self._step:
            return False
        self._steps.extend([(None, None)] * min(step - self._step, STEPS))
        self._step = step
        return True


class History:
    """The hour of every sink. `start` and `stop` belong to the event loop that runs the pipeline."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._lines: dict[str, Line] = {}
        self._looked_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look once a second from now on."""
        self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self.start)  # first: a bug ends no history
        self.look()

    def stop(self) -> None:
        """Look no more. Safe to call at any time."""
        if self._timer:
            self._timer.cancel()

    def look(self) -> None:
        """See how far every sink is."""
        now = time.monotonic()
        for lane in self._watchdog.pipeline.fan_out.every:
            if lane.name not in self._lines:  # it was not there at the look before, and may have got a backlog since
                self._lines[lane.name] = Line(self._looked_at)
            self._lines[lane.name].add(now, lane.stats.events, self._watchdog.lag_seconds(lane))
        self._looked_at = now

    @property
    def step(self) -> int:
        """The number of the step that runs: `hours` says the same until it ends."""
        return int(time.monotonic() // STEP_SECONDS)

    def rate(self, sink: str) -> float | None:
        """Events a second that it gets, of late; None: not known."""
        return self._lines[sink].rate(time.monotonic()) if sink in self._lines else None

    def hours(self) -> dict[str, tuple[list[float | None], list[float | None]]]:
        """By sink: events a second and the largest lag, as `Line.hour` has them."""
        now = time.monotonic()
        return {name: line.hour(now) for name, line in self._lines.items()}
