"""`docs/streams/tutorial.md` as a reader types it: every command, and what the page says that it shows."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from devstack.process import wait_until
from tests.support.program import ROOT

PAGE = ROOT / "docs/streams/tutorial.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HOME = re.compile(r"^(cd|\.) ~/.*\n", re.MULTILINE)
"""Lines that lead to the reader's own folders: the test's are elsewhere."""
READS = "SELECT active AND confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = 'orders_slot'"
BLOCK_SECONDS = 60.0


class Terminal:
    """One bash, which is given block after block."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._output = folder / "terminal.txt"
        with self._output.open("wb") as output:
            self._bash = subprocess.Popen(
                ["bash", "-e", "-u", "-o", "pipefail"],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._blocks = 0

    def type(self, block: str) -> str:
        """What it prints."""
        assert self._bash.stdin is not None
        begin = len(self.text)
        self._blocks += 1
        end = f"--- {self._blocks} ---\n"
        self._bash.stdin.write(f"{block}\necho '{end.strip()}'\n")
        self._bash.stdin.flush()
        wait_until(
            lambda: self.text.endswith(end) or self._bash.poll() is not None, f"the end of {block!r}", BLOCK_SECONDS
        )
        assert self.text.endswith(end), f"{block}\nended with {self._bash.returncode}:\n{self.text[begin:]}"
        return self.text[begin:].removesuffix(end)

    @property
    def text(self) -> str:
        """Everything so far."""
        return self._output.read_text(encoding="utf-8")

    def close(self) -> None:
        """End it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.communicate()


@pytest.fixture
def terminal(
    database: str, clickhouse_url: str, redis_url: str, environment: dict[str, str], tmp_path: Path
) -> Iterator[Terminal]:
    """The reader's second terminal: the servers are those of `environment`."""
    folder = tmp_path / "shop"
    folder.mkdir()
    program = tmp_path / "replicator"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -W error -m replicator "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    settings = {
        "REPLICATOR_POSTGRES_DSN": database,
        "REPLICATOR_CLICKHOUSE_URL": clickhouse_url,
        "REPLICATOR_REDIS_URL": redis_url,
        "REPLICATOR_CHECKPOINT_URL": environment["REPLICATOR_CHECKPOINT_URL"],
        "REPLICATOR_ADMIN_LISTEN": environment["REPLICATOR_ADMIN_LISTEN"],
        "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.2",
        "REPLICATOR_PROGRAM": "replicator",
    }
    lines = [f"export {name}='{value}'\n" for name, value in settings.items()]
    (folder / "servers.sh").write_text("".join(lines), encoding="utf-8")
    outside = {name: value for name, value in os.environ.items() if not name.startswith("REPLICATOR_")}
    terminal = Terminal(folder, {**outside, "PATH": f"{tmp_path}:{outside['PATH']}", "PYTHONPATH": str(ROOT)})
    yield terminal
    terminal.close()
    print(terminal.text)  # noqa: T201  pytest shows it when the test has failed
    for log in folder.glob("*.log"):
        print(log.read_text(encoding="utf-8"))  # noqa: T201


def _is_like(printed: str, shown: str) -> bool:
    """Whether it is what the page shows, where `…` stands for anything."""
    return re.fullmatch(re.escape(shown).replace("…", ".*"), printed, re.DOTALL) is not None


def _edited(text: str, diff: str) -> str:
    """With the lines of the page's diff."""
    before, after = (
        "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in signs) for signs in (" -", " +")
    )
    assert 1 == text.count(before), f"the page changes what is not there:\n{before}"
    return text.replace(before, after)


def _caught_up(source: psycopg.Connection) -> None:
    [(lsn,)] = source.execute("SELECT pg_current_wal_flush_lsn()::text").fetchall()
    wait_until(lambda: source.execute(READS, [lsn]).fetchone() == (True,), f"the slot to pass {lsn}")


def test_the_tutorial_of_streams(terminal: Terminal, source: psycopg.Connection, tmp_path: Path) -> None:
    """Line by line: from the tables to what `reconcile` repairs."""
    declaration = tmp_path / "shop" / "orders_stream.py"
    first, *blocks = BLOCK.findall(HOME.sub("", PAGE.read_text(encoding="utf-8")))
    assert "devstack | tee ~/shop/servers.sh" in first[1], "what the fixture stands for"
    printed, runs = "", False
    for kind, block in blocks:
        if kind == "python":
            declaration.write_text(block, encoding="utf-8")
        elif kind == "diff":
            declaration.write_text(_edited(declaration.read_text(encoding="utf-8"), block), encoding="utf-8")
        elif kind == "text":
            assert _is_like(printed, block), f"the page shows\n{block}\nand the terminal\n{printed}"
        else:
            if runs:
                _caught_up(source)
            printed = terminal.type(block)
            runs = ("replicator &>>" in block) or (runs and "kill" not in block)
    assert "dropped replication slot orders_slot" in printed
    assert [(0,)] == source.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'orders_slot'"
    ).fetchall()
    assert "Traceback" not in terminal.text + (tmp_path / "shop" / "replicator.log").read_text(encoding="utf-8")
