"""The quickest look at a slot: no destination but standard output."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import psycopg

from sinks.testing import decode
from tests.support.destinations import expected
from tests.support.program import ROOT, Program, succeed


def test_events_are_printed_and_nothing_else(
    program: Program, source: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    """The log is on the other stream. Started again, it prints what came meanwhile, and only that."""
    program.printed = tmp_path / "events.jsonl"
    program.environment |= {"REPLICATOR_SINKS": "stdout"}
    succeed(program.run("init"))
    assert "standard output is open" in succeed(program.run("check"))
    for _ in range(2):
        source.execute(
            "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'a'), (2, 2, 'b')"
        )
        program.start()
        program.wait_until_caught_up()
        assert 0 == program.stop()
    assert expected(database) == [decode(line) for line in program.printed.read_bytes().splitlines()]


def test_a_slot_is_tried_in_a_minute(program: Program, source: psycopg.Connection, tmp_path: Path) -> None:
    """As the page on sinks says, line by line; and once more, as it says below."""
    page = (ROOT / "docs/reference/sinks.md").read_text(encoding="utf-8").partition("## stdout")[2]
    settings, *lines = page.partition("```bash\n")[2].partition("```")[0].splitlines()
    commands = [shlex.split(line, comments=True)[3:] for line in lines]
    assert [["init"], [], ["drop-slot", "--yes"]] == commands
    values = dict(pair.split("=") for pair in settings.removeprefix("export ").split())
    values["REPLICATOR_SLOT"] = program.slot  # of this test
    assert "stdout" == values["REPLICATOR_SINKS"]
    program.environment |= values
    init, run, drop = commands
    for user, again in ((1, []), (2, ["--accept-gap"])):
        program.printed = tmp_path / f"{user}.jsonl"
        succeed(program.run(*init, *again))
        program.start(*run)
        source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, %s, 'a')", [user])
        program.wait_until_caught_up()
        program.process.send_signal(signal.SIGINT)
        program.process.wait(30)
        assert [user] == [decode(line)["user_id"] for line in program.printed.read_bytes().splitlines()]
        succeed(program.run(*drop))
