"""What a sink refuses for good: kept, listed, replayed and dropped through the real program."""

from __future__ import annotations

import psycopg

from devstack.api import Api
from tests.acceptance.destinations import Destinations, expected
from tests.acceptance.program import Program, succeed

INSERT = (
    "INSERT INTO engagement_events (content_id, user_id, event_type) SELECT 1, n, 'play' FROM generate_series(1, 9) n"
)


def test_list_replay_and_drop(
    program: Program, source: psycopg.Connection, api: Api, destinations: Destinations, database: str
) -> None:
    """The API refuses two events: the others pass; replay brings what it takes by then, drop forgets the rest."""
    api.behave(refuse_event_ids=[3, 7])
    program.start()
    source.execute(INSERT)
    program.wait_until_caught_up()
    assert 0 == program.stop()
    assert [1, 2, 4, 5, 6, 8, 9] == sorted(event["event_id"] for event in destinations.api())
    assert expected(database) == destinations.clickhouse()
    assert {1: 9} == destinations.counts()

    listed = succeed(program.run("dead-letters", "list", "--sink", "http")).splitlines()
    assert ["event 3", "event 7"] == [line.split("  ")[3] for line in listed[::2]]
    assert all("422" in line for line in listed[::2])
    assert all('{"event_id":' in line for line in listed[1::2])

    assert 1 == program.run("dead-letters", "replay").code  # refused as before: nothing is lost
    assert listed == succeed(program.run("dead-letters", "list")).splitlines()

    api.behave(refuse_event_ids=[7])
    assert 1 == program.run("dead-letters", "replay").code
    assert listed[2:] == succeed(program.run("dead-letters", "list")).splitlines()
    assert expected(database)[2] == destinations.api()[-1]

    api.behave()
    assert "1 taken, 0 left\n" == succeed(program.run("dead-letters", "replay"))
    assert "" == succeed(program.run("dead-letters", "list"))
    assert expected(database) == sorted(destinations.api(), key=lambda event: int(event["event_id"]))
    assert {1: 9} == destinations.counts()


def test_drop(program: Program, source: psycopg.Connection, api: Api, destinations: Destinations) -> None:
    """By number, then all; without a terminal only with --yes. What is dropped can't be replayed."""
    api.behave(refuse_event_ids=[3, 7])
    program.start()
    source.execute(INSERT)
    program.wait_until_caught_up()
    assert 0 == program.stop()
    first = succeed(program.run("dead-letters", "list")).split()[0]
    assert 2 == program.run("dead-letters", "drop").code
    assert "dropped 1 dead letters\n" == succeed(program.run("dead-letters", "drop", "--id", first, "--yes"))
    api.behave()
    assert "1 taken, 0 left\n" == succeed(program.run("dead-letters", "replay"))
    assert [7] == [event["event_id"] for event in destinations.api()[7:]]
    assert "dropped 0 dead letters\n" == succeed(program.run("dead-letters", "drop", "--yes"))
