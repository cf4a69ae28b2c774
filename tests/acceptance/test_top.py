"""`top` as people see it: on a terminal until Ctrl-C, and once where there is none."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg

from devstack.process import wait_until
from tests.support.program import ROOT, Program, assert_clean

INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"


class Terminal:
    """One of 80 columns with a command on it."""

    def __init__(self, *arguments: str, environment: dict[str, str]) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        os.set_blocking(self._ours, False)
        command = [sys.executable, "-W", "error", "-m", "replicator", *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Return when it is on the screen, now or before."""

        def read() -> bool:
            self._read()
            assert text in self.shown or self._process.poll() is None, self.shown
            return text in self.shown

        wait_until(read, f"the terminal to show {text!r}")

    def forget(self) -> None:
        """Wait for what is new from here on."""
        self._read()
        self.shown = ""

    def _read(self) -> None:
        with suppress(BlockingIOError, OSError):
            while part := os.read(self._ours, 65_536):
                self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part.decode(errors="replace"))

    def interrupt(self) -> int:
        """Ctrl-C. Returns the exit code."""
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(10)
        self._read()
        return code

    def end(self) -> None:
        """Whatever state it is in."""
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@contextmanager
def terminal(program: Program, *arguments: str, **more: str) -> Iterator[Terminal]:
    """With the program's settings."""
    environment = {**os.environ, "TERM": "xterm", **program.environment, **more}
    opened = Terminal(*arguments, environment=environment)
    try:
        yield opened
    finally:
        opened.end()


def test_top_follows_a_replicator_that_comes_and_goes(quick: Program, source: psycopg.Connection) -> None:
    """It waits for one, shows it, says that it is gone and goes on trying; Ctrl-C ends it with nothing to clean up."""
    with terminal(quick, "top") as shown:
        shown.wait_for("no answer at http://")
        quick.start()
        source.execute(INSERT)
        quick.wait_until_caught_up()
        shown.wait_for(f"{quick.slot}  ready")
        shown.wait_for("clickhouse")
        shown.forget()
        quick.kill()
        shown.wait_for("no answer at http://")
        shown.wait_for("trying")
        shown.forget()
        quick.start()
        shown.wait_for(f"{quick.slot}  ready")
        assert 0 == shown.interrupt()
        assert_clean(shown.shown)
        assert "stopped before" not in shown.shown


def test_without_a_terminal_top_looks_once(quick: Program, source: psycopg.Connection) -> None:
    """Plain text, also on a terminal that can't draw; its exit code is what it saw."""
    gone = quick.run("top")
    assert (3, "") == (gone.code, gone.stderr)
    assert "no answer at http://127.0.0.1" in gone.stdout
    assert "again" not in gone.stdout
    quick.start()
    source.execute(INSERT)
    quick.wait_until_caught_up()
    # Its newest look at the slot, once a second, may be from before there was one.
    wait_until(lambda: quick.admin("/readyz") == "ready\n", "it to be ready")
    for result in (
        quick.run("top"),
        quick.run("top", "--url", f"http://{quick.environment['REPLICATOR_ADMIN_LISTEN']}/"),
    ):
        assert 0 == result.code
        assert result.stdout.startswith(f"{quick.slot}  ready\n")
        assert "\x1b" not in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
    with terminal(quick, "top", TERM="dumb") as dumb:
        dumb.wait_for(f"{quick.slot}  ready")
    off = quick.run("top", admin_listen="")
    assert 2 == off.code
    assert "REPLICATOR_ADMIN_LISTEN is unusable: it is empty, so the replicator can't be asked" in off.stderr
    wrong = quick.run("top", "--url", "10.0.0.7:8080")
    assert 2 == wrong.code
    assert "--url is unusable: it is not an http:// or https:// address with a host" in wrong.stderr
