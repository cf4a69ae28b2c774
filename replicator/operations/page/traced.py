"""What became of one event, as a page: `/trace?id=301013` shows what the command `trace` says."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from replicator.contracts.errors import PROGRAM, ReplicatorError
from replicator.operations.follow.trace import BAD, Trace, number
from replicator.operations.page.render import ASSETS, environment

if TYPE_CHECKING:
    from jinja2 import Template

TRACE_SECONDS = 4.0
"""Less than a request may take. The command has more patience with servers that are away."""
STATES = {"written": "well", "waiting": "paused", "unknown": "silent"} | dict.fromkeys(BAD, "wrong")
"""What became of it → its colour."""

TraceOf = Callable[[str], Awaitable[Trace]]


class Traced:
    """One event at a time, however many ask: each costs the servers some queries."""

    def __init__(self, trace: TraceOf) -> None:
        self._trace = trace
        self._one_at_a_time = asyncio.Lock()

    async def document(self, query: str) -> bytes:
        """Of the event that a request's query names."""
        asked = "".join(parse_qs(query).get("id", []))
        found, problem = await self._found(asked)
        page = self._page.render(asked=asked, found=found, problem=problem, states=STATES, shown=_shown, whole=_whole)
        return page.encode()

    async def _found(self, asked: str) -> tuple[Trace | None, str]:
        """What became of it, or why that is not known."""
        try:
            async with asyncio.timeout(TRACE_SECONDS), self._one_at_a_time:
                return await self._trace(asked), ""
        except TimeoutError:
            command = f"`{PROGRAM} trace {shlex.quote(asked)}`"
            return None, f"The servers have not answered within {TRACE_SECONDS:g} s. {command} waits longer."
        except ReplicatorError as exc:
            return None, str(exc)

    @cached_property
    def _page(self) -> Template:
        return environment().from_string((ASSETS / "trace.html").read_text(encoding="utf-8"))


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _whole(trace: Trace) -> str:
    return json.dumps(trace.event, default=number, ensure_ascii=False)
