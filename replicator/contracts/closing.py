"""The end: connections are released, whichever of them fails at it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Protocol, TypeAlias

CLOSE_SECONDS = 15.0
"""More than a sink of ours takes: the embedded ClickHouse waits 10 s for a running call."""

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

    A failure, or silence, loses nothing: it is logged, and hides no result.
    """
    async with asyncio.TaskGroup() as group:
        for what, close in closing.items():
            group.create_task(_release(what, close))


async def _release(what: str, close: Closing) -> None:
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
