"""Writes events to ClickHouse, one insert per batch.

`client.py` connects, `table.py` creates and compares the table, `errors.py` interprets errors, and
`replicator/delivery/lane.py` decides when a batch is written and what happens after an error.

Each event is in the table once under FINAL, and without FINAL after merges: the sort key is the event's identity.
Until then ClickHouse recognises a repeated insert by its token. It silently drops the rows of a token that it knows,
whatever they are, and it remembers a token even when the rows have been deleted. So the token is a hash of the exact
bytes and of a number that is new in each process: a backfill that repairs a table is not a retry.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec
from pydantic import Field, SecretStr, field_validator

from replicator.contracts.errors import (
    BatchRefused,
    BatchTooLarge,
    SinkBroken,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    SinkUnusable,
    cited,
    command,
    frames,
)
from replicator.contracts.events import Event, Finding, Id, Refusal, SinkPosition, unfolded
from replicator.contracts.ledger import Slice
from replicator.contracts.settings import CaFile, Settings, number, open_to_all
from replicator.contracts.sink import CountsByHour, HasLedger, Held, Mode, Sink, SinkContext, Traces
from sinks.clickhouse.client import Client, parse_url
from sinks.clickhouse.errors import NOT_FITTING, REFUSED, TOO_LARGE, Failed, Unanswered
from sinks.clickhouse.http import Receipt
from sinks.clickhouse.ledger import ClickHouseLedger, Witnesses
from sinks.clickhouse.table import FSYNC, INSERT_SETTINGS, Look, columns, create, look, qualified, table_of, to_be_made

EMPTIED = (
    "ClickHouse table %s is empty, and was written to before: its events are missing. Meanwhile new events are written."
    f" {command('init')} prints the backfill command that restores the others; add --sinks %s to it"
)
LOOK_SECONDS = 5.0
"""While events are missing, how often is asked whether they are there again."""

UNREACHED_CURE = "Check that it is up and that REPLICATOR_CLICKHOUSE_URL leads to it"

_VIEW_CURE = (
    "Repair or drop the view that fails (SHOW CREATE TABLE shows what it reads and where it writes). The events are"
    " kept meanwhile"
)

EXPIRES_CURE = "Fine if that is intended. {compare} reports deleted rows as missing"

NO_EVENTS = Slice(origin_us=0, width_us=1, buckets=(0,))

PIECE = 500
"""Events that become text at once: it is still in the processor's cache when it is hashed, which halves the cost."""

PIECES_A_TURN = 40
"""6 ms of work. In a backlog the loop's other work takes 7 ms a turn: with ten turns a full insert began 0.09 s late,
a quarter of the time that it took, and all waited for ClickHouse."""

UNANSWERED_TRIES = 3
"""A network may fail once or twice. A front end or a server that is too slow for a large insert fails each time."""

_log = logging.getLogger(__name__)

_PROBE_RANGE_SQL = """SELECT
    toUnixTimestamp64Micro(parseDateTime64BestEffortOrNull('0001-01-01T00:00:00Z', 6, 'UTC')),
    toUnixTimestamp64Micro(parseDateTime64BestEffortOrNull('9999-12-31T23:59:59.999999Z', 6, 'UTC'))"""
"""Does DateTime64 hold the years 1 to 9999 (since mid-2026)? Before, it went from 1900 to 2299 and clamped silently."""

YEARS_1_TO_9999_US = (-62_135_596_800_000_000, 253_402_300_799_999_999)
YEARS_1900_TO_2299_US = (-2_208_988_800_000_000, 10_413_791_999_999_999)

YEARS = ("1900", "2299")
"""The same of a text, for the stream's other times and dates."""

_OUTSIDE_RANGE = "its time is outside what DateTime64 holds on this ClickHouse"
_OTHER_OUTSIDE = "one of its times or dates is outside the years 1900 to 2299, which this ClickHouse does not hold"


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
    # 10 MB of JSON. It costs ClickHouse 3.5 µs an event, and 4.5 at 20,000; 60,000 gain little and cost memory.
    clickhouse_max_events: int = number(40_000, 1, 1_000_000, "the most events in one insert")

    @field_validator("clickhouse_url")
    @classmethod
    def _usable(cls, url: SecretStr) -> SecretStr:
        parse_url(url.get_secret_value())
        return url


