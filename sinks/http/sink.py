"""The HTTP sink: POSTs events as JSON to an API.

Each `write` is one request. If the API refuses it, halves are sent until the bad event stands alone. `errors.py` knows
what a status means; the lane (`replicator/delivery/lane.py`) retries.

Requests go straight to httpx's transport. `httpx.AsyncClient` around it costs 30 % more CPU a request (measured,
without its search for cookies; 65 % with it), and all that it adds is unwanted here: cookies, redirects, proxies from
the environment, and a log line with the whole URL for every request.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import ClassVar, TypeAlias, cast

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport
from standardwebhooks import Webhook

from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkUnavailable
from replicator.contracts.events import Event, Finding, Refusal
from replicator.contracts.fields import Contract
from replicator.contracts.sink import Sink
from sinks.http.errors import refusal, status_text
from sinks.http.settings import HttpSettings

KEEPALIVE_SECONDS = 4.0  # Node and uvicorn hang up after 5 idle seconds: be first, or a POST meets a closing connection
DRAIN_SECONDS = 1.0  # for the rest of an answer whose status is known already
DRAIN_BYTES = 65_536  # a longer answer costs its connection
CHUNK_BYTES = 262_144
HEADERS = {"content-type": "application/json", "user-agent": "engagement-replicator"}
NO_OPTIONS = frozenset({405, 501})  # what servers answer to OPTIONS where only POST is served

CERTIFICATE_CURE = (
    "Check that the certificate is in date and names the host in REPLICATOR_HTTP_URL, and that REPLICATOR_HTTP_CA_FILE"
    " holds the authority that signed it, if that is a private one"
)
START_CURE = "Start the API, or correct REPLICATOR_HTTP_URL"
NO_TIME = "its time is infinite or outside the years 1 to 9999, which RFC 3339 can't say"

Work: TypeAlias = tuple[list[Sequence[Event]], list[Refusal]]
"""Of one write: the pieces that are still to be sent, the first one last, and what was refused so far."""


class HttpSink(Sink):
    """POSTs events to the API at REPLICATOR_HTTP_URL. Tests pass another `transport` than aiohttp's."""

    name = "http"
    settings_class: ClassVar = HttpSettings

    def __init__(
        self,
        settings: HttpSettings,
        contract: Contract,
        *,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        super().__init__(settings, contract)
        self.max_events = settings.http_batch_size
        self.concurrency = settings.http_concurrency
        self.max_repeats = max(settings.http_max_repeats, self.max_events)
        self._url = httpx.URL(settings.http_url.get_secret_value()).copy_with(userinfo=b"", fragment=None)
        # What messages name. Not the path: chat services put a secret in there.
        self._origin = str(self._url.copy_with(raw_path=b"")).rstrip("/")
        self._take_secrets(settings)
        self._timeout_seconds = settings.http_timeout_seconds
        self._connect = transport or (lambda: _aiohttp_transport(settings))
        self._transport: httpx.AsyncBaseTransport | None = None
        self._interrupted: dict[tuple[tuple[int, int, int], ...], Work] = {}
        """Writes that failed: they come again, and must not send again what was taken already."""

    async def check(self) -> list[Finding]:
        """Ask with OPTIONS, which carries no event. It shows that the API is there; only a POST shows that it takes."""
        try:
            response = await self._exchange("OPTIONS")
            if response.status_code not in NO_OPTIONS:
                refusal(response, sink=self.name, origin=self._origin)
        except SinkError as exc:
            cure = START_CURE if isinstance(exc, SinkUnavailable) else exc.cure
            return [Finding(ok=False, what=exc.detail, cure=cure)]
        answer = f"{self._origin} answers OPTIONS with {status_text(response.status_code)}"
        return [Finding(ok=True, what=f"{answer}; whether it takes events shows with the first one")]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """POST `events`. Returns those that the API refused alone, and those whose time JSON can't express."""
        work = self._interrupted.pop(_identity(events), None) if self._interrupted else None
        pieces, refusals = work or _begin(events)
        try:
            await self._finish(pieces, refusals)
        except BaseException:
            self._interrupted[_identity(events)] = pieces, refusals
            if len(self._interrupted) > self.concurrency:  # more than can be under way: the oldest never came again
                del self._interrupted[next(iter(self._interrupted))]
            raise
        return refusals

    async def renew(self) -> None:
        self._take_secrets(cast("HttpSettings", self.settings))

    def _take_secrets(self, settings: HttpSettings) -> None:
        self._headers = HEADERS | _authorization(settings)
        secret = settings.http_webhook_secret
        self._webhook = Webhook(secret.get_secret_value()) if secret else None

    async def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport:
            await transport.aclose()

    async def _finish(self, pieces: list[Sequence[Event]], refusals: list[Refusal]) -> None:
        """Send the pieces in order, and halves of those that are refused."""
        while pieces:
            reason = await self._post(pieces[-1])
            piece = pieces.pop()
            if reason and len(piece) == 1:
                refusals.append(Refusal(piece[0], reason))
            elif reason:
                middle = len(piece) // 2
                pieces += [piece[middle:], piece[:middle]]

    async def _post(self, events: Sequence[Event]) -> str | None:
        """Send them in one request. Why they were refused, None if they were taken."""
        body = events[0].json if self.max_events == 1 else b"[" + b",".join([event.json for event in events]) + b"]"
        headers = self._identification(event_key(events), body)
        if len(body) > CHUNK_BYTES:
            headers["content-length"] = str(len(body))
        response = await self._exchange("POST", headers, body if len(body) <= CHUNK_BYTES else _chunks(body))
        return refusal(response, sink=self.name, origin=self._origin)

    def _identification(self, key: str, body: bytes) -> dict[str, str]:
        headers = {"idempotency-key": key, "webhook-id": key}
        if self._webhook:
            now = datetime.now(UTC)
            headers["webhook-timestamp"] = str(int(now.timestamp()))
            headers["webhook-signature"] = self._webhook.sign(key, now, body.decode())
        return headers

    async def _exchange(
        self, method: str, headers: Mapping[str, str] | None = None, body: bytes | AsyncIterator[bytes] | None = None
    ) -> httpx.Response:
        """Send one request; the answer with its status and headers. Raises SinkUnavailable or SinkMisconfigured."""
        self._transport = self._transport or self._connect()
        request = httpx.Request(method, self._url, headers={**self._headers, **(headers or {})}, content=body)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                response = await self._transport.handle_async_request(request)
        except TimeoutError as exc:
            detail = f"{self._origin} did not answer within {self._timeout_seconds:g} s"
            raise SinkUnavailable(sink=self.name, detail=detail) from exc
        except (httpx.TransportError, aiohttp.ClientError, OSError) as exc:
            raise self._not_reached(exc) from exc
        await _drain(response)
        return response

    def _not_reached(self, exc: Exception) -> SinkError:
        cause = exc.__cause__
        if isinstance(cause, aiohttp.ClientConnectorCertificateError):
            detail = f"the certificate of {self._origin} is not accepted ({_what_failed(cause)})"
            return SinkMisconfigured(sink=self.name, detail=detail, cure=CERTIFICATE_CURE)
        return SinkUnavailable(sink=self.name, detail=f"no answer from {self._origin} ({_what_failed(exc)})")


def event_key(events: Sequence[Event]) -> str:
    """The `Idempotency-Key` of these events: always the same for the same ids in the same order."""
    first = events[0].id
    if len(events) == 1:
        return f"event-{first}"
    ids = struct.pack(f"<{len(events)}q", *[event.id for event in events])
    return f"events-{first}-{events[-1].id}-{hashlib.sha256(ids).hexdigest()[:32]}"


def _begin(events: Sequence[Event]) -> Work:
    refusals = [Refusal(event, NO_TIME) for event in events if event.ts_us is None]
    timed = [event for event in events if event.ts_us is not None] if refusals else events
    return [timed] if timed else [], refusals


def _identity(events: Sequence[Event]) -> tuple[tuple[int, int, int], ...]:
    # The id besides the position: events of a backfill have no position in the stream.
    return tuple((event.commit_lsn, event.ordinal, event.id) for event in events)


def _authorization(settings: HttpSettings) -> dict[str, str]:
    url, token = httpx.URL(settings.http_url.get_secret_value()), settings.http_bearer_token
    if token:
        return {"authorization": f"Bearer {token.get_secret_value()}"}
    credentials = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
    return {"authorization": f"Basic {credentials}"} if url.userinfo else {}


def _what_failed(exc: BaseException) -> str:
    """A network error without the address in it: the system's words where there are some."""
    cause = exc.__cause__ or exc
    words = getattr(cause, "verify_message", None) or (isinstance(cause, OSError) and cause.strerror)
    return words or type(cause).__name__


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    """A large body in pieces, so that other tasks can run while it is sent."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


async def _drain(response: httpx.Response) -> None:
    """Read the rest of the answer, so that its connection can be used again. The status has decided already."""
    stream = cast("httpx.AsyncByteStream", response.stream)
    with suppress(TimeoutError, httpx.TransportError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(DRAIN_SECONDS), aclosing(stream):
            size = 0
            async for chunk in stream:
                size += len(chunk)
                if size > DRAIN_BYTES:
                    break


def _aiohttp_transport(settings: HttpSettings) -> httpx.AsyncBaseTransport:
    """Aiohttp's connections: httpx's own pool manages a ninth of the requests a second."""
    ca_file = settings.http_ca_file
    # Without a file httpx trusts the authorities of certifi, or those in SSL_CERT_FILE and SSL_CERT_DIR.
    context = ssl.create_default_context(cafile=ca_file) if ca_file else httpx.create_ssl_context()

    def session() -> aiohttp.ClientSession:
        limit = settings.http_concurrency
        connector = aiohttp.TCPConnector(limit=limit, keepalive_timeout=KEEPALIVE_SECONDS, ssl=context)
        no_cookies = aiohttp.DummyCookieJar()
        return aiohttp.ClientSession(connector=connector, cookie_jar=no_cookies, middlewares=(_without_phrase,))

    return AiohttpTransport(verify=context, client=session)


async def _without_phrase(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Httpx-aiohttp fails on a reason phrase that is not UTF-8. Nobody reads the phrase (RFC 9112, 4)."""
    response = await send(request)
    response.reason = None
    return response
