"""A sink of an installed package is a sink like any other."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg

from tests.support.destinations import Destinations
from tests.support.plugin import install
from tests.support.program import ROOT, Program, assert_clean, succeed

COUNTS = """
import json
from replicator.contracts.sink import HasCounter
from replicator_lines import LinesSink
class CountedSink(LinesSink, HasCounter):
    def counter(self):
        return self
    def lines(self):
        path = self.settings.lines_path
        return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []
    async def counts(self, keys):
        return [sum(event["content_id"] == key for event in self.lines()) for key in keys]
    async def unseen(self, ids):
        return sorted({*ids} - {event["event_id"] for event in self.lines()})
"""
OURS = "clickhouse, redis, http, stdout"


def test_a_replicator_writes_to_an_installed_sink(
    quick: Program, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """`REPLICATOR_SINKS=lines,redis`, and nothing else, beside its path: an event arrives in both."""
    install(tmp_path)
    lines = tmp_path / "events.jsonl"
    quick.environment |= {
        "PYTHONPATH": str(tmp_path),
        "REPLICATOR_SINKS": "lines,redis",
        "REPLICATOR_LINES_PATH": str(lines),
    }
    quick.start()
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 999, 'play')")
    quick.wait_until_caught_up()
    [event] = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
    assert (1, 999, "video") == (event["content_id"], event["user_id"], event["content_type"])
    assert {1: 1} == destinations.counts()


def test_init_says_how_an_installed_sink_gets_the_older_rows(
    program: Program, source: psycopg.Connection, tmp_path: Path
) -> None:
    """A backfill that does not name it leaves it out."""
    install(tmp_path)
    lines = tmp_path / "events.jsonl"
    program.environment |= {
        "PYTHONPATH": str(tmp_path),
        "REPLICATOR_SINKS": "lines,redis,http",
        "REPLICATOR_LINES_PATH": str(lines),
    }
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 999, 'play')")
    assert succeed(program.run("init")).endswith("Without --sinks lines,redis it leaves out lines.\n")
    succeed(program.run("backfill", "--last", "1h", "--sinks", "lines,redis"))
    [event] = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
    assert 999 == event["user_id"]


def test_reconcile_compares_an_installed_sink_that_can_be_asked(
    program: Program, source: psycopg.Connection, tmp_path: Path
) -> None:
    """`HasCounter` is all it needs: what is missing is found, and repaired."""
    install(tmp_path, entry_points={"lines": "counted:CountedSink", "gone": "gone:Sink"})
    (tmp_path / "counted.py").write_text(COUNTS, encoding="utf-8")
    program.environment |= {
        "PYTHONPATH": str(tmp_path),
        "REPLICATOR_SINKS": "lines",
        "REPLICATOR_LINES_PATH": str(tmp_path / "events.jsonl"),
    }
    succeed(program.run("init"))
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 999, 'play')")
    compare = "reconcile", "--last", "1h", "--sinks", "lines"
    first = program.run(*compare)
    assert (3, 1) == (first.code, first.stdout.count("lines       not counted 1"))
    assert "lines       not counted 1" in succeed(program.run(*compare, "--repair"))
    assert "lines       not counted 0" in succeed(program.run(*compare))


def test_an_installed_sink_that_is_broken_is_one_line(program: Program, tmp_path: Path) -> None:
    """Named, it ends every command. Otherwise it is a warning, and nobody else's matter."""
    install(tmp_path, entry_points={"lines": "replicator_lines:LinesSink", "gone": "gone:Sink"})
    program.environment |= {"PYTHONPATH": str(tmp_path), "REPLICATOR_SINKS": "lines,gone"}
    problem = "REPLICATOR_SINKS is unusable: sink 'gone' can't be loaded: ModuleNotFoundError: No module named 'gone'."
    for command in (["check"], ["run"], ["config", "check"]):
        done = program.run(*command)
        assert_clean(done.stdout + done.stderr)
        [line] = [line.removeprefix("replicator: ") for line in (done.stdout + done.stderr).splitlines()]
        assert line == f"{problem} It takes sinks that are installed completely; other sinks are {OURS}, lines."
        assert 2 == done.code
    done = program.run("config", "check", sinks="lines")
    assert (0, "all settings are usable\n") == (done.code, done.stdout)
    assert [problem] == [line.partition(" sinks: ")[2].partition(" It takes")[0] for line in done.stderr.splitlines()]


THINGS = """
from replicator import *
STREAM = Stream("things", "public.things", updates="upsert", deletes="delete", fields=(
    Field("code", TEXT, role=Role.IDENTITY), Field("owner", BIGINT, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME), Field("price", numeric(9, 2))))
"""


def test_the_sink_for_any_stream(program: Program, source: psycopg.Connection, tmp_path: Path) -> None:
    """As the page shows it: changes, deletes and other identities, and everything again after a kill."""
    page = (ROOT / "docs/how-to/sink.md").read_text(encoding="utf-8")
    [shown] = [
        text for text in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "RowsSink" in text
    ]
    (tmp_path / "replicator_rows.py").write_text(shown, encoding="utf-8")
    (tmp_path / "things.py").write_text(THINGS, encoding="utf-8")
    install(tmp_path, entry_points={"rows": "replicator_rows:RowsSink"})
    source.execute(
        "CREATE TABLE things (code text PRIMARY KEY, owner int NOT NULL, at timestamptz NOT NULL DEFAULT now(),"
        "price numeric(9, 2) NOT NULL); GRANT SELECT ON things TO replicator"
    )
    program.environment |= {
        "PYTHONPATH": str(tmp_path),
        "REPLICATOR_SINKS": "rows",
        "REPLICATOR_STREAM": "things:STREAM",
        "REPLICATOR_ROWS_PATH": str(tmp_path / "rows.db"),
        "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.2",
    }
    succeed(program.run("init"))
    assert "sink rows: " in succeed(program.run("check"))
    program.start()
    source.execute("INSERT INTO things SELECT 'thing ' || n, n % 3, now(), n / 4.0 FROM generate_series(1, 40) n")
    program.kill()
    source.execute(
        "UPDATE things SET price = price + 1 WHERE owner = 1; DELETE FROM things WHERE owner = 2;"
        "UPDATE things SET code = code || '!' WHERE code < 'thing 2'"
    )
    program.start()
    program.wait_until_caught_up()
    with closing(sqlite3.connect(tmp_path / "rows.db")) as database:
        found = [
            json.loads(text) for (text,) in database.execute("SELECT json FROM rows WHERE NOT deleted ORDER BY id")
        ]
    wanted = source.execute('SELECT code, price::float8 FROM things ORDER BY code COLLATE "C"').fetchall()
    assert len(wanted) > 20
    assert wanted == [(thing["code"], thing["price"]) for thing in found]
    assert 0 == program.stop()
