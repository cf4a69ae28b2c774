"""The HTTP sink: POSTs events as JSON to an API.

Each `write` is one request, unless the API refuses the events in it: then halves are sent until the bad event stands
alone. `http_status.py` reads from an answer what became of the events; retries and their pauses, dead letters and how
far the sink is belong to its lane (`replicator/delivery/lane.py`).

The transport is used without `httpx.AsyncClient` around it. The client's redirects, cookies, proxies from the
environment and a log line with the whole URL for every request are unwanted here, and a request without them costs
two thirds (measured: 150 µs of our CPU instead of 220 µs).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, ClassVar, TypeAlias, cast

import aiohttp
import httpx
from aiohttp.connector import Connection
from httpx_aiohttp import AiohttpTransport
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from standardwebhooks import Webhook

from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkUnavailable
from replicator.contracts.events import Event, Finding, Refusal
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Contract, Sink
from sinks.http.errors import refusal, status_text

KEEPALIVE_SECONDS = 4.0  # Node and uvicorn hang up after 5 idle seconds: be first, or a POST meets a closing connection
DRAIN_SECONDS = 1.0  # for the rest of an answer whose status is known already
CHUNK_BYTES = 262_144
DRAIN_BYTES = 65_536  # a longer answer costs its connection
NO_OPTIONS = frozenset({405, 501})  # what servers answer to OPTIONS where only POST is served
BASE_HEADERS = {"content-type": "application/json", "user-agent": "engagement-replicator"}

CERTIFICATE_CURE = (
    "See that the certificate is in date and names the host in REPLICATOR_HTTP_URL, and that REPLICATOR_HTTP_CA_FILE "
    "holds the authority that signed it, if that is a private one"
)
START_CURE = "Start the API, or correct REPLICATOR_HTTP_URL"
NO_TIME = "its time is infinite or outside the years 1 to 9999, which RFC 3339 can't say"

Identity: TypeAlias = tuple[int, int, int]


def _checked_url(value: SecretStr) -> SecretStr:
    """The URL, if requests can be sent to it. Says what is wrong without repeating it: it may carry a password."""
    try:
        url = httpx.URL(value.get_secret_value())
    except httpx.InvalidURL as exc:
        raise ValueError("it is not a URL") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("it is no http:// or https:// URL with a host")
    if re.search(r"[%\s]", url.host) or (url.port is not None and url.port not in range(1, 65_536)):
        raise ValueError("its host or port is impossible")
    return value


def _checked_token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("a header can't carry it")
    return value


def _checked_secret(value: SecretStr) -> SecretStr:
    """The secret, if receivers can have the same one. `Webhook` itself would skip characters that are not base64."""
    prefix, _, text = value.get_secret_value().partition("_")
    if prefix != "whsec" or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text):
        raise ValueError("it is not of that form")
    try:
        Webhook(value.get_secret_value())
    except ValueError as exc:
        raise ValueError("what follows whsec_ is not base64") from exc
    return value


def _checked_ca_file(value: Path) -> Path:
    try:
        ssl.create_default_context(cafile=value)
    except OSError as exc:  # an SSLError too
        raise ValueError(f"it can't be used ({type(exc).__name__})") from exc
    return value


# Compose files pass on what may be unset as `${NAME:-}`.
_EmptyIsNone = BeforeValidator(lambda value: None if value == "" else value)


class HttpSettings(Settings):
    """Options of the HTTP sink."""

    http_url: Annotated[SecretStr, AfterValidator(_checked_url)] = Field(
        SecretStr("http://localhost:8000/events"),
        description="an http:// or https:// URL, with user:password@ where the API wants basic authentication",
    )
    http_batch_size: int = Field(
        100,  # 2.2 µs of our CPU an event (measured); 500 would be 0.5, where the API takes such arrays
        ge=1,
        le=10_000,
        description="events a request, 1 to 10000: a JSON array; with 1 a single JSON object",
    )
    # Measured: 100,000 events/s where the API answers in 5 ms, 50,000 at 20 ms. What is in flight in a crash, 1,600
    # events, may be repeated after it.
    http_concurrency: int = Field(
        16,
        ge=1,
        le=256,
        description="requests in flight at once, 1 to 256; 1 keeps the order of events",
    )
    # Four checkpoints' worth at 25,000 events/s. A lane that gets there asks for the next checkpoint at once.
    http_max_repeats: int = Field(
        20_000,
        ge=1,
        le=10_000_000,
        description="the most events that the API may see again after a crash, from HTTP_BATCH_SIZE to 10000000",
    )
    http_timeout_seconds: float = Field(
        15.0,  # the lower end of what Standard Webhooks recommends; a request that timed out may be seen twice
        gt=0,
        le=3600,
        description="seconds that a request may take as a whole, connecting included",
    )
    http_bearer_token: Annotated[Annotated[SecretStr, AfterValidator(_checked_token)] | None, _EmptyIsNone] = Field(
        None, description="the token of an Authorization: Bearer header (visible ASCII characters)"
    )
    http_webhook_secret: Annotated[Annotated[SecretStr, AfterValidator(_checked_secret)] | None, _EmptyIsNone] = Field(
        None, description="whsec_ and base64, the secret that requests are signed with (Standard Webhooks)"
    )
    http_ca_file: Annotated[Annotated[Path, AfterValidator(_checked_ca_file)] | None, _EmptyIsNone] = Field(
        None, description="a PEM file with the certificate authorities to trust instead of the public ones"
    )

    @field_validator("http_max_repeats")
    @classmethod
    def _holds_a_batch(cls, value: int, info: ValidationInfo) -> int:
        size = info.data.get("http_batch_size", 1)
        if value < size:
            raise ValueError(f"it is less than REPLICATOR_HTTP_BATCH_SIZE, {size}, and a batch is sent as a whole")
        return value

    @field_validator("http_bearer_token")
    @classmethod
    def _one_authorization(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        url = info.data.get("http_url")
        if value and url and httpx.URL(url.get_secret_value()).userinfo:
            raise ValueError("REPLICATOR_HTTP_URL carries a user as well, and a request has one Authorization header")
        return value


def event_key(events: Sequence[Event]) -> str:
    """The `Idempotency-Key` of these events: always the same for the same ids in the same order."""
    first = events[0].id
    if len(events) == 1:
        return f"event-{first}"
    ids = struct.pack(f"<{len(events)}q", *[event.id for event in events])
    return f"events-{first}-{events[-1].id}-{hashlib.sha256(ids).hexdigest()[:32]}"


def _identity(event: Event) -> Identity:
    # The id besides the position: events of a backfill have no position in the stream.
    return event.commit_lsn, event.ordinal, event.id


def _what_failed(exc: BaseException) -> str:
    """A network error without the address in it: the system's words where there are some."""
    cause = exc.__cause__ or exc
    words = getattr(cause, "verify_message", None) or (isinstance(cause, OSError) and cause.strerror)
    return words or type(cause).__name__


