"""A sink of an installed package is a sink like any other."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg

from tests.support.destinations import Destinations
from tests.support.plugin import install
from tests.support.program import Program


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
