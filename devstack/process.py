"""One server program as a child process: start it and wait until it answers, stop, kill, pause; its log in a file.

What each server needs (its command, and how to tell that it answers) is in `postgres`, `redis`, `clickhouse`, `api`
and `replicator`; `watchdog` ends what is left when this process dies before it could.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from devstack.watchdog import Watchdog, send, tree

START_TIMEOUT_SECONDS = 60.0  # a cold disk and a busy machine; a server that failed is noticed at once
STOP_TIMEOUT_SECONDS = 10.0  # PostgreSQL waits for its replication clients; then it is killed
POLL_SECONDS = 0.01  # between two looks at a server that is starting
LOG_LINES_SHOWN = 20
PORTS = range(10_000, 32_000)  # below the kernel's ephemeral range, see free_port
PORT_TRIES = 100
ROOT = Path(__file__).parents[1]  # where `python` finds our modules
PYTHONPATH = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


class DevStackError(Exception):
    """A server of the stack can't be had; the message says which, why, and what to do."""


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on, and that no outgoing connection is given by chance.

    A restarted server must find its port free again, and a client that dials a dead server must not reach itself,
    which happens when the port lies in the ephemeral range.
    """
    for port in random.sample(PORTS, PORT_TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DevStackError(f"no free port found between {PORTS.start} and {PORTS.stop}")


def find_program(name: str, package: str) -> str:
    """Path of a program, or an error that names the Debian package it is in."""
    path = shutil.which(name)
    if path is None:
        raise DevStackError(f"{name} is missing: apt-get install {package}")
    return path


def python(module: str) -> list[str]:
    """Command that runs one of our own modules."""
    return [sys.executable, "-P", "-m", module]


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
    """Return as soon as `condition` holds; raise DevStackError after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DevStackError(f"waited {timeout_seconds:g} s in vain for {what}")
        time.sleep(POLL_SECONDS)


class Service(ABC):
    """A server of the stack. Port and folder stay the same from `start` to `start`."""

    name: ClassVar[str]
    sink: ClassVar[str | None] = None
    """What REPLICATOR_SINKS calls it."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    crash_signal: ClassVar[signal.Signals] = signal.SIGKILL

    def __init__(self, folder: Path, watchdog: Watchdog) -> None:
        self.folder = folder / self.name
        self.folder.mkdir()
        self.port = free_port()
        self.log = self.folder / "log"
        self.user: str | None = None
        """The account it runs as; None: ours."""
        self._watchdog = watchdog
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """Program and arguments; called at every start."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it is ready for its users; called again until it is."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """The replicator's settings that lead here."""

    def variables(self) -> dict[str, str]:
        """The environment of its process."""
        return dict(os.environ)

    def ask_to_stop(self) -> None:
        """Begin an orderly stop."""
        send(self.stop_signal, [self.pid])

    @property
    def pid(self) -> int:
        """Process id; raises DevStackError when it isn't running."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether its process exists; it may be paused."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and return when it answers; on failure the error carries the end of its log."""
        process = self._spawn(self.command())
        try:
            wait_until(lambda: self._is_ready(process), f"{self.name} to answer")
        except DevStackError as exc:
            self.kill()
            raise DevStackError(f"{exc}\n{self.log_end()}") from None
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop it in order; kill it if that takes too long. Nothing happens when it isn't running."""
        if self._process is None:
            return
        self.resume()
        self.ask_to_stop()
        self._reap()

    def kill(self) -> None:
        """End it at once, as a crash would. Nothing happens when it isn't running."""
        if self._process is None:
            return
        send(self.crash_signal, [self.pid])
        self.resume()
        self._reap()

    def pause(self) -> None:
        """Freeze it with all its processes: connections stay open, nothing is answered."""
        send(signal.SIGSTOP, tree(self.pid))

    def resume(self) -> None:
        """Let it go on."""
        send(signal.SIGCONT, tree(self.pid))

    def restart(self) -> None:
        """Stop in order, then start."""
        self.stop()
        self.start()

    def log_end(self) -> str:
        """The last lines it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"--- end of the log of {self.name} ---", *lines[-LOG_LINES_SHOWN:]])

    def run(self, command: list[str]) -> None:
        """Run a program to its end as the service's user, output to the log; raise DevStackError when it fails."""
        status = self._spawn(command).wait()
        self._forget()
        if status:
            raise DevStackError(f"{Path(command[0]).name} ended with status {status}\n{self.log_end()}")

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        if self._process is not None:
            raise DevStackError(f"{self.name} runs already")
        # A session of its own: Ctrl-C reaches only the program that owns the stack, which then stops it in order.
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.variables() | {"PYTHONPATH": os.pathsep.join([str(ROOT), *PYTHONPATH]), "TZ": "UTC"},
                start_new_session=True,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
            )
        self._process = process
        self._watchdog.watch(process.pid, self.crash_signal)
        return process

    def _is_ready(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            raise DevStackError(f"{self.name} ended with status {process.returncode}")
        return self.answers()

    def _reap(self) -> None:
        process = self._running()
        everyone = tree(process.pid)
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            send(signal.SIGKILL, everyone)
            process.wait()
        self._forget()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise DevStackError(f"{self.name} isn't running")
        return self._process

    def _forget(self) -> None:
        self._watchdog.forget(self.pid)
        self._process = None
