"""The page, `/trace` and what probes and programs ask, on REPLICATOR_ADMIN_LISTEN.

They change nothing. Anybody who reaches the port can ask, so all that a request may take has a bound: connections,
bytes, time, log lines. That is why no web framework serves it. `watchdog.py` knows what is shown, `metrics.py`,
`status/` and `page/` give it its forms.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, exposition

from replicator.contracts.errors import SettingsError
from replicator.operations.exposure import is_here
from replicator.operations.logs import printable
from replicator.operations.metrics import Metrics
from replicator.operations.page.history import STEP_SECONDS
from replicator.operations.page.live import Live
from replicator.operations.page.traced import Traced, TraceOf
from replicator.operations.status.text import as_json
from replicator.operations.watchdog import Watchdog

CONNECTIONS = 32
"""Served at once. One more, and the oldest is closed: a probe is answered in a millisecond, so it is never the oldest
for long, however many others say nothing."""
BACKLOG = 16
"""Connections that the system accepts ahead: they take descriptors before they are counted."""
REQUEST_SECONDS = 5.0
"""For a whole request and its answer."""
HEAD_BYTES = 8_192
METRICS_SECONDS = 0.1
"""How old an answer of /metrics may be: it takes a millisecond, which a flood of requests would take from the sinks."""
COMPLAINT_SECONDS = 60.0
"""A line in the log at most so often, whatever is asked."""
TEXT, JSON = "text/plain; charset=utf-8", "application/json"
HTML, STREAM = "text/html; charset=utf-8", "text/event-stream"
UPDATES = "GET /updates "
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]*)?")
"""A name or an address, and a port. What is written otherwise is no host, whatever it may mean elsewhere."""
MISDIRECTED = b"Misdirected Request: ask by an address, or by the host that REPLICATOR_ADMIN_LISTEN names\n"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere, runs nothing that stands in it, and is in nobody's frame."""
HEADERS = (
    "Cache-Control: no-store",
    "Connection: close",
    f"Content-Security-Policy: {POLICY}",
    "Cross-Origin-Resource-Policy: same-origin",
    "Referrer-Policy: no-referrer",
    "X-Content-Type-Options: nosniff",
)
"""Of every answer."""

log = logging.getLogger(__name__)

Page = tuple[HTTPStatus, str, bytes]
"""Status, content type, body."""


