"""The connection to ClickHouse: over HTTP here, or into the embedded engine (`embedded.py`), by URL alone.

`errors.py` turns the driver's errors into the sink's. `sink.py`, `table.py` and `ledger.py` use a `Client`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import clickhouse_connect
from clickhouse_connect.driver.asyncclient import AsyncClient

from sinks.clickhouse.errors import not_clickhouse, translated, unreadable_authority

QUERY_FORMAT = "JSONCompactEachRow"
QUERY_SETTINGS = {"output_format_json_quote_64bit_integers": 0}
INSERT_FORMAT = "JSONEachRow"

_CONNECT_SECONDS = 10


class Address(NamedTuple):
    """REPLICATOR_CLICKHOUSE_URL, parsed."""

    scheme: str
    """`http`, `https` or `chdb`."""
    host: str
    """Empty for chdb."""
    port: int
    user: str
    password: str
    directory: str
    """Where the embedded engine keeps its data; empty for a server."""
    database: str

    def __str__(self) -> str:
        """Without user and password: fit for messages."""
        return f"chdb://{self.directory}" if self.scheme == "chdb" else f"{self.scheme}://{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """`http(s)://user:password@host:port/database` or `chdb:///directory/database`. Raises ValueError, free of secrets.

    The database is the last component in both: `chdb:///var/lib/replicator/clickhouse/engagement` is the database
    `engagement` in the directory `/var/lib/replicator/clickhouse`. The driver's own `dsn` takes the first component
    and passes options behind `?` on without checking them.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or {"http": 8123, "https": 8443}.get(parts.scheme, 0)
    except ValueError:
        raise ValueError("host or port can't be read") from None  # Python's own message quotes the URL
    directory, _, database = (unquote(part) for part in parts.path.rpartition("/"))
    if parts.scheme not in ("http", "https", "chdb"):
        raise ValueError("it begins with something else")
    if not database.replace("_", "").replace("-", "").isalnum():
        raise ValueError("the database at its end is missing or has other than letters, digits, _ and -")
    if parts.query or parts.fragment:
        raise ValueError("it has a ? or # part")
    if parts.scheme == "chdb" and (parts.netloc or not directory):
        raise ValueError("the embedded engine needs an absolute directory with a database in it")
    if parts.scheme != "chdb" and (not host or directory):
        raise ValueError("a server's URL has a host, and nothing but the database behind it")
    user, password = unquote(parts.username or "default"), unquote(parts.password or "")
    return Address(parts.scheme, host, port, user, password, directory, database)


class Client(Protocol):
    """A connection to ClickHouse. Connects at its first use, and again at the first use after `close`.

    No database is selected, because it may not exist yet: statements name it.

    Raises:
        SinkError: as `errors.translated` says.
        ValueRefused: ClickHouse refuses a value.
    """

    async def query(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[list[Any]]:
        """The rows of a SELECT as JSON has them: integers of any size are exact. `%(name)s` stands for a parameter."""

    async def command(self, sql: str) -> None:
        """Run a statement without a result."""

    async def insert(self, table: str, columns: Sequence[str], body: bytes, settings: Mapping[str, object]) -> int:
        """Insert JSON lines; how many rows ClickHouse counted, 0 if it did not count.

        Cancelled, the insert may still take place.
        """

    async def close(self) -> None:
        """Release the connection. Safe to call twice."""


def connect(address: Address, *, timeout_seconds: int, ca_file: Path | None = None) -> Client:
    """A client for the address; the time is for one answer, the file holds the authority of an https:// server."""
    if address.scheme == "chdb":
        from sinks.clickhouse.embedded import EmbeddedClient  # noqa: PLC0415  needs the chdb extra

        return EmbeddedClient(address.directory)
    return HttpClient(address, timeout_seconds, ca_file)


def decode_rows(body: bytes) -> list[list[Any]]:
    """An answer in QUERY_FORMAT."""
    return [json.loads(line) for line in body.splitlines()]


class HttpClient:
    """clickhouse-connect's asynchronous client. A cancelled call closes its connection."""

    def __init__(self, address: Address, timeout_seconds: int, ca_file: Path | None) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._ca_file = ca_file
        self._connecting = asyncio.Lock()
        self._client: AsyncClient | None = None

    async def query(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[list[Any]]:
        with translated(str(self._address)):
            client = await self._connected()
            body = await client.raw_query(sql, dict(parameters or {}), QUERY_SETTINGS, QUERY_FORMAT)
        try:
            return decode_rows(body)
        except ValueError:
            raise not_clickhouse(str(self._address)) from None

    async def command(self, sql: str) -> None:
        with translated(str(self._address)):
            await (await self._connected()).command(sql)

    async def insert(self, table: str, columns: Sequence[str], body: bytes, settings: Mapping[str, object]) -> int:
        with translated(str(self._address)):
            client = await self._connected()
            async with asyncio.timeout(self._timeout_seconds):  # aiohttp has no limit for sending a body
                summary = await client.raw_insert(table, list(columns), body, dict(settings), INSERT_FORMAT)
        if not summary.query_id():  # in every answer of ClickHouse's
            raise not_clickhouse(str(self._address))
        return summary.written_rows

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _connected(self) -> AsyncClient:
        async with self._connecting:
            if self._client is None:
                self._client = await self._connect()
            return self._client

    async def _connect(self) -> AsyncClient:
        address = self._address
        try:
            return await clickhouse_connect.get_async_client(
                interface=address.scheme,
                host=address.host,
                port=address.port,
                username=address.user,
                password=address.password,
                ca_cert=str(self._ca_file) if self._ca_file else None,
                connect_timeout=min(_CONNECT_SECONDS, self._timeout_seconds),
                send_receive_timeout=self._timeout_seconds,
                compress=False,  # on a local network compressing costs more than it saves
                query_retries=0,  # the lane retries
                autogenerate_session_id=False,  # a session forbids to retry a cancelled insert that still runs
            )
        except OSError as exc:  # the driver wraps those of the network
            if self._ca_file is None:
                raise
            raise unreadable_authority(self._ca_file, exc) from exc
