"""`pause`, `resume` and `retry` on the real program: nothing is missing or double, and nobody else notices."""

from __future__ import annotations

import sqlite3
import stat
import statistics
import threading
import time
from pathlib import Path

import psycopg

from devstack.api import Api
from devstack.process import wait_until
from tests.support.destinations import Destinations, expected
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import Program, succeed

INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"
SAMPLES = 30


def taken(destinations: Destinations) -> int:
    """How many events the API has."""
    return len(destinations.api())


def wait_for_clickhouse(database: str, destinations: Destinations) -> None:
    """Return when it has everything."""
    wait_until(lambda: len(expected(database)) == len(destinations.clickhouse()), "ClickHouse to have it")


def test_a_pause_lasts_over_a_kill(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """The others go on, both starts say so and stay ready, and PostgreSQL keeps everything for the sink."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    wait_until(lambda: quick.status()["wal"]["kept_bytes"] is not None, "the first look at the slot")
    said = succeed(quick.run("pause", "http"))
    assert said.startswith("sink http is paused until somebody resumes it; PostgreSQL keeps the WAL after")
    assert "WAL kept for the slot: no limit (max_slot_wal_keep_size); " in said
    for _ in range(2):
        insert_many(source, 1_000)
        wait_for_clickhouse(database, destinations)
        assert quick.admin("/readyz").startswith("ready\nsink http is paused until somebody resumes it;")
        assert 10 == taken(destinations)
        assert "<dd>at most " in quick.admin("/")
        quick.kill()
        quick.start()
    told = quick.run("status")
    assert 0 == told.code
    assert "  paused     until somebody resumes it" in told.stdout
    assert "sink http is paused until somebody resumes it, and not asked" in quick.run("check").stdout
    assert "continues from its position" in succeed(quick.run("resume", "http"))
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations), "nothing was sent twice"


def test_a_pause_that_is_forgotten_is_found(quick: Program, source: psycopg.Connection) -> None:
    """Where what a paused sink lacks is confirmed all the same, the next start says so."""
    quick.altered = ("--breach", "pause-forgotten")
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    succeed(quick.run("pause", "http"))
    insert_many(source, 10)
    quick.wait_until_caught_up()  # it never would
    quick.kill()
    quick.altered = ()
    assert "Sink http was left out" in quick.run("run").stderr


def test_a_pause_of_a_dead_sink_lets_the_others_alone(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, api: Api
) -> None:
    """Redis gets each event as soon as before, while the API answers nothing, while it is paused, and in between."""
    quick.start()

    def latencies() -> list[float]:
        found = []
        for _ in range(SAMPLES):
            before = destinations.counts().get(1, 0)
            began = time.monotonic()
            source.execute(INSERT)
            wait_until(lambda before=before: destinations.counts().get(1, 0) > before, "Redis to have it")  # type: ignore[misc]
            found.append(time.monotonic() - began)
        return found

    usual = latencies()
    api.behave(hang_seconds=60)
    pausing = threading.Thread(target=lambda: succeed(quick.run("pause", "http", "--for", "1h")))
    pausing.start()
    paused = latencies()
    pausing.join()
    paused += latencies()
    print(f"median {statistics.median(usual):.4f} s before, {statistics.median(paused):.4f} s paused")  # noqa: T201
    assert statistics.median(paused) < 2 * statistics.median(usual) + 0.02
    assert max(paused) < max(usual) + 0.5, "the pause itself holds nobody up"
    assert "http is paused until 20" in quick.admin("/readyz")
    api.behave()
    succeed(quick.run("resume", "http"))
    quick.wait_until_caught_up()
    assert_exact(database, destinations)
    assert 0 == quick.stop()


def test_a_pause_ends_at_its_time(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """By itself, and nothing is double; one that has ended while nothing ran does not begin again."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert "is paused until 20" in succeed(quick.run("pause", "http", "--for", "3s"))
    insert_many(source, 500)
    wait_until(lambda: 510 == taken(destinations), "the pause to end", 20)
    assert "Sink http is resumed" in quick.log
    wait_until(lambda: "ready\n" == quick.admin("/readyz"), "it to be ready", 20)
    quick.wait_until_caught_up()
    assert 0 == assert_exact(database, destinations), "nothing was sent twice"
    succeed(quick.run("pause", "http", "--for", "1s"))
    quick.kill()
    quick.start()
    insert_many(source, 1)
    quick.wait_until_caught_up()
    assert 0 == assert_exact(database, destinations)


def test_without_a_replicator_a_pause_is_kept(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """It begins with the next start. Where the replicator runs elsewhere, the commands say so and change nothing."""
    succeed(quick.run("init"))
    assert "no replicator runs here; with the next start sink http is paused" in succeed(quick.run("pause", "http"))
    retried = quick.run("retry", "http")
    assert (1, "no replicator runs here, so nothing is tried\n") == retried[:2]
    quick.start()
    insert_many(source, 10)
    wait_for_clickhouse(database, destinations)
    assert 0 == taken(destinations)
    mode = stat.S_IMODE((tmp_path / f"{quick.slot}.sock").stat().st_mode)
    assert 0o600 == mode
    elsewhere = {"checkpoint_url": f"sqlite:///{tmp_path}/other/checkpoint.db"}
    for command in ("pause", "resume", "retry"):
        done = quick.run(command, "redis", **elsewhere)
        assert (1, "") == done[:2]
        assert "does not run here: nothing listens at" in done.stderr
    refused = [quick.run(*words) for words in (("pause", "clickhouse"), ("pause", "redis"))]
    assert [0, 1] == [done.code for done in refused]
    assert "no other sink would be left" in refused[1].stdout
    assert 0 == quick.stop()
    assert "with the next start" in succeed(quick.run("resume", "http"))
    assert "is not paused" in succeed(quick.run("resume", "http"))
    assert 2 == quick.run("pause", "nosuch").code
    assert 2 == quick.run("pause", "http", "--for", "soon").code
    succeed(quick.run("resume", "clickhouse"))
    quick.start()
    quick.wait_until_caught_up()
    assert 0 == assert_exact(database, destinations)


def test_retry_ends_the_wait(
    program: Program, source: psycopg.Connection, destinations: Destinations, api: Api
) -> None:
    """The next try of a sink that is back comes now, not in a minute."""
    program.environment["REPLICATOR_RETRY_MAX_SECONDS"] = "3600"
    program.start()
    assert "is not in trouble" in succeed(program.run("retry", "http"))
    api.behave(status=503, retry_after="600")
    insert_many(source, 1)
    wait_until(lambda: "503" in program.status()["sinks"]["http"]["trouble"], "the trouble")
    api.behave()
    assert "is tried again now; the trouble until now: " in succeed(program.run("retry", "http"))
    wait_until(lambda: 1 == taken(destinations), "the event", 10)
    assert 0 == program.stop()


def test_a_socket_that_can_not_be_made_stops_nothing(
    quick: Program, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """Its path is too long: the replicator works and says so once, the command says so and how to mend it."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    quick.environment["REPLICATOR_CHECKPOINT_URL"] = f"sqlite:///{folder}/checkpoint.db"
    quick.start()
    insert_many(source, 1)
    quick.wait_until_caught_up()
    assert 1 == taken(destinations)
    quick.wait_for_log("and the system takes 107")
    done = quick.run("pause", "http")
    assert 1 == done.code
    assert "RUNTIME_DIRECTORY" in done.stderr
    assert 0 == quick.stop()


def test_a_resumed_sink_gets_what_the_others_got(
    quick: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """With the content of the time, though it has changed during the pause."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    succeed(quick.run("pause", "http"))
    for length in (200, 400):
        insert_many(source, 10)
        source.execute("UPDATE content SET length_seconds = %s WHERE content_id = 1", [length])
    insert_many(source, 10)
    wait_until(lambda: 40 == len(destinations.clickhouse()), "ClickHouse to have it")
    succeed(quick.run("resume", "http"))
    quick.wait_until_caught_up()
    assert destinations.clickhouse() == sorted(destinations.api(), key=lambda event: event["event_id"])
    assert 0 == quick.stop()


def test_another_cluster_s_replicator_is_left_alone(quick: Program, source: psycopg.Connection, tmp_path: Path) -> None:
    """It has the same slot name and the same directory for its socket: nothing is paused there."""
    quick.environment["RUNTIME_DIRECTORY"] = str(tmp_path)
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    other = tmp_path / "other.db"
    with sqlite3.connect(tmp_path / "checkpoint.db") as mine, sqlite3.connect(other) as theirs:
        mine.backup(theirs)
        theirs.execute("UPDATE replicator_checkpoints SET system_identifier = '7'")
    for command in ("pause http", "resume http", "retry http", "tail"):
        refused = quick.run(*command.split(), checkpoint_url=f"sqlite:///{other}")
        assert 1 == refused.code
        assert "and these settings mean that of 7\nGive each replicator its own RUNTIME_DIRECTORY" in refused.stdout
    assert "ready\n" == quick.admin("/readyz")
    assert "is paused until" in succeed(quick.run("pause", "http"))
