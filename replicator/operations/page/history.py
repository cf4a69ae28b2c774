"""An hour of throughput and lag for each sink, in memory: 6 kB a sink, however long the process runs.

`http.py` serves it at `/history`, and the page draws it.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
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
    """The hour of one sink, a value a step."""

    def __init__(self) -> None:
        # Of every step twice: as it grows, and where it will be read from. NaN: nothing is known.
        self._rates, self._lags = (array("f", [math.nan]) * STEPS for _ in range(2))
        self._step = 0
        self._before = (0.0, 0)  # time and events at the end of the step before
        self._looks: deque[tuple[float, int]] = deque(maxlen=RECENT_LOOKS)

    def add(self, at: float, events: int, lag_seconds: float) -> None:
        """What is so at `at`: time.monotonic(), events since the process began, and the lag."""
        if self._move_to(at):
            self._before = self._looks[-1] if self._looks else (at, events)
        self._looks.append((at, events))
        place = self._step % STEPS
        began, before = self._before
        self._rates[place] = (events - before) / (at - began) if at > began else math.nan
        lag = self._lags[place]
        self._lags[place] = lag_seconds if math.isnan(lag) else max(lag, lag_seconds)

    def rate(self, at: float) -> float | None:
        """Events a second, of late; None: not known."""
        (began, before), (ended, events) = (self._looks[0], self._looks[-1]) if self._looks else ((at, 0), (at, 0))
        is_old = at - ended > STEP_SECONDS
        return None if is_old or ended == began else (events - before) / (ended - began)

    def hour(self, at: float) -> tuple[list[float | None], list[float | None]]:
        """Events a second and the largest lag in seconds, a value a step, the oldest first; None: not known.

        The last value is that of the last step that has ended.
        """
        self._move_to(at)
        places = [step % STEPS for step in range(self._step + 1, self._step + STEPS)]
        rates, lags = ([line[place] for place in places] for line in (self._rates, self._lags))
        return [*map(_known, rates)], [*map(_known, lags)]

    def _move_to(self, at: float) -> bool:
        """Begin the step of this moment; False: it was begun before. What lies between is not known."""
        step = int(at // STEP_SECONDS)
        if step <= self._step:
            return False
        for passed in range(max(self._step + 1, step - STEPS + 1), step + 1):
            self._rates[passed % STEPS] = self._lags[passed % STEPS] = math.nan
        self._step = step
        return True


def _known(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


class History:
    """The hour of every sink. `start` and `stop` belong to the event loop that runs the pipeline."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._lines: dict[str, Line] = {}
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
            line = self._lines.setdefault(lane.name, Line())
            line.add(now, lane.stats.events, self._watchdog.lag_seconds(lane))

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
