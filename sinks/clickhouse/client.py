"""ClickHouse behind a URL: a server over HTTP (`http.py`), or the embedded engine (`embedded.py`).

`errors.py` says what an error means. `sink.py`, `table.py` and `ledger.py` use a `Client`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from sinks.clickhouse.errors import CODE, Errors, Failed, failed
from sinks.clickhouse.http import HttpServer, Receipt

if TYPE_CHECKING:
    from sinks.clickhouse.embedded import EmbeddedEngine

LONG_SECONDS = 600.0
"""For a statement that reads or deletes many rows, such as reconcile's."""
QUESTION_SETTINGS: Mapping[str, object] = {
    "use_query_cache": 0,  # an answer of a minute ago hides what was lost since
    "apply_deleted_mask": 1,  # rows that were deleted are not there
    # The answer is whole, and nothing else stands in it.
    "limit": 0,
    "offset": 0,
    "extremes": 0,
    "additional_table_filters": "{}",
    "additional_result_filter": "",
    # At a limit of the profile it is an error, not the part that was found until then.
    "read_overflow_mode": "throw",
    "read_overflow_mode_leaf": "throw",
    "result_overflow_mode": "throw",
    "timeout_overflow_mode": "throw",
    "group_by_overflow_mode": "throw",
    "set_overflow_mode": "throw",
    "sort_overflow_mode": "throw",
    "distinct_overflow_mode": "throw",
    # For people who forget a WHERE. Some of our questions are about the whole table.
    "force_primary_key": 0,
    "force_index_by_date": 0,
}
"""Sent with every question: what a user's profile may have changed, and an answer is wrong with. Limits are left as
they are: they protect the server, and `errors.LIMITED` names them."""
_PORTS = {"http": 8123, "https": 8443, "chdb": None}

_Names = Annotated[list[str], msgspec.Meta(min_length=1)]

T = TypeVar("T")


class Address(NamedTuple):
    """REPLICATOR_CLICKHOUSE_URL, parsed."""

    server: str
    """`http://host:port`, `https://host:port` or `chdb:///directory`: without secrets, fit for messages."""
    user: str
    password: str
    database: str


def parse_url(url: str) -> Address:
    """`http(s)://user:password@host:port/database` or `chdb:///directory/database`. Raises ValueError, free of secrets.

    A `dsn` of clickhouse-connect takes another component for the database and anything after `?`.
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
        raise ValueError("it needs the host of a server, or the absolute directory of the engine, before the database")
    if embedded and find_spec("chdb") is None:
        raise ValueError("the embedded engine is missing: pip install 'engagement-replicator[chdb]'")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    server = f"chdb://{directory}" if embedded else f"{parts.scheme}://{host}:{port or default}"
    return Address(server, unquote(parts.username or "default"), unquote(parts.password or ""), database)


class Client:
    """Statements for ClickHouse. Connects at its first use, and again at the first use after `close`.

    Statements name their database: none is selected, because it may not exist yet. A call that is cancelled ends its
    request; an insert may still take place.
    """

    def __init__(self, sink: str, address: Address, timeout_seconds: float, ca_file: Path | None = None) -> None:
        self.errors = Errors(sink, address.server)
        self.timeout_seconds = timeout_seconds
        self._ca_file = ca_file
        self._engine = _engine(self.errors, address, ca_file)

    async def query(
        self,
        sql: str,
        row: type[T],
        parameters: Mapping[str, object] | None = None,
        *,
        settings: Mapping[str, object] | None = None,
        seconds: float | None = None,
    ) -> list[T]:
        """The rows of a SELECT, integers and decimals exact. `%(name)s` stands for a parameter. Raises SinkError."""
        # With names: so an empty answer is somebody else's, and no table without rows.
        body = await self._ask(f"{_bound(sql, parameters)}\nFORMAT JSONCompactEachRowWithNames", settings, seconds)
        try:
            names, *rows = [json.loads(line, parse_float=Decimal) for line in body.splitlines()]
            msgspec.convert(names, _Names)
            return msgspec.convert(rows, list[row], strict=False)  # type: ignore[valid-type]  # not strict: an integer in quotes is one
        except (ValueError, msgspec.ValidationError, RecursionError):
            if found := CODE.search(body):
                raise self.errors.answered(failed(int(found[1]), body)) from None
            raise self.errors.not_clickhouse("its answer has another form than the question asks for") from None

    async def one(self, sql: str, row: type[T]) -> T:
        """The row of a SELECT that always has one. Raises SinkError."""
        rows = await self.query(sql, row)
        if len(rows) != 1:
            raise self.errors.not_clickhouse("its answer has another form than the question asks for")
        return rows[0]

    async def command(self, sql: str, parameters: Mapping[str, object] | None = None) -> None:
        """Run a statement without a result. Raises SinkError. Ask for its effect: the answer may be somebody else's."""
        body = await self._ask(_bound(sql, parameters), None, LONG_SECONDS)
        if found := CODE.search(body):
            raise self.errors.answered(failed(int(found[1]), body))

    async def insert(
        self, table: str, columns: Sequence[str], data: Sequence[bytes], settings: Mapping[str, object]
    ) -> Receipt:
        """Insert JSON lines, in pieces. Raises SinkError, and Failed when ClickHouse answers with an error."""
        return await self._engine.insert(table, columns, data, settings, self.timeout_seconds)

    async def says(self, sql: str) -> str:
        """The text that a statement prints, which takes no FORMAT. Raises SinkError."""
        return (await self._ask(sql, None, None)).decode(errors="replace").strip()

    async def login_as(self, address: Address) -> None:
        """Connect anew, with the user and password of this address."""
        await self._engine.close()
        self._engine = _engine(self.errors, address, self._ca_file)

    async def close(self) -> None:
        """Release the connection. Safe to call twice."""
        await self._engine.close()

    async def _ask(self, statement: str, settings: Mapping[str, object] | None, seconds: float | None) -> bytes:
        try:
            asked = {**QUESTION_SETTINGS, **(settings or {})}
            return await self._engine.ask(statement, asked, seconds or self.timeout_seconds)
        except Failed as failure:
            raise self.errors.answered(failure) from None


def _engine(errors: Errors, address: Address, ca_file: Path | None) -> HttpServer | EmbeddedEngine:
    scheme, _, directory = address.server.partition("://")
    if scheme != "chdb":
        return HttpServer(errors, address.user, address.password, ca_file)
    from sinks.clickhouse.embedded import EmbeddedEngine  # noqa: PLC0415  550 MB that most do without

    return EmbeddedEngine(errors, directory)


def _bound(sql: str, parameters: Mapping[str, object] | None) -> str:
    return sql % {name: _literal(value) for name, value in parameters.items()} if parameters else sql


def _literal(value: object) -> str:
    """A number, a text, or a tuple of them, in SQL."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
