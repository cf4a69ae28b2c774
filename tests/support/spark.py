"""`python -m replicator_spark` as a child process, in the environment that `make spark-setup` makes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from devstack.control import fetch
from devstack.watchdog import send, tree
from tests.support.program import ROOT, Program, Result

PYTHON = ROOT / ".venv-spark/bin/python"
SUBMIT = ROOT / ".venv-spark/bin/spark-submit"
OF_SPARK = {"PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": str(PYTHON)}
"""Nodes of this machine inherit the first; spark-submit starts the second."""
TIMEOUT_SECONDS = 180.0


class SparkBackfill:
    """One run of `backfill` on local cores or on a small cluster of processes."""

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        *arguments: str,
        submit: Sequence[str] | None = None,
        altered: Sequence[str] = (),
    ) -> None:
        """With options for `submit`, spark-submit starts it; `altered` are arguments for `spark_altered.py`."""
        module = ("tests.support.spark_altered", *altered, "--") if altered else ("replicator_spark",)
        program = [str(PYTHON), "-W", "error", "-m", *module]
        if submit is not None:
            program = [str(SUBMIT), *submit, "replicator_spark/__main__.py"]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("REPLICATOR_")}
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*program, "backfill", *arguments],
                cwd=ROOT,
                env={**outside, **environment, **OF_SPARK},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def result(self) -> Result:
        """How it ended."""
        out, _ = self.process.communicate(timeout=TIMEOUT_SECONDS)
        return Result(self.process.returncode, out, self.said)

    @property
    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def children(self, word: str) -> list[int]:
        """Processes under it whose command line has this word."""
        return [pid for pid in tree(self.process.pid) if word in command_line(pid)]

    def end(self) -> None:
        """Leave nothing running."""
        send(signal.SIGKILL, tree(self.process.pid))
        with self.process:
            self.process.kill()


def command_line(pid: int) -> str:
    """Of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def shown(port: int) -> str:
    """What Spark's UI and REST API, on this port, show of the one application there."""
    base = f"http://127.0.0.1:{port}"
    [application] = msgspec.json.decode(fetch(f"{base}/api/v1/applications"))
    of_it = f"{base}/api/v1/applications/{application['id']}"
    pages = [f"{of_it}/{page}" for page in ("environment", "jobs", "stages", "executors", "allexecutors")]
    pages += [f"{base}/{page}/" for page in ("jobs", "stages", "environment", "executors")]
    return "".join(fetch(page).decode() for page in pages)


class SparkProgram(Program):
    """The replicator, whose `run` is `python -m replicator_spark stream`; the other commands are the product's."""

    options: tuple[str, ...] = ("--master", "local[3]")
    """Of `stream`."""
    submitted = False
    """Whether spark-submit starts it."""
    product = False
    """Whether `run` is the product's own."""

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        if arguments or self.product:
            return super()._command(arguments)
        if self.submitted:
            return [str(SUBMIT), *self.options, "replicator_spark/__main__.py", "stream"]
        program = ("tests.support.spark_altered", *self.altered, "--") if self.altered else ("replicator_spark",)
        return [str(PYTHON), "-W", "error", "-m", *program, "stream", *self.options]

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        return {**super()._environment(variables), **OF_SPARK, "PYTHONPATH": str(self.root)}

    def workers(self, word: str = "pyspark.daemon") -> list[int]:
        """Processes under the driver whose command line has this word."""
        return [pid for pid in tree(self.process.pid) if word in command_line(pid)]

    def lose_power(self) -> None:
        """Kill it with its JVM and workers, which would otherwise ask a sink once more. On return the slot is free."""
        send(signal.SIGKILL, tree(self.process.pid))
        self.kill()

    def end(self) -> None:
        """Its JVM and what that has started, too."""
        below = tree(self.process.pid) if self.running else []
        super().end()
        send(signal.SIGKILL, below)
