"""`python -m replicator_spark backfill` as it stands, on real Spark; the sinks are PostgreSQL's."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest

from devstack import DevStack
from devstack.control import fetch
from devstack.process import free_port, wait_until
from devstack.spark import EXECUTORS
from devstack.watchdog import tree
from tests.support import environment as ground
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.program import Program, assert_clean, succeed
from tests.support.spark import PYTHON, SparkBackfill, command_line, shown

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-spark: make spark-setup"),
]

EVERYTHING = ("--start", "2000-01-01", "--end", "2100-01-01")
ALL_SINKS = ("--sinks", "clickhouse,redis,http")

INDEX = "CREATE INDEX ON engagement_events (event_ts, id)"
MANY = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms)
SELECT 1 + n %% 3, n, 'play', timestamptz '2026-01-08 09:00:00+00' + n * interval '1 ms', n
FROM generate_series(0, %(rows)s::bigint - 1) AS n
"""

Run: TypeAlias = Callable[..., SparkBackfill]


@pytest.fixture
def made(environment: dict[str, str], database: str, tmp_path: Path) -> Program:
    """The replicator after `init`: table, checkpoint and slot are there."""
    program = Program(environment, database, tmp_path / "replicator.log")
    succeed(program.run("init"))
    return program


@pytest.fixture
def backfill(environment: dict[str, str], made: Program, tmp_path: Path) -> Iterator[Run]:  # noqa: ARG001  it has to be
    """Starts one; what is left is ended."""
    log = tmp_path / "backfill.log"
    started: list[SparkBackfill] = []

    def run(*arguments: str, altered: Sequence[str] = (), **variables: str) -> SparkBackfill:
        settings = {f"REPLICATOR_{name.upper()}": value for name, value in variables.items()}
        started.append(SparkBackfill(environment | settings, log, *arguments, altered=altered))
        return started[-1]

    yield run
    for each in started:
        each.end()
    if log.exists():
        print(log.read_text(encoding="utf-8"))  # noqa: T201  pytest shows it when the test has failed


