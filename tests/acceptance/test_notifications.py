"""People who do not look are told: the real program, and a real HTTP server that misbehaves first."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from devstack.api import Api
from devstack.process import wait_until
from tests.support.hook import Hook, hook
from tests.support.program import Program, succeed

INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"
SECRET = "planted/T000/B000"  # noqa: S105  part of every address here; must never be printed


@pytest.fixture
def hooked(quick: Program) -> Iterator[tuple[Program, Hook]]:
    """The program, and whom it tells; the addresses come from a file, as secrets do."""
    with hook() as server:
        file = Path(quick.environment["REPLICATOR_CHECKPOINT_URL"].removeprefix("sqlite:///")).with_name("hook")
        file.write_text(f"http://127.0.0.1:{server.port}/{SECRET}\n", encoding="utf-8")
        file.chmod(0o600)
        quick.environment["REPLICATOR_NOTIFY_URL_FILE"] = str(file)
        yield quick, server


def test_a_trouble_and_a_gap_are_told(hooked: tuple[Program, Hook], api: Api, source: psycopg.Connection) -> None:
    """Each once, however often the server fails to take it and the program is started again; the heart beats first."""
    program, server = hooked
    program.environment["REPLICATOR_HEARTBEAT_URL"] = f"http://127.0.0.1:{server.port}/beat"
    program.start()
    wait_until(lambda: "GET /beat" in server.asked, "the heartbeat")
    server.statuses = [500, 0, 302]
    api.behave(status=401)
    source.execute(INSERT)
    wait_until(lambda: bool(server.told), "the trouble to be told")
    [told] = server.told
    assert ("begins", "sink", "http") == (told["event"], told["kind"], told["subject"])
    assert "R502" == told["code"]
    assert "answered 401 Unauthorized" in told["problem"]
    assert "REPLICATOR_HTTP_BEARER_TOKEN" in told["cure"]
    assert 1 == program.status()["notifications"]["sent"]
    program.kill()
    source.execute("SELECT pg_drop_replication_slot(%s)", [program.slot])
    for _ in range(2):
        program.spawn()
        assert 1 == program.process.wait(20)
    _, gap = server.told
    assert f"replication slot {program.slot} does not exist" in gap["problem"]
    assert "init --accept-gap" in gap["text"]
    assert SECRET not in program.log
    assert "Traceback" not in program.log


def test_nobody_who_is_told_holds_up_the_stream(
    hooked: tuple[Program, Hook], api: Api, source: psycopg.Connection
) -> None:
    """A server that takes nothing and says nothing: events go through, and the end comes as soon as ever."""
    program, server = hooked
    server.silent_seconds = 3.0
    program.start()
    api.behave(status=401)
    source.execute(INSERT)
    wait_until(lambda: bool(server.asked), "the trouble to be told")
    api.behave()
    program.wait_until_caught_up(20)
    assert 0 == program.stop()


def test_the_page_says_that_nobody_is_told(hooked: tuple[Program, Hook], api: Api, source: psycopg.Connection) -> None:
    """In amber, with the cure and a notice, and in the metrics; `/readyz` stays 200: nothing is wrong with the data."""
    program, server = hooked
    server.statuses = [500] * 10_000
    program.start()
    api.behave(status=401)
    source.execute(INSERT)
    wait_until(lambda: bool(program.status()["notifications"]["trouble"]), "the message to be refused")
    api.behave()
    program.wait_until_caught_up(20)
    told = "Check the address in REPLICATOR_NOTIFY_URL."
    wait_until(lambda: 2 == program.admin("/").count(told), "the headline and a notice to say so")
    assert "Warning" in program.admin("/")
    assert "ready\n" == program.admin("/readyz")
    assert program.metric("notifications_waiting", slot=program.slot)


def test_a_message_can_be_tried(hooked: tuple[Program, Hook]) -> None:
    """`notify test`: what the server says decides the exit code."""
    program, server = hooked
    assert "answered 200 OK" in succeed(program.run("notify", "test"))
    assert "test" == server.told[0]["event"]
    server.statuses = [403]
    failed = program.run("notify", "test")
    assert 1 == failed.code
    assert "answered 403 Forbidden. Check the address in REPLICATOR_NOTIFY_URL." in failed.stderr
    assert SECRET not in failed.stderr
    unset = program.run("notify", "test", notify_url_file="")
    assert (2, True) == (unset.code, "REPLICATOR_NOTIFY_URL is unusable: it is not set." in unset.stderr)


def test_systemd_is_told(quick: Program, tmp_path: Path) -> None:
    """That it lives, when it is ready, what it does, and that it stops; a loop that hangs says nothing more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        quick.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        quick.spawn()
        told = [manager.recv(4096).decode()]
        assert told[0].startswith("WATCHDOG=1\nSTATUS=")
        while "READY=1" not in told[-1]:
            told.append(manager.recv(4096).decode())
        assert f"reading slot {quick.slot} from" in quick.said
        while "STATUS=reading" not in told[-1]:
            told.append(manager.recv(4096).decode())
        quick.pause()
        manager.settimeout(2.0)
        with pytest.raises(TimeoutError):  # what was sent before is read first
            [manager.recv(4096) for _ in range(10)]
        quick.resume()
        quick.process.send_signal(signal.SIGTERM)
        manager.settimeout(20)
        while told[-1] != "STOPPING=1":
            told.append(manager.recv(4096).decode())
        assert 0 == quick.process.wait(20)
    assert 1 == sum("READY=1" in lines for lines in told)
