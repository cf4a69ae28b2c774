"""The connection to ClickHouse: over HTTP, or into the embedded engine (chdb), by URL alone.

`errors.py` turns the driver's errors into the sink's. `sink.py`, `table.py` and `ledger.py` use a `Client`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import clickhouse_connect
from clickhouse_connect.driver.asyncclient import AsyncClient

from sinks.clickhouse.errors import not_clickhouse, translated

CONNECT_SECONDS = 10
CLOSE_SECONDS = 10  # a running insert of the embedded engine takes some 0.2 s; it ends cleanly after that
_PORTS = {"http": 8123, "https": 8443, "chdb": None}

_log = logging.getLogger(__name__)


class Address(NamedTuple):
    """REPLICATOR_CLICKHOUSE_URL, parsed."""

    server: str
    """`http://host:port`, `https://host:port` or `chdb:///directory`: without secrets, fit for messages."""
    user: str
    password: str
    database: str


def parse_url(url: str) -> Address:
    """`http(s)://user:password@host:port/database` or `chdb:///directory/database`. Raises ValueError, free of secrets.

    The driver's own `dsn` would do, but takes another component for the database and anything after `?`.
    """
    try:
        parts = urlsplit(url)
        default, port = _PORTS[parts.scheme], parts.port
    except (ValueError, KeyError):  # Python's own message quotes the URL
        raise ValueError("it begins with something else, or host or port can't be read") from None
    directory, _, database = (unquote(part) for part in parts.path.rpartition("/"))
    embedded = parts.scheme == "chdb"
    if not database.replace("_", "").replace("-", "").isalnum():
        raise ValueError("the database at its end is missing or has other than letters, digits, _ and -")
    if parts.query or parts.fragment:
        raise ValueError("it has a ? or # part")
    if embedded == bool(parts.hostname) or embedded != bool(directory):
        raise ValueError("before the database is the host of a server, or the absolute directory of the engine")
    if embedded and find_spec("chdb") is None:
        raise ValueError("the embedded engine is missing: pip install 'engagement-replicator[chdb]'")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    server = f"chdb://{directory}" if embedded else f"{parts.scheme}://{host}:{port or default}"
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


class EmbeddedEngine:
    """chdb with the methods of the asynchronous driver. One process may open a directory at a time.

    Its calls block, so each runs in a thread: a daemon, because a call that never returns must not keep the program
    from ending, as the thread of an executor would.
    """

    def __init__(self) -> None:
        self._client: Any = None
        self._running: asyncio.Future[Any] | None = None

    async def open(self, directory: str) -> EmbeddedEngine:
        """Load the engine, and the tables in the directory."""
        self._client = await self._run(clickhouse_connect.get_client, interface="chdb", path=directory)
        return self

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return partial(self._run, getattr(self._client, name))

    async def close(self) -> None:
        """Wait for a running call, then free the directory."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._run(self._client.close)
        except TimeoutError:  # the write was cancelled, so nothing counts as written
            _log.warning("the embedded ClickHouse still works after %d s; the program ends without it", CLOSE_SECONDS)

    async def _run(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """One call at a time: the next begins when it has ended, not when nobody waits for it any more."""
        while self._running is not None and not self._running.done():
            await asyncio.wait([self._running])
        result: Future[Any] = Future()

        def work() -> None:
            try:
                result.set_result(call(*arguments, **options))
            except BaseException as exc:  # noqa: BLE001  the caller raises it
                result.set_exception(exc)

        threading.Thread(target=work, name="chdb", daemon=True).start()
        self._running = asyncio.wrap_future(result)
        return await asyncio.shield(self._running)
