"""Against services of somebody else's: a plain role, tables made by hand, nothing but environment variables."""

from __future__ import annotations

import psycopg

from tests.acceptance.destinations import Destinations, expected
from tests.acceptance.program import Program


def test_smoke(program: Program, source: psycopg.Connection, destinations: Destinations, database: str) -> None:
    """Smoke."""
    program.start()
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 2, 'play')")
    program.wait_until_caught_up()
    assert expected(database) == destinations.api() == destinations.clickhouse()
    assert {1: 1} == destinations.counts() == destinations.top()
    assert {1: expected(database)[0]} == destinations.last()
    assert 0 == program.stop()
