"""The ClickHouse sink's pure parts: URLs and settings, rows, and what errors mean. No server."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from pathlib import Path

import aiohttp
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError, ProgrammingError
from hypothesis import given
from hypothesis import strategies as st

from enrichment import EVENT
from replicator.contracts.errors import SettingsError, SinkError, SinkMisconfigured, SinkUnavailable, SinkUnusable
from replicator.contracts.events import Event
from replicator.contracts.settings import load
from sinks.clickhouse.client import Address, EmbeddedEngine, parse_url
from sinks.clickhouse.errors import ValueRefused, translated
from sinks.clickhouse.sink import ClickHouseSettings, ClickHouseSink, rows

SECRET = "Xq7Zk2"  # noqa: S105  looked for in messages
ROW_TEXT = 'Cannot parse input: \'{"device":"Xq7Zk2"}\': (XQ7ZK2) (at row 1)'


@pytest.fixture(autouse=True)
def _no_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A `.env` file of the developer's is not read."""
    monkeypatch.chdir(tmp_path)


class TestUrl:
    """REPLICATOR_CLICKHOUSE_URL."""

    @pytest.mark.parametrize(
        ("url", "address"),
        [
            ("http://default@localhost:8123/engagement", Address("http://localhost:8123", "default", "", "engagement")),
            ("http://h/d", Address("http://h:8123", "default", "", "d")),
            (f"https://u:{SECRET}%40%2F@h/a_b-1", Address("https://h:8443", "u", f"{SECRET}@/", "a_b-1")),
            ("https://[::1]:9/d", Address("https://[::1]:9", "default", "", "d")),
            ("chdb:///var/lib/my%20ch/d", Address("chdb:///var/lib/my ch", "default", "", "d")),
        ],
    )
    def test_is_read(self, url: str, address: Address) -> None:
        """Ports and user have defaults; the last component is the database, of a directory too; no secret is shown."""
        assert parse_url(url) == address
        assert SECRET not in address.server

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "localhost:8123/d",
            "tcp://h:9000/d",
            "http://h",
            "http://h/",
            "http://h/a/b",
            "http:///d",
            "http://h/d?secure=1",
            "http://h/d#x",
            "http://h/d`",
            "http://h/a%20b",
            "http://h:port/d",
            "http://[::1/d",
            f"http://u:{SECRET}/x@h/d",
            f"http://u:{SECRET}#x@h/d",
            "chdb://d",
            "chdb:///d",
            "chdb://host/dir/d",
            "chdb:///dir/",
        ],
    )
    def test_unusable_one_is_named(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By its variable, with what it takes and without what may be a password."""
        monkeypatch.setenv("REPLICATOR_CLICKHOUSE_URL", url)
        with pytest.raises(SettingsError) as caught:
            load(ClickHouseSettings)
        assert "REPLICATOR_CLICKHOUSE_URL is unusable" in str(caught.value)
        assert "It takes http:// or https://" in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_the_embedded_engine_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is an extra."""
        monkeypatch.setattr("sinks.clickhouse.client.find_spec", lambda _: None)
        monkeypatch.setenv("REPLICATOR_CLICKHOUSE_URL", "chdb:///var/lib/ch/d")
        with pytest.raises(SettingsError, match=r"pip install 'engagement-replicator\[chdb\]'"):
            load(ClickHouseSettings)


class TestSettings:
    """The others."""

    def test_have_defaults(self) -> None:
        """That lead to the server of the compose file."""
        sink = ClickHouseSink(load(ClickHouseSettings), EVENT)
        assert (sink.name, sink.concurrency, sink.max_events, sink.linger_seconds) == ("clickhouse", 1, 20_000, 0.8)

    def test_ca_file_must_exist(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A typo is found before a connection is tried."""
        monkeypatch.setenv("REPLICATOR_CLICKHOUSE_CA_FILE", str(tmp_path / "nothing.pem"))
        with pytest.raises(SettingsError, match="REPLICATOR_CLICKHOUSE_CA_FILE is unusable"):
            load(ClickHouseSettings)

    def test_ca_file_must_hold_a_certificate(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The wrong file is found before a connection is tried, too."""
        (tmp_path / "key.pem").write_text("nothing of the kind", encoding="utf-8")
        monkeypatch.setenv("REPLICATOR_CLICKHOUSE_CA_FILE", str(tmp_path / "key.pem"))
        with pytest.raises(SettingsError, match="no certificate can be read from it"):
            load(ClickHouseSettings)


def event(number: int, commit_lsn: int, payload: bytes) -> Event:
    """An event that carries any JSON object."""
    return Event(commit_lsn=commit_lsn, ordinal=number, id=number, key=1, ts_us=0, json=payload)


class TestRows:
    """What is sent."""

    @given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.text())))
    def test_have_the_lsn_of_their_own_commit(self, facts: list[tuple[int, str]]) -> None:
        """One JSON object a line, whatever the order of the commits and the text inside."""
        payloads = [json.dumps({"number": number, "device": text}).encode() for number, (_, text) in enumerate(facts)]
        sent = rows([event(number, facts[number][0], payload) for number, payload in enumerate(payloads)])
        assert [json.loads(line) for line in sent.splitlines()] == [
            {"number": number, "device": text, "_lsn": lsn} for number, (lsn, text) in enumerate(facts)
        ]


