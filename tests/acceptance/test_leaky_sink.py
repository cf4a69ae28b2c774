"""A sink of another package that fails with a secret in its words, wherever the replicator may call it."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.support.environment import SECRET
from tests.support.plugin import install
from tests.support.program import Program, assert_clean

LEAKY = f"""
import os
from replicator.contracts.sink import HasCounter
from replicator_lines import LinesSink

def reach(place):
    if os.environ.get("LEAKS_AT") == place:
        raise RuntimeError("http://me:{SECRET}@h/" + place)

class LeakySink(LinesSink, HasCounter):
    def counter(self):
        return self
    async def counts(self, keys):
        reach("counter")
        path = self.settings.lines_path
        return [len(path.read_text().splitlines()) if path.exists() else 0 for key in keys]
    async def unseen(self, ids):
        reach("counter")
        return []
    async def create(self):
        reach("create")
        return []
    async def check(self):
        reach("check")
        return []
    async def open(self, *given):
        reach("open")
    async def write(self, new):
        reach("write")
        return await super().write(new)
    async def close(self):
        reach("close")
"""


@pytest.fixture
def leaky(quick: Program, source: psycopg.Connection, tmp_path: Path) -> Program:
    """A program with this sink, and an event in the table."""
    install(tmp_path, entry_points={"lines": "leaky:LeakySink"})
    (tmp_path / "leaky.py").write_text(LEAKY, encoding="utf-8")
    quick.environment |= {
        "PYTHONPATH": str(tmp_path),
        "REPLICATOR_SINKS": "lines",
        "REPLICATOR_LINES_PATH": str(tmp_path / "events.jsonl"),
    }
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 999, 'play')")
    return quick


COMMANDS = {
    "init": ["init"],
    "check": ["check"],
    "backfill": ["backfill", "--last", "1h", "--sinks", "lines"],
    "reconcile": ["reconcile", "--last", "1h", "--sinks", "lines"],
    "replay": ["dead-letters", "replay"],
    "status": ["status"],
}
CLOSED = "sink lines could not be closed (RuntimeError)"


def test_one_that_can_not_be_closed_changes_no_result(leaky: Program) -> None:
    """A line says so; what a command has done, and its exit code, are as they are."""
    leaky.environment["LEAKS_AT"] = "close"
    codes = {name: leaky.run(*command).code for name, command in COMMANDS.items()}
    assert {name: 3 if name == "status" else 0 for name in COMMANDS} == codes
    assert len(COMMANDS) == leaky.log.count(CLOSED)
    leaky.start()
    leaky.wait_until_caught_up()
    assert 0 == leaky.stop()
    assert CLOSED in leaky.said
    assert_clean(leaky.log)
