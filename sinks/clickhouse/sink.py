"""Writes events to ClickHouse: one insert a batch, over HTTP or into the embedded engine (chdb), by URL alone.

`clickhouse_url.py` reads the URL, `clickhouse_table.py` makes and compares the table, `clickhouse_errors.py` says what
an error means, and `replicator/delivery/lane.py` decides when a batch is written and what happens after an error.

Each event ends up in the table once under FINAL, and without it after merges: the sort key is the event's identity.
Before that, an insert that is sent again is recognised by its token. ClickHouse silently drops the rows of a token that
it knows, whatever they are, and it knows a token longer than its rows, if those are deleted. So the token is a hash of
the exact bytes, and of a number that is new in each process: a backfill that repairs a table is no retry.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, TypeVar

import clickhouse_connect
from clickhouse_connect.driver.client import Client
from pydantic import Field, FilePath, SecretStr, field_validator

from replicator.contracts.errors import SinkError, SinkUnavailable, SinkUnusable
from replicator.contracts.events import Event, Finding, Refusal, SinkPosition
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Contract, CountsByHour, HasLedger, Mode, Sink
from sinks.clickhouse.errors import ValueRefused, translated
from sinks.clickhouse.ledger import ClickHouseLedger
from sinks.clickhouse.table import COLUMNS, Problem, Shape, create, find_problem, is_empty, look, qualified
from sinks.clickhouse.url import Address, parse_url

EMPTIED = (
    "ClickHouse table %s is empty, and was written to before: what it had is missing. `python -m replicator init`"
    " prints the `python backfill.py` command that brings it; type that with --sinks clickhouse, while this goes on"
)

UNREACHED_CURE = "See that it is up and that REPLICATOR_CLICKHOUSE_URL leads to it"

_log = logging.getLogger(__name__)

T = TypeVar("T")

_WHOLE_INSERT_ROWS = 1_048_576  # above any clickhouse_max_events: an insert is parsed into one block

_INSERT_SETTINGS = {
    # One insert is one block, and one part a month: atomic, and what the token stands for.
    "input_format_parallel_parsing": 0,
    "max_insert_block_size": _WHOLE_INSERT_ROWS,
    "min_insert_block_size_rows": _WHOLE_INSERT_ROWS,
    "min_insert_block_size_bytes": 0,
    # A catch-up or a backfill may span more months than the default of 100.
    "max_partitions_per_insert_block": 0,
    # The batch is gathered here; ClickHouse's own gathering (on by default since 26) would add its wait to ours and
    # ignores the token. Where a profile insists on it, at least the answer has to mean that the rows are there.
    "async_insert": 0,
    "wait_for_async_insert": 1,
    "date_time_input_format": "best_effort",  # RFC 3339
    # Whatever does not fit is an error, not something else: an unknown field, a null where none may be, a bad row.
    "input_format_skip_unknown_fields": 0,
    "input_format_null_as_default": 0,
    "input_format_allow_errors_num": 0,
    "input_format_allow_errors_ratio": 0,
}

_PROBE_RANGE_SQL = """SELECT
    toUnixTimestamp64Micro(parseDateTime64BestEffortOrNull('0001-01-01T00:00:00Z', 6, 'UTC')),
    toUnixTimestamp64Micro(parseDateTime64BestEffortOrNull('9999-12-31T23:59:59.999999Z', 6, 'UTC'))"""
"""Does DateTime64 hold the years 1 to 9999 (since mid-2026)? Before, it went from 1900 to 2299 and clamped silently."""

_HOURS_SQL = """
WITH toUnixTimestamp64Micro(event_ts) AS us
SELECT intDiv(us - positiveModulo(us, 3600000000), 1000000) AS hour, count() FROM {table} FINAL
WHERE event_ts >= fromUnixTimestamp64Micro(%(start)s, 'UTC') AND event_ts < fromUnixTimestamp64Micro(%(end)s, 'UTC')
GROUP BY hour"""
"""Each event once, whatever was sent again."""

YEARS_1_TO_9999_US = (-62_135_596_800_000_000, 253_402_300_799_999_999)
YEARS_1900_TO_2299_US = (-2_208_988_800_000_000, 10_413_791_999_999_999)

_OUTSIDE_RANGE = "event_ts is outside what DateTime64 holds on this ClickHouse"


class ClickHouseSettings(Settings):
    """Options of the ClickHouse sink."""

    clickhouse_url: SecretStr = Field(
        SecretStr("http://default@localhost:8123/engagement"),
        description="http:// or https://user:password@host:port/database, or chdb:///directory/database "
        "for the embedded engine",
    )
    clickhouse_ca_file: FilePath | None = Field(
        None, description="the path of a PEM file with the authority behind an https:// server's certificate"
    )
    clickhouse_timeout_seconds: int = Field(
        30,  # an insert takes 0.1 s; a server that is held back by merges may take ten
        ge=1,
        le=3600,
        description="whole seconds until an insert that was not answered counts as failed, 1 to 3600",
    )
    clickhouse_linger_seconds: float = Field(
        0.8,  # about one insert a second, what ClickHouse likes, and visible within 1.5 s of the commit
        ge=0,
        le=60,
        description="seconds to gather events for one insert, 0 to 60",
    )
    clickhouse_max_events: int = Field(
        20_000,  # 6 MB of JSON: larger inserts gain nothing and cost memory
        ge=1,
        le=1_000_000,
        description="the most events in one insert, 1 to 1000000",
    )

    @field_validator("clickhouse_url")
    @classmethod
    def _usable(cls, url: SecretStr) -> SecretStr:
        parse_url(url.get_secret_value())
        return url


class ClickHouseSink(Sink, CountsByHour, HasLedger):
    """A `contracts.sink.Sink`. The client blocks, so every call to it runs in a thread."""

    name = "clickhouse"
    settings_class: ClassVar = ClickHouseSettings
    concurrency = 1  # inserts of one table gain nothing side by side, and in order the latest view is the last

    def __init__(self, settings: ClickHouseSettings, contract: Contract = None) -> None:
        super().__init__(settings, contract)
        self.max_events = settings.clickhouse_max_events
        self.linger_seconds = settings.clickhouse_linger_seconds
        self._settings = settings
        self._address = parse_url(settings.clickhouse_url.get_secret_value())
        self._table = qualified(self._address.database)
        self._run = secrets.token_bytes(16)
        self._client: Client | None = None
        self._range_us = YEARS_1900_TO_2299_US
        self._shape: Shape | None = None
        """The table when it was seen last, and was right."""

    async def create(self) -> list[str]:
        """Make the database and the table, each only if it is missing (a plain user may not make databases)."""
        return await asyncio.to_thread(self._create)

    async def check(self) -> list[Finding]:
        """Reachable, the table as it should be, and an insert of no rows goes through."""
        return await asyncio.to_thread(self._check)

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:  # noqa: ARG002  the same in both modes
        """Connect, and look at the table: a wrong one is an error now and not at the first event."""
        await asyncio.to_thread(self._open, resumes=start is not None)

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """One insert, unless ClickHouse refuses a value in it.

        Cancelled, the insert may still happen in its thread; the same events again do no harm.
        """
        return await asyncio.to_thread(self._write, events)

    async def hours(self, start_us: int, end_us: int) -> dict[int, int]:
        """How many events it has in each hour of a range, by the hour's start in Unix seconds; for a comparison."""
        found = await self.ask(lambda client, table: _hours(client, table, start_us, end_us))
        return {int(hour): int(count) for hour, count in found}

    async def ask(self, question: Callable[[Client, str], T]) -> T:
        """What the function says, called in a thread with the client and the table's name; errors are ours."""

        def answer() -> T:
            client = self._connected()
            with self._translated():
                return question(client, self._table)

        return await asyncio.to_thread(answer)

    def ledger(self, *, with_content: bool) -> ClickHouseLedger:
        """Its rows, for a comparison."""
        return ClickHouseLedger(self.ask, with_content=with_content)

    async def close(self) -> None:
        """Drop the connections, or free the embedded engine's directory."""
        client, self._client = self._client, None
        if client is not None:
            await asyncio.to_thread(client.close)

    def _connected(self) -> Client:
        if self._client is None:
            with self._translated():
                client = _connect(self._address, self._settings)
                if client.query(_PROBE_RANGE_SQL).result_rows == [YEARS_1_TO_9999_US]:
                    self._range_us = YEARS_1_TO_9999_US
            self._client = client
        return self._client

    def _translated(self) -> AbstractContextManager[None]:
        return translated(str(self._address))

    def _create(self) -> list[str]:
        client = self._connected()
        with self._translated():
            return create(client, self._address.database)

    def _check(self) -> list[Finding]:
        try:
            found = Finding(True, f"ClickHouse {self._connected().server_version} at {self._address}")
            problem = self._find_problem()
            if problem is None:
                self._insert_rows(b"")
        except SinkError as exc:
            cure = UNREACHED_CURE if isinstance(exc, SinkUnavailable) else exc.cure
            return [Finding(False, f"ClickHouse at {self._address}: {exc.detail}", cure)]
        if problem is not None:
            return [found, Finding(False, f"ClickHouse: {problem.what}", problem.cure)]
        return [found, Finding(True, f"ClickHouse table {self._table} has the right shape and takes inserts")]

    def _look(self) -> Shape | None:
        client = self._connected()
        with self._translated():
            return look(client, self._address.database)

    def _find_problem(self) -> Problem | None:
        return find_problem(self._look(), self._address.database)

    def _open(self, *, resumes: bool) -> None:
        self._require_table()
        if not resumes:
            return
        client = self._connected()
        with self._translated():
            empty = is_empty(client, self._address.database)
        if empty:
            _log.error(EMPTIED, self._table)

    def _require_table(self) -> None:
        """Raises SinkUnusable unless the table keeps events as they are.

        Looked at again after every insert: ClickHouse wraps and cuts values without a word where a column has become
        narrower. Rows that went into such a column do not count as written, and are inserted again once it is mended.
        """
        shape = self._look()
        if shape is not None and shape == self._shape:
            return
        problem = find_problem(shape, self._address.database)
        if problem is not None:
            raise SinkUnusable(sink=self.name, detail=problem.what, cure=problem.cure)
        self._shape = shape

    def _write(self, events: Sequence[Event]) -> list[Refusal]:
        self._connected()
        first, last = self._range_us
        held = [event for event in events if event.ts_us is not None and first <= event.ts_us <= last]
        refused = self._insert(held) if held else []
        if len(held) < len(events):
            kept = set(map(id, held))
            refused += [Refusal(event, _OUTSIDE_RANGE) for event in events if id(event) not in kept]
        return refused

    def _insert(self, events: Sequence[Event]) -> list[Refusal]:
        """Insert, or halve until the events that ClickHouse refuses stand alone; returns those."""
        try:
            self._insert_rows(rows(events))
        except SinkUnusable:
            self._require_table()  # names what is wrong, as a rule
            raise
        except ValueRefused as exc:
            self._require_table()  # an altered column is not the events' fault
            if len(events) == 1:
                return [Refusal(events[0], f"ClickHouse refuses a value in it: {exc}")]
            middle = len(events) // 2
            return self._insert(events[:middle]) + self._insert(events[middle:])
        self._require_table()
        return []

    def _insert_rows(self, body: bytes) -> None:
        token = hashlib.sha256(
            body
        )  # of the rows that go out, not of their positions: those can't tell two views apart
        token.update(self._run)
        settings = {**_INSERT_SETTINGS, "insert_deduplication_token": token.hexdigest()}
        with self._translated():
            self._connected().raw_insert(self._table, list(COLUMNS), body, settings, "JSONEachRow")