class ClickHouseSink(Sink, CountsByHour, HasLedger, Traces):
    """One table, written by `INSERT ... FORMAT JSONEachRow`."""

    name = "clickhouse"
    settings_class: ClassVar = ClickHouseSettings
    takes_any_stream = True
    concurrency = 1  # concurrent inserts into one table gain nothing, and in order the latest view is the last

    def __init__(self, settings: ClickHouseSettings, context: SinkContext) -> None:
        super().__init__(settings, context)
        stream = context.stream
        self.max_events = settings.clickhouse_max_events
        self.linger_seconds = settings.clickhouse_linger_seconds
        address = parse_url(settings.clickhouse_url.get_secret_value())
        self._server, self._database = address.server, address.database
        self._client = Client(self.name, address, settings.clickhouse_timeout_seconds, settings.clickhouse_ca_file)
        self._table = qualified(self._database, stream)
        self._called = f"{self._database}.{table_of(stream)}"  # in messages
        self._password = address.password
        self._run = secrets.token_bytes(16)
        self._range_us: tuple[int, int] | None = None
        self._unanswered = 0  # inserts, one after the other
        self._was_wrong = False  # the table, at the last look
        self._witnesses = Witnesses(self.ledger(with_content=False))
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = 0.0  # time.monotonic()
        self._told = False  # of what it failed at
        self._is_open = False
        self._rows = versions if stream.follows else rows
        others = (field for field in stream.fields if field is not stream.time)
        self._other_times = [field.name for field in others if "Date" in field.type.clickhouse]
        times: Any = [(name, str | None, None) for name in self._other_times]
        self._times = msgspec.json.Decoder(msgspec.defstruct("Times", times)).decode

    async def create(self) -> list[str]:
        return await create(self._client, self._database, self.stream)

    async def check(self) -> list[Finding]:
        """Is it reachable, is the table as it should be, and does an insert of no rows go through?"""
        findings = []
        if self._has_no_directory():  # opening it would make it
            cure = f"Run {command('init')}, which makes it, or correct REPLICATOR_CLICKHOUSE_URL"
            what = f"ClickHouse: there is no directory of {self._server}"
            return [Finding(False, what, cure, made_by_init=True)]
        try:
            [version] = await self._client.one("SELECT version()", tuple[str])
            findings.append(Finding(True, f"ClickHouse {cited(version)} at {self._server}"))
            findings += open_to_all([Path(self._server.removeprefix("chdb://"))])  # of a server there is no such file
            if missing := await to_be_made(self._client, self._database, self.stream):
                return [*findings, missing]
            seen = await self._look()
            await self._insert([])
            await self.ledger(with_content=True).digests(NO_EVENTS)  # may it read, as reconcile does?
            await self._witnesses.begin(seen)
            self.look()
        except SinkUnusable as exc:
            return [*findings, Finding(False, f"ClickHouse: {exc.detail}", exc.cure)]
        except SinkError as exc:
            cure = UNREACHED_CURE if isinstance(exc, SinkUnavailable) else exc.cure
            at = "" if self._server in exc.detail else f" at {self._server}"
            return [*findings, Finding(False, f"ClickHouse{at}: {exc.detail}", cure)]
        findings.append(Finding(True, f"ClickHouse: table {self._called} has the right shape and takes inserts"))
        if not seen.durable:
            what = f"ClickHouse: table {self._called}: rows of the last seconds may be gone after a power cut"
            findings.append(Finding(True, what, f"ALTER TABLE {self._table} MODIFY SETTING {FSYNC}"))
        if seen.expires:
            what = f"ClickHouse: table {self._called} has a TTL: ClickHouse deletes what is older by itself"
            compare = command(f"reconcile{self.context.stream_option}")
            findings.append(Finding(True, what, EXPIRES_CURE.format(compare=compare)))
        return findings

    def _has_no_directory(self) -> bool:
        scheme, _, directory = self._server.partition("://")
        return scheme == "chdb" and not Path(directory).is_dir()

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:  # noqa: ARG002  the same in both modes
        """Connect, and look at the table: a wrong one is an error now and not at the first event."""
        seen = await self._look()
        await self._witnesses.begin(seen)
        self._is_open = True
        if not seen.rows and start is not None and not self._witnesses.gone:
            _log.error(EMPTIED, self._called, self.name, extra={"code": "R518"})

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """One insert. Returns those whose time does not fit."""
        first, last = await self._range()
        if self.stream.follows:
            events = [*unfolded(events, self.stream.identity.name)]

        def fits(event: Event) -> bool:
            return (event.ts_us is not None and first <= event.ts_us <= last) or event.deleted

        outside = [Refusal(event, _OUTSIDE_RANGE) for event in filterfalse(fits, events)]
        fitting = list(filter(fits, events)) if outside else events
        if self._other_times and last == YEARS_1900_TO_2299_US[1]:
            outside += [Refusal(event, _OTHER_OUTSIDE) for event in fitting if self._is_clamped(event)]
            fitting = [event for event in fitting if not self._is_clamped(event)]
        if fitting:
            await self._insert(fitting)
        return outside

    def _is_clamped(self, event: Event) -> bool:
        """Whether ClickHouse would silently take another time, or date, for one of the event's."""
        if event.deleted:
            return False
        texts = filter(None, msgspec.structs.astuple(self._times(event.json)))
        return any(text[4:5] != "-" or not YEARS[0] <= text[:4] <= YEARS[1] for text in texts)

    async def carried(self, events: Sequence[Event]) -> None:
        if events:
            await self._witnesses.see(events, await self._look())

    async def hours(self, start_us: int, end_us: int) -> dict[int, int]:
        return await self.ledger(with_content=False).hours(start_us, end_us)

    async def trace(self, event_id: Id, event: Event | None) -> Held:
        return await self.ledger(with_content=True).trace(event_id, event)

    def ledger(self, *, with_content: bool) -> ClickHouseLedger:
        return ClickHouseLedger(self._client, self._table, self.stream, with_content=with_content)

    async def renew(self) -> None:
        settings = cast("ClickHouseSettings", self.settings)
        address = parse_url(settings.clickhouse_url.get_secret_value())
        self._password = address.password
        await self._client.login_as(address)

    def look(self) -> None:
        """That events are missing, until they are there again."""
        if not self._witnesses.gone:
            return
        asks = self._asking is not None and not self._asking.done()
        if self._is_open and not asks and time.monotonic() - self._asked_at >= LOOK_SECONDS:
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        raise self._client.errors.emptied(self._called)

    async def _ask(self) -> None:
        try:
            await self._witnesses.look()
        except SinkError:  # they stay missing, and the next insert meets the same
            pass
        except Exception as exc:  # noqa: BLE001  a bug, and nobody waits for this task: it is told once
            if not self._told:  # without its message, which may have anything in it
                said = "sink %s can't be asked for what is missing: %s\n%s"
                _log.error(said, self.name, type(exc).__name__, frames(exc), extra={"code": SinkBroken.code})
            self._told = True

    def remember(self) -> str:
        return self._witnesses.memory

    def recall(self, memory: str) -> None:
        self._witnesses.recall(memory)

    async def close(self) -> None:
        self._is_open = False
        if self._asking is not None:
            self._asking.cancel()
        await self._client.close()

    async def _range(self) -> tuple[int, int]:
        """The times that DateTime64 holds on this server, in µs since 1970."""
        if self._range_us is None:
            ends = await self._client.one(_PROBE_RANGE_SQL, tuple[int | None, int | None])
            wide = ends == YEARS_1_TO_9999_US
            self._range_us = YEARS_1_TO_9999_US if wide else YEARS_1900_TO_2299_US
        return self._range_us

    async def _look(self) -> Look:
        return await look(self._client, self._database, self.stream)

    async def _insert(self, events: Sequence[Event]) -> None:
        if self._was_wrong:  # it may be repaired between an insert, whose rows it cuts, and the look after that
            await self._look()
            self._was_wrong = False
        try:
            receipt = await self._send(events)
        except Failed as failure:
            raise self._explained(failure, await self._look(), len(events)) from None
        except Unanswered as exc:
            self._unanswered += 1
            if self._unanswered < UNANSWERED_TRIES or len(events) == 1:
                raise
            await self._look()  # raises when questions are not answered either
            detail = f"{exc.detail} to {self._unanswered} inserts, while questions are answered"
            raise BatchTooLarge(sink=self.name, detail=detail) from None
        self._unanswered = 0
        # ClickHouse silently wraps and cuts values when a column has become narrower. Rows that went into such a column
        # do not count as written, and are inserted again once the table is repaired.
        try:
            seen = await self._look()
        except SinkUnusable:
            self._was_wrong = True
            self._run = secrets.token_bytes(16)  # else the next try passes for a repeat, and the cut rows stay
            raise
        if not _proves(receipt, len(events), seen) and not await self.ledger(with_content=True).holds(events):
            self._run = secrets.token_bytes(16)  # else the next try could pass for a repeat, and be dropped
            if receipt.doubt:
                raise self._client.errors.not_clickhouse(f"{receipt.doubt}, and the rows are not in the table")
            raise SinkUnavailable(sink=self.name, detail=f"ClickHouse wrote {receipt.rows} of {len(events)} rows")
        if events:
            await self._witnesses.see(events, seen)

    async def _send(self, events: Sequence[Event]) -> Receipt:
        token = hashlib.sha256(self._run)
        body: list[bytes] = []
        for first in range(0, len(events), PIECE):
            if body and len(body) % PIECES_A_TURN == 0:
                await asyncio.sleep(0)  # the loop's other work
            body.append(self._rows(events[first : first + PIECE]))
            token.update(body[-1])  # not the positions, which can't tell two views of an event apart
        settings = {**INSERT_SETTINGS, "insert_deduplication_token": token.hexdigest()}
        return await self._client.insert(self._table, list(columns(self.stream)), body, settings)

    def _explained(self, failure: Failed, seen: Look, count: int) -> SinkError:
        """What an error of an insert means when the table and the settings are as they should be."""
        if failure.too_large or (failure.code in TOO_LARGE and count > 1):
            return BatchTooLarge(sink=self.name, detail=str(failure))
        if seen.views and (failure.in_view or failure.code in NOT_FITTING):
            detail = (
                f"{failure}, and the table is in order. Each insert also goes to its views: {', '.join(seen.views)}"
            )
            return SinkMisconfigured(sink=self.name, detail=cited(detail), cure=_VIEW_CURE)
        if failure.code in REFUSED:
            reason = cited(failure.text, [self._password])
            return BatchRefused(sink=self.name, detail=str(failure), reason=reason)
        return self._client.errors.answered(failure)


def _proves(receipt: Receipt, sent: int, seen: Look) -> bool:
    """Whether the answer alone shows that all rows are there.

    Rows that views made are counted, too. So are those of a known token: that they are there already is what it says.
    """
    return not receipt.doubt and (receipt.rows == sent or (bool(seen.views) and receipt.rows > sent))


def rows(events: Sequence[Event]) -> bytes:
    """The events as JSON lines, each with the `_lsn` of its commit after its own fields."""
    return b"".join([b'%b,"_lsn":%d}\n' % (event.json[:-1], event.commit_lsn) for event in events])


def versions(events: Sequence[Event]) -> bytes:
    """The same of rows that change: each with its version, the higher the later, and whether it is gone."""
    return b"".join(
        [b'%b,"_version":%d,"_deleted":%d}\n' % (event.json[:-1], event.version, event.deleted) for event in events]
    )
