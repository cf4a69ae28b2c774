"""Who looks at the page, and what they are sent: once a second what has changed, the same bytes to all of them.

Nothing is made while nobody looks. `render.py` makes the parts, `http.py` has the connections.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from replicator import __version__
from replicator.contracts.stores import TaskProgress
from replicator.operations.page.beside import Beside
from replicator.operations.page.history import History
from replicator.operations.page.render import ASSETS, Rendered, Renderer
from replicator.operations.watchdog import Watchdog

UPDATE_SECONDS = 1.0
"""The page says after some seconds without an update that the replicator is silent."""
VIEWERS = 16
"""One more, and the oldest is closed; its page asks again."""
UNREAD_BYTES = 131_072
"""Who has not read so much is closed."""
KINDS = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


class Live:
    """The page; `start` and `stop` belong to the event loop that runs the pipeline."""

    def __init__(
        self,
        watchdog: Watchdog,
        store: TaskProgress,
        slot: str,
        settings: Sequence[Mapping[str, Any]],
        streams: Sequence[str] = (),
    ) -> None:
        """`settings` as `config show --json` has them, without secrets; `streams` are those of the slot."""
        self.streams = streams
        self.history = History(watchdog)
        self.assets = {
            f"/{file.name}": (KINDS[kind], file.read_bytes())
            for file in ASSETS.iterdir()
            if (kind := file.name.rpartition(".")[2]) in KINDS
        }
        """Path → type and content."""
        self._beside = Beside(watchdog, store, slot)
        self._renderer = Renderer(watchdog, self.history, self._beside, settings, streams)
        self._document: tuple[int, bytes] = (-1, b"")
        self._rendered, self._rendered_at = Rendered("", "", {}), -math.inf
        self.viewers: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._updating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin the history."""
        self.history.start()

    def stop(self) -> None:
        """Close everybody's connection. Safe to call at any time."""
        self.history.stop()
        self._beside.stop()
        self._close([*self.viewers])

    async def document(self) -> bytes:
        """The page as it is now, made at most once a second."""
        self._beside.renew()
        await self._beside.settle()
        second = int(asyncio.get_running_loop().time())
        if self._document[0] != second:
            self._document = second, self._renderer.document().encode()
        return self._document[1]

    async def follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send updates until the viewer goes, says anything, or does not read."""
        while len(self.viewers) >= VIEWERS:
            self._close([next(iter(self.viewers))])
        if not self.viewers and time.monotonic() - self._rendered_at >= UPDATE_SECONDS:
            self._render()
        self.viewers[writer] = None
        self._send(writer, _event(self._rendered, self._rendered.parts))
        if self._updating is None or self._updating.done():
            self._updating = asyncio.create_task(self._update())
        try:
            await reader.read(1)
        finally:
            self.viewers.pop(writer, None)
        if self._updating.done() and not self._updating.cancelled():
            self._updating.result()

    async def _update(self) -> None:
        """A failure closes everybody's connection: the page must not look as if all were well."""
        try:
            while self.viewers:
                self._beside.renew()
                await asyncio.sleep(UPDATE_SECONDS)
                before = self._rendered.parts
                self._render()
                changed = {name: part for name, part in self._rendered.parts.items() if before.get(name) != part}
                update = _event(self._rendered, changed)
                for writer in [*self.viewers]:
                    self._send(writer, update)
        finally:
            self._close([*self.viewers])

    def _render(self) -> None:
        self._rendered_at, self._rendered = time.monotonic(), self._renderer.parts()

    def _send(self, writer: asyncio.StreamWriter, update: bytes) -> None:
        writer.write(update)
        if writer.transport.get_write_buffer_size() > UNREAD_BYTES:
            self._close([writer])

    def _close(self, writers: Sequence[asyncio.StreamWriter]) -> None:
        for writer in writers:
            self.viewers.pop(writer, None)
            writer.transport.abort()


def _event(now: Rendered, parts: Mapping[str, str]) -> bytes:
    """In the form of server-sent events."""
    data = {"version": __version__, "state": now.state, "title": now.title, "parts": parts}
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
