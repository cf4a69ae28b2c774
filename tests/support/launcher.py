"""Starts Python programs whose libraries are already loaded: seven eighths of what a start of ours costs.

A process that has imported what we depend on, and nothing of ours, forks for every program. What it forks goes on as
`python` would: its own settings, files and process id, ended by any signal. `program.py` uses it; what starts in
another folder or environment, and whatever `tests/prove` starts, is a new interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, Self

import msgspec

ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable, "-W", "error")
LIBRARIES = (
    "aiohttp.web",
    "clickhouse_connect",
    "dotenv",
    "httpx_aiohttp",
    "jinja2",
    "prometheus_client",
    "psycopg",
    "pydantic.dataclasses",
    "pydantic.json_schema",
    "redis.asyncio",
    "sqlalchemy.dialects.sqlite",
    "sqlite3",
    "standardwebhooks",
    "typer",
)
MESSAGE_BYTES = 128 * 1024  # the environment is the largest part of it
NUMBER_BYTES = 4  # of a process id, and of an exit code
DIFFERS = (
    "PYTEST_CURRENT_TEST",  # with every test, and Python does not ask for it
    "PYTHONPATH",  # with the stream or the sink of a test
)


class Process(Protocol):
    """What tests do with a program that they have started. `subprocess.Popen` is one."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """The exit code; negative: the signal that ended it; None: it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when it has ended. Raises `subprocess.TimeoutExpired`."""

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""

    def terminate(self) -> None:
        """Send SIGTERM."""

    def kill(self) -> None:
        """Send SIGKILL."""


class Request(msgspec.Struct):
    """A program that is to start."""

    command: list[str]
    environment: dict[str, str]


class Launched:
    """A program that the launcher has started. Its process id and exit code come through a pipe, from its parent."""

    def __init__(self, command: Sequence[str], numbers: int) -> None:
        self._command = command
        self._numbers = open(numbers, "rb", buffering=0)  # noqa: SIM115  closed when it has ended
        self.pid = self._number()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """As Popen's."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As Popen's."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._numbers, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self._command, timeout or 0)
            self.returncode = self._number()
            self._numbers.close()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """As Popen's."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        """As Popen's."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """As Popen's."""
        self.send_signal(signal.SIGKILL)

    def _number(self) -> int:
        data = self._numbers.read(NUMBER_BYTES)
        assert len(data) == NUMBER_BYTES, "the launcher has ended"
        return int.from_bytes(data, "little", signed=True)


class Launcher:
    """`with Launcher() as launcher:` has one, from the first program on. Programs that still run end with it."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel is not None and self._process is not None:
            self._channel.close()
            self._process.wait()

    def can_start(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> bool:
        """Whether nothing about Python itself differs: its options, its folder, its environment."""
        ours = tuple(command[: len(PYTHON)]) == PYTHON and folder == ROOT
        return ours and self._decisive(environment) == self._decisive(self._environment)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], stdout: IO[bytes], stderr: IO[bytes]
    ) -> Launched:
        """Start it, with nothing on its standard input."""
        channel = self._channel or self._open()
        ours, its = os.pipe()
        request = msgspec.msgpack.encode(Request(list(command), dict(environment)))
        socket.send_fds(channel, [request], [stdout.fileno(), stderr.fileno(), its])
        os.close(its)
        return Launched(command, ours)

    def _open(self) -> socket.socket:
        self._channel, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [*PYTHON, "-m", __name__, str(its.fileno())],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                start_new_session=True,  # Ctrl-C is for the tests, which end what they have started
            )
        return self._channel

    @staticmethod
    def _decisive(environment: Mapping[str, str]) -> dict[str, str]:
        return {
            name: value
            for name, value in environment.items()
            if not name.startswith("REPLICATOR_") and name not in DIFFERS
        }


def serve(channel: socket.socket) -> Request:
    """Fork for each request. Returns in the new process; ends with the tests, and their programs with it."""
    running: dict[int, tuple[int, int]] = {}
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not channel:
                selector.unregister(key.fd)
                os.close(key.fd)
                _report(*running.pop(key.fd))
                continue
            message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 3)
            if not message:
                for pid, numbers in running.values():
                    os.kill(pid, signal.SIGKILL)
                    _report(pid, numbers)
                sys.exit()
            if not (pid := os.fork()):
                return _become(message, descriptors)
            stdout, stderr, numbers = descriptors
            os.close(stdout)
            os.close(stderr)
            _write(numbers, pid)
            ended = os.pidfd_open(pid)
            running[ended] = (pid, numbers)
            selector.register(ended, selectors.EVENT_READ)


def _report(pid: int, numbers: int) -> None:
    _write(numbers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(numbers)


def _write(numbers: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(numbers, number.to_bytes(NUMBER_BYTES, "little", signed=True))


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]


def _become(message: bytes, descriptors: Sequence[int]) -> Request:
    request = msgspec.msgpack.decode(message, type=Request)
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[1], 2)
    former = _python_path(os.environ)
    sys.path[1 : 1 + len(former)] = _python_path(request.environment)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.orig_argv[:] = request.command
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")  # as Python does when it starts: a test may have one
    return request


def main() -> None:
    """Load the libraries and serve; in a new process, be its program."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        request = serve(channel)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    [program, *arguments] = request.command[len(PYTHON) :]
    if program == "-m":
        [module, *sys.argv[1:]] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif program == "-c":
        [source, *sys.argv[1:]] = arguments
        sys.path[0] = ""
        exec(source, {"__name__": "__main__"})  # noqa: S102  a test's own
    else:
        sys.argv[1:] = arguments
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
