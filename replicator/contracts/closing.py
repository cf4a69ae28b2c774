"""The end: connections are released, whichever of them fails at it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from threading import Event, Thread
from typing import Protocol, TypeAlias

CLOSE_SECONDS = 15.0
"""More than a sink of ours takes: the embedded ClickHouse waits 10 s for a running call."""

GRACE_SECONDS = 5.0
"""So much later everything that waits has been given up: what still goes on holds the event loop."""

Closing: TypeAlias = Callable[[], Awaitable[None]]

log = logging.getLogger(__name__)


class Closes(Protocol):
    """What has connections."""

    async def close(self) -> None:
        """Release them."""


async def close_all(*opened: Closes) -> None:
    """Close each of them in this order, also after one that raises; then what was raised is raised."""
    async with AsyncExitStack() as stack:
        for one in reversed(opened):
            stack.push_async_callback(one.close)


async def release(closing: Mapping[str, Closing]) -> None:
    """Close what is no longer needed, by what each is; `sink NAME` is a sink.

    A failure, or silence, loses nothing: it is logged, and hides no result. One that blocks the event loop ends the
    program, if `blocking_ends` says how.
    """
    left = dict.fromkeys(closing)
    with _watched(left):
        async with asyncio.TaskGroup() as group:
            for what, close in closing.items():
                group.create_task(_release(what, close, left))


@contextmanager
def blocking_ends(end: Callable[[], object]) -> Iterator[None]:
    """This program is ours to end, by this: not even a signal would end it then."""
    _ends.append(end)
    try:
        yield
    finally:
        _ends.remove(end)


_ends: list[Callable[[], object]] = []


@contextmanager
def _watched(left: Mapping[str, None]) -> Iterator[None]:
    """From a thread: the event loop can't."""
    released = Event()

    def watch() -> None:
        # Twice: a process that was stopped meanwhile has had no time.
        if released.wait(CLOSE_SECONDS) or released.wait(GRACE_SECONDS):
            return
        log.error("%s can't be closed: it blocks the program, which ends", " or ".join(left), extra={"code": "R521"})
        for end in _ends:
            end()

    if _ends:
        Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        released.set()


async def _release(what: str, close: Closing, left: dict[str, None]) -> None:
    async def closed() -> BaseException | None:
        try:
            await close()
        except (Exception, SystemExit) as exc:  # noqa: BLE001  a sink of another package may raise anything
            return exc
        return None

    task = asyncio.create_task(closed())
    try:
        done, _ = await asyncio.wait([task], timeout=CLOSE_SECONDS)
    finally:
        task.cancel()
        del left[what]
    if not done:
        why = f"it has not ended within {CLOSE_SECONDS:.0f} s"
    elif task.cancelled():  # by itself
        why = asyncio.CancelledError.__name__
    elif failure := task.result():
        why = type(failure).__name__  # without its message, which may have anything in it
    else:
        return
    fields = {"sink": what.removeprefix("sink ")} if what.startswith("sink ") else {}
    log.warning("%s could not be closed (%s)", what, why, extra={"code": "R520", **fields})
