"""Writes events to ClickHouse, one insert per batch.

`client.py` connects, `table.py` creates and compares the table, `errors.py` interprets errors, and
`replicator/delivery/lane.py` decides when a batch is written and what happens after an error.

Each event is in the table once under FINAL, and without FINAL after merges: the sort key is the event's identity.
Until then ClickHouse recognises a repeated insert by its token. It silently drops the rows of a token that it knows,
whatever they are, and it remembers a token even when the rows have been deleted. So the token is a hash of the exact
bytes and of a number that is new in each process: a backfill that repairs a table is not a retry.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Sequence
from functools import partial
from itertools import filterfalse
from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from replicator.contracts.errors import SinkError, SinkUnavailable, SinkUnusable, command
from replicator.contracts.events import Event, Finding, Refusal, SinkPosition
from replicator.contracts.fields import Contract
from replicator.contracts.settings import CaFile, Settings, number
from replicator.contracts.sink import CountsByHour, HasLedger, Mode, Sink
from sinks.clickhouse.client import Client, parse_url
from sinks.clickhouse.errors import ValueRefused
from sinks.clickhouse.ledger import ClickHouseLedger
from sinks.clickhouse.table import columns, create, qualified, require_table

EMPTIED = (
    "ClickHouse table %s is empty, and was written to before: its events are missing. Meanwhile new events are written."
    f" {command('init')} prints the backfill command that restores the others; add --sinks clickhouse to it"
)

UNREACHED_CURE = "Check that it is up and that REPLICATOR_CLICKHOUSE_URL leads to it"

_log = logging.getLogger(__name__)

_WHOLE_INSERT_ROWS = 1_048_576  # above any clickhouse_max_events: an insert is parsed into one block

_INSERT_SETTINGS = {
    # One insert is one block, and one part a month: atomic, and what the token stands for.
    "input_format_parallel_parsing": 0,
    "max_insert_block_size": _WHOLE_INSERT_ROWS,
    "min_insert_block_size_rows": _WHOLE_INSERT_ROWS,
    "min_insert_block_size_bytes": 0,
    # A catch-up or a backfill may span more months than the default of 100.
    "max_partitions_per_insert_block": 0,
    # The lane gathers the batch. ClickHouse's own gathering (on by default since 26) would add its wait and ignore the
    # token. Where a profile insists on it, at least the answer has to mean that the rows are there.
    "async_insert": 0,
    "wait_for_async_insert": 1,
    "date_time_input_format": "best_effort",  # RFC 3339
    # Whatever does not fit is an error: an unknown field, a null where none may be, a bad row.
    "input_format_skip_unknown_fields": 0,
    "input_format_null_as_default": 0,
    "input_format_allow_errors_num": 0,
    "input_format_allow_errors_ratio": 0,
}

_PROBE_RANGE_SQL = """SELECT
    toUnixTimestamp64Micro(parseDateTime64BestEffortOrNull('0001-01-01T00:00:00Z', 6, 'UTC')),
    toUnixTimestamp64Micro(parseDateTime64BestEffortOrNull('9999-12-31T23:59:59.999999Z', 6, 'UTC'))"""
"""Does DateTime64 hold the years 1 to 9999 (since mid-2026)? Before, it went from 1900 to 2299 and clamped silently."""

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
    clickhouse_ca_file: CaFile = Field(
        None, description="the path of a PEM file with the authority of an https:// server"
    )
    # An insert takes 0.1 s; a server that is held back by merges may take ten.
    clickhouse_timeout_seconds: int = number(
        30, 1, 3600, "whole seconds until an insert that was not answered counts as failed"
    )
    # About one insert a second, what ClickHouse likes, and visible within 1.5 s of the commit.
    clickhouse_linger_seconds: float = number(0.8, 0, 60, "seconds to gather events for one insert")
    # 6 MB of JSON: larger inserts gain nothing and cost memory.
    clickhouse_max_events: int = number(20_000, 1, 1_000_000, "the most events in one insert")

    @field_validator("clickhouse_url")
    @classmethod
    def _usable(cls, url: SecretStr) -> SecretStr:
        parse_url(url.get_secret_value())
        return url


class ClickHouseSink(Sink, CountsByHour, HasLedger):
    """One table, written by `INSERT ... FORMAT JSONEachRow`."""

    name = "clickhouse"
    settings_class: ClassVar = ClickHouseSettings
    concurrency = 1  # concurrent inserts into one table gain nothing, and in order the latest view is the last

    def __init__(self, settings: ClickHouseSettings, contract: Contract) -> None:
        super().__init__(settings, contract)
        self.max_events = settings.clickhouse_max_events
        self.linger_seconds = settings.clickhouse_linger_seconds
        address = parse_url(settings.clickhouse_url.get_secret_value())
        self._server, self._database = address.server, address.database
        self._client = Client(address, settings.clickhouse_timeout_seconds, settings.clickhouse_ca_file)
        self._table = qualified(self._database)
        self._require_table = partial(require_table, self._client, self._database, contract)
        self._run = secrets.token_bytes(16)
        self._range_us: tuple[int, int] | None = None

    async def create(self) -> list[str]:
        return await create(self._client, self._database, self.contract)

    async def check(self) -> list[Finding]:
        """Is it reachable, is the table as it should be, and does an insert of no rows go through?"""
        findings = []
        if self._has_no_directory():  # opening it would make it
            cure = f"Run {command('init')}, which makes it, or correct REPLICATOR_CLICKHOUSE_URL"
            return [Finding(False, f"ClickHouse: there is no directory of {self._server}", cure)]
        try:
            [[version]] = await self._client.query("SELECT version()")
            findings.append(Finding(True, f"ClickHouse {version} at {self._server}"))
            await self._require_table()
            await self._insert_rows(b"")
        except SinkUnusable as exc:
            return [*findings, Finding(False, f"ClickHouse: {exc.detail}", exc.cure)]
        except SinkError as exc:
            cure = UNREACHED_CURE if isinstance(exc, SinkUnavailable) else exc.cure
            return [Finding(False, f"ClickHouse at {self._server}: {exc.detail}", cure)]
        return [*findings, Finding(True, f"ClickHouse table {self._table} has the right shape and takes inserts")]

    def _has_no_directory(self) -> bool:
        scheme, _, directory = self._server.partition("://")
        return scheme == "chdb" and not Path(directory).is_dir()

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:  # noqa: ARG002  the same in both modes
        """Connect, and look at the table: a wrong one is an error now and not at the first event."""
        if await self._require_table() and start is not None:
            _log.error(EMPTIED, self._table)

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """One insert, unless ClickHouse refuses a value in it."""
        first, last = await self._range()

        def fits(event: Event) -> bool:
            return event.ts_us is not None and first <= event.ts_us <= last

        outside = [Refusal(event, _OUTSIDE_RANGE) for event in filterfalse(fits, events)]
        fitting = list(filter(fits, events)) if outside else events
        return outside + (await self._insert(fitting) if fitting else [])

    async def hours(self, start_us: int, end_us: int) -> dict[int, int]:
        return await self.ledger(with_content=False).hours(start_us, end_us)

    def ledger(self, *, with_content: bool) -> ClickHouseLedger:
        return ClickHouseLedger(self._client, self._table, self.contract, with_content=with_content)

    async def close(self) -> None:
        await self._client.close()

    async def _range(self) -> tuple[int, int]:
        """The times that DateTime64 holds on this server, in µs since 1970."""
        if self._range_us is None:
            wide = await self._client.query(_PROBE_RANGE_SQL) == [list(YEARS_1_TO_9999_US)]
            self._range_us = YEARS_1_TO_9999_US if wide else YEARS_1900_TO_2299_US
        return self._range_us

    async def _insert(self, events: Sequence[Event]) -> list[Refusal]:
        """Insert, or halve until the events that ClickHouse refuses stand alone; returns those."""
        try:
            written = await self._insert_rows(rows(events))
        except SinkUnusable:
            await self._require_table()  # names what is wrong, as a rule
            raise
        except ValueRefused as exc:
            await self._require_table()  # an altered column is not the events' fault
            if len(events) == 1:
                return [Refusal(events[0], f"ClickHouse refuses a value in it: {exc}")]
            middle = len(events) // 2
            return await self._insert(events[:middle]) + await self._insert(events[middle:])
        # ClickHouse silently wraps and cuts values when a column has become narrower. Rows that went into such a column
        # do not count as written, and are inserted again once the table is repaired.
        await self._require_table()
        if 0 < written < len(events):  # 0: it did not count, or the token was known
            self._run = secrets.token_bytes(16)  # else the next try would pass for a repeat, and be dropped
            raise SinkUnavailable(sink=self.name, detail=f"ClickHouse wrote {written} of {len(events)} rows")
        return []

    async def _insert_rows(self, body: bytes) -> int:
        token = hashlib.sha256(body)  # not of the positions, which can't tell two views of an event apart
        token.update(self._run)
        settings = {**_INSERT_SETTINGS, "insert_deduplication_token": token.hexdigest()}
        return await self._client.insert(self._table, list(columns(self.contract)), body, settings)


def rows(events: Sequence[Event]) -> bytes:
    """The events as JSON lines, each with the `_lsn` of its commit after its own fields."""
    return b"".join([b'%b,"_lsn":%d}\n' % (event.json[:-1], event.commit_lsn) for event in events])
