"""What a sink refuses for good: kept, listed, replayed and dropped through the real program."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg

from devstack.api import Api
from tests.support.destinations import Destinations, expected
from tests.support.program import Program, succeed

INSERT = (
    "INSERT INTO engagement_events (content_id, user_id, event_type) SELECT 1, n, 'play' FROM generate_series(1, 9) n"
)


PARCELS = """
from replicator import *
STREAM = Stream("parcels", "public.parcels", updates="upsert", deletes="delete", fields=(
    Field("event_id", BIGINT, role=Role.IDENTITY), Field("depot", TEXT, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME)))
"""
MADE = """
CREATE TABLE parcels (event_id bigint PRIMARY KEY, depot text NOT NULL, at timestamptz NOT NULL DEFAULT now());
ALTER TABLE parcels REPLICA IDENTITY FULL;
GRANT SELECT ON parcels TO replicator;
"""


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

    again = program.run("dead-letters", "replay")
    assert 1 == again.code  # refused as before
    assert "0 taken, 3 left\n" in again.stdout
    for line in letters[::2]:
        number, *_, reason = line.split("  ")
        assert f"dead letter {number} of http stays: {reason}\n" in again.stdout
    assert letters == listed(program)

    elsewhere = program.run("dead-letters", "replay", "--id", letters[0].split()[0], sinks="redis")
    assert 1 == elsewhere.code
    assert "0 taken, 1 left\n" in elsewhere.stdout
    assert " of http stays: sink http is not among REPLICATOR_SINKS\n" in elsewhere.stdout

    api.behave(refuse_event_ids=[5, 7])
    assert 1 == program.run("dead-letters", "replay").code
    assert letters[2:] == listed(program)

    assert 2 == program.run("dead-letters", "drop").code  # nobody to ask
    fifth = letters[2].split()[0]
    assert "dropped 1 dead letter\n" == succeed(program.run("dead-letters", "drop", "--id", fifth, "--yes"))

    api.behave()
    assert "1 taken, 0 left\n" == succeed(program.run("dead-letters", "replay"))
    assert [] == listed(program)
    assert [3, 7] == delivered(destinations)[6:]
    wanted = [event for event in expected(database) if event["event_id"] != 5]
    assert wanted == sorted(destinations.api(), key=lambda event: int(event["event_id"]))
    assert {1: 9} == destinations.counts()


def test_there_is_none(program: Program) -> None:
    """Nothing to do is said and is no failure; a number that there is not is one."""
    succeed(program.run("init"))
    for action in (["list"], ["replay"], ["drop", "--yes"]):
        nothing = program.run("dead-letters", *action)
        assert (0, "no dead letters\n", "") == (nothing.code, nothing.stderr, nothing.stdout)
        unknown = program.run("dead-letters", *action, "--sink", "http", "--id", "99")
        assert (1, "there is no dead letter 99 of sink http\n") == (unknown.code, unknown.stderr)


def test_a_row_is_refused_twice(program: Program, source: psycopg.Connection) -> None:
    """By the stream and by a backfill: one dead letter; with a condition that it does not meet, it is not listed."""
    source.execute("ALTER TABLE engagement_events ALTER user_id DROP NOT NULL")
    program.start()
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, NULL, 'play')")
    program.wait_until_caught_up()
    assert 0 == program.stop()
    program.run("backfill", "--last", "1h")
    [letter, _] = listed(program, "--stage", "row")
    number = letter.split()[0]
    other = program.run("dead-letters", "list", "--id", number, "--where", "event_type=pause")
    said = f"dead letter {number} is there, but does not fit the other options\n"
    assert (1, "", said) == (other.code, other.stdout, other.stderr)


def test_a_row_that_no_event_can_be_made_of(
    program: Program, source: psycopg.Connection, destinations: Destinations, database: str
) -> None:
    """Among good rows, in their transaction: kept and said with its position, the others exact; numbers of any size."""
    source.execute("ALTER TABLE engagement_events ALTER user_id DROP NOT NULL, ADD extra numeric")
    program.start()
    with source.transaction():
        source.execute(INSERT)
        source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, NULL, 'play')")
        source.execute("INSERT INTO engagement_events (content_id, event_type, extra) VALUES (2, 'a', 1e5000)")
        source.execute(
            "INSERT INTO engagement_events (content_id, user_id, event_type, extra) SELECT 2, 7, 'b', e::numeric"
            " FROM unnest(ARRAY[repeat('9', 131072), 'NaN', '-Infinity', '1e-16383', '0']) AS e"
        )
    source.execute(INSERT)
    program.wait_until_caught_up()
    source.execute("DELETE FROM engagement_events WHERE user_id IS NULL")
    wanted = expected(database)
    assert 23 == len(wanted)
    assert wanted == destinations.clickhouse()
    assert wanted == sorted(destinations.api(), key=lambda event: int(event["event_id"]))
    assert {1: 18, 2: 5} == destinations.counts()
    said = [line for line in program.log.splitlines() if "dead letter of a row at " in line]
    assert ["(event 10)", "(event 11)"] == [line[line.index("(event") : line.index(")") + 1] for line in said]
    assert all("ERROR" in line and "engagement_events.user_id is NULL, not a 64-bit integer" in line for line in said)
    assert ["#10", "#11"] == [line[line.index("#") : line.index(" (event")] for line in said]
    assert 2 == program.metric("refused_rows_total")
    letters = listed(program, "--stage", "row")
    [first, _] = json.loads(succeed(program.run("dead-letters", "list", "--json")))["dead_letters"]
    assert first.pop("created_at").endswith("Z")
    assert first.pop("position").endswith("#10")
    assert '"user_id","value":null}' in first.pop("payload")
    reason = "public.engagement_events.user_id is NULL, not a 64-bit integer"
    expected_form = {"sink": None, "stage": "row", "origin": "stream", "event_id": 10, "reason": reason}
    assert expected_form == {name: first[name] for name in first if name != "id"}
    types = [line.partition('"event_type","value":')[2].partition("}")[0] for line in letters[1::2]]
    assert ['"play"', '"a"'] == types
    assert "extra" not in "".join(letters), "it is none of our columns"
    assert 1 == program.run("dead-letters", "replay").code  # refused as before
    assert letters == listed(program)
    assert 0 == program.stop()


def test_changes_of_rows(quick: Program, source: psycopg.Connection, api: Api, tmp_path: Path) -> None:
    """What happened to a row is kept with it: a replay deletes what was deleted, and ends the former identity.

    Also where the slot has another stream.
    """
    source.execute(MADE.encode())
    (tmp_path / "parcels_stream.py").write_text(PARCELS, encoding="utf-8")
    quick.environment |= {
        "REPLICATOR_STREAM": "parcels_stream:STREAM,enrichment.contract:EVENT",
        "PYTHONPATH": str(tmp_path),
    }
    succeed(quick.run("init"))
    quick.start()
    source.execute("INSERT INTO parcels SELECT n, 'north' FROM generate_series(1, 9) n")
    quick.wait_until_caught_up()
    api.behave(refuse_event_ids=[3, 50])
    source.execute("DELETE FROM parcels WHERE event_id = 3")
    source.execute("UPDATE parcels SET event_id = 50 WHERE event_id = 5")
    source.execute("UPDATE parcels SET depot = 'south' WHERE event_id < 3")
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 2 == len(listed(quick, "--sink", "http/parcels", "--where", "event_id=3"))
    api.behave()
    assert "2 taken, 0 left\n" == succeed(quick.run("dead-letters", "replay"))
    gone, moved = api.events()[-2:]
    assert (3, "delete") == (gone["event_id"], gone["_operation"])
    assert (50, "upsert", 5) == (moved["event_id"], moved["_operation"], moved["_was"])
