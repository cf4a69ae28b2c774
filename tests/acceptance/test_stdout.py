"""The quickest look at a slot: no destination but standard output."""

from __future__ import annotations

from pathlib import Path

import psycopg

from sinks.testing import decode
from tests.support.destinations import expected
from tests.support.program import Program, succeed


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