def _authorization(url: httpx.URL, token: SecretStr | None) -> dict[str, str]:
    if token:
        return {"authorization": f"Bearer {token.get_secret_value()}"}
    if not url.userinfo:
        return {}
    credentials = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
    return {"authorization": f"Basic {credentials}"}


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    """A large body in pieces, so that sending it leaves the loop to others in between."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


async def _drain(response: httpx.Response) -> None:
    """Read the rest of the answer, so that its connection can be used again."""
    stream = cast("httpx.AsyncByteStream", response.stream)
    # The status has decided already what became of the events: a rest that breaks off changes nothing.
    with suppress(TimeoutError, httpx.TransportError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(DRAIN_SECONDS), aclosing(stream):
            size = 0
            async for chunk in stream:
                size += len(chunk)
                if size > DRAIN_BYTES:
                    break


class _Answer(aiohttp.ClientResponse):
    """An answer whose phrase is ASCII: httpx-aiohttp can't pass on any other, and nobody reads it (RFC 9112, 4)."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Read its head."""
        await super().start(connection)
        self.reason = (self.reason or "").encode("ascii", "replace").decode()
        return self


class HttpSink(Sink):
    """POSTs events to the API in `settings`; see `contracts.sink.Sink`.

    `connect` makes the transport; tests put theirs there.
    """

    name = "http"
    settings_class: ClassVar = HttpSettings

    def __init__(
        self,
        settings: HttpSettings,
        contract: Contract = None,
        *,
        connect: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        super().__init__(settings, contract)
        url = httpx.URL(settings.http_url.get_secret_value())
        self.max_events = settings.http_batch_size
        self.concurrency = settings.http_concurrency
        self.max_repeats = settings.http_max_repeats
        self._url = url.copy_with(userinfo=b"", fragment=None)
        # What messages name. Not the path: chat services put a secret in there.
        self._origin = str(self._url.copy_with(raw_path=b"")).rstrip("/")
        self._headers = {**BASE_HEADERS, **_authorization(url, settings.http_bearer_token)}
        secret = settings.http_webhook_secret
        self._webhook = Webhook(secret.get_secret_value()) if secret else None
        self._timeout_seconds = settings.http_timeout_seconds
        self._ca_file = settings.http_ca_file
        self._connect = connect or self._aiohttp_transport
        self._transport: httpx.AsyncBaseTransport | None = None
        # Why an event was refused (None: it was taken), of writes that were interrupted while halving. The write comes
        # again with the same events and must not send these again.
        self._settled: dict[Identity, str | None] = {}

    async def check(self) -> list[Finding]:
        """Ask with OPTIONS, which carries no event. It shows the way to the API; only a POST shows that it takes."""
        try:
            response = await self._exchange(httpx.Request("OPTIONS", self._url, headers=self._headers))
            if response.status_code not in NO_OPTIONS:
                refusal(response, sink=self.name, origin=self._origin)
        except SinkError as exc:
            return [
                Finding(ok=False, what=exc.detail, cure=START_CURE if isinstance(exc, SinkUnavailable) else exc.cure)
            ]
        answer = f"{self._origin} answers OPTIONS with {status_text(response.status_code)}"
        return [Finding(ok=True, what=f"{answer}; whether it takes events shows with the first one")]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """POST `events`; returns those that the API refused when they stood alone, and those that JSON can't tell."""
        settled = {_identity(event): NO_TIME for event in events if event.ts_us is None} | self._recall(events)
        wanted = [event for event in events if _identity(event) not in settled] if settled else events
        try:
            if wanted and (reason := await self._post(wanted)):
                await self._bisect(wanted, reason, settled)
        except BaseException:
            self._remember(settled)
            raise
        if not settled:
            return []
        return [Refusal(event, reason) for event in events if (reason := settled.get(_identity(event)))]

    async def close(self) -> None:
        """Close the connections."""
        transport, self._transport = self._transport, None
        if transport:
            await transport.aclose()

    async def _bisect(self, events: Sequence[Event], reason: str, settled: dict[Identity, str | None]) -> None:
        """These were refused together for `reason`: settle each of them, by sending halves."""
        if len(events) == 1:
            settled[_identity(events[0])] = reason
            return
        middle = len(events) // 2
        for half in (events[:middle], events[middle:]):
            if half_reason := await self._post(half):
                await self._bisect(half, half_reason, settled)
            else:
                settled.update(dict.fromkeys(map(_identity, half)))

    def _recall(self, events: Sequence[Event]) -> dict[Identity, str | None]:
        """What is settled of these events by an earlier, interrupted write of them; forgets it."""
        if not self._settled:
            return {}
        return {key: self._settled.pop(key) for key in map(_identity, events) if key in self._settled}

    def _remember(self, settled: Mapping[Identity, str | None]) -> None:
        """Keep it for the write that comes again; writes that never came again make room, oldest first."""
        self._settled.update(settled)
        for key in list(self._settled)[: -self.max_events * self.concurrency]:
            del self._settled[key]

    async def _post(self, events: Sequence[Event]) -> str | None:
        """Send them in one request. Why they were refused, None if they were taken."""
        body = events[0].json if self.max_events == 1 else b"[" + b",".join([event.json for event in events]) + b"]"
        headers = {**self._headers, **self._identification(event_key(events), body)}
        if len(body) > CHUNK_BYTES:
            headers["content-length"] = str(len(body))
        content = body if len(body) <= CHUNK_BYTES else _chunks(body)
        response = await self._exchange(httpx.Request("POST", self._url, headers=headers, content=content))
        return refusal(response, sink=self.name, origin=self._origin)

    def _identification(self, key: str, body: bytes) -> Mapping[str, str]:
        headers = {"idempotency-key": key, "webhook-id": key}
        if self._webhook:
            now = datetime.now(UTC)
            headers["webhook-timestamp"] = str(int(now.timestamp()))
            headers["webhook-signature"] = self._webhook.sign(key, now, body.decode())
        return headers

    async def _exchange(self, request: httpx.Request) -> httpx.Response:
        """Send one request; the answer with its status and headers. Raises SinkUnavailable or SinkMisconfigured."""
        self._transport = self._transport or self._connect()
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

    def _aiohttp_transport(self) -> httpx.AsyncBaseTransport:
        # Without a file of ours httpx trusts the authorities of certifi, or those in SSL_CERT_FILE / SSL_CERT_DIR.
        context = ssl.create_default_context(cafile=self._ca_file) if self._ca_file else httpx.create_ssl_context()

        def session() -> aiohttp.ClientSession:
            connector = aiohttp.TCPConnector(limit=self.concurrency, keepalive_timeout=KEEPALIVE_SECONDS, ssl=context)
            return aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), response_class=_Answer
            )

        return AiohttpTransport(verify=context, client=session)
