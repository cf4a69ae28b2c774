"""The real program as a child process: `python -m replicator` with nothing but environment variables.

`destinations.py` reads what it has written; `conftest.py` gives every test one of each.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import psycopg

from devstack.process import wait_until
from tests.support.environment import SECRET
from tests.support.launcher import PYTHON, Launcher, Process
from tests.support.metrics import value

ROOT = Path(__file__).parents[2]
COMMAND_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 40.0  # more than REPLICATOR_DRAIN_TIMEOUT_SECONDS
CAUGHT_UP_TIMEOUT_SECONDS = 120.0
ADMIN_TIMEOUT_SECONDS = 5.0

ALTERED: tuple[str, ...] = ()
"""Arguments for `failpoints.py` in this session; pytest's `--breach` sets them."""

LAUNCHER: Launcher | None = None
"""What starts the programs of this session, if it can; `conftest.py` sets it."""

_READER = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
_CONFIRMED = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"


class Result(NamedTuple):
    """The result of a command."""

    code: int
    stdout: str
    stderr: str


def assert_clean(text: str) -> None:
    """The text has neither a traceback nor a secret."""
    assert "Traceback" not in text
    assert SECRET not in text


def succeed(result: Result) -> str:
    """The output of a command that must succeed."""
    assert_clean(result.stdout + result.stderr)
    assert 0 == result.code, result.stderr
    return result.stdout


class Program:
    """One replicator: its settings, its process while it runs, its log.

    `dsn` is a superuser's, to look at the slot; the program does not get it.
    """

    def __init__(self, environment: Mapping[str, str], dsn: str, log: Path) -> None:
        self.environment = dict(environment)
        """REPLICATOR_* only. A test may change them before it starts the program."""
        self.slot = self.environment["REPLICATOR_SLOT"]
        self.altered: tuple[str, ...] = ALTERED
        """Arguments for `tests/prove/failpoints.py`; without any the program is unaltered."""
        self.root = ROOT
        """The checkout that it runs in."""
        self.printed: Path | None = None
        """Where `spawn` leads its standard output; None: into the log."""
        self._dsn = dsn
        self._log = log
        self._process: Process | None = None
        self._said_before = 0

    def run(self, *arguments: str, **variables: str) -> Result:
        """Run one command. `variables` are settings for it: `slot="x"` is REPLICATOR_SLOT=x."""
        return self._run(self._command(arguments), variables)

    def _run(self, command: list[str], variables: Mapping[str, str]) -> Result:
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = self._start(command, variables, stdout, stderr)
            try:
                code = process.wait(COMMAND_TIMEOUT_SECONDS)
            except BaseException:
                process.kill()
                process.wait()
                raise
            said = []
            for file in (stdout, stderr):
                file.seek(0)
                said.append(file.read().decode())
        self._note(f"$ {shlex.join(command[3:])} → {code}\n{said[0]}{said[1]}")
        return Result(code, *said)

    def _start(self, command: list[str], variables: Mapping[str, str], stdout: IO[bytes], stderr: IO[bytes]) -> Process:
        environment = self._environment(variables)
        if LAUNCHER is not None and LAUNCHER.can_start(command, self.root, environment):
            return LAUNCHER.start(command, environment, stdout, stderr)
        return subprocess.Popen(
            command, cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )

    def follow(self, command: str, **variables: str) -> Result:
        """Run a command from a message: `python …`."""
        python, *arguments = shlex.split(command, comments=True)
        assert "python" == python
        return self._run([*PYTHON, *arguments], variables)

    def move_to(self, dsn: str) -> None:
        """From now on look for the slot there. Does not change where the program reads."""
        self._dsn = dsn

    def spawn(self, *arguments: str, **variables: str) -> Process:
        """Start it and return at once."""
        assert not self.running, "it runs already"
        self._said_before = len(self.log)
        with self._log.open("ab") as log, (self.printed or self._log).open("ab") as output:
            self._process = self._start(self._command(arguments), variables, output, log)
        return self._process

    def start(self, *arguments: str, **variables: str) -> None:
        """Start it and return when it reads the stream."""
        process = self.spawn(*arguments, **variables)

        def reads() -> bool:
            assert process.poll() is None, f"it ended with {process.returncode}:\n{self.log}"
            return f"reading slot {self.slot} from" in self.said

        wait_until(reads, "the replicator to read its slot")

    def wait_for_log(self, text: str) -> None:
        """Return when this is in its log."""

        def said() -> bool:
            assert text in self.log or self.running, f"it ended with {self.process.returncode}:\n{self.log}"
            return text in self.log

        wait_until(said, f"the replicator to say {text!r}")

    @property
    def running(self) -> bool:
        """Whether its process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def process(self) -> Process:
        """The process started last."""
        assert self._process is not None, "it was never started"
        return self._process

    def wait_until_caught_up(self, timeout_seconds: float = CAUGHT_UP_TIMEOUT_SECONDS) -> None:
        """Return when it has confirmed everything that is committed now; every sink then has it."""
        with psycopg.connect(self._dsn, autocommit=True) as looking:
            # Commits are flushed. Later WAL, of other databases, does not matter.
            [lsn] = looking.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone() or ("0/0",)
            wait_until(lambda: self._confirmed(looking, lsn), f"the slot to pass {lsn}", timeout_seconds)

    def _confirmed(self, looking: psycopg.Connection, lsn: str) -> bool:
        assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
        row = looking.execute(_CONFIRMED, [lsn, self.slot]).fetchone()
        assert row is not None, f"there is no slot {self.slot}"
        return bool(row[0])

    def stop(self) -> int:
        """Send SIGTERM. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_SECONDS)

    @property
    def ended_in_order(self) -> bool:
        """Whether SIGTERM ended it with 0, or before it began: the kernel does, or the imports' own handler."""
        code = self.process.returncode
        return code == 0 or (not self.said and code in {-signal.SIGTERM, 128 + signal.SIGTERM})

    def admin(self, path: str) -> str:
        """The answer of an admin endpoint (`/readyz`, `/status`, `/metrics`), whatever its status code."""
        url = f"http://{self.environment['REPLICATOR_ADMIN_LISTEN']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=ADMIN_TIMEOUT_SECONDS) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as exc:
            return str(exc.read().decode())

    def status(self) -> dict[str, Any]:
        """What `/status` says."""
        return dict(msgspec.json.decode(self.admin("/status")))

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of a metric with these labels, and perhaps more; None if there is none."""
        return value(self.admin("/metrics"), name, **labels)

    def kill(self) -> None:
        """Send SIGKILL. On return PostgreSQL has noticed, and the slot is free."""
        self.process.kill()
        self.process.wait()
        with psycopg.connect(self._dsn, autocommit=True) as looking:
            free = (None, (None,))
            wait_until(lambda: looking.execute(_READER, [self.slot]).fetchone() in free, "the slot to be free")

    def pause(self) -> None:
        """Send SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill it, whatever state it is in."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        """Everything it printed on both streams since the first start."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    @property
    def said(self) -> str:
        """The log since the last start."""
        return self.log[self._said_before :]

    def _note(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(text)

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        program = ("tests.prove.failpoints", *self.altered, "--") if self.altered else ("replicator",)
        return [*PYTHON, "-m", *program, *arguments]

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("REPLICATOR_")}
        ours = {f"REPLICATOR_{name.upper()}": value for name, value in variables.items()}
        return {**outside, **self.environment, **ours}
