"""The connection to ClickHouse: over HTTP, or into the embedded engine (`embedded.py`), by URL alone.

`errors.py` turns the driver's errors into the sink's. `sink.py`, `table.py` and `ledger.py` use a `Client`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import clickhouse_connect
from clickhouse_connect.driver.asyncclient import AsyncClient

from sinks.clickhouse.embedded import EmbeddedEngine
from sinks.clickhouse.errors import not_clickhouse, translated

CONNECT_SECONDS = 10
_PORTS = {"http": 8123, "https": 8443, "chdb": None}


class Address(NamedTuple):
    """REPLICATOR_CLICKHOUSE_URL, parsed."""

    server: str
    """`http://host:port`, `https://host:port` or `chdb:///directory`: without secrets, fit for messages."""
    user: str
    password: str
    database: str


def parse_url(url: str) -> Address:
    """`http(s)://user:password@host:port/database` or `chdb:///directory/database`. Raises ValueError, free of secrets.

    The driver's own `dsn` would do, but takes another component for the database and anything behind `?`.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        raise ValueError("host or port can't be read") from None  # Python's own message quotes the URL
    directory, _, database = (unquote(part) for part in parts.path.rpartition("/"))
    embedded = parts.scheme == "chdb"
    if parts.scheme not in _PORTS:
        raise ValueError("it begins with something else")
    if not database.replace("_", "").replace("-", "").isalnum():
        raise ValueError("the database at its end is missing or has other than letters, digits, _ and -")
    if parts.query or parts.fragment:
        raise ValueError("it has a ? or # part")
    if embedded == bool(parts.hostname) or embedded != bool(directory):
        raise ValueError("before the database is the host of a server, or the absolute directory of the engine")
    if embedded and find_spec("chdb") is None:
        raise ValueError("the embedded engine is missing: pip install 'engagement-replicator[chdb]'")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    server = f"chdb://{directory}" if embedded else f"{parts.scheme}://{host}:{port}"
    return Address(server, unquote(parts.username or "default"), unquote(parts.password or ""), database)


class Client:
    """Statements for ClickHouse. Connects at its first use, and again at the first use after `close`.

    Statements name their database: none is selected, because it may not exist yet. Raises SinkError and ValueRefused,
    as `errors.translated` says. A call that is cancelled ends its request; an insert may still take place.
    """

    def __init__(self, address: Address, timeout_seconds: int, ca_file: Path | None = None) -> None:
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._ca_file = ca_file
        self._connecting = asyncio.Lock()
        self._driver: AsyncClient | EmbeddedEngine | None = None

    async def query(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[list[Any]]:
        """The rows of a SELECT as JSON has them: integers of any size are exact. `%(name)s` stands for a parameter."""
        settings = {"output_format_json_quote_64bit_integers": 0}
        async with self._connected() as driver:
            body = await driver.raw_query(sql, dict(parameters or {}), settings, "JSONCompactEachRow")
            return [json.loads(line) for line in body.splitlines()]

    async def command(self, sql: str, parameters: Mapping[str, object] | None = None) -> None:
        """Run a statement without a result."""
        async with self._connected() as driver:
            await driver.command(sql, dict(parameters or {}))

    async def insert(self, table: str, columns: Sequence[str], body: bytes, settings: Mapping[str, object]) -> int:
        """Insert JSON lines; how many rows ClickHouse counted, 0 if it did not count."""
        async with self._connected() as driver, asyncio.timeout(self._timeout_seconds):  # a body may never be read
            result = await driver.raw_insert(table, list(columns), body, dict(settings), "JSONEachRow")
        if not any(result.summary.values()):
            raise not_clickhouse(self._address.server)
        return result.written_rows

    async def close(self) -> None:
        """Release the connection. Safe to call twice."""
        driver, self._driver = self._driver, None
        if driver is not None:
            await driver.close()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncClient | EmbeddedEngine]:
        with translated(self._address.server):
            async with self._connecting:
                if self._driver is None:
                    self._driver = await self._connect()
                driver = self._driver
            yield driver

    async def _connect(self) -> AsyncClient | EmbeddedEngine:
        scheme, _, directory = self._address.server.partition("://")
        if scheme == "chdb":
            return await EmbeddedEngine().open(directory)
        return await clickhouse_connect.get_async_client(
            interface=scheme,
            dsn=self._address.server,
            username=self._address.user,
            password=self._address.password,
            ca_cert=str(self._ca_file) if self._ca_file else None,
            connect_timeout=min(CONNECT_SECONDS, self._timeout_seconds),
            send_receive_timeout=self._timeout_seconds,
            compress=False,  # on a local network compressing costs more than it saves
            query_retries=0,  # the lane retries
            autogenerate_session_id=False,  # a session forbids to retry a cancelled insert that still runs
        )
