"""An API that refuses: the real program finds out whose fault it is, and keeps what is not proved to be an event's.

The variants, with a sink in memory, are in `tests/replicator/delivery/test_evidence.py`.
"""

from __future__ import annotations

import time

import msgspec
import psycopg
import pytest

from devstack.api import Api
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import Program, assert_clean, succeed

REFUSES_ALL = "Sink http refuses everything"


@pytest.fixture
def small(quick: Program) -> Program:
    """Several writes at once, each of several events."""
    quick.environment["REPLICATOR_HTTP_BATCH_SIZE"] = "10"
    return quick


def letters(program: Program) -> dict[int, str]:
    """The dead letters: event → reason."""
    found = msgspec.json.decode(succeed(program.run("dead-letters", "list", "--json")))["dead_letters"]
    assert all(letter["sink"] == "http" for letter in found)
    return {letter["event_id"]: letter["reason"] for letter in found}


def ends_exact(program: Program, database: str, destinations: Destinations) -> None:
    """Everything is everywhere, without a dead letter."""
    program.wait_until_caught_up()
    assert "ready\n" == program.admin("/readyz")
    assert {} == letters(program)
    assert 0 == program.stop()
    assert_clean(program.log)
    assert_exact(database, destinations)


def test_it_refuses_everything_from_the_start(
    small: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """As with http:// before a port that speaks TLS: told everywhere, asked seldom, and nothing is lost by it."""
    api.behave(status=400)
    small.start()
    insert_many(source, 2_000)
    wait_until(lambda: REFUSES_ALL in small.admin("/readyz"), "it not to be ready")
    asked, began = api.stats().requests, time.monotonic()
    told = small.run("status")
    assert (3, True) == (told.code, REFUSES_ALL in told.stdout)
    sink = small.status()["sinks"]["http"]
    assert (2_000, 0, 0) == (sink["waiting"], sink["dead_letters"], sink["events"])
    assert sink["trouble_seconds"] > 0
    assert 1 == small.run("check").code
    assert (api.stats().requests - asked) / (time.monotonic() - began) < 10, "a second"
    api.behave()
    ends_exact(small, database, destinations)
    assert "sink http takes events again after" in small.log


def test_it_breaks_at_three_in_the_morning(
    small: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """After hours of good work it refuses everything: not one dead letter, the others go on."""
    small.start()
    insert_many(source, 500)
    small.wait_until_caught_up()
    api.behave(status=422)
    insert_many(source, 500)
    wait_until(lambda: REFUSES_ALL in small.admin("/readyz"), "it not to be ready")
    wait_until(lambda: 1_000 == small.status()["sinks"]["redis"]["events"], "Redis to go on")
    assert {} == letters(small)
    api.behave()
    ends_exact(small, database, destinations)


def test_it_refuses_half_of_all_requests_at_random(
    small: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """Every event arrives, none is a dead letter."""
    small.start()
    insert_many(source, 10)
    small.wait_until_caught_up()
    api.behave(status=400, probability=0.5)
    for _ in range(4):
        insert_many(source, 100)
        small.wait_until_caught_up()
    api.behave()
    ends_exact(small, database, destinations)


def test_it_refuses_events(small: Program, source: psycopg.Connection, api: Api, destinations: Destinations) -> None:
    """One among good ones, a hundred in a row, one alone: each is a dead letter with the API's reason."""
    bad = [37, *range(401, 501), 1_001]
    api.behave(refuse_event_ids=bad)
    small.start()
    insert_many(source, 100)
    small.wait_until_caught_up()
    assert 99 == len(api.event_ids()), "nothing is sent twice while others prove it"
    insert_many(source, 900)
    small.wait_until_caught_up()
    insert_many(source, 1)
    small.wait_until_caught_up()
    assert "is refused" not in small.log, "the API's words stay in the dead letter"
    assert {number: f"422 Unprocessable Entity: event {number} is refused" for number in bad} == letters(small)
    assert {*range(1, 1_002)} - {*bad} == {*api.event_ids()}
    assert "ready\n" == small.admin("/readyz")
    assert 1_001 == sum(destinations.counts().values())


def test_it_takes_no_large_request(
    quick: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """413: smaller ones arrive, `status` has the size, and larger ones are tried ever more rarely."""
    api.behave(max_body_bytes=20_000)
    quick.start()
    insert_many(source, 5_000)
    quick.wait_until_caught_up()
    assert quick.status()["sinks"]["http"]["write_events"] < 100
    assert 1 == quick.log.count("too large for it")

    def refused() -> int:
        return len([request for request in api.requests() if request.status == 413])

    before = refused()
    insert_many(source, 5_000)
    quick.wait_until_caught_up()
    assert refused() - before < before / 2
    ends_exact(quick, database, destinations)


@pytest.mark.parametrize("altered", [(), ("--breach", "evidence-ignored")], ids=["as it is", "evidence-ignored"])
def test_dead_letters_without_evidence(
    small: Program, source: psycopg.Connection, api: Api, altered: tuple[str, ...]
) -> None:
    """An API that refuses everything: without the rule of evidence its events are dead letters at once."""
    small.altered = altered or small.altered
    small.environment["REPLICATOR_HTTP_BATCH_SIZE"] = "1"
    small.start()
    insert_many(source, 10)
    small.wait_until_caught_up()
    api.behave(status=400)
    insert_many(source, 10)
    wait_until(lambda: "answered 400 Bad Request" in small.log, "it to be refused")
    if altered:
        small.wait_until_caught_up()
    assert bool(altered) == bool(letters(small))
