"""The admin server against whoever reaches its port: bounded in connections, bytes, time and log lines."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import types
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from msgspec import structs

from devstack.process import free_port
from replicator.cli import arguments
from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.fields import BIGINT
from replicator.contracts.stores import Task
from replicator.delivery.retry import Trouble
from replicator.operations import http
from replicator.operations.follow.trace import Place, Trace
from replicator.operations.http import CONNECTIONS, HEAD_BYTES, Admin, exposed
from replicator.operations.notices.ring import Notices, Reason
from replicator.operations.page import live, traced
from replicator.operations.page.live import VIEWERS, Live
from replicator.operations.status.form import CheckpointStatus, SlotStatus, Status

STATUS = Status(
    reasons=[],
    replicator=None,
    slot=SlotStatus(name="s"),
    checkpoint=CheckpointStatus(),
    sinks={},
    dead_letters=None,
)


HANGS, FAILS = 13, 14
"""Events that are never found, or not for the servers' sake."""


class FakeWatchdog:
    """Says what the test says."""

    def __init__(self) -> None:
        self.standby = ""
        self.wrong: list[str] = []
        self.lanes: list[object] = []
        self.notices = Notices()
        letters = types.SimpleNamespace(reasons={}, trouble=Trouble())
        fan_out = types.SimpleNamespace(lanes=self.lanes, every=self.lanes)
        self.pipeline = types.SimpleNamespace(fan_out=fan_out, letters=letters)

    def pauses(self) -> list[str]:
        """None."""
        return []

    def reasons(self) -> list[str]:
        """What is wrong."""
        return self.wrong

    def status(self) -> Status:
        """The same, as a form."""
        return structs.replace(STATUS, reasons=self.wrong)

    def found(self) -> list[Reason]:
        """What is wrong, each with what it is about."""
        return [Reason("sink", "redis", text) for text in self.wrong]

    def warnings(self) -> list[Reason]:
        """What will be wrong."""
        return []

    def lag_seconds(self, _: object) -> float:
        """Of any lane."""
        return 1.5


class FakeStore:
    """Has nothing."""

    def tasks(self, _: str) -> list[Task]:
        """Of any slot."""
        return []