def meaning(error: Exception) -> SinkError | ValueRefused:
    """What the lane gets to see of it."""
    with pytest.raises((SinkError, ValueRefused)) as caught, translated("http://h:8123"):
        raise error
    assert isinstance(caught.value, SinkError | ValueRefused)
    return caught.value


class TestErrors:
    """What they mean."""

    @pytest.mark.parametrize("code", [6, 27, 41, 53, 69, 72, 321, 407, 469])
    def test_a_value_is_refused(self, code: int) -> None:
        """The event's fault."""
        assert isinstance(meaning(DatabaseError(ROW_TEXT, code=code)), ValueRefused)

    @pytest.mark.parametrize("code", [16, 60, 81, 115, 117])
    def test_table_and_program_do_not_fit(self, code: int) -> None:
        """Stops, and says how to make the table."""
        error = meaning(DatabaseError(ROW_TEXT, code=code))
        assert isinstance(error, SinkUnusable)
        assert "python -m replicator init" in str(error)

    @pytest.mark.parametrize("code", [164, 192, 193, 194, 452, 497, 516])
    def test_we_are_turned_away(self, code: int) -> None:
        """Tried again slowly."""
        assert isinstance(meaning(DatabaseError(ROW_TEXT, code=code)), SinkMisconfigured)

    @pytest.mark.parametrize("code", [159, 202, 209, 210, 241, 242, 243, 252, 425, 745, 999, 1002, 12345])
    def test_not_now(self, code: int) -> None:
        """Overload, disk, replicas, and every code that nobody named: tried again."""
        assert isinstance(meaning(DatabaseError(ROW_TEXT, code=code)), SinkUnavailable)

    @pytest.mark.parametrize("code", [27, 117, 252, 516])
    def test_messages_carry_the_code_and_nothing_of_the_row(self, code: int) -> None:
        """Neither the message nor what a logged traceback shows."""
        error = meaning(DatabaseError(ROW_TEXT, code=code, name="XQ7ZK2"))
        assert f"ClickHouse error {code}" in str(error)
        assert SECRET.upper() not in str(error).upper()
        assert error.__cause__ is None
        assert error.__suppress_context__

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(401, SinkMisconfigured), (404, SinkMisconfigured), (429, SinkUnavailable), (502, SinkUnavailable)],
    )
    def test_something_else_answers(self, status: int, kind: type[SinkError]) -> None:
        """A proxy, or another program on that port."""
        assert isinstance(
            meaning(DatabaseError(f"HTTP driver received HTTP status {status}, server response: x")), kind
        )

    def test_certificate_is_not_trusted(self) -> None:
        """However deep in the chain; the cure is the CA file."""
        error = OperationalError("Error executing HTTP request")
        error.__cause__ = Exception("retries")
        error.__cause__.__context__ = ssl.SSLCertVerificationError("self-signed")
        found = meaning(error)
        assert isinstance(found, SinkMisconfigured)
        assert "REPLICATOR_CLICKHOUSE_CA_FILE" in str(found)

    def test_the_client_objects(self) -> None:
        """A profile that pins a setting we need, a chdb directory that another process holds."""
        assert isinstance(meaning(ProgrammingError("Setting async_insert is readonly")), SinkMisconfigured)

    def test_a_missing_file_is_not_the_network(self) -> None:
        """An error of the operating system that the driver did not wrap is not explained away."""
        with pytest.raises(FileNotFoundError), translated("http://h:8123"):
            raise FileNotFoundError("table.sql")

    def test_no_answer(self) -> None:
        """Tried again; the message says from where."""
        error = OperationalError("Network Error: refused")
        error.__cause__ = aiohttp.ClientOSError()
        error.__cause__.__cause__ = ConnectionRefusedError("refused")
        found = meaning(error)
        assert isinstance(found, SinkUnavailable)
        assert "no answer from http://h:8123 (ConnectionRefusedError)" in str(found)


async def test_calls_wait_for_an_engine_that_hangs() -> None:
    """A retry does not start beside the call that was given up, and none that was given up in the queue ever runs."""
    engine, released, begun = EmbeddedEngine(), threading.Event(), []

    def hang(number: int) -> None:
        begun.append(number)
        released.wait()

    for number in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await engine._run(hang, number)  # noqa: SLF001  any call, without the engine
    released.set()
    assert await engine._run(str, 7) == "7"  # noqa: SLF001
    assert begun == [0]
