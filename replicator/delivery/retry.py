"""Trying again: which errors, after which pause, and how the log hears of it. Everything that retries does it here.

The error says what happened (contracts/errors.py); what to do about it is decided here. Every other error ends the
program. With tenacity or stamina, pause, sleep, stop and log would still be written here, and each call costs 16 µs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from replicator.contracts import errors

log = logging.getLogger(__name__)

BASE_SECONDS = 0.1
"""Upper end of the first pause; it doubles up to the setting's maximum (AWS, "Exponential Backoff And Jitter")."""
STANDBY_SECONDS = 1.0
"""How often a standby asks for the slot."""
LOOK_SECONDS = 5.0
"""How often tables that don't fit are looked at: a few catalog queries, and it goes on as soon as they do."""
OPERATOR_SECONDS = 30.0
"""Pause while only an operator can help: it should not look like an attack on the destination."""
RETRY_AFTER_MAX_SECONDS = 900.0
"""A destination may name a time, but a broken one must not silence its lane for days."""
CANCEL_SECONDS = 0.5
"""How long a task that is cancelled may take before it is cancelled again."""
COMPLAINT_SECONDS = 30.0
"""Trouble is logged when it begins, and then once in this time."""

HELD = (errors.SinkUnusable, errors.SinkBroken)
"""What ends a command that runs once and holds a lane."""
RETRYABLE = (
    errors.SourceUnavailable,
    errors.SlotInUse,
    errors.TablesUnsettled,
    errors.TablesUnfit,
    errors.CheckpointUnavailable,
    errors.SinkUnavailable,
    errors.SinkMisconfigured,
    errors.DeadLettersFull,
)
NEEDS_OPERATOR = (errors.SinkMisconfigured, errors.DeadLettersFull, errors.SinkRefusesAll, errors.TablesUnfit, *HELD)

T = TypeVar("T")


class Stopped(Exception):
    """A stop was asked for before the next try."""


class Trouble:
    """Why something does not work at the moment; false while it does. Several callers can share one."""

    def __init__(
        self,
        message: str = "",
        *,
        over: Callable[[float], str] | None = None,
        sink: str = "",
        code: str = "",
        level: int = logging.ERROR,
    ) -> None:
        """`over` makes what is logged when it ends, of the seconds that it lasted; `sink` is whose trouble it is.

        `code` is that of problems that are no errors; `level` is the log's.
        """
        self.message = message
        """The newest problem with its cure; empty while there is none."""
        self.cure = ""
        """The end of the message; empty where the problem has none."""
        self.code = ""
        """Of the error that it is; empty when it is none."""
        self.needs_operator = False
        """Retrying alone does not end it."""
        self.standby = False
        """Another process has the slot: there is nothing to mend."""
        self.failures = 0
        """Tries that failed since the program began."""
        self._over = over
        self._level = level
        self._extra = {name: value for name, value in (("sink", sink), ("code", code)) if value}
        self._callers = 0
        self._since = 0.0
        self._logged: dict[type, float] = {}  # when each kind of problem was; empty while there is none

    def __bool__(self) -> bool:
        return bool(self.message)

    def seconds(self) -> float:
        """How long it has lasted; 0.0 while there is none."""
        return time.monotonic() - self._since if self._logged else 0.0

    def say(self, problem: Exception | str) -> None:
        """Keep it. Log a kind of problem when it begins, and again while it lasts, but a standby waits quietly."""
        now, kind = time.monotonic(), type(problem)
        if not self._logged:
            self._since = now
        self.standby = kind is errors.SlotInUse
        if kind not in self._logged or (now - self._logged[kind] > COMPLAINT_SECONDS and not self.standby):
            log.log(logging.WARNING if self.standby else self._level, "%s", problem, extra=self._extra)
            self._logged[kind] = now
        self.message = str(problem)
        self.cure, self.code = "", ""
        if isinstance(problem, errors.ReplicatorError):
            self.cure, self.code = problem.advice, problem.code
        self.needs_operator = isinstance(problem, NEEDS_OPERATOR)

    def begin(self) -> None:
        """One more caller fails."""
        self._callers += 1

    def end(self, *, well: bool = True) -> None:
        """One of the callers has succeeded, or has another problem: it is over when all have."""
        self._callers -= 1
        if self._callers <= 0:
            if self._over and well:
                log.info("%s", self._over(self.seconds()), extra=self._extra)
            self.clear()

    def clear(self) -> None:
        """All is well."""
        self.message = self.cure = self.code = ""
        self.needs_operator, self.standby, self._callers = False, False, 0
        self._logged.clear()


async def retry(
    call: Callable[[], Awaitable[T]],
    trouble: Trouble,
    longest: float,
    *,
    stopping: asyncio.Event | None = None,
    fresh_after: float | None = None,
    retried: tuple[type[Exception], ...] = RETRYABLE,
) -> T:
    """Call until it succeeds; the pauses are at most `longest` seconds unless the destination names a time.

    A call that lasted `fresh_after` seconds did well: the next pause is the shortest again. Raises Stopped when
    `stopping` is set after a failure, and every error that is not `retried`.
    """
    stopping, attempt, failed = stopping or asyncio.Event(), 0, False
    while True:
        began = time.monotonic()
        try:
            result = await call()
        except retried as exc:
            if not failed:
                trouble.begin()
            if fresh_after is not None and time.monotonic() - began > fresh_after:
                attempt = 0
            trouble.failures += 1
            trouble.say(exc)
            await wait(stopping, pause_seconds(exc, attempt, longest))
            if stopping.is_set():
                raise Stopped from exc
            failed = True
            attempt += not isinstance(exc, errors.SlotInUse)  # a standby that waited long takes over as soon as others
        except Exception:
            if failed:
                trouble.end(well=False)
            raise
        else:
            if failed:
                trouble.end()
            return result


def pause_seconds(exc: Exception, attempt: int, longest: float) -> float:
    """How long to wait after this error, when the attempt (0, 1, 2 …) failed."""
    if isinstance(exc, errors.SlotInUse):
        return STANDBY_SECONDS
    if isinstance(exc, errors.TablesUnfit):
        return min(LOOK_SECONDS, longest)
    if isinstance(exc, NEEDS_OPERATOR):
        return min(OPERATOR_SECONDS, longest)
    # A named time is the least: 0, or a date that has passed, must not become a storm.
    named = exc.retry_after or 0.0 if isinstance(exc, errors.SinkUnavailable) else 0.0
    return max(min(named, RETRY_AFTER_MAX_SECONDS), backoff(attempt, longest))


def backoff(attempt: int, longest: float) -> float:
    """Full jitter: anything between 0 and a limit that doubles with each attempt, seconds."""
    return random.uniform(0, min(longest, BASE_SECONDS * 2 ** min(attempt, 30)))  # noqa: S311  not a secret


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel them, and wait until they have ended; their errors are theirs.

    One that has not ended soon is cancelled once more: the first time psycopg asks the server, for up to 10 s, to end
    the query, and a server that is silent ends nothing.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=CANCEL_SECONDS)
        for task in ended:
            if not task.cancelled():
                task.exception()  # else asyncio says that nobody asked


async def wait(event: asyncio.Event, seconds: float | None) -> None:
    """Return when it is set, or after so many seconds (None: only then)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