class Served:
    """An admin server, and a client that writes bytes."""

    def __init__(self, listen: str = "127.0.0.1") -> None:
        self.watchdog = FakeWatchdog()
        self.opened: list[asyncio.StreamWriter] = []
        self.port = free_port()
        self.page = Live(self.watchdog, FakeStore(), "s", [])  # type: ignore[arg-type]  # as much as they need
        self.traced: list[int] = []
        self.admin = Admin(self.watchdog, f"{listen}:{self.port}", self.page, self._trace)  # type: ignore[arg-type]  # likewise

    async def _trace(self, event_id: str, _stream: str | None) -> Trace:
        number = arguments.event_id(event_id, BIGINT)
        self.traced.append(number)
        if number == HANGS:
            await asyncio.Event().wait()
        if number == FAILS:
            raise SourceUnavailable(detail="<script>")
        places = {"http": Place(state="dead letter", dead_letter=7, reason="<b>no</b>")}
        places["redis"] = Place(state="differs", differences={"device": ("<i>", None)}, notes=["a `note`"])
        event = {"event_id": number, "device": "<i>\x1b[2J"}
        return Trace(event_id=number, in_postgresql=True, event=event, commit_lsn="0/1", sinks=places)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that has said nothing."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1_000_000)
        self.opened.append(writer)
        return reader, writer

    async def follow(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that gets updates."""
        reader, writer = await self.connect()
        writer.write(b"GET /updates HTTP/1.1\r\n\r\n")
        return reader, writer

    async def send(self, request: bytes) -> bytes:
        """Everything that is answered."""
        reader, writer = await self.connect()
        writer.write(request)
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    async def get(self, path: str, *headers: str, method: str = "GET") -> bytes:
        """The answer to a request."""
        lines = [f"{method} {path} HTTP/1.1", *headers, "", ""]
        return await self.send("\r\n".join(lines).encode())


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """It listens."""
    async with _serving() as served:
        yield served


@asynccontextmanager
async def _serving(listen: str = "127.0.0.1") -> AsyncIterator[Served]:
    served = Served(listen)
    await served.admin.start()
    try:
        yield served
    finally:
        await served.admin.stop()
        for writer in served.opened:
            writer.transport.abort()
        await asyncio.sleep(0)  # until they are closed


async def test_it_answers_as_a_client_expects(served: Served) -> None:
    """Status line, length and body; HEAD has no body."""
    answer = await served.get("/healthz", f"Host: 127.0.0.1:{served.port}")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 3\r\n" in answer
    assert answer.endswith(b"\r\n\r\nok\n")
    head = await served.get("/healthz", method="HEAD")
    assert b"Content-Length: 3\r\n" in head
    assert head.endswith(b"\r\n\r\n")
    assert b"200 OK" in await served.get("/status?pretty")


async def test_the_hour_of_each_sink(served: Served) -> None:
    """A value a step; a sink that has just begun has none yet, but a rate since the look before."""
    served.watchdog.lanes.append(types.SimpleNamespace(name="redis", stats=types.SimpleNamespace(events=3)))
    served.page.history.look()
    found = msgspec.json.decode((await served.get("/history")).partition(b"\r\n\r\n")[2])
    assert 10 == found["step_seconds"]
    assert found["sinks"]["redis"].pop("events_per_second_now") > 0
    assert {"events_per_second": [None] * 359, "lag_seconds": [None] * 359} == found["sinks"]["redis"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET /../status HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET http://evil.example/status HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /status HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405 Method Not Allowed"),
        (b"\x16\x03\x01\x02\r\n\r\n", b"400 Bad Request"),
        (b"\r\n\r\n", b"400 Bad Request"),
        (b"GET /status\r\n\r\n", b"400 Bad Request"),
    ],
)
async def test_what_it_does_not_serve(served: Served, request_: bytes, status: bytes) -> None:
    """Each with its own status, and nothing of the request in the answer."""
    answer = await served.send(request_)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"evil" not in answer


async def test_one_event_is_traced(served: Served) -> None:
    """Everything that it has to say, escaped."""
    answer = (await served.get("/trace?id=301013")).decode()
    assert answer.startswith("HTTP/1.1 200 OK")
    for text in ("Event 301013", "Committed at 0/1", "dead letter 7", "&lt;b&gt;no", "&lt;i&gt;", "<code>note</code>"):
        assert text in answer
    assert not re.search("<script|<b>no|<i>|\x1b", answer)
    assert [301013] == served.traced


@pytest.mark.parametrize("query", ["", "?id=", "?id=x", "?id=1e3", "?id=9223372036854775808", "?id=" + "9" * 5000])
async def test_what_is_no_id_is_not_asked_for(served: Served, query: str) -> None:
    """It says what an id is, and asks no server."""
    assert b"It takes a 64-bit integer" in await served.get(f"/trace{query}")
    assert [] == served.traced


async def test_nothing_of_the_request_is_in_the_answer_unescaped(served: Served) -> None:
    """Nor what a server says."""
    assert b"<script" not in await served.get("/trace?id=%22%3E%3Cscript%3Ealert(1)")
    answer = await served.get(f"/trace?id={FAILS}")
    assert b"&lt;script&gt;" in answer
    assert b"<script" not in answer


async def test_servers_that_hang_cost_one_trace_at_a_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is sent to the command, which has more patience."""
    monkeypatch.setattr(traced, "TRACE_SECONDS", 0.2)
    answers = await asyncio.gather(*(served.get(f"/trace?id={HANGS}") for _ in range(5)))
    assert all(f"trace {HANGS}".encode() in answer for answer in answers)
    assert len(served.traced) < len(answers)
    assert f"trace {HANGS} --stream orders".encode() in await served.get(f"/trace?id={HANGS}&stream=orders")
    assert b"Event 5 " in await served.get("/trace?id=5")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:1"])
async def test_another_name_is_misdirected(served: Served, host: str) -> None:
    """A web page may bind its own name to 127.0.0.1; the browser then sends that name."""
    for path in ("/status", "/healthz", "/nothing"):
        assert (await served.get(path, f"Host: {host}")).startswith(b"HTTP/1.1 421 ")
    assert (await served.get("/status", "Host: localhost", f"HOST: {host}")).startswith(b"HTTP/1.1 421 ")


NO_HOSTS = ["", "@", "/", "@evil.example", "/evil.example", "localhost/", "evil.example@localhost", "localhost:x", "[]",
            "[localhost]", "]127.0.0.1[", ":8080", "localhost localhost", "127.0.0.1,evil.example"]  # fmt: skip


@pytest.mark.parametrize("host", NO_HOSTS)
@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0"])  # noqa: S104  as the image does
async def test_what_is_no_host_is_misdirected(listen: str, host: str) -> None:
    """It is nobody's name, and so not ours: an empty one is as little this machine as `@` or `/` are."""
    async with _serving(listen) as served:
        assert b" 421 " in await served.get("/status", f"Host: {host}")


@pytest.mark.parametrize("host", ["localhost:", "LOCALHOST", "127.0.0.1", "127.8.8.8:80", "[::1]:8080", "[::1]"])
async def test_names_of_this_machine(served: Served, host: str) -> None:
    """Also through a tunnel, whose port is another one."""
    assert b"200 OK" in await served.get("/status", f"Host: {host}")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("10.0.0.7:8080", 200),
        ("[fd00::7]:8080", 200),
        ("localhost:8080", 200),
        ("replicator:8080", 200),
        ("replicator.shop.svc.cluster.local:8080", 200),
        ("ip-10-0-0-7.eu-west-1.compute.internal", 200),
        ("evil.example:8080", 421),
        ("10.0.0.7.evil.example", 421),
        ("local.evil.example", 421),
    ],
)
async def test_names_where_others_may_ask(host: str, status: int) -> None:
    """In a container: probes and scrapers use an address or a name of the inside, which no web page can have."""
    async with _serving("0.0.0.0") as served:  # noqa: S104  as the image does
        assert (await served.get("/status", f"Host: {host}")).startswith(b"HTTP/1.1 %d " % status)
        assert b"200 OK" in await served.get("/healthz")


