"""The ClickHouse sink on the current engine, over HTTP and embedded: exact values, no duplicates, faults, shapes."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from devstack import DevStack
from devstack.clickhouse import ClickHouse
from devstack.process import wait_until
from enrichment import EVENT
from replicator.contracts.errors import (
    BatchRefused,
    SinkEmptied,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    SinkUnusable,
)
from replicator.contracts.events import Event, Finding
from replicator.contracts.sink import SinkContext
from sinks.clickhouse.sink import YEARS_1900_TO_2299_US, ClickHouseSettings, ClickHouseSink
from sinks.clickhouse.table import INIT, columns, table_of

TABLE = table_of(EVENT)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NOON = datetime(2026, 1, 8, 12, tzinfo=UTC)
RETRY_DEADLINE_SECONDS = 60.0


def event(number: int, *, ts: datetime = NOON, commit_lsn: int = 100, **fields: object) -> Event:
    """An event as enrichment makes it; fields as JSON, decimals as they stand."""
    known: dict[str, object] = {
        "event_id": number,
        "content_id": 1,
        "user_id": 999,
        "event_type": "play",
        "event_ts": f"{ts:%Y-%m-%dT%H:%M:%S.%fZ}".rjust(27, "0"),
        "duration_ms": 7000,
        "device": "web",
        "content_type": "video",
        "length_seconds": 300,
        "engagement_seconds": Decimal("7.0"),
        "engagement_pct": Decimal("0.02"),
    }
    body = ",".join(f'"{name}":{_json(value)}' for name, value in (known | fields).items())
    ts_us = (ts - EPOCH) // timedelta(microseconds=1)
    return Event(commit_lsn=commit_lsn, ordinal=number, id=number, key=1, ts_us=ts_us, json=b"{%s}" % body.encode())


def _json(value: object) -> str:
    return str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)


def events(first: int, last: int) -> list[Event]:
    """Events `first` to `last`."""
    return [event(number) for number in range(first, last + 1)]


@pytest.fixture
def clickhouse(stack: DevStack) -> Iterator[ClickHouse]:
    """ClickHouse with an empty database; running and well behaved again afterwards."""
    stack.clickhouse.reset()
    yield stack.clickhouse
    stack.clickhouse.behave()


@asynccontextmanager
async def sink_for(url: str, **settings: Any) -> AsyncIterator[ClickHouseSink]:
    """A sink, closed afterwards."""
    sink = ClickHouseSink(ClickHouseSettings(clickhouse_url=SecretStr(url), **settings), SinkContext(EVENT))
    try:
        yield sink
    finally:
        await sink.close()


@pytest.fixture
async def sink(clickhouse: ClickHouse) -> AsyncIterator[ClickHouseSink]:
    """A sink with its table made."""
    async with sink_for(clickhouse.url) as made:
        await made.create()
        await made.open()
        yield made


def table(clickhouse: ClickHouse, what: str = "count()", clauses: str = "") -> str:
    """One value or the rows of a query on the table."""
    return clickhouse.query(f"SELECT {what} FROM {TABLE} {clauses}").rstrip("\n")  # noqa: S608  our own constants


def ids(clickhouse: ClickHouse, final: str = "FINAL") -> list[int]:
    """Event ids in the table, in order, repeats included."""
    return [int(line) for line in table(clickhouse, "event_id", f"{final} ORDER BY event_id").split()]


async def written(sink: ClickHouseSink, batch: list[Event]) -> None:
    """Write as a lane does, trying again at once."""
    async with asyncio.timeout(RETRY_DEADLINE_SECONDS):
        while True:
            try:
                assert list(await sink.write(batch)) == []
            except SinkUnavailable:
                continue
            return


async def _write_all(sink: ClickHouseSink, batches: list[list[Event]]) -> None:
    for batch in batches:
        await written(sink, batch)


def random_event(chance: random.Random, number: int) -> Event:
    """Any shape the source can have."""

    def nullable(value: object) -> object:
        return None if chance.random() < 0.2 else value

    seconds, pct = (Decimal(chance.randint(-(2**31), 2**31 - 1)).scaleb(-scale) for scale in (3, 2))
    return event(
        number,
        ts=datetime(1969, 1, 1, tzinfo=UTC) + timedelta(microseconds=chance.randrange(10**14)),
        commit_lsn=chance.randrange(2**64),
        content_id=chance.randint(-(2**63), 2**63 - 1),
        user_id=chance.randint(-(2**63), 2**63 - 1),
        event_type="".join(chance.choices('ab"\\\n\u00e9\U0001f600 ', k=chance.randrange(12))),
        duration_ms=nullable(chance.randint(-(2**31), 2**31 - 1)),
        device=nullable(chance.choice(["web", "ios", "", "null"])),
        content_type=nullable("video"),
        length_seconds=nullable(chance.randrange(2**31)),
        engagement_seconds=nullable(seconds),
        engagement_pct=nullable(pct),
    )


def stored(clickhouse: ClickHouse) -> list[dict[str, object]]:
    """All rows as JSON, by event id, with the decimals exact and the time in the contract's form."""
    columns = "* EXCEPT (_inserted_at) REPLACE (formatDateTime(event_ts, '%Y-%m-%dT%H:%i:%S.%fZ') AS event_ts)"
    options = "SETTINGS output_format_json_quote_64bit_integers = 0 FORMAT JSONEachRow"
    lines = table(clickhouse, columns, f"FINAL ORDER BY event_id {options}")
    return [json.loads(line, parse_float=Decimal) for line in lines.split("\n")]


