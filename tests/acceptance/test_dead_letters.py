"""What a sink refuses for good: kept, listed, replayed and dropped through the real program."""

from __future__ import annotations

import psycopg

from devstack.api import Api
from tests.acceptance.destinations import Destinations, expected
from tests.acceptance.program import Program, succeed

INSERT = (
    "INSERT INTO engagement_events (content_id, user_id, event_type) SELECT 1, n, 'play' FROM generate_series(1, 9) n"
)


def listed(program: Program, *arguments: str) -> list[str]:
    """Two lines a dead letter: what is known of it, and its payload."""
    return succeed(program.run("dead-letters", "list", *arguments)).splitlines()


def delivered(destinations: Destinations) -> list[int]:
    """What the API has taken, in order."""
    return [event["event_id"] for event in destinations.api()]


def test_list_replay_and_drop(
    program: Program, source: psycopg.Connection, api: Api, destinations: Destinations, database: str
) -> None:
    """The API refuses three events and the others pass; replay brings what it takes by then, drop forgets one."""
    api.behave(refuse_event_ids=[3, 5, 7])
    program.start()
    source.execute(INSERT)
    program.wait_until_caught_up()
    assert 0 == program.stop()
    assert [1, 2, 4, 6, 8, 9] == sorted(delivered(destinations))
    assert expected(database) == destinations.clickhouse()
    assert {1: 9} == destinations.counts()
    letters = listed(program, "--sink", "http")
    assert ["event 3", "event 5", "event 7"] == [line.split("  ")[3] for line in letters[::2]]
    assert all("422" in line for line in letters[::2])
    assert all('{"event_id":' in line for line in letters[1::2])

    assert 1 == program.run("dead-letters", "replay").code  # refused as before
    assert letters == listed(program)

    api.behave(refuse_event_ids=[5, 7])
    assert 1 == program.run("dead-letters", "replay").code
    assert letters[2:] == listed(program)

    assert 2 == program.run("dead-letters", "drop").code  # nobody to ask
    fifth = letters[2].split()[0]
    assert "dropped 1 dead letters\n" == succeed(program.run("dead-letters", "drop", "--id", fifth, "--yes"))

    api.behave()
    assert "1 taken, 0 left\n" == succeed(program.run("dead-letters", "replay"))
    assert [] == listed(program)
    assert [3, 7] == delivered(destinations)[6:]
    wanted = [event for event in expected(database) if event["event_id"] != 5]
    assert wanted == sorted(destinations.api(), key=lambda event: int(event["event_id"]))
    assert {1: 9} == destinations.counts()