async def test_names_are_the_same_in_small_and_in_capital_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser sends small ones, however the machine and the setting write theirs."""
    bind = http.listen
    monkeypatch.setattr(http, "listen", lambda address, serve: bind(f"127.0.0.1:{address.split(':')[1]}", serve))
    monkeypatch.setattr("socket.gethostname", lambda: "Box.Example")
    async with _serving("Status.Example") as served:
        for host in ("box.example:1", "BOX.example", "status.example:1", "STATUS.EXAMPLE"):
            assert b"200 OK" in await served.get("/status", f"Host: {host}")
        assert b" 421 " in await served.get("/status", "Host: box.example.evil.example")


async def test_the_page_runs_nothing_and_is_in_no_frame(served: Served) -> None:
    """Whatever a server or a row says is text; nothing in the page is a script or a style."""
    served.watchdog.wrong = ['sink <script>alert("1")</script> & `init <b>`. Mend "it" `']
    head, _, body = (await served.get("/")).decode().partition("\r\n\r\n")
    for line in ("Content-Type: text/html; charset=utf-8", "X-Content-Type-Options: nosniff", "frame-ancestors 'none'"):
        assert line in head
    assert "unsafe" not in head
    assert "script-src 'self';" in head
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; " in body
    assert 1 == body.count("<script")
    assert '<script src="page.js" defer></script>' in body
    assert " style=" not in body
    assert "<style" not in body


async def test_the_page_is_small(served: Served) -> None:
    """With everything that it loads, and the two lines of each of three sinks; and it loads nothing else."""
    lines = 6 * 3_500
    body = (await served.get("/")).decode()
    loaded = re.findall(r'(?:src|href)="([^"]*)"', body)
    assert ["icon.svg", "page.css", "page.js"] == loaded, "a proxy may have it in a folder"
    answers = [await served.get(f"/{path}") for path in loaded]
    assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers)
    assert len(body) + sum(map(len, answers)) + lines < 60_000


async def _updates(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    async for line in reader:
        if line.startswith(b"data: "):
            yield msgspec.json.decode(line.removeprefix(b"data: "))


async def test_a_viewer_gets_everything_and_then_what_changes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The colour with each update."""
    monkeypatch.setattr(live, "UPDATE_SECONDS", 0.02)
    reader, _ = await served.follow()
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream")
        updates = aiter(_updates(reader))
        first = await anext(updates)
        assert "well" == first["state"]
        assert {"headline", "flow", "clock"} <= set(first["parts"])
        served.watchdog.wrong = ["the slot stands still"]
        while "wrong" != (update := await anext(updates))["state"]:
            assert "wal" not in update["parts"], "it has not changed"
        assert "the slot stands still" in update["parts"]["headline"]


async def test_whoever_does_not_read_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a bounded buffer, and the others nothing."""
    monkeypatch.setattr(live, "UPDATE_SECONDS", 0.01)
    monkeypatch.setattr(live, "UNREAD_BYTES", 20_000)
    _, deaf = await served.follow()
    deaf.transport.pause_reading()  # type: ignore[attr-defined]  # of a WriteTransport that is both
    reader, _ = await served.follow()
    async with asyncio.timeout(20):
        async for _ in _updates(reader):
            served.watchdog.wrong = [f"{time.monotonic()} {'x' * 100_000}"]
            if 1 == len(served.page.viewers):
                break


async def test_viewers_have_a_bound(served: Served) -> None:
    """The oldest is closed; a page asks again."""
    opened = []
    for _ in range(VIEWERS + 3):
        reader, _ = await served.follow()
        await reader.readuntil(b"\n\n")
        opened.append(reader)
    assert VIEWERS == len(served.page.viewers)
    for reader in opened[:3]:
        await _end(reader)
    assert b"200 OK" in await served.get("/healthz"), "they are not counted as requests"


async def test_whoever_comes_and_goes_costs_one_rendering_a_second(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of requests must not take the loop from the sinks."""
    asked = 0
    status = served.watchdog.status

    def count() -> Status:
        nonlocal asked
        asked += 1
        return status()

    monkeypatch.setattr(served.watchdog, "status", count)
    monkeypatch.setattr(live, "UPDATE_SECONDS", 60.0)
    for _ in range(20):
        reader, writer = await served.follow()
        await reader.readuntil(b"\n\n")
        writer.close()
        await writer.wait_closed()
    assert 1 == asked
    for _ in range(20):
        assert b"200 OK" in await served.get("/")
    assert asked < 20


