"""ClickHouse's HTTP interface: one request a statement, bounded in bytes and in time.

It follows no redirect, uses no proxy of the environment, and believes an insert's answer only if it proves itself
(`Receipt`). `docs/decisions.md` says why this is not clickhouse-connect's client.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import aiohttp

from sinks.clickhouse.errors import CODE, Errors, failed
from sinks.tls import following

CONNECT_SECONDS = 10
KEEPALIVE_SECONDS = 2.5  # below the 3 s of old servers: they would close a connection just as an insert is sent
ANSWER_BYTES = 16 << 20  # reconcile fetches 50,000 rows, some 5 MB
SHORT_BYTES = 65_536  # an error, and the answer of an insert, which is empty
HEADER_BYTES = 65_536  # a company's proxy may add more than aiohttp's 8 kB

_CODE_HEADER = "X-ClickHouse-Exception-Code"
_ID_HEADER = "X-ClickHouse-Query-Id"
_SUMMARY_HEADER = "X-ClickHouse-Summary"


class Receipt(NamedTuple):
    """What the answer to an insert says."""

    rows: int
    """How many rows were written, those of materialized views included."""
    doubt: str = ""
    """Why the answer proves nothing, whatever it says; empty if it is ClickHouse's answer to this very insert."""


class HttpServer:
    """A server at `http://` or `https://`. Raises Failed when ClickHouse answers with an error, else SinkError."""

    def __init__(self, errors: Errors, user: str, password: str, ca_file: Path | None) -> None:
        self._errors = errors
        self._server = errors.server
        self._ca_file = ca_file
        self._headers = {
            "Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}",
            "Accept-Encoding": "identity",
            "User-Agent": "engagement-replicator",
        }
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, statement: str, settings: Mapping[str, object], seconds: float) -> bytes:
        """Run a statement; what it prints."""
        async with self._answer([statement.encode()], settings, seconds, uuid.uuid4().hex) as answer:
            return await _text(answer, ANSWER_BYTES, self._errors)

    async def insert(
        self, table: str, columns: Sequence[str], data: Sequence[bytes], settings: Mapping[str, object], seconds: float
    ) -> Receipt:
        """Insert JSON lines, in pieces."""
        statement = f"INSERT INTO {table} (`{'`, `'.join(columns)}`) FORMAT JSONEachRow\n".encode()
        query_id = uuid.uuid4().hex
        async with self._answer([statement, *data], settings, seconds, query_id) as answer:
            text = await _text(answer, SHORT_BYTES, self._errors, cut=True)
            if found := CODE.search(text):  # it was sent after the status line: the insert failed meanwhile
                raise failed(int(found[1]), text)
            return _receipt(answer.headers, text, query_id)

    async def close(self) -> None:
        """Release the connections. Safe to call twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @asynccontextmanager
    async def _answer(
        self, body: Sequence[bytes], settings: Mapping[str, object], seconds: float, query_id: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer of ClickHouse, unless it is an error. `seconds` are for all of it, from connecting to the end."""
        parameters = {name: str(value) for name, value in settings.items()}
        # An error after the first row of a result becomes the status, too.
        parameters |= {"wait_end_of_query": "1", "query_id": query_id}
        length = {"Content-Length": str(sum(map(len, body)))}
        with self._errors.translated():
            async with (
                asyncio.timeout(seconds),
                self._connected().post(
                    f"{self._server}/", params=parameters, headers=length, data=_sent(body), allow_redirects=False
                ) as answer,
            ):
                await _require_good(answer, self._errors)
                yield answer

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = self._tls()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(keepalive_timeout=KEEPALIVE_SECONDS, ssl=context or True),
                trace_configs=following(context, self._ca_file) if context else None,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                headers=self._headers,
                auto_decompress=False,
                max_line_size=HEADER_BYTES,
                max_field_size=HEADER_BYTES,
                trust_env=False,
            )
        return self._session

    def _tls(self) -> ssl.SSLContext | None:
        if not self._server.startswith("https://"):
            return None
        context = ssl.create_default_context()
        if self._ca_file is not None:
            try:
                context.load_verify_locations(self._ca_file)
            except OSError as exc:  # an SSLError too
                raise self._errors.unreadable_ca(exc) from None
        return context


async def _sent(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """One after the other: as one text a large insert would be in memory once more."""
    for piece in pieces:
        yield piece  # aiohttp gives the loop a turn whenever the socket is full


async def _require_good(answer: aiohttp.ClientResponse, errors: Errors) -> None:
    """Raises Failed or SinkError unless this is an answer with success."""
    header = answer.headers.get(_CODE_HEADER, "")
    if HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES and not header:
        return
    text = await _text(answer, SHORT_BYTES, errors, cut=True)
    if found := re.fullmatch(rb"\d{1,9}", header.encode()) or CODE.match(text):  # a front end may drop the header
        raise failed(int(found[0] if header else found[1]), text)
    raise errors.not_from_clickhouse(answer.status)


async def _text(answer: aiohttp.ClientResponse, most: int, errors: Errors, *, cut: bool = False) -> bytes:
    """The body. Raises SinkMisconfigured if it is longer than any that ClickHouse gives, unless it may be `cut`."""
    encoding = answer.headers.get("Content-Encoding", "identity")  # we ask for none, and a bomb would be one
    if encoding.lower() != "identity":
        raise errors.not_clickhouse("its answer is compressed")
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > most:
            answer.close()
            if cut:
                break
            raise errors.not_clickhouse(f"its answer is longer than {most} bytes")
    return bytes(body[:most])


def _receipt(headers: Mapping[str, str], text: bytes, query_id: str) -> Receipt:
    try:
        rows = int(json.loads(headers[_SUMMARY_HEADER])["written_rows"])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return Receipt(0, "its answer has no summary of ClickHouse's")
    if text:
        return Receipt(rows, "its answer has a text in it, and that of an insert has none")
    if headers.get(_ID_HEADER) != query_id:
        return Receipt(rows, "its answer is not to this request")
    return Receipt(rows)