def expected(event: Event) -> dict[str, object]:
    """The row that the event makes."""
    fields: dict[str, object] = json.loads(event.json, parse_float=Decimal)
    return fields | {"_lsn": event.commit_lsn}


async def test_a_full_insert_gives_the_loop_one_turn(sink: ClickHouseSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn of the loop takes some 7 ms in a backlog, and ClickHouse has nothing to do so long."""
    await sink.write(events(1, 1))
    turns: list[int] = []
    began: list[int] = []

    async def tick() -> None:
        while True:
            turns.append(len(turns))
            await asyncio.sleep(0)

    async def insert(*_: object) -> None:
        began[:] = turns
        raise SinkUnavailable(sink="clickhouse", detail="not in this test")

    ticker = asyncio.create_task(tick())
    monkeypatch.setattr("sinks.clickhouse.http.HttpServer.insert", insert)
    with pytest.raises(SinkUnavailable):
        await sink.write(events(1, sink.max_events))
    ticker.cancel()
    assert len(began) == 1


class TestValues:
    """What is read back is what was written."""

    async def test_every_field_is_exact(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Nulls, text of all kinds, integers beyond 2^53, decimals at both ends."""
        texts = [
            "",
            "web",
            'quote " and \\ and \n\t\x00\x1f',
            "é 漢字 \U0001f600 \u2028",
            "'; DROP TABLE x",
            "null",
            "x" * 100_000,
        ]
        decimals = [("2147483.648", "-0.01"), ("-2147483.648", "2147483.65"), ("0.001", "0.0"), ("7.0", "-21474836.48")]
        numbers = [2**63 - 1, -(2**63), 2**53 + 1, 0, -1]
        batch = [
            event(1, content_id=numbers[0], user_id=numbers[1], duration_ms=None, device=None, content_type=None,
                  length_seconds=None, engagement_seconds=None, engagement_pct=None),
            event(2, content_id=numbers[2], user_id=numbers[3], duration_ms=numbers[4], length_seconds=2**31 - 1),
            *(event(10 + n, event_type=text, device=text, content_type=text) for n, text in enumerate(texts)),
            *(event(20 + n, engagement_seconds=Decimal(seconds), engagement_pct=Decimal(pct))
              for n, (seconds, pct) in enumerate(decimals)),
        ]  # fmt: skip
        assert list(await sink.write(batch)) == []
        assert stored(clickhouse) == [expected(event) for event in batch]

    async def test_random_events_are_exact(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """5,000 of all shapes, written in batches."""
        seed = random.randrange(2**32)  # noqa: S311  a test's randomness
        print(f"seed {seed}")  # noqa: T201  to run it again
        chance = random.Random(seed)  # noqa: S311  a test's randomness
        batch = [random_event(chance, number) for number in range(5000)]
        for start in range(0, len(batch), 1700):
            assert list(await sink.write(batch[start : start + 1700])) == []
        assert stored(clickhouse) == [expected(event) for event in batch]

    async def test_columns_are_the_contracts(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Those of the contract, in its order; ours come after its eleven."""
        assert sink.name == "clickhouse"
        found = clickhouse.query(f"SELECT name, type FROM system.columns WHERE table = '{TABLE}' ORDER BY position")  # noqa: S608
        types = dict(line.replace("\\'", "'").split("\t") for line in found.splitlines())
        assert list(types.items())[:-1] == list(columns(EVENT).items())
        assert list(types.items())[-1] == ("_inserted_at", "DateTime64(3, 'UTC')")
        assert [field.name for field in EVENT.fields] == list(types)[:11]

    async def test_a_refused_value(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """The lane finds the event. The log gets nothing of the row, the dead letter ClickHouse's own words."""
        batch = events(1, 10)
        batch[4] = event(5, engagement_seconds=Decimal("9223372036854775.807"))
        batch[6] = event(7, event_ts="tomorrow")
        codes = {0: "69 ARGUMENT_OUT_OF_BOUND", 4: "69 ARGUMENT_OUT_OF_BOUND", 6: "41 CANNOT_PARSE_DATETIME"}
        for number, code in codes.items():
            with pytest.raises(BatchRefused) as caught:
                await sink.write([batch[number]] if number else batch)
            assert caught.value.detail == f"ClickHouse error {code}"
            assert caught.value.reason.startswith(f"Code: {code.partition(' ')[0]}. DB::Exception: ")
        assert ids(clickhouse) == []
        await sink.write([event for event in batch if event.id not in {5, 7}])
        assert ids(clickhouse) == [1, 2, 3, 4, 6, 8, 9, 10]

    async def test_an_unknown_field_is_an_error(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Not skipped: somebody's enrichment has more than the table."""
        with pytest.raises(SinkMisconfigured, match="117 INCORRECT_DATA"):
            await sink.write([event(1, surprise=1)])
        assert ids(clickhouse) == []

    async def test_an_altered_column_is_not_the_events_fault(
        self, clickhouse: ClickHouse, sink: ClickHouseSink
    ) -> None:
        """Nothing is dead-lettered over it."""
        clickhouse.query(f"ALTER TABLE {TABLE} MODIFY COLUMN event_type Enum8('pause' = 1)")
        with pytest.raises(SinkUnusable, match="column event_type as Enum8"):
            await sink.write(events(1, 3))


class TestTime:
    """What DateTime64 holds is stored, the rest refused: never clamped."""

    async def test_ends_of_the_range(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """To the microsecond, beside 1970 and in between."""
        moments = [
            datetime(1, 1, 1, tzinfo=UTC),
            datetime(1899, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
            datetime(1900, 1, 1, tzinfo=UTC),
            datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
            datetime(2299, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
            datetime(2300, 1, 1, tzinfo=UTC),
            datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        ]
        batch = [event(number, ts=moment) for number, moment in enumerate(moments)]
        refused = {refusal.event.id for refusal in await sink.write(batch)}
        found = table(clickhouse, "event_id, toUnixTimestamp64Micro(event_ts)", "ORDER BY event_id").splitlines()
        assert [tuple(map(int, line.split())) for line in found] == [
            (event.id, event.ts_us) for event in batch if event.id not in refused
        ]
        assert refused.isdisjoint({2, 3, 4})

    async def test_an_older_engine_holds_less(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """1900 to 2299 is what is written to an engine that can't do more."""
        sink._range_us = YEARS_1900_TO_2299_US  # noqa: SLF001  no such engine at hand
        ends = [datetime(1900, 1, 1, tzinfo=UTC), datetime(2300, 1, 1, tzinfo=UTC)]
        tick = timedelta(microseconds=1)
        batch = [event(number, ts=ts) for number, ts in enumerate([ends[0] - tick, ends[0], ends[1] - tick, ends[1]])]
        assert [refusal.event.id for refusal in await sink.write(batch)] == [0, 3]
        assert ids(clickhouse) == [1, 2]

    async def test_no_time_at_all(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Infinite, or of a year that not even Python has: refused alone."""
        batch = events(1, 3)
        batch[1].ts_us = None
        refused = await sink.write(batch)
        assert [(refusal.event.id, refusal.reason) for refusal in refused] == [
            (2, "its time is outside what DateTime64 holds on this ClickHouse")
        ]
        assert ids(clickhouse) == [1, 3]
        assert [refusal.event.id for refusal in await sink.write([batch[1]])] == [2]

    async def test_150_months_in_one_insert(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """A catch-up is not stopped by ClickHouse's limit of 100 partitions."""
        batch = [event(n, ts=datetime(2000 + n // 12, 1 + n % 12, 15, tzinfo=UTC)) for n in range(150)]
        assert list(await sink.write(batch)) == []
        assert table(clickhouse, "count(), uniqExact(_partition_id)") == "150\t150"


class TestRepeats:
    """Each event once."""

    async def test_the_same_batch_again_stores_nothing(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Not even before a merge."""
        for _ in range(3):
            await sink.write(events(1, 500))
        assert ids(clickhouse, final="") == list(range(1, 501))

    async def test_one_write_is_one_part(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """And so one block: atomic, and known by one token."""
        clickhouse.query(f"SYSTEM STOP MERGES {TABLE}")
        await sink.write(events(1, sink.max_events))
        parts = clickhouse.query(f"SELECT count(), sum(rows) FROM system.parts WHERE active AND table = '{TABLE}'")  # noqa: S608
        assert parts == f"1\t{sink.max_events}\n"

    async def test_overlapping_batches_count_once_under_final(
        self, clickhouse: ClickHouse, sink: ClickHouseSink
    ) -> None:
        """As after a restart."""
        await sink.write(events(1, 300))
        await sink.write(events(200, 400))
        assert ids(clickhouse) == list(range(1, 401))

    async def test_the_latest_view_stays(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """By commit LSN, whatever the order of arrival; of equal ones the last."""
        for lsn, device in [(200, "new"), (2**63 + 5, "newest"), (100, "old")]:
            await sink.write([event(1, commit_lsn=lsn, device=device)])
        await sink.write([event(2, device="first")])
        await sink.write([event(2, device="second")])
        assert table(clickhouse, "device", "FINAL ORDER BY event_id") == "newest\nsecond"

    async def test_a_repair_is_not_taken_for_a_retry(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """ClickHouse remembers the tokens of rows that were deleted since; another process has other tokens."""
        await sink.write(events(1, 10))
        clickhouse.query(f"ALTER TABLE {TABLE} DELETE WHERE event_id > 5 SETTINGS mutations_sync = 2")
        assert ids(clickhouse) == [1, 2, 3, 4, 5]
        async with sink_for(clickhouse.url) as backfill:
            await backfill.write(events(1, 10))
        assert ids(clickhouse) == list(range(1, 11))


class TestFaults:
    """What goes wrong on the way."""

    @pytest.mark.parametrize(
        "fault",
        [
            {"status": 503},
            {"status": 500, "exception": "Code: 252. DB::Exception: Too many parts. (TOO_MANY_PARTS)"},
            {"close": "before"},
            {"close": "after"},
        ],
    )
    async def test_tried_again_it_is_stored_once(
        self, clickhouse: ClickHouse, sink: ClickHouseSink, fault: dict[str, object]
    ) -> None:
        """Even when it was stored and only the answer was lost."""
        clickhouse.behave(**fault, requests=2)
        with pytest.raises(SinkUnavailable):
            await sink.write(events(1, 100))
        await written(sink, events(1, 100))
        assert ids(clickhouse, final="") == list(range(1, 101))

    async def test_no_answer_in_time(self, clickhouse: ClickHouse) -> None:
        """A server that hangs holds up one try, not the lane."""
        async with sink_for(clickhouse.url, clickhouse_timeout_seconds=1) as sink:
            await sink.create()
            clickhouse.behave(hang_seconds=3, requests=1)
            with pytest.raises(SinkUnavailable, match="no answer from http://127"):
                await sink.write(events(1, 10))
            await written(sink, events(1, 10))
        assert ids(clickhouse) == list(range(1, 11))

    async def test_cancelled(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """The insert goes on without us; the same events again, meanwhile, make no second row."""
        clickhouse.behave(delay_seconds=1, requests=1)
        writing = asyncio.create_task(sink.write(events(1, 100)))
        await asyncio.to_thread(wait_until, lambda: bool(ids(clickhouse)), "the insert")
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await sink.write(events(1, 100))
        assert ids(clickhouse, final="") == list(range(1, 101))

    async def test_cancelled_it_ends_its_request(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """At once, on the wire too: nothing is left that could hold up the end of the program."""
        clickhouse.behave(hang_seconds=60, requests=1)
        threads = threading.active_count()
        writing = asyncio.create_task(sink.write(events(1, 10)))
        await asyncio.wait({writing}, timeout=0.5)  # it hangs
        assert _connections(clickhouse.port) >= 1  # one of the test before may be closing
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        await asyncio.to_thread(wait_until, lambda: _connections(clickhouse.port) == 0, "the connection to be closed")
        assert threading.active_count() <= threads + 1  # that of to_thread

    async def test_a_frozen_server_that_reads_nothing(self, clickhouse: ClickHouse) -> None:
        """The insert is larger than what the network holds, so it is stuck while it is sent."""
        async with sink_for(clickhouse.url, clickhouse_timeout_seconds=1) as sink:
            await sink.create()
            await sink.write(events(1, 10))
            clickhouse.pause()
            try:
                with pytest.raises(SinkUnavailable, match=r"no answer from http://127.* \(TimeoutError\)"):
                    await sink.write([event(number, device="x" * 1000) for number in range(20_000)])
            finally:
                clickhouse.resume()
            await written(sink, events(11, 20))

    async def test_a_front_end_that_answers_200_to_everything(
        self, clickhouse: ClickHouse, sink: ClickHouseSink
    ) -> None:
        """It is not ClickHouse's answer, so nothing counts as written: not by an insert, nor by a first question."""
        clickhouse.behave(status=200)
        with pytest.raises(SinkMisconfigured, match="answers, but not as ClickHouse does"):
            await sink.write(events(1, 10))
        clickhouse.behave(status=200, only_inserts=False)
        with pytest.raises(SinkMisconfigured, match="answers, but not as ClickHouse does"):
            await sink.open()
        async with sink_for(clickhouse.url) as another:
            with pytest.raises(SinkMisconfigured, match="answers, but not as ClickHouse does"):
                await another.open()
        clickhouse.behave()
        await sink.write(events(1, 10))
        assert ids(clickhouse) == list(range(1, 11))

    async def test_server_killed_in_between(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """It dies while batches are being written; all are there once it is back."""
        batches = [events(n * 200 + 1, n * 200 + 200) for n in range(100)]
        writing = asyncio.create_task(_write_all(sink, batches))
        async with asyncio.timeout(RETRY_DEADLINE_SECONDS):
            await asyncio.to_thread(wait_until, lambda: bool(ids(clickhouse)), "the first rows")
            await asyncio.to_thread(clickhouse.kill)
            assert not writing.done()
            with pytest.raises(SinkUnavailable):
                await sink.write(events(1, 1))
            await asyncio.to_thread(clickhouse.start)
            await writing
        assert ids(clickhouse) == list(range(1, 20_001))

    async def test_read_only_is_our_settings_fault(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Kept and tried again slowly."""
        clickhouse.behave(read_only=True)
        with pytest.raises(SinkMisconfigured, match="164 READONLY"):
            await sink.write(events(1, 10))

    async def test_wrong_password(self) -> None:
        """Said in so many words, without the password."""
        with DevStack("clickhouse", clickhouse_password="right") as stack:  # noqa: S106
            async with sink_for(stack.clickhouse.url) as sink:
                assert await sink.create() == ["ClickHouse: made table engagement.events_enriched"]
            async with sink_for(stack.clickhouse.url.replace(":right@", ":Xq7Zk2@")) as sink:
                with pytest.raises(SinkMisconfigured, match="516 AUTHENTICATION_FAILED") as caught:
                    await sink.open()
                assert "Xq7Zk2" not in f"{caught.value} {await sink.check()}"

    async def test_the_password_is_rotated(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """The new one is in the settings when the sink is told so; the next write has it."""
        clickhouse.behave(password="rotated")  # noqa: S106  no secret
        with pytest.raises(SinkMisconfigured, match="516 AUTHENTICATION_FAILED"):
            await sink.write(events(1, 10))
        url = clickhouse.url.replace("default@", "default:rotated@")
        sink.settings = ClickHouseSettings.model_validate({"clickhouse_url": url})
        await sink.renew()
        await sink.write(events(1, 10))
        clickhouse.behave()
        assert ids(clickhouse) == list(range(1, 11))

    async def test_nobody_listens(self) -> None:
        """Tried again; check says what to look at."""
        async with sink_for("http://127.0.0.1:9/engagement") as sink:
            with pytest.raises(SinkUnavailable, match=r"\(Connection refused\)"):
                await sink.open()
            finding = (await sink.check())[0]
        assert (finding.ok, "REPLICATOR_CLICKHOUSE_URL" in finding.cure) == (False, True)
        assert "ClickHouse: no answer from http://127.0.0.1:9 (Connection refused)" == finding.what

    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("https://127.0.0.1:PORT/engagement", "does not speak TLS"),
            ("http://nowhere.invalid/d", "no answer from http://nowhere.invalid:8123"),
            (f"http://{'a' * 64}.example/d", "no answer from http://aaa"),
            ("http://a..b/d", "a..b"),
        ],
    )
    async def test_wrong_addresses(self, clickhouse: ClickHouse, url: str, told: str) -> None:
        """Each is told for what it is, in one line."""
        async with sink_for(url.replace("PORT", str(clickhouse.port))) as sink:
            [finding] = await sink.check()
            assert (finding.ok, told in finding.what) == (False, True)
            with pytest.raises(SinkError):
                await sink.write(events(1, 3))

    async def test_certificates_are_checked(self, tmp_path: Path) -> None:
        """An unknown authority is our settings' fault; named, it is trusted, and the answer counts."""
        certificate, key = _certificate(tmp_path)
        with _tls_server(certificate, key) as url:
            async with sink_for(url) as sink:
                with pytest.raises(SinkMisconfigured, match="REPLICATOR_CLICKHOUSE_CA_FILE"):
                    await sink.open()
            async with sink_for(url, clickhouse_ca_file=certificate) as sink:
                with pytest.raises(SinkUnavailable, match="HTTP status 503"):
                    await sink.open()


class TestShapes:
    """`create` and `check`."""

    async def test_create_says_what_it_did(self, clickhouse: ClickHouse) -> None:
        """The second time: nothing. The database is the URL's, the SQL file's name for it notwithstanding."""
        async with sink_for(clickhouse.url.replace("/engagement", "/other-db")) as sink:
            try:
                assert await sink.create() == [
                    "ClickHouse: made database other-db",
                    f"ClickHouse: made table other-db.{TABLE}",
                ]
                assert await sink.create() == []
                await sink.write(events(1, 5))
                assert clickhouse.query(f"SELECT count() FROM `other-db`.{TABLE}") == "5\n"  # noqa: S608  our own constants
            finally:
                clickhouse.query("DROP DATABASE `other-db`")

    async def test_check_leaves_no_trace(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Not even an empty part."""
        findings = await sink.check()
        assert [finding.ok for finding in findings] == [True, True]
        assert findings[0].what.startswith("ClickHouse 2")
        assert clickhouse.query(f"SELECT count() FROM system.parts WHERE table = '{TABLE}'") == "0\n"  # noqa: S608

    async def test_missing_table(self, clickhouse: ClickHouse) -> None:
        """Every way of finding out names `init`."""
        async with sink_for(clickhouse.url) as sink:
            with pytest.raises(SinkUnusable, match="python -m replicator init"):
                await sink.open()
            with pytest.raises(SinkUnusable, match="does not exist"):
                await sink.write(events(1, 3))
            assert (await sink.check())[1] == Finding(
                False, f"ClickHouse: table engagement.{TABLE} does not exist", INIT, made_by_init=True
            )

    @pytest.mark.parametrize("database", ["engagement", "not-there"])
    async def test_missing_table_that_may_not_be_made(self, clickhouse: ClickHouse, database: str) -> None:
        """`check` says so before `init` does."""
        clickhouse.behave(read_only=True, only_inserts=False)
        async with sink_for(clickhouse.url.replace("/engagement", f"/{database}")) as sink:
            finding = (await sink.check())[1]
            assert (finding.ok, finding.made_by_init) == (False, False)
            assert (
                f"GRANT CREATE {'TABLE' if database == 'engagement' else 'DATABASE, CREATE TABLE'} ON" in finding.cure
            )
            with pytest.raises(SinkMisconfigured, match="164 READONLY"):
                await sink.create()

    async def test_dropped_while_we_write(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Stops with the cure; the events are not lost, they are still in the slot."""
        clickhouse.query(f"DROP TABLE {TABLE}")
        with pytest.raises(SinkUnusable, match="does not exist"):
            await sink.write(events(1, 3))

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ("DROP COLUMN device", "no column device LowCardinality(Nullable(String))"),
            ("MODIFY COLUMN duration_ms Nullable(Int32)", "column duration_ms as Nullable(Int32)"),
            ("MODIFY COLUMN duration_ms Nullable(Int64) EPHEMERAL", "column duration_ms as Nullable(Int64) EPHEMERAL"),
        ],
    )
    async def test_wrong_columns(self, clickhouse: ClickHouse, sink: ClickHouseSink, change: str, problem: str) -> None:
        """Named by check, open and write."""
        clickhouse.query(f"ALTER TABLE {TABLE} {change}")
        finding = (await sink.check())[1]
        assert (finding.ok, problem in finding.what, "sql clickhouse" in finding.cure) == (False, True, True)
        with pytest.raises(SinkUnusable) as caught:
            await sink.open()
        assert problem in str(caught.value)

    async def test_wrong_engine_and_sort_key(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Events would be there twice, or replace each other."""
        clickhouse.query(f"CREATE TABLE plain AS {TABLE} ENGINE = MergeTree ORDER BY event_ts")
        clickhouse.query(f"DROP TABLE {TABLE}")
        clickhouse.query(f"RENAME TABLE plain TO {TABLE}")
        what = (await sink.check())[1].what
        assert "the engine MergeTree and not ReplacingMergeTree(_lsn)" in what
        assert "the sort key (event_ts) and not (event_ts, content_id, event_id)" in what

    async def test_durable(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """`init` makes the table so that an answered insert is on disk; `check` tells how to make another one so."""
        [made] = clickhouse.query(f"SELECT engine_full FROM system.tables WHERE name = '{TABLE}'").splitlines()  # noqa: S608
        assert "fsync_after_insert = 1, fsync_part_directory = 1" in made
        clickhouse.query(f"ALTER TABLE {TABLE} RESET SETTING fsync_after_insert, fsync_part_directory")
        advice = (await sink.check())[-1]
        assert advice.ok
        assert "may be gone after a power cut" in advice.what
        clickhouse.query(advice.cure)
        assert [finding.ok for finding in await sink.check()] == [True, True]

    @pytest.mark.parametrize(
        "change",
        [
            "MODIFY TTL toDateTime(event_ts) + INTERVAL 1 SECOND",
            "MODIFY COLUMN device LowCardinality(Nullable(String)) TTL toDateTime(event_ts) + INTERVAL 1 SECOND",
        ],
    )
    async def test_a_ttl_is_named(self, clickhouse: ClickHouse, sink: ClickHouseSink, change: str) -> None:
        """It takes rows, or values, that were written: `check` says so, as it may be meant."""
        assert [finding.ok for finding in await sink.check()] == [True, True]
        clickhouse.query(f"ALTER TABLE {TABLE} {change}")
        advice = (await sink.check())[-1]
        assert (advice.ok, "has a TTL" in advice.what) == (True, True)

    async def test_more_columns_are_fine(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """The table is the user's too."""
        clickhouse.query(f"ALTER TABLE {TABLE} ADD COLUMN weekday UInt8 DEFAULT toDayOfWeek(event_ts)")
        assert [finding.ok for finding in await sink.check()] == [True, True]
        await sink.write(events(1, 3))
        assert table(clickhouse, "any(weekday)") == "4"

    async def test_no_right_to_insert(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """Found by check, not by the first event."""
        clickhouse.behave(read_only=True)
        finding = (await sink.check())[1]
        assert (finding.ok, "164 READONLY" in finding.what) == (False, True)


COPY = f"CREATE TABLE other AS {TABLE}"

EMPTIED = {
    "truncated": [f"TRUNCATE TABLE {TABLE} SYNC"],
    "another one": [COPY, f"EXCHANGE TABLES other AND {TABLE}"],
    "made again": [COPY, f"DROP TABLE {TABLE} SYNC", f"RENAME TABLE other TO {TABLE}"],
}

NOT_EMPTIED = {
    "merged": [f"OPTIMIZE TABLE {TABLE} FINAL"],
    "an old partition is dropped": [f"ALTER TABLE {TABLE} DROP PARTITION 202501"],
    "a copy": [COPY, f"INSERT INTO other SELECT * FROM {TABLE}", f"EXCHANGE TABLES other AND {TABLE}"],  # noqa: S608  ours
    "some are deleted": [f"ALTER TABLE {TABLE} DELETE WHERE event_id < 50 SETTINGS mutations_sync = 2"],
    "its rows have expired": [
        f"ALTER TABLE {TABLE} MODIFY TTL toDateTime(event_ts) + INTERVAL 1 DAY SETTINGS mutations_sync = 2"
    ],
}


class TestEmptied:
    """Events that were written are gone."""

    @pytest.mark.parametrize("how", EMPTIED)
    async def test_it_is_said_until_they_are_back(
        self, clickhouse: ClickHouse, sink: ClickHouseSink, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """With the next insert; until all are there again, whoever brings them, and whether or not more is written."""
        monkeypatch.setattr("sinks.clickhouse.sink.LOOK_SECONDS", 0.0)
        await sink.write(events(1, 50))
        await sink.write(events(51, 60))
        sink.look()
        for statement in EMPTIED[how]:
            clickhouse.query(statement)
        await sink.write(events(61, 70))
        await sink.write(events(71, 80))
        assert ids(clickhouse) == list(range(61, 81))
        with pytest.raises(SinkEmptied, match=r"emptied, or another .* prints the backfill command .* --accept-gap"):
            sink.look()
        async with sink_for(clickhouse.url) as backfill:
            await backfill.open()
            await backfill.write(events(51, 60))
            await sink._ask()  # noqa: SLF001  what `look` begins
            with pytest.raises(SinkEmptied):
                sink.look()
            await backfill.write(events(1, 50))
        async with asyncio.timeout(RETRY_DEADLINE_SECONDS):
            while True:
                with suppress(SinkEmptied):
                    sink.look()
                    break
                await asyncio.sleep(0.01)

    async def test_a_bug_while_they_are_looked_for_is_told(
        self,
        clickhouse: ClickHouse,
        sink: ClickHouseSink,
        *,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Once; meanwhile they stay missing, and one question at a time goes on."""
        monkeypatch.setattr("sinks.clickhouse.sink.LOOK_SECONDS", 0.0)
        await sink.write(events(1, 50))
        clickhouse.query(f"TRUNCATE TABLE {TABLE} SYNC")
        await sink.write(events(51, 60))
        answer, asked = asyncio.Event(), list[asyncio.Event]()

        async def bug() -> None:
            asked.append(answer)
            await answer.wait()
            raise ZeroDivisionError

        monkeypatch.setattr(sink._witnesses, "look", bug)  # noqa: SLF001  what `look` begins
        async with asyncio.timeout(RETRY_DEADLINE_SECONDS):
            while len(asked) < 3:
                with pytest.raises(SinkEmptied):
                    sink.look()
                await asyncio.sleep(0)
                if len(asked) == 1 and not answer.is_set():
                    with pytest.raises(SinkEmptied):
                        sink.look()
                    await asyncio.sleep(0)
                    assert 1 == len(asked), "the first one has no answer yet"
                    answer.set()
        assert 1 == caplog.text.count("sink clickhouse can't be asked for what is missing: ZeroDivisionError\n")
        assert "ZeroDivisionError" in caplog.text

    @pytest.mark.parametrize("how", NOT_EMPTIED)
    async def test_rows_go_for_good_reasons(self, clickhouse: ClickHouse, sink: ClickHouseSink, how: str) -> None:
        """Nothing is missing, or somebody wanted it so."""
        await sink.write([event(number, ts=datetime(2025, 1, 8, tzinfo=UTC)) for number in range(1, 60)])
        await sink.write(events(60, 60))
        for statement in NOT_EMPTIED[how]:
            clickhouse.query(statement)
        for _ in range(2):
            await sink.write(events(60, 60))
            sink.look()

    async def test_others_write_for_it(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """In parts side by side: none of them sees that its rows are the only ones, and the sink does."""

        async def carry(batch: list[Event]) -> None:
            for part in (batch[::2], batch[1::2]):
                async with sink_for(clickhouse.url) as other:
                    await other.write(part)
            await sink.carried(batch)

        await carry(events(1, 50))
        clickhouse.query(f"TRUNCATE TABLE {TABLE} SYNC")
        await carry(events(51, 60))
        with pytest.raises(SinkEmptied):
            sink.look()

    async def test_a_restart(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """What the table held when the program began counts as well."""
        await sink.write(events(1, 50))
        async with sink_for(clickhouse.url) as again:
            await again.open()
            clickhouse.query(f"TRUNCATE TABLE {TABLE} SYNC")
            await again.write(events(51, 60))
            with pytest.raises(SinkEmptied):
                again.look()

    @pytest.mark.parametrize("how", EMPTIED)
    async def test_a_restart_forgets_nothing(self, clickhouse: ClickHouse, sink: ClickHouseSink, how: str) -> None:
        """Neither what happened while nobody looked, nor what was known and not kept; until the events are back."""
        await sink.write(events(1, 50))
        memory = sink.remember()
        for statement in EMPTIED[how]:
            clickhouse.query(statement)
        await sink.write(events(51, 60))
        for kept in (memory, sink.remember()):
            async with sink_for(clickhouse.url) as again:
                again.recall(kept)
                assert "was emptied, or another one" in (await again.check())[-1].what
                await again.open()
                with pytest.raises(SinkEmptied):
                    again.look()
                still = again.remember()
        await sink.write(events(1, 50))
        async with sink_for(clickhouse.url) as again:
            again.recall(still)
            await again.open()
            again.look()
            assert still != again.remember()

    async def test_what_went_for_a_good_reason_need_not_come_back(
        self, clickhouse: ClickHouse, sink: ClickHouseSink
    ) -> None:
        """Else a table of which old partitions are dropped would lack them for ever, once it was another one."""
        for number in range(1, 12):
            await sink.write([event(number, ts=datetime(2025, 1, 8, tzinfo=UTC))])
        await sink.write(events(50, 60))
        async with sink_for(clickhouse.url) as again:
            again.recall(sink.remember())
            await again.write(events(61, 61))
            memory = again.remember()
        clickhouse.query(f"ALTER TABLE {TABLE} DROP PARTITION 202501")
        async with sink_for(clickhouse.url) as again:
            again.recall(memory)
            await again.open()
            again.look()
            memory = again.remember()
        for statement in EMPTIED["another one"]:
            clickhouse.query(statement)
        async with sink_for(clickhouse.url) as again:
            again.recall(memory)
            await again.open()
            with pytest.raises(SinkEmptied):
                again.look()
            clickhouse.query(f"EXCHANGE TABLES other AND {TABLE}")
            await again._ask()  # noqa: SLF001  what `look` begins
            again.look()

    @pytest.mark.parametrize("memory", ["", "another release's", '{"gone": 1}', "[]"])
    async def test_what_it_does_not_understand_it_does_not_recall(self, sink: ClickHouseSink, memory: str) -> None:
        """It then knows what the table holds now."""
        sink.recall(memory)
        await sink.open()
        sink.look()

    async def test_a_paused_sink_is_not_asked(self, clickhouse: ClickHouse, sink: ClickHouseSink) -> None:
        """What is known to be lost is told all the same."""
        await sink.write(events(1, 50))
        clickhouse.query(f"TRUNCATE TABLE {TABLE} SYNC")
        await sink.write(events(51, 60))
        async with sink_for("http://localhost:9/engagement") as paused:
            paused.recall(sink.remember())
            with pytest.raises(SinkEmptied):
                paused.look()
            assert paused._asking is None  # noqa: SLF001  what `look` begins

    async def test_the_memory_changes_rarely(self, sink: ClickHouseSink) -> None:
        """It is written to the checkpoint database."""
        seen = set()
        for number in range(1, 100):
            await sink.write(events(number, number))
            seen.add(sink.remember())
        assert len(seen) <= 11


def _connections(port: int) -> int:
    """How many TCP connections to a local port are established."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    ends = [line.split()[2:4] for line in lines]
    return ends.count([f"0100007F:{port:04X}", "01"])


EMBEDDED = """
import asyncio, json, sys
from pydantic import SecretStr
from sinks.clickhouse.sink import ClickHouseSettings, ClickHouseSink
from enrichment import EVENT
from replicator.contracts.errors import BatchRefused
from replicator.contracts.events import Event
from replicator.contracts.sink import SinkContext

async def main(url, payload):
    told = []
    for _ in range(2):  # the second sink opens what the first has closed
        sink = ClickHouseSink(ClickHouseSettings(clickhouse_url=SecretStr(url)), SinkContext(EVENT))
        told.append(await sink.create())
        told.append([finding.ok for finding in await sink.check()])
        event = Event(commit_lsn=7, ordinal=1, id=1, key=1, ts_us=0, json=payload.encode())
        bad = Event(commit_lsn=7, ordinal=2, id=2, key=1, ts_us=0, json=payload.encode().replace(b"7.0", b"1e18"))
        for _ in range(2):
            told.append([refusal.event.id for refusal in await sink.write([event])])
            try:
                await sink.write([event, bad])
            except BatchRefused as exc:
                told.append(exc.detail)
        await sink.close()
    print(json.dumps(told))

asyncio.run(main(*sys.argv[1:]))
"""
"""In a process of its own: a process may hold one directory."""

STOPPED = """
import asyncio, signal, sys, threading
from clickhouse_connect.driver._backendclient import SyncBackendClient
from pydantic import SecretStr
from replicator.contracts.events import Event
from replicator.contracts.sink import SinkContext
from sinks.clickhouse import embedded
from enrichment import EVENT
from sinks.clickhouse.sink import ClickHouseSettings, ClickHouseSink

insert = SyncBackendClient.raw_insert
embedded.CLOSE_SECONDS = 1 if sys.argv[3] == "hangs" else 60

def raw_insert(*arguments):
    print("inserting", flush=True)
    if sys.argv[3] == "hangs":
        threading.Event().wait()
    return insert(*arguments)

async def main(url, payload):
    sink = ClickHouseSink(ClickHouseSettings(clickhouse_url=SecretStr(url)), SinkContext(EVENT))
    await sink.create()
    events = [Event(commit_lsn=7, ordinal=n, id=n, key=1, ts_us=0,
                    json=payload.replace('"event_id":1,', f'"event_id":{n},').encode()) for n in range(200_000)]
    SyncBackendClient.raw_insert = raw_insert
    writing = asyncio.create_task(sink.write(events))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, writing.cancel)
    try:
        await writing
    except asyncio.CancelledError:
        await sink.close()
        print("closed", flush=True)

asyncio.run(main(*sys.argv[1:3]))
"""
"""Ends on SIGTERM; `works`: the insert is the engine's; `hangs`: it never returns."""

READ = """
import sys, chdb

connection = chdb.connect(sys.argv[1])
print(connection.query("SELECT count(), any(engagement_seconds) FROM `my-db`.events_enriched FINAL", "CSV"))
"""


class TestEmbedded:
    """chdb:// is the same sink."""

    def test_end_to_end(self, tmp_path: Path) -> None:
        """Made, checked, written, closed, and opened again; then read by another process."""
        url = f"chdb://{tmp_path}/deep/er/my-db"
        run = [sys.executable, "-W", "error", "-c"]
        told = subprocess.run([*run, EMBEDDED, url, event(1).json.decode()], check=True, capture_output=True, text=True)
        made = ["ClickHouse: made database my-db", f"ClickHouse: made table my-db.{TABLE}"]
        wrote = [[], "ClickHouse error 69 ARGUMENT_OUT_OF_BOUND"] * 2
        assert json.loads(told.stdout) == [made, [True, True], *wrote, [], [True, True], *wrote]
        found = subprocess.run([*run, READ, str(tmp_path / "deep" / "er")], check=True, capture_output=True, text=True)
        assert found.stdout.strip() == "1,7"

    @pytest.mark.parametrize(("engine", "rows"), [("works", "200000,7"), ("hangs", "0,\\N")])
    def test_sigterm_during_an_insert(self, tmp_path: Path, engine: str, rows: str) -> None:
        """A running insert is finished, and the directory is in order; one that never returns holds up nothing."""
        url = f"chdb://{tmp_path}/data/my-db"
        run = [sys.executable, "-W", "error", "-c"]
        with subprocess.Popen([*run, STOPPED, url, event(1).json.decode(), engine], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"inserting\n"
            process.terminate()
            assert process.wait(20) == 0
            assert process.stdout.read() == b"closed\n"
        found = subprocess.run([*run, READ, str(tmp_path / "data")], check=True, capture_output=True, text=True)
        assert found.stdout.strip() == rows

    async def test_a_check_makes_no_directory(self, tmp_path: Path) -> None:
        """The engine would make it, and then lack only the table."""
        async with sink_for(f"chdb://{tmp_path}/typo/my-db") as sink:
            [found] = await sink.check()
        assert (False, f"ClickHouse: there is no directory of chdb://{tmp_path}/typo") == (found.ok, found.what)
        assert not (tmp_path / "typo").exists()

    async def test_a_directory_that_cannot_be(self, tmp_path: Path) -> None:
        """Named, with the cure; no thread is left over from each try."""
        (tmp_path / "file").touch()
        threads = threading.active_count()
        async with sink_for(f"chdb://{tmp_path}/file/ch/my-db") as sink:
            for _ in range(3):
                with pytest.raises(SinkMisconfigured, match="who holds its directory"):
                    await sink.open()
        await asyncio.to_thread(wait_until, lambda: threading.active_count() <= threads + 1, "the threads to end")


class _Unavailable(BaseHTTPRequestHandler):
    """Answers 503 to everything."""

    def do_GET(self) -> None:
        self.send_error(503)

    do_POST = do_GET  # noqa: N815  the library's name

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def _tls_server(certificate: Path, key: Path) -> Iterator[str]:
    """URL of an HTTPS server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Unavailable) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}/engagement"
        server.shutdown()
        thread.join()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of its own authority for 127.0.0.1, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files]
    subprocess.run(make, check=True, capture_output=True)
    return certificate, key
