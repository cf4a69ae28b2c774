"""An HTTP server that people are told through: it remembers what it was sent, and misbehaves as a test says."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hook:
    """Listens on `port`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.statuses: list[int] = []
        """Of the next answers; 0: hang up without one. Then 200."""
        self.headers: dict[str, str] = {}
        self.silent_seconds = 0.0
        """Before it answers."""
        self.asked: list[str] = []
        """Method and path of each request, answered or not."""
        self.told: list[dict[str, Any]] = []
        """The messages that it has taken."""

    def texts(self) -> list[str]:
        """Of the messages."""
        return [message["text"] for message in self.told]


@contextmanager
def hook(context: ssl.SSLContext | None = None) -> Iterator[Hook]:
    """It listens until the end."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            listening.asked.append(f"{self.command} {self.path}")
            time.sleep(listening.silent_seconds)
            status = listening.statuses.pop(0) if listening.statuses else 200
            if not status:
                return
            if status == 200 and body:
                listening.told.append(json.loads(body))
            self.send_response(status)
            for name, value in listening.headers.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_POST = _answer  # noqa: N815  the library's names

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        listening = Hook(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield listening
        finally:
            server.shutdown()
            thread.join()
