"""The ClickHouse sink's pure parts: URLs and settings, rows, and what errors mean. No server."""

from __future__ import annotations

import json
import ssl
import threading
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrichment import EVENT
from replicator.contracts.errors import SettingsError, SinkError, SinkMisconfigured, SinkUnavailable
from replicator.contracts.events import Event
from replicator.contracts.settings import load
from replicator.contracts.sink import SinkContext
from sinks.clickhouse.client import Address, parse_url
from sinks.clickhouse.embedded import EmbeddedEngine
from sinks.clickhouse.errors import LIMITED, Errors, Failed, failed
from sinks.clickhouse.http import HttpServer
from sinks.clickhouse.sink import ClickHouseSettings, ClickHouseSink, rows

ERRORS = Errors("clickhouse", "http://h:8123")
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
        sink = ClickHouseSink(load(ClickHouseSettings), SinkContext(EVENT))
        assert (sink.name, sink.concurrency, sink.max_events, sink.linger_seconds) == ("clickhouse", 1, 40_000, 0.8)

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


def sent(code: int, text: str) -> Failed:
    """What ClickHouse answers."""
    return failed(code, f"Code: {code}. DB::Exception: {text}".encode())


class TestCodes:
    """What an error means, when it is not known to be about an event."""

    @pytest.mark.parametrize("code", [16, 60, 81, 117])
    def test_something_does_not_fit(self, code: int) -> None:
        """Waits for an operator."""
        error = ERRORS.answered(sent(code, ROW_TEXT))
        assert isinstance(error, SinkMisconfigured)
        assert "python -m replicator sql clickhouse" in str(error)

    @pytest.mark.parametrize("code", [164, 192, 193, 194, 452, 497, 516])
    def test_we_are_turned_away(self, code: int) -> None:
        """Tried again slowly."""
        assert isinstance(ERRORS.answered(sent(code, ROW_TEXT)), SinkMisconfigured)

    @pytest.mark.parametrize("code", [6, 27, 53, 202, 209, 210, 241, 242, 243, 252, 395, 425, 745, 999, 1002, 12345])
    def test_not_now(self, code: int) -> None:
        """Overload, disk, replicas, and every code that nobody named: tried again."""
        assert isinstance(ERRORS.answered(sent(code, ROW_TEXT)), SinkUnavailable)

    @pytest.mark.parametrize(("code", "limit"), LIMITED.items())
    def test_a_limit_is_named(self, code: int, limit: str) -> None:
        """It stays until somebody raises it."""
        error = ERRORS.answered(sent(code, ROW_TEXT))
        assert isinstance(error, SinkMisconfigured)
        assert limit in error.cure

    @pytest.mark.parametrize("code", [27, 117, 252, 516])
    def test_messages_carry_the_code_and_nothing_of_the_row(self, code: int) -> None:
        """A word of the row that looks like a name is none."""
        error = ERRORS.answered(sent(code, ROW_TEXT))
        assert f"ClickHouse error {code}" in str(error)
        assert SECRET.upper() not in str(error).upper()

    @pytest.mark.parametrize(
        "end",
        [
            " (QUOTA_EXCEEDED)",
            " (QUOTA_EXCEEDED) (version 26.9.2.1 (official build))\n",
            " (QUOTA_EXCEEDED) (version 22.8)",
        ],
    )
    def test_the_name_is_the_servers(self, end: str) -> None:
        """Nobody has to look up a number."""
        assert str(sent(201, ROW_TEXT + end)) == "ClickHouse error 201 QUOTA_EXCEEDED"

    def test_a_code_without_text_has_its_name(self) -> None:
        """If it is one of those that are known here."""
        assert str(failed(164, b"")) == "ClickHouse error 164 READONLY"

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            *((status, SinkMisconfigured) for status in (301, 307, 400, 401, 404, 411, 418, 421, 431, 494, 499)),
            *((status, SinkUnavailable) for status in (408, 425, 429, 500, 502, 503, 504, 520, 999)),
            (413, Failed),
        ],
    )
    def test_something_else_answers(self, status: int, kind: type[Exception]) -> None:
        """A proxy, or another program on that port."""
        error = ERRORS.not_from_clickhouse(status)
        assert isinstance(error, kind)
        assert f"http://h:8123 answers with HTTP status {status}" in str(error)


def meaning(error: Exception) -> SinkError:
    """What the lane gets to see of it."""
    with pytest.raises(SinkError) as caught, ERRORS.translated():
        raise error
    return caught.value


def tls(reason: str) -> ssl.SSLError:
    """As OpenSSL raises it."""
    error = ssl.SSLError(1, f"[SSL: {reason}] something")
    error.reason = reason
    return error


class TestNetwork:
    """Nobody answers."""

    def test_certificate_is_not_trusted(self) -> None:
        """However deep in the chain; the cure is the CA file."""
        error = aiohttp.ClientError("Error executing HTTP request")
        error.__cause__ = Exception("retries")
        error.__cause__.__context__ = ssl.SSLCertVerificationError("self-signed")
        found = meaning(error)
        assert isinstance(found, SinkMisconfigured)
        assert "REPLICATOR_CLICKHOUSE_CA_FILE" in str(found)

    @pytest.mark.parametrize(
        ("reason", "kind"),
        [("WRONG_VERSION_NUMBER", SinkMisconfigured), ("UNEXPECTED_EOF_WHILE_READING", SinkUnavailable)],
    )
    def test_tls_fails(self, reason: str, kind: type[SinkError]) -> None:
        """There is none, or it broke off."""
        error = aiohttp.ClientOSError()
        error.__cause__ = tls(reason)
        assert type(meaning(error)) is kind or isinstance(meaning(error), kind)

    def test_a_missing_file_is_not_the_network(self) -> None:
        """An error of the operating system that the client did not wrap is not explained away."""
        with pytest.raises(FileNotFoundError), ERRORS.translated():
            raise FileNotFoundError("table.sql")

    def test_no_answer(self) -> None:
        """Tried again; the message says from where, and why."""
        error = aiohttp.ClientOSError()
        error.__cause__ = ConnectionRefusedError(111, "refused")
        found = meaning(error)
        assert isinstance(found, SinkUnavailable)
        assert "no answer from http://h:8123 (Connection refused)" in str(found)

    async def test_an_impossible_host(self) -> None:
        """That only the look-up of its name finds out about."""
        server = HttpServer(Errors("clickhouse", f"http://{'a' * 64}.example:8123"), "default", "", None)
        with pytest.raises(SinkError):
            await server.ask("SELECT 1", {}, 10)
        await server.close()

    async def test_the_authority_has_gone(self, tmp_path: Path) -> None:
        """Its file was there when the program started."""
        server = HttpServer(Errors("clickhouse", "https://localhost:9"), "default", "", tmp_path / "gone.pem")
        with pytest.raises(SinkMisconfigured, match="REPLICATOR_CLICKHOUSE_CA_FILE can't be read"):
            await server.ask("SELECT 1", {}, 10)
        await server.close()


async def test_calls_wait_for_an_engine_that_hangs() -> None:
    """A retry does not start beside the call that was given up, and none that was given up in the queue ever runs."""
    engine, released, begun = EmbeddedEngine(ERRORS, "/nowhere"), threading.Event(), []

    def hang(number: int) -> None:
        begun.append(number)
        released.wait()

    for number in range(3):
        with pytest.raises(TimeoutError):
            await engine._run(lambda number=number: hang(number), 0.05)  # type: ignore[misc]  # noqa: SLF001  any call, without the engine
    released.set()
    assert await engine._run(lambda: "7", 10) == "7"  # noqa: SLF001
    assert begun == [0]
