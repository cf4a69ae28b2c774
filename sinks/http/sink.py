"""The HTTP sink: POSTs events as JSON to an API, one request a write.

`transport.py` has the connections, `errors.py` knows what a status means; the lane (`replicator/delivery/`) retries,
and sends parts of what is refused.

Requests go straight to httpx's transport. `httpx.AsyncClient` around it costs 30 % more CPU a request (measured,
without its search for cookies; 65 % with it), and all that it adds is unwanted here: cookies, redirects, proxies from
the environment, and a log line with the whole URL for every request.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import ClassVar, cast

import aiohttp
import httpx
from standardwebhooks import Webhook

from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkUnavailable, cited, network_words
from replicator.contracts.events import Event, Finding, Refusal, change
from replicator.contracts.sink import Sink, SinkContext
from sinks.http.errors import judge, status_text
from sinks.http.settings import HttpSettings
from sinks.http.transport import clear_status, create_transport, speaks_tls

DRAIN_SECONDS = 1.0  # for the rest of an answer whose status is known already
DRAIN_BYTES = 65_536  # a longer answer costs its connection
CHUNK_BYTES = 262_144
WORDS_BYTES = 4_096  # of an answer are looked at for the reason of a refusal
CUT_BYTES = 1_024  # of an answer that is longer: half a secret at its end would not be recognised
HEADERS = {
    "content-type": "application/json",
    "user-agent": "engagement-replicator",
    "accept-encoding": "identity",  # the reason of a refusal is read, and nothing else
}
NO_OPTIONS = frozenset({405, 501})  # what servers answer to OPTIONS where only POST is served

CERTIFICATE_CURE = (
    "Check that the certificate is in date and names the host in REPLICATOR_HTTP_URL, and that REPLICATOR_HTTP_CA_FILE"
    " holds the authority that signed it, if that is a private one"
)
START_CURE = "Start the API, or correct REPLICATOR_HTTP_URL"
TLS_CURE = "Set REPLICATOR_HTTP_URL to https://: the port speaks TLS"
PERHAPS_TLS = " (if the port speaks TLS, REPLICATOR_HTTP_URL begins with https://)"
REFUSED_CURE = (
    "See what the API says about it: it may refuse events as well. Check host and path of REPLICATOR_HTTP_URL"
)
NO_TIME = "its time is infinite or outside the years 1 to 9999, which RFC 3339 can't say"


class HttpSink(Sink):
    """POSTs events to the API at REPLICATOR_HTTP_URL. Tests pass another `transport` than aiohttp's."""

    name = "http"
    settings_class: ClassVar = HttpSettings
    takes_any_stream = True

    def __init__(
        self,
        settings: HttpSettings,
        context: SinkContext,
        *,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        super().__init__(settings, context)
        self.max_events = settings.http_batch_size
        self.concurrency = 1 if self.stream.follows else settings.http_concurrency  # changes of a row in their order
        self.max_repeats = max(settings.http_max_repeats, self.max_events)
        self._url = httpx.URL(settings.http_url.get_secret_value()).copy_with(userinfo=b"", fragment=None)
        # What messages name. Not the path: chat services put a secret in there.
        self._origin = str(self._url.copy_with(raw_path=b"")).rstrip("/")
        self._take_secrets(settings)
        self._timeout_seconds = settings.http_timeout_seconds
        self._connect = transport or (lambda: create_transport(settings))
        self._transport: httpx.AsyncBaseTransport | None = None

    async def check(self) -> list[Finding]:
        """Ask with OPTIONS, which carries no event. It shows that the API is there; only a POST shows that it takes."""
        try:
            response, _ = await self._exchange("OPTIONS")
            if response.status_code not in NO_OPTIONS:
                judge(response, sink=self.name, origin=self._origin)
        except SinkError as exc:
            return [Finding(ok=False, what=f"HTTP API: {exc.detail}", cure=await self._cure(exc))]
        answer = f"HTTP API: {self._origin} answers OPTIONS with {status_text(response.status_code)}"
        return [Finding(ok=True, what=f"{answer}; whether it takes events shows with the first one")]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """POST `events`. Returns those whose time JSON can't express."""
        refusals = [Refusal(event, NO_TIME) for event in events if event.ts_us is None and not event.deleted]
        timed = [event for event in events if event.ts_us is not None or event.deleted] if refusals else events
        if timed:
            await self._post(timed)
        return refusals

    async def renew(self) -> None:
        self._take_secrets(cast("HttpSettings", self.settings))

    def _take_secrets(self, settings: HttpSettings) -> None:
        self._headers = HEADERS | _authorization(settings)
        self._secrets = _secrets(settings)
        secret = settings.http_webhook_secret
        self._webhook = Webhook(secret.get_secret_value()) if secret else None

    async def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport:
            await transport.aclose()

    async def _cure(self, exc: SinkError) -> str:
        url = self._url
        if url.scheme == "http" and await speaks_tls(url.host, url.port or 80, self._timeout_seconds):
            return TLS_CURE
        cures: dict[type[SinkError], str] = {SinkUnavailable: START_CURE, SinkMisconfigured: exc.cure}
        return cures.get(type(exc), REFUSED_CURE)

    async def _post(self, events: Sequence[Event]) -> None:
        sent = [change(event) for event in events] if self.stream.follows else [event.json for event in events]
        body = sent[0] if self.max_events == 1 else b"[" + b",".join(sent) + b"]"
        key = change_key(events) if self.stream.follows else event_key(events)
        headers = {"idempotency-key": key, "webhook-id": key}
        if self._webhook:
            now = datetime.now(UTC)
            headers["webhook-timestamp"] = str(int(now.timestamp()))
            headers["webhook-signature"] = self._webhook.sign(key, now, body.decode())
        if len(body) > CHUNK_BYTES:
            headers["content-length"] = str(len(body))
        response, words = await self._exchange("POST", headers, body)
        judge(response, sink=self.name, origin=self._origin, words=cited(words, self._secrets))

    async def _exchange(
        self, method: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[httpx.Response, str]:
        """Send one request; the answer and how its body begins. Raises SinkUnavailable or SinkMisconfigured."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                response = await self._send(method, headers or {}, body)
        except TimeoutError as exc:
            detail = f"{self._origin} did not answer within {self._timeout_seconds:g} s"
            raise SinkUnavailable(sink=self.name, detail=detail) from exc
        except aiohttp.ClientResponseError as exc:
            if not (status := clear_status(exc)):
                hint = PERHAPS_TLS if self._url.scheme == "http" else ""
                detail = f"what answers at {self._origin} does not speak HTTP{hint}"
                raise SinkUnavailable(sink=self.name, detail=detail) from exc
            return httpx.Response(status), ""
        except (httpx.TransportError, aiohttp.ClientError, OSError) as exc:
            raise self._not_reached(exc) from exc
        return response, await _drain(response)

    async def _send(self, method: str, headers: Mapping[str, str], body: bytes) -> httpx.Response:
        """A connection that is closed in our face is nothing to talk about: a server may have ended, or was idle."""
        self._transport = self._transport or self._connect()
        for last in (False, True):
            content = body if len(body) <= CHUNK_BYTES else _chunks(body)
            request = httpx.Request(method, self._url, headers={**self._headers, **headers}, content=content)
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.TransportError, aiohttp.ClientError, OSError) as exc:
                if last or not _hung_up(exc):
                    raise
        raise AssertionError

    def _not_reached(self, exc: Exception) -> SinkError:
        cause = exc.__cause__
        if isinstance(cause, aiohttp.ClientConnectorCertificateError):
            detail = f"the certificate of {self._origin} is not accepted ({network_words(cause)})"
            return SinkMisconfigured(sink=self.name, detail=detail, cure=CERTIFICATE_CURE)
        return SinkUnavailable(sink=self.name, detail=f"no answer from {self._origin} ({network_words(exc)})")


def event_key(events: Sequence[Event]) -> str:
    """The `Idempotency-Key` of these events: always the same for the same ids in the same order."""
    first = events[0].id
    if isinstance(first, str):
        return f"events-{_digest([event.id for event in events])}"
    if len(events) == 1:
        return f"event-{first}"
    ids = struct.pack(f"<{len(events)}q", *[event.id for event in events])
    return f"events-{first}-{events[-1].id}-{hashlib.sha256(ids).hexdigest()[:32]}"


def change_key(events: Sequence[Event]) -> str:
    """The same of changes, of which a row has many."""
    return f"changes-{_digest([(event.id, event.version) for event in events])}"


def _digest(names: object) -> str:
    return hashlib.sha256(repr(names).encode()).hexdigest()[:32]


def _authorization(settings: HttpSettings) -> dict[str, str]:
    url, token = httpx.URL(settings.http_url.get_secret_value()), settings.http_bearer_token
    if token:
        return {"authorization": f"Bearer {token.get_secret_value()}"}
    credentials = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
    return {"authorization": f"Basic {credentials}"} if url.userinfo else {}


def _secrets(settings: HttpSettings) -> list[str]:
    """What no message may repeat, however the API writes it."""
    url = httpx.URL(settings.http_url.get_secret_value())
    given = [settings.http_bearer_token, settings.http_webhook_secret]
    secrets = [secret.get_secret_value() for secret in given if secret]
    secrets += [url.password, url.userinfo.decode(), *_authorization(settings).values()]
    secrets += [url.path.strip("/"), url.raw_path.decode(), url.query.decode(), *url.params.values()]
    return sorted(filter(None, {*secrets, *(secret.partition(" ")[2] for secret in secrets)}), key=len, reverse=True)


def _hung_up(exc: Exception) -> bool:
    """The connection was closed without an answer."""
    cause = exc.__cause__ or exc
    closed = isinstance(cause, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionError)
    return closed and not isinstance(cause, aiohttp.ClientConnectorError)


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    """A large body in pieces, so that other tasks can run while it is sent."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


async def _drain(response: httpx.Response) -> str:
    """Read the rest of the answer, so that its connection can be used again; how it begins. The status has decided."""
    stream = cast("httpx.AsyncByteStream", response.stream)
    begins, size = b"", 0
    with suppress(TimeoutError, httpx.TransportError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(DRAIN_SECONDS), aclosing(stream):
            async for chunk in stream:
                begins += chunk[: WORDS_BYTES - len(begins)]
                size += len(chunk)
                if size > DRAIN_BYTES:
                    break
    whole = size <= WORDS_BYTES
    return (begins if whole else begins[:-CUT_BYTES]).decode(errors="replace")