def rows(events: Sequence[Event]) -> bytes:
    """The events as JSON lines, each with the `_lsn` of its commit behind its own fields."""
    parts: list[bytes] = []
    lsn, tail = -1, b""
    for event in events:
        if event.commit_lsn != lsn:
            lsn = event.commit_lsn
            tail = b',"_lsn":%d}\n' % lsn
        parts += (event.json[:-1], tail)
    return b"".join(parts)


def _hours(client: Client, table: str, start_us: int, end_us: int) -> Sequence[Sequence[int]]:
    return client.query(_HOURS_SQL.format(table=table), {"start": start_us, "end": end_us}).result_rows


def _connect(address: Address, settings: ClickHouseSettings) -> Client:
    """A client that tells no database (it may not exist yet), keeps no session and shares no pool."""
    if address.scheme == "chdb":
        return clickhouse_connect.get_client(interface="chdb", path=address.directory)
    return clickhouse_connect.get_client(
        interface=address.scheme,
        host=address.host,
        port=address.port,
        username=address.user,
        password=address.password,
        ca_cert=str(settings.clickhouse_ca_file) if settings.clickhouse_ca_file else None,
        connect_timeout=min(10, settings.clickhouse_timeout_seconds),
        send_receive_timeout=settings.clickhouse_timeout_seconds,
        compress=False,  # on a local network compressing costs more than it saves
        query_retries=0,  # the lane retries
        autogenerate_session_id=False,  # a session would forbid the retry of a cancelled insert that still runs
        dedicated_pool=True,
    )