class Admin:
    """The HTTP server; `start` and `stop` belong to the event loop that runs the pipeline."""

    def __init__(self, watchdog: Watchdog, listen: str, page: Live, trace: TraceOf) -> None:
        self._watchdog = watchdog
        self._page = page
        self._traced = Traced(trace, page.streams)
        self._listen = listen
        self._host = listen.rpartition(":")[0].strip("[]").lower()
        self._registry = CollectorRegistry()
        self._registry.register(Metrics(watchdog))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._pages = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/standbyz": self._standbyz,
            "/status": self._status,
            "/history": self._hour,
            "/updates": lambda: (HTTPStatus.OK, STREAM, b""),
            "/metrics": self._metrics,
        }
        self._server: asyncio.Server | None = None
        self._serving: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._complained_at = self._measured_at = -math.inf
        self._measured = b""

    async def start(self) -> None:
        """Listen; nothing to do when the setting is empty. Raises SettingsError when the address can't be had."""
        if not self._listen:
            return
        if warning := exposed(self._listen):
            log.warning("%s", warning, extra={"code": "R102"})
        asyncio.get_running_loop().set_exception_handler(self._unhandled)
        self._server = await listen(self._listen, self._serve)
        self._page.start()

    async def stop(self) -> None:
        """Stop listening. Safe to call at any time."""
        self._page.stop()
        if self._server is not None:
            self._server.close()
        for writer in [*self._serving]:
            writer.transport.abort()

    # -- a request -----------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._serving) >= CONNECTIONS:
            self._complain(f"more than {CONNECTIONS} connections at once, the oldest ones are closed")
            oldest = next(iter(self._serving))
            del self._serving[oldest]
            oldest.transport.abort()
        self._serving[writer] = None
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                asked = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                writer.write(await self._answer(asked))
                if not asked[0].startswith(UPDATES) or self._refused(asked):
                    writer.close()
                    await writer.wait_closed()
                    return
            del self._serving[writer]  # the page has a bound of its own
            await self._page.follow(reader, writer)
        except (OSError, EOFError):  # too slow, or gone: a probe may only see whether the port is open
            pass
        except asyncio.LimitOverrunError:
            self._complain(f"a request's head was longer than {HEAD_BYTES} bytes")
        except Exception as exc:  # of the page: what it shows comes from everywhere
            log.debug("a request failed", exc_info=True)
            self._complain(f"a request failed in an unexpected way ({type(exc).__name__})")
        finally:
            self._serving.pop(writer, None)
            writer.transport.abort()

    async def _answer(self, asked: Sequence[str]) -> bytes:
        status, kind, body = self._refused(asked) or await self._found(asked[0].split(" ")[1])
        length = () if kind == STREAM else (f"Content-Length: {len(body)}",)
        lines = (f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Type: {kind}", *length, *HEADERS)
        return "\r\n".join([*lines, "", ""]).encode() + (b"" if asked[0].startswith("HEAD ") else body)

    def _refused(self, asked: Sequence[str]) -> Page | None:
        """The answer to what is no request for anything here."""
        method, _, rest = asked[0].partition(" ")
        if not rest.partition(" ")[2].startswith("HTTP/1."):
            self._complain("the request is not HTTP")
            return _error(HTTPStatus.BAD_REQUEST)
        if not all(map(self._is_ours, _hosts(asked))):  # a web page that has bound its name to this machine
            return HTTPStatus.MISDIRECTED_REQUEST, TEXT, MISDIRECTED
        return None if method in ("GET", "HEAD") else _error(HTTPStatus.METHOD_NOT_ALLOWED)

    def _is_ours(self, name: str) -> bool:
        """Whether no web page from elsewhere can have this name."""
        if not name:
            return False
        if name == self._host or is_here(name):
            return True
        return not is_here(self._host) and (_is_private(name) or name == socket.gethostname().lower())

    async def _found(self, target: str) -> Page:
        path, _, query = target.partition("?")
        if path == "/":
            return HTTPStatus.OK, HTML, await self._page.document()
        if path == "/trace":
            return HTTPStatus.OK, HTML, await self._traced.document(query)
        if path in self._page.assets:
            return HTTPStatus.OK, *self._page.assets[path]
        page = self._pages.get(path)
        return page() if page else _error(HTTPStatus.NOT_FOUND)

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """No descriptors are left for a connection: asyncio tries again each second, and would say so each time."""
        if "accept" in context["message"]:
            self._complain(f"a connection can't be accepted ({context.get('exception')})")
        else:
            loop.default_exception_handler(context)

    def _complain(self, problem: str) -> None:
        if time.monotonic() - self._complained_at >= COMPLAINT_SECONDS:
            self._complained_at = time.monotonic()
            log.warning("admin endpoints: %s; said at most once a minute", problem, extra={"code": "R103"})

    # -- the pages -----------------------------------------------------------------------------------------------

    def _healthz(self) -> Page:
        return HTTPStatus.OK, TEXT, b"ok\n"  # from the loop that runs the pipeline: it lives

    def _readyz(self) -> Page:
        reasons = [*self._watchdog.reasons(), *filter(None, [self._watchdog.standby])]
        return _light([*(reasons or ["ready"]), *self._watchdog.pauses()], ok=not reasons)

    def _standbyz(self) -> Page:
        reasons = self._watchdog.reasons()
        return _light(reasons or ["standby" if self._watchdog.standby else "ready"], ok=not reasons)

    def _status(self) -> Page:
        return HTTPStatus.OK, JSON, as_json(self._watchdog.status()).encode()

    def _hour(self) -> Page:
        hours = self._page.history.hours().items()
        now = self._page.history.rate
        sinks = {
            name: {"events_per_second_now": now(name), "events_per_second": rates, "lag_seconds": lags}
            for name, (rates, lags) in hours
        }
        return HTTPStatus.OK, JSON, msgspec.json.encode({"step_seconds": STEP_SECONDS, "sinks": sinks})

    def _metrics(self) -> Page:
        if time.monotonic() - self._measured_at >= METRICS_SECONDS:
            self._measured_at, self._measured = time.monotonic(), exposition.generate_latest(self._registry)
        return HTTPStatus.OK, exposition.CONTENT_TYPE_LATEST, self._measured


async def listen(
    address: str, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]
) -> asyncio.Server:
    """Raises SettingsError when the address can't be had."""
    host, _, port = address.rpartition(":")
    try:
        return await asyncio.start_server(serve, host.strip("[]"), int(port), limit=HEAD_BYTES, backlog=BACKLOG)
    except (OSError, OverflowError) as exc:
        problem = f"{address} can't be listened on ({exc})"
        raise SettingsError(name="REPLICATOR_ADMIN_LISTEN", problem=problem, expected="a free host:port") from exc


async def unavailable(address: str) -> SettingsError | None:
    """Why `run` could not listen there now."""
    try:
        (await listen(address, lambda _, writer: writer.transport.abort())).close()
    except SettingsError as exc:
        return exc
    return None


def exposed(listen: str) -> str:
    """That other machines can reach the endpoints; empty if they can't."""
    if not listen or is_here(listen.rpartition(":")[0].strip("[]")):
        return ""
    return (
        f"REPLICATOR_ADMIN_LISTEN: anyone who reaches {listen} can read status, metrics and any event by its id,"
        " without a password; let only probes and scrapers reach it"
    )


def _is_private(host: str) -> bool:
    """An address, or a name that the internet has not: of a container, of a service in Kubernetes."""
    with suppress(ValueError):
        ip_address(host)
        return True
    return "." not in host or host.lower().endswith((".local", ".internal"))


def _hosts(lines: Sequence[str]) -> Iterator[str]:
    """The names, without port and in small letters, that the request was sent to; empty: it is none."""
    for name, _, value in (line.partition(":") for line in lines[1:]):
        if name.strip().lower() == "host":
            found = HOST.fullmatch(value.strip().lower())
            yield (found[1] or found[2]) if found else ""


def _light(lines: Sequence[str], *, ok: bool) -> Page:
    body = "".join(f"{printable(line)}\n" for line in lines).encode()
    return HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE, TEXT, body


def _error(status: HTTPStatus) -> Page:
    return status, TEXT, f"{status.phrase}\n".encode()
