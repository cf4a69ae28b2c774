"""What an operator, and whoever else reaches the machine, does to the running program."""

from __future__ import annotations

import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from devstack.process import free_port, wait_until
from tests.support.destinations import Destinations
from tests.support.program import Program, succeed

INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"
MANY = 1_100
AHEAD = "import time\n\nnow = time.time\ntime.time = lambda: now() + 3600\n"
TOGETHER = 20
"""So many are opened at once: a queue that is full makes each of them wait for a second or more."""


@contextmanager
def silent_connections(address: str, count: int) -> Iterator[None]:
    """Connections that begin a request and never end it."""
    host, _, port = address.rpartition(":")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * count), hard))
    opened = []

    def open_one(_: int) -> None:
        opened.append(connection := socket.create_connection((host, int(port)), timeout=10))
        connection.sendall(b"GET /status HTTP/1.1\r\nX-Slow: ")

    try:
        with ThreadPoolExecutor(TOGETHER) as threads:
            list(threads.map(open_one, range(count)))
        yield
    finally:
        for connection in opened:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_slow_connections_neither_end_nor_stall_it(
    quick: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """1,100 of them with 1,024 descriptors: events go through, probes are answered, the log stays short."""
    quick.run("init")
    process = quick.spawn()
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    quick.wait_for_log("reading slot")
    with silent_connections(quick.environment["REPLICATOR_ADMIN_LISTEN"], MANY):
        assert "ok\n" == quick.admin("/healthz")
        source.execute(INSERT)
        quick.wait_until_caught_up(10)
        assert "ready\n" == quick.admin("/readyz")
        assert 1 == len(destinations.clickhouse())
    assert 0 == quick.stop()
    assert "Traceback" not in quick.log
    assert 1 == quick.log.count("admin endpoints:"), "a line a minute"


def test_clocks_that_differ(quick: Program, tmp_path: Path) -> None:
    """The window in Redis would have another 10 minutes: the program is not ready, and `check` fails."""
    succeed(quick.run("init"))
    (tmp_path / "sitecustomize.py").write_text(AHEAD, encoding="utf-8")
    quick.environment["PYTHONPATH"] = str(tmp_path)
    quick.start()
    told = "this machine's clock is 3600 s ahead of that of PostgreSQL"
    wait_until(lambda: told in quick.admin("/readyz"), "it to be told")
    checked = quick.run("check")
    assert 1 == checked.code
    assert f"FAIL  replication slot {quick.slot}: {told}" in checked.stdout
    assert 0 == quick.stop()


def test_a_standby_is_well(quick: Program, database: str, source: psycopg.Connection, tmp_path: Path) -> None:
    """It is not ready, its own light is green, its metrics call no one, `status` exits with 0."""
    quick.start()
    listen = {"REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}"}
    second = Program(quick.environment | listen, database, tmp_path / "second.log")
    try:
        second.spawn()
        second.wait_for_log("is held by process")
        wait_until(lambda: "standby\n" == second.admin("/standbyz"), "the standby to be well")
        assert "is held by process" in second.admin("/readyz")
        assert (1, 1) == (second.metric("standby"), second.metric("ready"))
        shown = second.run("status")
        assert 0 == shown.code, shown.stdout
        assert shown.stdout.startswith("replicator   standby: ")
        source.execute(INSERT)
        quick.wait_until_caught_up()
        assert 0 == quick.stop()
        wait_until(lambda: "ready\n" == second.admin("/readyz"), "the standby to take over")
        assert 0 == second.metric("standby")
    finally:
        second.end()


class Hanging:
    """A server that accepts, reads what it is sent, and never answers."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        connections = []
        with suppress(OSError):
            while True:
                connections.append(self._listening.accept()[0])
                self.asked.set()

    def close(self) -> None:
        """Listen no more."""
        self._listening.close()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    """It listens."""
    server = Hanging()
    yield server
    server.close()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(
    quick: Program, source: psycopg.Connection, hanging: Hanging, second: signal.Signals
) -> None:
    """The first one says which sink it waits for, and how long; neither prints a traceback."""
    quick.run("init")
    quick.start(http_url=f"http://{hanging.address}/events", http_timeout_seconds="60")
    source.execute(INSERT)
    assert hanging.asked.wait(10)
    time.sleep(0.5)  # until the request is in flight
    quick.process.send_signal(signal.SIGINT)
    quick.wait_for_log("http; a second signal ends it at once")
    assert "stopping: waiting up to 25 s for writes to " in quick.said
    time.sleep(0.3)
    quick.process.send_signal(second)
    assert 128 + second == quick.process.wait(2)
    assert "Traceback" not in quick.log
    assert "rror" not in quick.said


def test_a_terminal_that_goes_away_is_a_stop(quick: Program, source: psycopg.Connection) -> None:
    """SIGHUP drains as SIGTERM does."""
    quick.start()
    source.execute(INSERT)
    quick.process.send_signal(signal.SIGHUP)
    assert 0 == quick.process.wait(20)
    assert "is written and confirmed" in quick.said


@pytest.mark.parametrize("command", ["check", "init"])
def test_a_command_ends_while_a_sink_hangs(quick: Program, hanging: Hanging, command: str) -> None:
    """As process 1 of a container, too, which has no handler of the system's own."""
    process = quick.spawn(command, clickhouse_url=f"http://{hanging.address}/engagement")
    assert hanging.asked.wait(20)
    process.terminate()
    assert 1 == process.wait(3)
    assert quick.said.endswith("replicator: stopped before it was done\n")
    assert "Traceback" not in quick.log
