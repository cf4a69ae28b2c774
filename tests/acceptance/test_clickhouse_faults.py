"""What stands before ClickHouse, and what hangs behind it, with the real program: nothing lost, nothing dead-lettered.

Variants are in `tests/sinks/test_clickhouse_front.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import psycopg
import pytest

from devstack import DevStack
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.front import Answer, Asked, Front, Lie, front_end
from tests.support.load import insert_many
from tests.support.program import Program

EXCEPTION = b"Code: 241. DB::Exception: Memory limit (total) exceeded. (MEMORY_LIMIT_EXCEEDED) (version 26.9.2.1)\n"


@pytest.fixture
def front(quick: Program, stack: DevStack) -> Iterator[Front]:
    """A front end before ClickHouse, which the program takes for ClickHouse."""
    with front_end(stack.clickhouse.port) as made:
        quick.environment["REPLICATOR_CLICKHOUSE_URL"] = made.url(quick.environment["REPLICATOR_CLICKHOUSE_URL"])
        yield made


def stripped(asked: Asked) -> Answer:
    """Without the settings in the URL, and with an old server's default."""
    known = [(name, text) for name, text in parse_qsl(urlsplit(asked.path).query) if name in {"query", "database"}]
    return asked.pass_on(path=f"/?{urlencode([*known, ('date_time_input_format', 'basic')])}")


def empty(asked: Asked) -> Answer:
    """ClickHouse's own answer to an insert of no rows."""
    return asked.pass_on(body=asked.body.splitlines()[0])


LIES: Mapping[str, tuple[Lie, str]] = {
    "an exception after the status line": (lambda _: Answer(200, {}, EXCEPTION), "error 241 MEMORY_LIMIT_EXCEEDED"),
    "a page": (lambda _: Answer(200, {}, b"<html>Back soon</html>"), "not as ClickHouse does"),
    "no rows": (empty, "ClickHouse wrote 0 of"),
    "a redirect": (lambda _: Answer(307, {"Location": "http://127.0.0.1:9/"}), "HTTP status 307"),
    "no settings": (stripped, "date_time_input_format = basic"),
}


def _state(program: Program) -> tuple[str, int]:
    """What is said of ClickHouse, and how many events it has taken."""
    sink = program.status()["sinks"]["clickhouse"]
    return sink["trouble"], sink["events"]


def test_nothing_counts_without_a_proof(
    quick: Program, database: str, source: psycopg.Connection, front: Front, destinations: Destinations
) -> None:
    """One lie after the other: it waits and says so, in /readyz too; the others go on; then it goes on by itself."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    for lie, told in LIES.values():
        _, before = _state(quick)
        others = quick.status()["sinks"]["redis"]["events"]
        front.tell(lie, only_inserts=lie is not stripped)
        insert_many(source, 10)
        wait_until(lambda told=told: told in _state(quick)[0], f"{told!r} to be said")  # type: ignore[misc]  # mypy can't type a lambda's default
        wait_until(lambda others=others: others + 10 == quick.status()["sinks"]["redis"]["events"], "Redis to go on")  # type: ignore[misc]  # as above
        assert before == _state(quick)[1]
        if "MEMORY" not in told and "wrote" not in told:  # those may pass by themselves: a reason after 10 s
            assert "turns the replicator away" in quick.admin("/readyz")
        front.behave()
        quick.wait_until_caught_up()
        assert ("", before + 10) == _state(quick)
    assert 0 == quick.status()["dead_letters"]["sinks"].get("clickhouse", 0)
    assert_exact(database, destinations)


def test_a_front_end_that_strips_settings_from_the_start(
    quick: Program, database: str, source: psycopg.Connection, front: Front, destinations: Destinations
) -> None:
    """`check` names it, `run` waits for it, and no event is refused over it."""
    assert 0 == quick.run("init").code
    front.tell(stripped, only_inserts=False)
    checked = quick.run("check")
    assert (1, True) == (checked.code, "date_time_input_format = basic" in checked.stdout)
    quick.start()
    insert_many(source, 60)
    wait_until(lambda: "date_time_input_format = basic" in _state(quick)[0], "it to be said")
    assert 0 == _state(quick)[1]
    front.behave()
    quick.wait_until_caught_up()
    assert 0 == quick.status()["dead_letters"]["sinks"].get("clickhouse", 0)
    assert_exact(database, destinations)


PROFILES = {
    "a cache": "use_query_cache=1&query_cache_nondeterministic_function_handling=save"
    "&query_cache_system_table_handling=save",
    "deleted rows": "apply_deleted_mask=0",
    "part of an answer": "limit=5&offset=1&extremes=1",
    "part of a table": "additional_table_filters=" + quote("{'engagement.events_enriched': 'event_id > 3'}"),
    "part of a result": "additional_result_filter=" + quote("1 = 0"),
    "an index is asked for": "force_primary_key=1&force_index_by_date=1",
}
"""Settings that an answer is wrong with, or is none."""
LIMITS = {
    "max_rows_to_read": "max_rows_to_read=5&read_overflow_mode=break",
    "max_bytes_to_read": "max_bytes_to_read=50",
    "max_result_bytes": "max_result_bytes=5&result_overflow_mode=break",
    "max_execution_time": "max_execution_time=0.000001&timeout_overflow_mode=break",
    "force_primary_key": "force_data_skipping_indices=" + quote("`no such index`"),
}
"""Settings that stop an answer, by what the cure names."""


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_profile_that_hides_a_loss(
    quick: Program, source: psycopg.Connection, stack: DevStack, front: Front, profile: str
) -> None:
    """What the user's profile sets comes behind what the program sends: rows that are gone are missing at once."""
    quick.environment["REPLICATOR_SINKS"] = "clickhouse"
    front.tell(lambda asked: asked.pass_on(path=f"{asked.path}&{profile}"), only_inserts=False)
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    reconcile = "reconcile", "--start", "2020-01-01", "--end", "2100-01-01"
    assert 0 == quick.run(*reconcile).code
    stack.clickhouse.query("DELETE FROM events_enriched WHERE event_id <= 3 SETTINGS lightweight_deletes_sync = 2")
    found = quick.run(*reconcile)
    assert (3, True) == (found.code, "missing 3" in found.stdout)
    assert 0 == quick.run(*reconcile, "--repair").code
    assert "10" == stack.clickhouse.query("SELECT count() FROM events_enriched FINAL").strip()


