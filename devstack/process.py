"""One server as a child process: start it and wait until it answers; stop, kill or pause it. Its log goes to a file.

`postgres`, `redis`, `clickhouse`, `api` and `replicator` define the command of each server, and how to see that it
answers. `watchdog` ends the servers if this process dies first.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from devstack.watchdog import Watchdog, send, tree

START_TIMEOUT_SECONDS = 120.0  # for Spark and a cold disk on a busy machine; a server that fails is noticed at once
STOP_TIMEOUT_SECONDS = 10.0  # PostgreSQL waits for its replication clients; killed after that
POLL_SECONDS = 0.01  # between two checks of what is waited for, at first
POLL_MAX_SECONDS = 0.1  # later: checks cost the processor what the servers and the program need
LOG_LINES_SHOWN = 20
PORTS = range(10_000, 32_000)  # below the kernel's ephemeral range, see free_port
PORTS_A_PROCESS = 250  # servers and programs of a process at one time: some 20
ROOT = Path(__file__).parents[1]  # where `python` finds our modules
PYTHONPATH = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


class DevStackError(Exception):
    """A server of the stack can't be used. The message says which, why, and what to do."""


@functools.cache
def _ports() -> Iterator[int]:
    """The ports of this process, in turn and without end. No other process that calls this has them.

    A port that is only looked up is anybody's until its server listens: two test runs side by side would now and then
    be given the same one. So every process claims a stretch of ports, by its first one, until it ends.
    """
    for first in random.sample(PORTS[::PORTS_A_PROCESS], len(PORTS[::PORTS_A_PROCESS])):
        with socket.socket() as claim, contextlib.suppress(OSError):
            claim.bind(("127.0.0.1", first))
            claim.detach()  # open until this process ends
            return itertools.cycle(range(first + 1, first + PORTS_A_PROCESS))
    raise DevStackError(f"all ports between {PORTS.start} and {PORTS.stop} are claimed by other processes")


def free_port() -> int:
    """A free port on 127.0.0.1 outside the ephemeral range, which no other process is given while this one lives.

    In that range an outgoing connection could take the port while its server is down, and a client of that server
    could connect to itself.
    """
    for port in itertools.islice(_ports(), PORTS_A_PROCESS):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DevStackError(f"the {PORTS_A_PROCESS} ports of this process are in use")


def find_program(name: str, package: str) -> str:
    """Path of a program. Raises an error that names its Debian package if it is missing."""
    path = shutil.which(name)
    if path is None:
        raise DevStackError(f"{name} is missing: apt-get install {package}")
    return path


def python(module: str) -> list[str]:
    """Command that runs one of our modules."""
    return [sys.executable, "-P", "-m", module]


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
    """Return as soon as `condition` holds; raise DevStackError after `timeout_seconds`."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > timeout_seconds:
            raise DevStackError(f"waited {timeout_seconds:g} s for {what}")
        time.sleep(min(max(POLL_SECONDS, waited / 10), POLL_MAX_SECONDS))


class Service(ABC):
    """A server of the stack. It keeps its port and its folder over restarts."""

    name: ClassVar[str]
    sink: ClassVar[str | None] = None
    """Its name in REPLICATOR_SINKS."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    crash_signal: ClassVar[signal.Signals] = signal.SIGKILL

    def __init__(self, folder: Path, watchdog: Watchdog) -> None:
        self.folder = folder / self.name
        self.folder.mkdir()
        self.port = free_port()
        self.log = self.folder / "log"
        self.user: str | None = None
        """The account it runs as; None: the current one."""
        self._watchdog = watchdog
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """Program and arguments. Called at every start."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it is ready for clients. Called until it is."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """The replicator's settings for this server."""

    def variables(self) -> dict[str, str]:
        """The environment of its process."""
        return dict(os.environ)

    def ask_to_stop(self) -> None:
        """Begin a graceful stop."""
        send(self.stop_signal, [self.pid])

    @property
    def pid(self) -> int:
        """Process id. Raises DevStackError if it isn't running."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether its process exists, paused or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and return when it answers. On failure the error ends with the last lines of its log."""
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
        """Stop it gracefully; kill it if that takes too long. Does nothing if it isn't running."""
        if self._process is None:
            return
        self.resume()
        self.ask_to_stop()
        self._reap()

    def kill(self) -> None:
        """End it at once, as a crash would. Does nothing if it isn't running."""
        if self._process is None:
            return
        send(self.crash_signal, [self.pid])
        self.resume()
        self._reap()

    def pause(self) -> None:
        """Freeze all its processes: connections stay open, nothing is answered."""
        send(signal.SIGSTOP, tree(self.pid))

    def resume(self) -> None:
        """Continue after `pause`."""
        send(signal.SIGCONT, tree(self.pid))

    def restart(self) -> None:
        """Stop gracefully, then start."""
        self.stop()
        self.start()

    def log_end(self) -> str:
        """The last lines it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"--- end of the log of {self.name} ---", *lines[-LOG_LINES_SHOWN:]])

    def run(self, command: list[str]) -> None:
        """Run a program as the service's user, with its output in the log. Raises DevStackError if it fails."""
        status = self._spawn(command).wait()
        self._forget()
        if status:
            raise DevStackError(f"{Path(command[0]).name} ended with status {status}\n{self.log_end()}")

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        if self._process is not None:
            raise DevStackError(f"{self.name} runs already")
        # Its own session: Ctrl-C reaches only the program that owns the stack, which then stops this gracefully.
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
