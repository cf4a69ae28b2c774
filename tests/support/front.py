"""A front end before ClickHouse that passes everything on, and lies when a test says so."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, TypeAlias

OURS = ("authorization", "content-type", "accept-encoding")  # of a request, passed on
THEIRS = "x-clickhouse"  # of an answer, passed back


class Answer(NamedTuple):
    """What the client gets."""

    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes | Iterable[bytes] = b""
    """Of an iterable, chunks are sent until the client hangs up."""


class Asked(NamedTuple):
    """A request, and how to pass it on."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    port: int

    @property
    def inserts(self) -> bool:
        """Whether it is an INSERT."""
        return bool(re.match(rb"\s*INSERT", self.body))

    def pass_on(self, *, path: str | None = None, body: bytes | None = None) -> Answer:
        """ClickHouse's own answer, perhaps to another request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() in OURS}
            connection.request("POST", path or self.path, self.body if body is None else body, headers)
            answer = connection.getresponse()
            passed = {name: value for name, value in answer.getheaders() if name.lower().startswith(THEIRS)}
            return Answer(answer.status, passed, answer.read())
        finally:
            connection.close()


Lie: TypeAlias = Callable[[Asked], Answer]


class Front:
    """Listens on `port`."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.port = server.server_port
        self.lie: Lie = Asked.pass_on
        self.asked: list[Asked] = []
        self.sent_bytes = 0
        """Of the last answer."""

    def url(self, url: str) -> str:
        """The same, through this front end."""
        return re.sub(r":\d+/", f":{self.port}/", url)

    def tell(self, lie: Lie, *, only_inserts: bool = True) -> None:
        """Answer like this from now on."""
        self.lie = lambda asked: lie(asked) if asked.inserts or not only_inserts else asked.pass_on()

    def behave(self) -> None:
        """Pass everything on."""
        self.lie = Asked.pass_on


@contextmanager
def front_end(port: int) -> Iterator[Front]:
    """Before the server on that port, until the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = Asked(self.path, body, dict(self.headers.items()), port)
            front.asked.append(asked)
            answer = front.lie(asked)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if isinstance(answer.body, bytes):
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            front.sent_bytes = 0
            try:
                for chunk in [answer.body] if isinstance(answer.body, bytes) else answer.body:
                    self.wfile.write(chunk)
                    front.sent_bytes += len(chunk)
            except OSError:
                return  # the client has hung up

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        front = Front(server)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield front
        finally:
            server.shutdown()
            thread.join()