async def test_a_bug_in_the_page_closes_it_and_says_so_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It must not look as if all were well; everything else goes on."""

    def fail() -> Status:
        raise ZeroDivisionError

    monkeypatch.setattr(live, "UPDATE_SECONDS", 0.05)
    reader, _ = await served.follow()
    await reader.readuntil(b"\n\n")
    monkeypatch.setattr(served.watchdog, "status", fail)
    async with asyncio.timeout(5):
        await _end(reader)
        for _ in range(3):
            assert b"" == await served.get("/")
    assert b"200 OK" in await served.get("/healthz")
    [record] = [record for record in caplog.records if "admin endpoints" in record.getMessage()]
    assert "ZeroDivisionError" in record.getMessage()


async def test_a_standby_has_a_light_of_its_own(served: Served) -> None:
    """It is well and it does not replicate; once something is wrong, both lights say so."""
    watchdog = served.watchdog
    for standby, wrong, ready, standby_ok in (
        ("", [], b"200", b"200"),
        ("held by process 7", [], b"503", b"200"),
        ("held by process 7", ["the slot stands still"], b"503", b"503"),
        ("", ["the slot stands still"], b"503", b"503"),
    ):
        watchdog.standby, watchdog.wrong = standby, list(wrong)
        assert (await served.get("/readyz")).startswith(b"HTTP/1.1 " + ready)
        assert (await served.get("/standbyz")).startswith(b"HTTP/1.1 " + standby_ok)
        assert standby.encode() in await served.get("/readyz")


async def test_what_servers_say_is_escaped(served: Served) -> None:
    """An operator asks with curl, on a terminal."""
    served.watchdog.wrong = ["FATAL\x1b[2J\n\x9b0m\u202egnp"]
    for path in ("/readyz", "/standbyz", "/status"):
        _, _, body = (await served.get(path)).decode().partition("\r\n\r\n")
        assert body.replace("\n", "").isprintable()
    assert 2 == len((await served.get("/readyz")).partition(b"\r\n\r\n")[2].split(b"\n"))


async def test_whoever_says_nothing_is_closed_and_holds_up_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Many silent connections: a request is answered at once, and each of them ends."""
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.5)
    silent = [await served.connect() for _ in range(3 * CONNECTIONS)]
    async with asyncio.timeout(2):
        assert b"200 OK" in await served.get("/healthz")
    async with asyncio.timeout(5):
        await asyncio.gather(*(_end(reader) for reader, _ in silent))
    _close(silent)
    assert 1 == len(caplog.records), "one line a minute"


async def _end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def _close(connections: Sequence[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    for _, writer in connections:
        writer.close()


async def test_a_head_that_trickles_has_a_time_limit(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no request."""
    monkeypatch.setattr(http, "REQUEST_SECONDS", 0.3)
    reader, writer = await served.connect()

    async def trickle() -> None:
        while True:
            writer.write(b"G")
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle())
    async with asyncio.timeout(5):
        assert b"" == await _end(reader)
    trickling.cancel()
    writer.close()


async def test_a_head_has_a_bound_in_bytes(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """It is not read to its end, and said once."""
    for _ in range(3):
        assert b"" == await served.send(b"GET / HTTP/1.1\r\nX: " + b"x" * 50 * HEAD_BYTES)
    [record] = caplog.records
    assert "head was longer" in record.getMessage()


async def test_no_descriptors_left_is_a_line_a_minute(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Without a traceback; what is not about accepting is told as asyncio does."""
    loop = asyncio.get_running_loop()
    for _ in range(100):
        context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
        loop.call_exception_handler(context)
    [record] = caplog.records
    assert (logging.WARNING, None) == (record.levelno, record.exc_info)
    loop.call_exception_handler({"message": "something else"})
    assert "something else" in caplog.text
    assert served.port


@pytest.mark.parametrize(
    ("listen", "warns"),
    [
        ("", False),
        ("127.0.0.1:8080", False),
        ("[::1]:8080", False),
        ("localhost:8080", False),
        ("0.0.0.0:8080", True),
        ("[::]:8080", True),
        ("10.1.2.3:8080", True),
        ("replicator.internal:8080", True),
    ],
)
def test_an_address_that_others_reach_is_named(listen: str, warns: bool) -> None:
    """There is no password."""
    assert warns == (listen != "" and listen in exposed(listen))