@pytest.mark.parametrize("limit", LIMITS)
def test_a_profile_that_limits_questions(quick: Program, source: psycopg.Connection, front: Front, limit: str) -> None:
    """Where it stops one, that is an error whose cure names the limit; it never looks like a loss, or like none."""
    quick.environment["REPLICATOR_SINKS"] = "clickhouse"
    quick.start()
    insert_many(source, 20)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    front.tell(lambda asked: asked.pass_on(path=f"{asked.path}&{LIMITS[limit]}"), only_inserts=False)
    for command in ("check", "reconcile --start 2020-01-01 --end 2100-01-01"):
        found = quick.run(*command.split())
        told = found.stdout + found.stderr
        assert (1, True) == (found.code, "what limits the replicator's user" in told and limit in told), told


def test_a_small_limit(
    quick: Program, database: str, source: psycopg.Connection, front: Front, destinations: Destinations
) -> None:
    """413 for more than 20 kB: everything arrives, in smaller inserts."""
    front.tell(lambda asked: Answer(413) if len(asked.body) > 20_000 else asked.pass_on())
    quick.start()
    insert_many(source, 2_000)
    quick.wait_until_caught_up()
    assert_exact(database, destinations)


def test_a_broken_view(
    quick: Program, database: str, source: psycopg.Connection, stack: DevStack, destinations: Destinations
) -> None:
    """It is named. The program lives, the others go on, no event is refused."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    stack.clickhouse.query("CREATE TABLE target (event_id Int64, number Int32) ENGINE = MergeTree ORDER BY event_id")
    select = "SELECT event_id, toInt32(event_type) AS number FROM events_enriched"
    stack.clickhouse.query(f"CREATE MATERIALIZED VIEW cast_it TO target AS {select}")
    insert_many(source, 10)
    wait_until(lambda: "engagement.cast_it" in _state(quick)[0], "the view to be named")
    stack.clickhouse.query("DROP TABLE cast_it SYNC")
    quick.wait_until_caught_up()
    assert 0 == quick.status()["dead_letters"]["sinks"].get("clickhouse", 0)
    assert_exact(database, destinations)


@pytest.mark.parametrize(("altered", "lost"), [((), 0), (("--breach", "written-rows-ignored"), 10)])
def test_the_suite_notices_when_the_answer_is_not_read(  # noqa: PLR0917  fixtures
    quick: Program,
    source: psycopg.Connection,
    front: Front,
    destinations: Destinations,
    altered: tuple[str, ...],
    lost: int,
) -> None:
    """A planted breach: whatever an insert's answer says counts as written."""
    quick.altered = altered or quick.altered
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    front.asked.clear()
    front.tell(empty)
    insert_many(source, 10)
    wait_until(lambda: any(asked.inserts for asked in front.asked[:-1]), "an insert to be answered")
    front.behave()
    quick.wait_until_caught_up()
    assert 20 - lost == len(destinations.clickhouse())
