"""The stdout sink: each event as a line of JSON on standard output, for a look at a slot or another program behind it.

A pipe keeps nothing: what the reader has not read when it ends is gone, and PostgreSQL has been told that it is there.
"""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Sequence
from functools import partial

from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.events import Event, Finding, Refusal, change
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Sink, SinkContext
from sinks.threads import BlockingCalls

STDOUT = 1
WRITE_SECONDS = 15.0
"""A reader that takes nothing for so long is reported. Its write goes on, and the events come again behind it."""
CURE = "Restart the replicator, piped into a program that reads until the end"

# What moves a terminal's cursor or turns its text around, beyond what JSON escapes anyway: C1 and bidirectional marks.
_CONTROL = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class StdoutSink(Sink):
    """Writes lines whole and in order; after a crash or a slow reader, some come again. Tests pass another `output`."""

    name = "stdout"
    takes_any_stream = True
    max_events = 1000

    def __init__(self, settings: Settings, context: SinkContext, *, output: int = STDOUT) -> None:
        super().__init__(settings, context)
        self._output = output
        self._calls = BlockingCalls("stdout")
        self._cut = False

    async def check(self) -> list[Finding]:
        """Writing nothing shows a descriptor that is closed, but not a reader that is gone."""
        try:
            os.write(self._output, b"")
        except OSError as exc:
            return [Finding(False, f"standard output: {exc.strerror}", CURE)]
        return [Finding(True, "standard output is open; a reader's end shows with the next event")]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        if events:
            lines = map(change, events) if self.stream.follows else (event.json for event in events)
            await self._print(b"\n".join([*lines, b""]))
        return []

    async def _print(self, lines: bytes) -> None:
        try:
            await self._calls.run(partial(self._put, lines), WRITE_SECONDS)
        except TimeoutError as exc:
            detail = f"standard output: its reader has taken nothing for {WRITE_SECONDS:g} s"
            raise SinkUnavailable(sink=self.name, detail=detail) from exc
        except OSError as exc:
            problem = f"its reader has ended. {CURE}" if exc.errno == errno.EPIPE else exc.strerror
            raise SinkUnavailable(sink=self.name, detail=f"standard output: {problem}") from exc

    def _put(self, lines: bytes) -> None:
        """Behind a line that an error cut off, a new one begins."""
        shown = _harmless(lines) if os.isatty(self._output) else lines
        left = memoryview(b"\n" + shown if self._cut else shown)
        while left:
            try:
                put = os.write(self._output, left)
            except BlockingIOError:  # whoever started us has made it so
                select.select([], [self._output], [])
                continue
            left, self._cut = left[put:], put < len(left)


def _harmless(lines: bytes) -> bytes:
    """The same JSON; a terminal only shows it."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", lines.decode()).encode()
