"""`trace` on the real program: what became of one event, in every state that it can be in."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.load import insert_many
from tests.support.program import Program, assert_clean

AGAIN = "INSERT INTO engagement.events_enriched SELECT * {} FROM engagement.events_enriched WHERE event_id = {}"


class Traces:
    """What `trace` says."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def of(self, number: int) -> tuple[int, dict[str, Any]]:
        """Exit code and JSON form."""
        done = self._program.run("trace", str(number), "--json")
        assert_clean(done.stdout + done.stderr)
        return done.code, json.loads(done.stdout)

    def states(self, number: int) -> tuple[int, dict[str, str]]:
        """Exit code, and the state at each sink."""
        code, found = self.of(number)
        return code, {name: place["state"] for name, place in found["sinks"].items()}

    def notes(self, number: int, sink: str) -> str:
        """What it has to say of a sink."""
        return "\n".join(self.of(number)[1]["sinks"][sink]["notes"])

    def text(self, number: int) -> str:
        """For people."""
        return self._program.run("trace", str(number)).stdout


@pytest.fixture
def traces(quick: Program) -> Traces:
    """Of a replicator that runs."""
    quick.start()
    return Traces(quick)


EVERYWHERE = {"clickhouse": "written", "redis": "written", "http": "written"}


def test_what_is_well(traces: Traces, quick: Program, source: psycopg.Connection, destinations: Destinations) -> None:
    """Written everywhere; a newer event is its content's last; that expires; its content changes; it comes twice."""
    source.execute(
        "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms) VALUES (1, 7, 'p', 30000)"
    )
    insert_many(source, 30)
    quick.wait_until_caught_up()
    assert (0, EVERYWHERE) == traces.states(1)
    assert 0 == quick.run("backfill", "--last", "1h", "--sinks", "clickhouse").code
    assert (0, EVERYWHERE) == traces.states(1), "ClickHouse names the end of the WAL, where the API is, too"
    assert "content:last:1 is event" in traces.notes(1, "redis")
    assert "content:count:1 is" in traces.notes(1, "redis")
    destinations.redis.delete("content:last:1")
    assert "content:last:1 has expired" in traces.notes(1, "redis")
    source.execute("UPDATE content SET length_seconds = 600 WHERE content_id = 1")
    assert (0, EVERYWHERE) == traces.states(1)
    assert "length_seconds 300 there, 600 now" in traces.notes(1, "clickhouse")
    text = traces.text(1)
    assert text.startswith("PostgreSQL   it has the row\n  commit     0/")
    assert '"user_id":7' in text
    assert 2 == quick.run("trace", "one").code
    assert 0 == quick.stop()
    assert (0, EVERYWHERE) == traces.states(1), "without a replicator, too"


def test_what_differs(traces: Traces, quick: Program, source: psycopg.Connection, stack: DevStack) -> None:
    """Another value; copies of it; gone from ClickHouse; gone from PostgreSQL; never there."""
    insert_many(source, 3)
    quick.wait_until_caught_up()
    stack.clickhouse.query(AGAIN.format("", 1))
    assert "2 copies until the next merge" in traces.notes(1, "clickhouse")
    stack.clickhouse.query(AGAIN.format("REPLACE ('other' AS device, _lsn + 1 AS _lsn)", 1))
    code, found = traces.of(1)
    assert (3, "differs") == (code, found["sinks"]["clickhouse"]["state"])
    assert "other" == found["sinks"]["clickhouse"]["differences"]["device"][1]
    assert "  ! device: other there" in traces.text(1)
    stack.clickhouse.query("DELETE FROM engagement.events_enriched WHERE event_id = 2")
    wait_until(lambda: (3, EVERYWHERE | {"clickhouse": "not found"}) == traces.states(2), "the sinks to be past it", 20)
    source.execute("DELETE FROM engagement_events WHERE id = 3")
    code, found = traces.of(3)
    assert (3, False, None) == (code, found["in_postgresql"], found["event"])
    assert "it has no such row" in traces.text(3)
    nowhere = {"clickhouse": "not found", "redis": "not found", "http": "unknown"}
    assert (3, nowhere) == traces.states(99)
    assert "it can't be asked" == traces.notes(99, "http"), "no position tells of an event that nobody knows"
    assert "it can't be asked: this follows from its position" == traces.notes(1, "http")


def test_what_is_not_there_yet(  # noqa: PLR0917  fixtures
    traces: Traces, quick: Program, source: psycopg.Connection, api: Api, destinations: Destinations, stack: DevStack
) -> None:
    """It waits while a sink is down, or is paused; what a sink refused is a dead letter with its reason."""
    insert_many(source, 5)
    quick.wait_until_caught_up()
    api.behave(status=503)
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 7, 'p')")
    wait_until(lambda: 6 == len(destinations.clickhouse()), "ClickHouse to have it")
    assert (0, EVERYWHERE | {"http": "waiting"}) == traces.states(6)
    wait_until(lambda: "503" in traces.notes(6, "http"), "the trouble to be told")
    stack.clickhouse.kill()
    try:
        code, found = traces.states(6)
        assert (0, "unknown") == (code, found["http"]), "ClickHouse alone knows the commit"
        assert "could not be asked" in traces.notes(6, "clickhouse")
    finally:
        stack.clickhouse.start()
    api.behave(refuse_event_ids=[7])
    insert_many(source, 3)
    wait_until(lambda: quick.status()["dead_letters"]["sinks"] == {"http": 1}, "the dead letter")
    wait_until(lambda: (3, EVERYWHERE | {"http": "dead letter"}) == traces.states(7), "the sinks to have the event", 20)
    assert "http         dead letter 1 because " in traces.text(7)
