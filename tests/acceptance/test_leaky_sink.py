"""A sink of another package that fails with a secret in its words, wherever the replicator may call it."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.support.environment import SECRET
from tests.support.plugin import install
from tests.support.program import Program, assert_clean

LEAKY = f"""
from pathlib import Path
from replicator.contracts.sink import HasCounter
from replicator_lines import LinesSink

def reach(place):
    path = Path(__file__).with_name("place")
    if path.exists() and path.read_text() == place:
        raise type(place.title() + "Error", (RuntimeError,), {{}})("http://me:{SECRET}@h/" + place)

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
    def look(self):
        reach("look")
    def remember(self):
        reach("remember")
        return ""
    async def close(self):
        reach("close")
reach("import")
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


def leak_at(program: Program, place: str) -> None:
    """From now on; the sink's own `reach` knows."""
    Path(program.environment["PYTHONPATH"], "place").write_text(place, encoding="utf-8")


COMMANDS = {
    "init": ["init"],
    "check": ["check"],
    "backfill": ["backfill", "--last", "1h", "--sinks", "lines"],
    "reconcile": ["reconcile", "--last", "1h", "--sinks", "lines"],
    "replay": ["dead-letters", "replay"],
    "status": ["status"],
}
CLOSED = "sink lines could not be closed (CloseError)"


def test_one_that_can_not_be_closed_changes_no_result(leaky: Program) -> None:
    """A line says so; what a command has done, and its exit code, are as they are."""
    leak_at(leaky, "close")
    codes = {name: leaky.run(*command).code for name, command in COMMANDS.items()}
    assert {name: 3 if name == "status" else 0 for name in COMMANDS} == codes
    assert len(COMMANDS) == leaky.log.count(CLOSED)
    leaky.start()
    leaky.wait_until_caught_up()
    assert 0 == leaky.stop()
    assert CLOSED in leaky.said
    assert_clean(leaky.log)


NEEDING = {
    "import": ["status", "backfill"],
    "create": ["init"],
    "check": ["check"],
    "open": ["backfill"],
    "write": ["backfill"],
    "counter": ["reconcile"],
}
"""What fails where it fails."""


@pytest.mark.parametrize("place", NEEDING)
def test_no_command_quotes_it(leaky: Program, place: str) -> None:
    """Also with all that the log has; it names the sink, and the kind of the error."""
    leaky.environment["REPLICATOR_LOG_LEVEL"] = "debug"
    assert 0 == leaky.run("init").code
    leak_at(leaky, place)
    for name in NEEDING[place]:
        result = leaky.run(*COMMANDS[name])
        said = result.stdout + result.stderr
        assert (2 if place == "import" else 1) == result.code
        assert f"{place.title()}Error" in said
        assert "leaky.py" in said or "sink lines" in said.lower()
        assert SECRET not in said


def test_run_does_not_quote_it(leaky: Program, source: psycopg.Connection) -> None:
    """It goes on, says where the sink fails, and writes when that is over."""
    leaky.environment["REPLICATOR_LOG_LEVEL"] = "debug"
    leak_at(leaky, "create")
    leaky.spawn()
    leaky.wait_for_log("reading slot")
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 999, 'play')")
    for place in ("open", "write", "look", "remember", "close"):
        leaky.wait_for_log("Error")
        leak_at(leaky, place)
        leaky.wait_for_log("reading slot" if place == "close" else f"{place.title()}Error")
    leaky.wait_until_caught_up()
    assert 0 == leaky.stop()
    assert CLOSED in leaky.log
    assert SECRET not in leaky.log