@pytest.mark.parametrize("index", [None, INDEX], ids=["by id", "by event_ts"])
def test_all_sinks_are_postgresqls(
    index: str | None, backfill: Run, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """Slices side by side on two cores: every field of every event, and no event twice at the API."""
    source.execute(MANY, {"rows": 20_000})
    if index:
        source.execute(index)
    done = backfill(*EVERYTHING, *ALL_SINKS, "--master", "local[2]", "--slices", "5").result()
    assert "read        20000 events of 20000" in succeed(done)
    assert "redis       20000 written (20000 new, 0 already there)" in done.stdout
    assert 0 == assert_exact(database, destinations)


def test_a_killed_task_costs_a_turn(
    backfill: Run, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """SIGKILL for both Python workers while they write: Spark gives their turns again. The API sees repeats."""
    source.execute(MANY, {"rows": 20_000})
    running = backfill(*EVERYTHING, *ALL_SINKS, "--master", "local[2,4]", "--slices", "4", "--rate", "4000")
    wait_until(lambda: len(destinations.api()) >= 4_000, "the first turns")
    for pid in running.children("pyspark.daemon"):
        os.kill(pid, signal.SIGKILL)
    assert "read        20000 events of 20000" in succeed(running.result())
    assert 0 < assert_exact(database, destinations) <= 10_000


def test_a_task_that_hangs_costs_a_turn(
    backfill: Run, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """SIGSTOP for both Python workers while they write: Spark is told to end them, and their turns are given again."""
    source.execute(MANY, {"rows": 20_000})
    command = (*EVERYTHING, *ALL_SINKS, "--master", "local[2]", "--slices", "4", "--rate", "4000")
    running = backfill(*command, altered=("--breach", "impatient"))
    wait_until(lambda: len(destinations.api()) >= 2_000, "the first turns")
    for pid in running.children("pyspark.daemon"):
        if [pid] == tree(pid):
            os.kill(pid, signal.SIGSTOP)
    assert "read        20000 events of 20000" in succeed(running.result())
    assert "those that run have hung" in running.said
    assert 0 < assert_exact(database, destinations) <= 10_000


def test_an_executor_dies(backfill: Run, source: psycopg.Connection, database: str, destinations: Destinations) -> None:
    """On a small cluster of processes, whose Master starts another one."""
    source.execute(MANY, {"rows": 20_000})
    cluster = ("--master", "local-cluster[2,1,512]", "--conf", "spark.executor.memory=512m")
    running = backfill(*EVERYTHING, *ALL_SINKS, *cluster, "--slices", "4", "--rate", "2000")
    wait_until(lambda: len(destinations.api()) >= 2_000, "the first turns")
    os.kill(running.children("CoarseGrainedExecutorBackend")[-1], signal.SIGKILL)
    assert "read        20000 events of 20000" in succeed(running.result())
    assert_exact(database, destinations)


def test_nodes_that_read_a_standby_and_one_that_dies(tmp_path: Path) -> None:
    """A Master and two Workers, whose DSN leads to a standby: they read that, and in the end one Worker is enough.

    No secret is in their logs or on the Master's page.
    """
    with DevStack(*DevStack.SERVICES) as own, ground.fresh_database(own) as database:
        role = ground.plain_role(own, database)
        settings = ground.environment(role, own.clickhouse.url, own.redis.url, own.api.url, folder=tmp_path)
        succeed(Program(settings, database, tmp_path / "replicator.log").run("init"))
        with psycopg.connect(database) as source:
            source.execute(MANY, {"rows": 20_000})
        standby = own.standby()
        standby.start()
        of_node = settings | {"REPLICATOR_POSTGRES_DSN": role.replace(f":{own.postgres.port}/", f":{standby.port}/")}
        with own.spark(**of_node) as spark:
            options = ["--master", spark.master.url, *(word for option in EXECUTORS for word in ("--conf", option))]
            running = SparkBackfill(
                settings, tmp_path / "log", *EVERYTHING, *ALL_SINKS, *options, "--slices", "4", "--rate", "2000"
            )
            destinations = Destinations(own)
            try:
                wait_until(lambda: len(destinations.api()) >= 2_000, "the first turns")
                with psycopg.connect(standby.superuser_dsn) as looking:
                    assert looking.execute(READERS).fetchone() != (0,)
                spark.workers[0].kill()
                assert "spark backfill" in (pages := fetch(f"http://127.0.0.1:{spark.master.ui}/").decode())
                assert "read        20000 events of 20000" in succeed(running.result())
            finally:
                running.end()
            # Workers log the command that they start an executor with; executors log what tasks say.
            logs = [file for file in (own.folder / "spark").rglob("*") if file.name in {"log", "stderr", "stdout"}]
            assert len(logs) > 3
            assert not [file for file in logs if ground.SECRET in file.read_text(encoding="utf-8", errors="replace")]
            assert ground.SECRET not in pages
        assert_exact(database, destinations)
        destinations.redis.close()


READERS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'replicator enrichment'"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_driver_ends_and_is_continued(
    *,
    number: signal.Signals,
    backfill: Run,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
) -> None:
    """Killed it loses the turns that run, stopped it ends them: the command that it prints does the rest only."""
    source.execute(MANY, {"rows": 20_000})
    command = (*EVERYTHING, *ALL_SINKS, "--master", "local[2]")
    running = backfill(*command, "--slices", "10", "--rate", "2000")
    wait_until(lambda: len(done_slices(tmp_path / "checkpoint.db")) >= 2, "the first slices")
    running.process.send_signal(number)
    stopped = running.result()
    if number is signal.SIGTERM:
        assert 1 == stopped.code
        assert_clean(stopped.stderr)
        assert "not finished; to continue: python -m replicator_spark backfill --start" in stopped.stderr
    before = 2_000 * len(done_slices(tmp_path / "checkpoint.db"))
    rest = backfill(*command, "--resume").result()
    assert f"read        {20_000 - before} events of 20000, {before} before" in succeed(rest)
    repeats = assert_exact(database, destinations)
    assert repeats <= (4_000 if number is signal.SIGKILL else 0)


def done_slices(checkpoint: Path) -> list[int]:
    """Numbers of those that are kept as done."""
    with closing(sqlite3.connect(checkpoint)) as connection:
        row = connection.execute("SELECT progress FROM replicator_tasks WHERE task LIKE 'spark %'").fetchone()
    shares = json.loads(row[0])["shares"] if row else []
    return [number for number, share in enumerate(shares) if share["done"]]


def test_a_refused_event_is_kept_once(
    backfill: Run, made: Program, stack: DevStack, source: psycopg.Connection, destinations: Destinations
) -> None:
    """By the driver: the nodes have no checkpoint database. The others arrive, and a second run keeps no more."""
    source.execute(MANY, {"rows": 100})
    stack.api.behave(refuse_event_ids=[7, 70])
    for _ in range(2):
        done = backfill(*EVERYTHING, "--sinks", "http", "--master", "local[2]", "--slices", "3").result()
        assert "http        98 written, 2 dead letters" in succeed(done)
    letters = json.loads(succeed(made.run("dead-letters", "list", "--json")))["dead_letters"]
    assert [7, 70] == sorted(letter["event_id"] for letter in letters)
    assert 98 == len({event["event_id"] for event in destinations.api()})


def test_a_sink_that_is_away_is_waited_for(
    backfill: Run, stack: DevStack, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """The driver says what holds the slices, although only the nodes meet it; then it goes on where it was."""
    source.execute(MANY, {"rows": 3_000})
    stack.api.behave(status=503)
    running = backfill(*EVERYTHING, *ALL_SINKS, "--master", "local[2]", "--slices", "2")
    wait_until(lambda: "is held, on node" in running.said, "the driver to say so", 90)
    assert "Sink http did not take the batch" in running.said
    stack.api.behave()
    assert "read        3000 events of 3000" in succeed(running.result())
    assert 0 == assert_exact(database, destinations)


# --- what is refused


def test_a_node_with_other_settings(backfill: Run, source: psycopg.Connection, destinations: Destinations) -> None:
    """It writes nothing: a forgotten setting has a default, and would lead elsewhere."""
    source.execute(MANY, {"rows": 10})
    other = ("--master", "local[2]", "--conf", "spark.executorEnv.REPLICATOR_HTTP_BATCH_SIZE=7")
    refused = backfill(*EVERYTHING, *ALL_SINKS, *other).result()
    assert 1 == refused.code
    assert_clean(refused.stderr)
    assert "node of the cluster differs from the driver: REPLICATOR_HTTP_BATCH_SIZE has another" in refused.stderr
    assert [] == destinations.api()


def test_a_node_without_the_program(backfill: Run, source: psycopg.Connection) -> None:
    """Which module is missing is in the node's log; here is what every node needs."""
    source.execute(MANY, {"rows": 10})
    nodes = ("--master", "local-cluster[1,1,512]", "--conf", "spark.executor.memory=512m")
    elsewhere = ("--conf", "spark.executorEnv.PYTHONPATH=/nonexistent")
    refused = backfill(*EVERYTHING, *nodes, *elsewhere).result()
    assert 1 == refused.code
    assert_clean(refused.stderr.splitlines()[-1])
    assert "Spark gave a task up (ModuleNotFoundError). Every node needs this program" in refused.stderr


def test_speculation_with_the_api(backfill: Run) -> None:
    """Tasks that run twice at once are for sinks that bear it."""
    refused = backfill(*EVERYTHING, *ALL_SINKS, "--master", "local[1]", "--conf", "spark.speculation=true").result()
    assert 2 == refused.code
    assert "spark.speculation is unusable" in refused.stderr


def test_a_cluster_that_is_not_there(backfill: Run) -> None:
    """One line with the cure, and no traceback of ours."""
    refused = backfill(*EVERYTHING, "--master", "no-such-master").result()
    assert 1 == refused.code
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("replicator: Spark does not start")


# --- secrets


def test_spark_shows_no_secret(backfill: Run, source: psycopg.Connection, destinations: Destinations) -> None:
    """Neither its UI nor its REST API, neither logs nor command lines."""
    source.execute(MANY, {"rows": 20_000})
    port = free_port()
    page = ("--conf", "spark.ui.enabled=true", "--conf", f"spark.ui.port={port}")
    running = backfill(
        *EVERYTHING, *ALL_SINKS, "--master", "local[2]", *page, "--slices", "10", "--rate", "500", log_level="debug"
    )
    wait_until(lambda: len(destinations.api()) >= 500, "the first turns")
    told = shown(port) + "".join(map(command_line, running.children("")))
    assert "spark backfill 2000-01-01" in told
    assert ground.SECRET not in told
    assert ground.SECRET not in running.said
    assert running.process.poll() is None, "it was to be looked at while it runs"
