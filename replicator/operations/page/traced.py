"""What became of one event, as a page: `/trace?id=301013` shows what the command `trace` says.

Where the slot has several streams, `&stream=orders` says which one it is of.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from replicator.contracts.errors import ReplicatorError, command
from replicator.operations.follow.trace import BAD, Trace, as_made, shown
from replicator.operations.page.render import ASSETS, environment

if TYPE_CHECKING:
    from jinja2 import Template

TRACE_SECONDS = 4.0
"""Less than a request may take. The command has more patience with servers that are away."""
STATES = {"written": "well", "waiting": "paused", "unknown": "silent"} | dict.fromkeys(BAD, "wrong")
"""What became of it → its colour."""

TraceOf = Callable[[str, str | None], Awaitable[Trace]]
"""By id and stream; without a stream, of the only one."""


class Traced:
    """One event at a time, however many ask: each costs the servers some queries."""

    def __init__(self, trace: TraceOf, streams: Sequence[str] = ()) -> None:
        self._trace = trace
        self._streams = streams
        self._one_at_a_time = asyncio.Lock()

    async def document(self, query: str) -> bytes:
        """Of the event that a request's query names."""
        given = parse_qs(query)
        asked, stream = "".join(given.get("id", [])), next(iter(given.get("stream", [])), None)
        found, problem = await self._found(asked, stream)
        words = {"asked": asked, "streams": self._streams, "stream": stream, "found": found, "problem": problem}
        return self._page.render(**words, states=STATES, shown=shown, as_made=as_made).encode()

    async def _found(self, asked: str, stream: str | None) -> tuple[Trace | None, str]:
        """What became of it, or why that is not known."""
        try:
            async with asyncio.timeout(TRACE_SECONDS), self._one_at_a_time:
                return await self._trace(asked, stream), ""
        except TimeoutError:
            option = f" --stream {shlex.quote(stream)}" if stream is not None else ""
            patient = command(f"trace {shlex.quote(asked)}{option}")
            return None, f"The servers did not answer within {TRACE_SECONDS:g} s. {patient} waits longer."
        except ReplicatorError as exc:
            return None, str(exc)

    @cached_property
    def _page(self) -> Template:
        return environment().from_string((ASSETS / "trace.html").read_text(encoding="utf-8"))
