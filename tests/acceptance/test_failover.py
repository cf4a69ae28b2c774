"""PostgreSQL as people run it: shut down while a sink is behind, restarted, failed over. Nothing is lost."""

from __future__ import annotations

import time

import psycopg
import pytest

from devstack import DevStack
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import Program

LIMIT_BYTES = 1_000_000
SHUTDOWN_SECONDS = 9.0  # two looks of the watchdog, 5 s and 1 s apart; a sink that is down would hold it up for ever


@pytest.mark.parametrize("full", [False, True], ids=["reads on", "reading has stopped"])
def test_a_fast_shutdown_does_not_wait_for_a_sink(
    quick: Program, database: str, stack: DevStack, destinations: Destinations, *, full: bool
) -> None:
    """The API is down and events wait: PostgreSQL ends within seconds, and afterwards everything arrives."""
    if full:
        quick.environment["REPLICATOR_MEMORY_LIMIT_MB"] = "1"
    quick.start()
    with psycopg.connect(database, autocommit=True) as writer:
        insert_many(writer, 100)
        quick.wait_until_caught_up()
        stack.api.behave(status=503)
        insert_many(writer, 20_000 if full else 100)
    waiting = "the API to hold it up"
    wait_until(lambda: quick.status()["sinks"]["http"]["waiting"] > 0, waiting)
    wait_until(lambda: full == (quick.status()["replicator"]["held_bytes"] > LIMIT_BYTES), waiting)
    began = time.monotonic()
    stack.postgres.stop()
    assert time.monotonic() - began < SHUTDOWN_SECONDS
    stack.postgres.start()
    stack.api.behave()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


def test_commits_do_not_wait_for_the_sinks_without_a_word(
    quick: Program, source: psycopg.Connection, stack: DevStack
) -> None:
    """`synchronous_standby_names` would choose the replicator: `check` fails, and `/readyz` and the log say it."""
    quick.start()
    assert "ok    synchronous_standby_names = ''" in quick.run("check").stdout
    stack.api.behave(status=503)
    source.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    source.execute("SELECT pg_reload_conf()")
    try:
        quick.wait_for_log("commits in PostgreSQL wait for the sinks")
        assert "commits in PostgreSQL wait for the sinks" in quick.admin("/readyz")
        assert "FAIL  synchronous_standby_names = '*': commits would wait for the sinks" in quick.run("check").stdout
    finally:
        source.execute("ALTER SYSTEM RESET synchronous_standby_names")
        source.execute("SELECT pg_reload_conf()")
