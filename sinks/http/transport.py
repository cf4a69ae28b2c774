"""The connections of the HTTP sink: aiohttp's, behind httpx's transport interface. `sink.py` sends requests over them.

An answer counts by its status line, whatever follows it: aiohttp's parser rejects answers (a body after 204, a bad
header) whose status says clearly that the events are taken.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from functools import partial
from typing import Any

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError
from httpx_aiohttp import AiohttpTransport

from sinks.http.settings import HttpSettings
from sinks.tls import following

KEEPALIVE_SECONDS = 4.0  # Node and uvicorn hang up after 5 idle seconds: be first, or a POST meets a closing connection
HEADER_BYTES = 65_536  # of one header, and of the status line; proxies add headers of more than aiohttp's 8,190
HEADERS_MAX = 1_000
CLEAR = "the status is clear, the rest of the answer is not"
before = re.compile(rb"\A(?:\r?\n|HTTP/\d\.\d 1\d\d(?=[ \r\n]).*?\n\r?\n)+", re.DOTALL)
"""What may come before it: empty lines, and whole interim answers (100 Continue, 103 Early Hints)."""
status_line = re.compile(rb"HTTP/\d\.\d ([2-5]\d\d)[ \r\n]").match


class Answers(ResponseHandler):
    """One connection. Remembers how the answer begins."""

    _head = b""
    _status = 0
    """0: unknown."""

    def set_response_params(self, **params: Any) -> None:
        """A new request is sent on it."""
        self._head, self._status = b"", 0
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._head = before.sub(b"", self._head + data)[:HEADER_BYTES]
            if begun := status_line(self._head):
                self._head, self._status = b"", int(begun[1])
            if self._status // 100 == 4:  # noqa: PLR2004  another connection may lead to another server, which takes it
                self.force_close()
        super().data_received(data)

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        """The answer can't be read to its end. Its status is passed on if there was one."""
        clear = HttpProcessingError(code=self._status, message=CLEAR)
        super().set_exception(clear if self._status else exc, *cause)


def clear_status(exc: aiohttp.ClientResponseError) -> int:
    """The status of an answer that can't be read to its end; 0 if it has none."""
    return exc.status if exc.message == CLEAR else 0


def create_transport(settings: HttpSettings) -> httpx.AsyncBaseTransport:
    """Aiohttp's connections: httpx's own pool manages a ninth of the requests a second."""
    ca_file = settings.http_ca_file
    if not settings.http_url.get_secret_value().lower().startswith("https:"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; it trusts nobody, and need not read whom
    elif ca_file:
        context = ssl.create_default_context(cafile=ca_file)
    else:  # the authorities of certifi, or those in SSL_CERT_FILE and SSL_CERT_DIR
        context = httpx.create_ssl_context()

    def session() -> aiohttp.ClientSession:
        limit = settings.http_concurrency
        connector = aiohttp.TCPConnector(limit=limit, keepalive_timeout=KEEPALIVE_SECONDS, ssl=context)
        connector._factory = partial(Answers, loop=asyncio.get_running_loop())  # type: ignore[assignment]  # noqa: SLF001  aiohttp has no other way
        return aiohttp.ClientSession(
            connector=connector,
            trace_configs=following(context, ca_file),
            cookie_jar=aiohttp.DummyCookieJar(),
            middlewares=(_without_phrase,),
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            max_headers=HEADERS_MAX,
        )

    return AiohttpTransport(verify=context, client=session)


async def _without_phrase(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Httpx-aiohttp fails on a reason phrase that is not UTF-8. Nobody reads the phrase (RFC 9112, 4)."""
    response = await send(request)
    response.reason = None
    return response


async def speaks_tls(host: str, port: int, seconds: float) -> bool:
    """Whether the port takes a TLS handshake."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over it
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
