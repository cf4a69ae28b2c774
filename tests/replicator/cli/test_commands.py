"""The commands against servers that are away or turn us away: one clear line, the right exit code, no traceback.

What they do when all is well is the acceptance tests' to show.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from devstack import DevStack
from devstack.process import free_port, wait_until

ROOT = Path(__file__).parents[3]


class Environment(dict[str, str]):
    """The program's variables."""

    def run(self, *arguments: str) -> tuple[int, str]:
        """One command; its exit code and everything it said."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "replicator", *arguments],
            cwd=ROOT,
            env=self,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stdout
        return done.returncode, done.stdout

    @contextmanager
    def running(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """`run`, its log in a file; killed at the end if it still runs."""
        with log.open("wb") as file:
            command = [sys.executable, "-W", "error", "-m", "replicator"]
            process = subprocess.Popen(command, cwd=ROOT, env=self, stderr=file)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            print(log.read_text(encoding="utf-8"))  # noqa: T201  shown when the test fails


@pytest.fixture
def environment(database: str, redis_url: str, tmp_path: Path) -> Environment:
    """Settings of a replicator of this test's own, into Redis."""
    ours = {
        "REPLICATOR_POSTGRES_DSN": database,
        "REPLICATOR_SLOT": f"commands_{uuid.uuid4().hex[:12]}",
        "REPLICATOR_SINKS": "redis",
        "REPLICATOR_REDIS_URL": redis_url,
        "REPLICATOR_CHECKPOINT_URL": f"sqlite:///{tmp_path}/checkpoint.db",
        "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}",
    }
    return Environment(os.environ | ours)


def _ended(process: subprocess.Popen[bytes], log: Path) -> int:
    """Exit code after SIGTERM; nothing but clear lines in the log."""
    process.send_signal(signal.SIGTERM)
    code = process.wait(30)
    assert "Traceback" not in log.read_text(encoding="utf-8")
    return code


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"port": 1}, "not reachable"), ({"user": "nobody", "password": "hunter2"}, "nobody"), ({"dbname": "no"}, '"no"')],
)
def test_a_server_that_can_not_be_had(environment: Environment, wrong: dict[str, str | int], words: str) -> None:
    """Each command says which, and what to look at; the password is not repeated."""
    environment["REPLICATOR_POSTGRES_DSN"] = conninfo.make_conninfo(environment["REPLICATOR_POSTGRES_DSN"], **wrong)
    for command, expected in ((["init"], 1), (["drop-slot", "--yes"], 1), (["check"], 1), (["status"], 3)):
        code, said = environment.run(*command)
        assert expected == code, said
        assert words in said
        assert "REPLICATOR_POSTGRES_DSN" in said
        assert "hunter2" not in said


def test_a_sink_that_is_away(environment: Environment) -> None:
    """A command asks once: it does not say that it goes on trying."""
    environment |= {"REPLICATOR_SINKS": "clickhouse", "REPLICATOR_CLICKHOUSE_URL": "http://127.0.0.1:1/engagement"}
    code, said = environment.run("init")
    assert 1 == code
    assert "replicator: Sink clickhouse failed: no answer from http://127.0.0.1:1" in said
    assert "retried" not in said


def test_a_slot_that_is_read_is_not_dropped(environment: Environment, tmp_path: Path) -> None:
    """It says who reads it and what to do; afterwards it goes, and is then not there."""
    log = tmp_path / "log"
    with environment.running(log) as process:
        wait_until(lambda: "reading slot" in log.read_text(encoding="utf-8"), "the stream to run")
        code, said = environment.run("drop-slot", "--yes")
        assert (1, True) == (code, "stop that process first" in said)
        assert "standby" not in said
        assert 0 == _ended(process, log)
    assert environment.run("drop-slot", "--yes")[0] == 0
    assert "there is no replication slot" in environment.run("drop-slot", "--yes")[1]


def test_a_question_needs_a_terminal(environment: Environment) -> None:
    """Unusable arguments, not a guess."""
    assert environment.run("init")[0] == 0
    code, said = environment.run("drop-slot")
    assert (2, True) == (code, "--yes" in said)


def test_a_stop_at_the_first_line(environment: Environment, tmp_path: Path) -> None:
    """Most of the program is not even imported yet: it is a stop like any other."""
    log = tmp_path / "log"
    with environment.running(log) as process:
        while not log.stat().st_size:  # no pause: there is a tenth of a second to meet
            assert process.poll() is None
        assert 0 == _ended(process, log)


def test_a_stop_while_postgresql_is_away(environment: Environment, tmp_path: Path) -> None:
    """Nothing to save, nothing to confirm: done."""
    environment["REPLICATOR_POSTGRES_DSN"] = conninfo.make_conninfo(environment["REPLICATOR_POSTGRES_DSN"], port=1)
    log = tmp_path / "log"
    with environment.running(log) as process:
        wait_until(lambda: "not reachable" in log.read_text(encoding="utf-8"), "the first try to fail")
        assert 0 == _ended(process, log)


def test_a_stop_of_a_standby(environment: Environment, tmp_path: Path) -> None:
    """It waits for its turn, and lets go of it."""
    first, second = tmp_path / "first", tmp_path / "second"
    with environment.running(first) as active:
        wait_until(lambda: "reading slot" in first.read_text(encoding="utf-8"), "the stream to run")
        environment["REPLICATOR_ADMIN_LISTEN"] = ""
        with environment.running(second) as standby:
            wait_until(lambda: "waits as the standby" in second.read_text(encoding="utf-8"), "the standby to wait")
            assert 0 == _ended(standby, second)
        assert 0 == _ended(active, first)


def test_a_first_start_waits_for_its_sinks(stack: DevStack, environment: Environment, tmp_path: Path) -> None:
    """Redis comes up after us: no error for an operator, and a stop meanwhile is a stop."""
    log = tmp_path / "log"
    stack.redis.stop()
    try:
        with environment.running(log) as process:
            wait_until(lambda: "Sink redis" in log.read_text(encoding="utf-8"), "the first try to fail")
            assert process.poll() is None
            stack.redis.start()
            told = "takes events again", "reading slot"
            wait_until(lambda: all(words in log.read_text(encoding="utf-8") for words in told), "the lane to open")
            assert 0 == _ended(process, log)
    finally:
        if not stack.redis.running:
            stack.redis.start()


def test_a_stop_while_a_new_slot_waits(environment: Environment, tmp_path: Path) -> None:
    """A slot is made once the transactions that run have ended; a stop does not wait for that."""
    log = tmp_path / "log"
    with psycopg.connect(environment["REPLICATOR_POSTGRES_DSN"]) as running:
        running.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')")
        with environment.running(log) as process, psycopg.connect(environment["REPLICATOR_POSTGRES_DSN"]) as looker:
            query = "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s"
            slot = [environment["REPLICATOR_SLOT"]]
            wait_until(lambda: looker.execute(query, slot).fetchone() is not None, "the slot to be made")
            assert 0 == _ended(process, log)
