"""`python -m replicator_spark stream` as it stands, on real Spark: whatever dies, the sinks are PostgreSQL's."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from devstack import DevStack
from devstack.process import free_port, wait_until
from devstack.spark import EXECUTORS, SparkCluster
from devstack.watchdog import tree
from tests.prove.shapes import NOTE_CONTENT
from tests.support.destinations import Destinations, expected
from tests.support.environment import SECRET
from tests.support.exact import assert_exact, compare, first_views
from tests.support.load import Load, insert_many
from tests.support.metrics import value
from tests.support.program import assert_clean, succeed
from tests.support.spark import PYTHON, SparkProgram, command_line, shown
from tests.support.spark_altered import PLACES

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-spark: make spark-setup")

STREAMS = "SELECT application_name FROM pg_stat_replication WHERE application_name LIKE %s"
CHANGE = "UPDATE content SET length_seconds = %s, content_type = 'film' WHERE content_id < 3"
DIES_SECONDS = 90.0
WHOLE = "Spark has 2 executors, 4 cores"


@pytest.fixture
def noted(source: psycopg.Connection) -> psycopg.Connection:
    """The source; each event's content is noted as of its commit."""
    source.execute(NOTE_CONTENT.encode())
    return source


def insert(source: psycopg.Connection, rows: int, turn: int) -> None:
    """Events of many kinds, whose content changes before, between and after."""
    insert_many(source, rows // 4)
    source.execute(CHANGE, [100 + turn])
    with source.transaction():
        insert_many(source, rows // 2)
        source.execute(CHANGE, [200 + turn])
        insert_many(source, rows // 4)
    source.execute(CHANGE, [300 + turn])


def test_there_and_back(
    spark: SparkProgram, noted: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """The product, Spark, the product: each goes on where the other has stopped, and nothing comes twice.

    The commands of the product work beside Spark. `make test` has this one test on real Spark, where there is one.
    """
    for turn, product in enumerate([True, False, True]):
        spark.product = product
        spark.start()
        insert(noted, 20_000, turn)
        spark.wait_until_caught_up()
        carrier = "" if product else " on Spark at local[3]"
        named = noted.execute(STREAMS, [f"%{spark.slot}%"]).fetchall()
        assert [(f"replicator {spark.slot}{carrier}",)] == named
        assert ("carried out by Spark at local[3]" in succeed(spark.run("status"))) is not product
        assert ("Writes are carried out by Spark at local[3] (1 executor, 3 cores)." in spark.admin("/")) is not product
        assert (None if product else 3) == value(spark.admin("/metrics"), "carrier_cores")
        assert 0 == spark.stop()
        assert_clean(spark.said)
    assert 0 == assert_exact(database, destinations, content_at_commit=True)


# -- the driver ----------------------------------------------------------------------------------------------------


@pytest.mark.spark
@pytest.mark.timeout(600)  # Spark starts seven times
def test_the_driver_dies_at_every_place(
    spark: SparkProgram, noted: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """One after the other: each start goes on where the last one was killed. In the end every field is right."""
    seed = random.randrange(10**6)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test has failed
    chance = random.Random(seed)  # noqa: S311  likewise
    succeed(spark.run("init"))
    for turn, place in enumerate(PLACES):
        spark.altered = "--die", place, "--after", str(chance.randint(1, 3_000))
        spark.spawn()
        insert(noted, 4_000, turn)
        assert -signal.SIGKILL == spark.process.wait(DIES_SECONDS), place
        spark.kill()  # until the slot is free
    spark.altered = ()
    spark.start()
    spark.wait_until_caught_up()
    assert 0 == spark.stop()
    repeats = assert_exact(database, destinations, content_at_commit=True)
    assert repeats <= 20_000 * len(PLACES)


@pytest.mark.spark
def test_spark_ends_under_it(
    spark: SparkProgram, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """SIGKILL for the JVM, while the driver waits for a write inside a transaction of 300,000 rows: it ends with 1.

    The driver is killed inside the same transaction. Whoever starts it again has everything.
    """
    spark.start()
    insert_many(source, 300_000)
    wait_until(lambda: len(destinations.api()) >= 40_000, "some of them at the API", 60)
    [jvm] = spark.workers("SparkSubmit")
    os.kill(jvm, signal.SIGKILL)
    assert 1 == spark.process.wait(DIES_SECONDS)
    assert "CRITICAL R700 replicator.spark: Spark's process on the driver has ended" in spark.said
    assert SECRET not in spark.said
    assert "in an unexpected way" not in spark.said, "a write that Spark's end has failed is no bug of a sink"
    spark.start()
    had = len(destinations.api())
    wait_until(lambda: len(destinations.api()) >= had + 40_000, "more of them at the API", 60)
    assert len(destinations.api()) < 300_000, "it was to be killed inside"
    spark.kill()
    spark.start()
    spark.wait_until_caught_up(120)
    assert 0 == spark.stop()
    assert_exact(database, destinations)


@pytest.mark.spark
def test_spark_hangs(spark: SparkProgram, source: psycopg.Connection, tmp_path: Path) -> None:
    """Spark's process does not answer any more: a stop ends all the same, and leaves no process that keeps the cores.

    Before, its folder is gone for a while. How many cores there are is what the cluster has, whatever
    spark.default.parallelism says.
    """
    folder = tmp_path / "spark"
    folder.mkdir()
    spark.options = (*spark.options, "--conf", "spark.default.parallelism=200", "--conf", f"spark.local.dir={folder}")
    spark.environment["REPLICATOR_RETRY_MAX_SECONDS"] = "0.5"
    spark.start()
    insert_many(source, 5)
    spark.wait_until_caught_up()
    assert "Spark has 1 executor, 3 cores" in spark.said
    folder.rename(tmp_path / "away")
    insert_many(source, 5)
    wait_until(lambda: "was not given a task (No such file or directory)" in spark.admin("/readyz"), "trouble")
    (tmp_path / "away").rename(folder)
    spark.wait_until_caught_up()
    [jvm] = spark.workers("SparkSubmit")
    os.kill(jvm, signal.SIGSTOP)
    assert 0 == spark.stop()
    wait_until(lambda: not command_line(jvm), "the end of Spark's process")


@pytest.mark.spark
def test_a_stop_while_spark_starts(spark: SparkProgram) -> None:
    """No Master answers, which Spark finds out in a minute: a stop ends it at once, and its process with it."""
    spark.options = "--master", "spark://127.0.0.1:1"
    spark.spawn()
    wait_until(lambda: "Setting Spark log level" in spark.said, "Spark's process")
    started = spark.workers("SparkSubmit")
    assert 0 == spark.stop()
    wait_until(lambda: not any(map(command_line, started)), "the end of Spark's process")
    assert_clean(spark.said)


@pytest.mark.spark
def test_an_older_checkpoint(spark: SparkProgram, source: psycopg.Connection, tmp_path: Path) -> None:
    """Restored beside a slot that has gone on, it is a gap, and told as the product tells it."""
    spark.product = True
    spark.start()
    insert_many(source, 5)
    spark.wait_until_caught_up()
    assert 0 == spark.stop()
    shutil.copy(tmp_path / "checkpoint.db", tmp_path / "older.db")
    spark.start()
    insert_many(source, 5)
    spark.wait_until_caught_up()
    assert 0 == spark.stop()
    shutil.copy(tmp_path / "older.db", tmp_path / "checkpoint.db")
    spark.product = False
    spark.spawn()
    assert 1 == spark.process.wait(DIES_SECONDS)
    assert "is not continuous with the checkpoint" in spark.said
    assert "init --accept-gap" in spark.said


@pytest.mark.spark
def test_settings_of_spark_that_are_refused(
    spark: SparkProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 2 and one line, before anything is written: retries of Spark's, and a secret for the nodes."""
    spark.options = (*spark.options, "--conf", "spark.task.maxFailures=4")
    spark.spawn()
    assert 2 == spark.process.wait(DIES_SECONDS)
    assert "spark.task.maxFailures is unusable: Spark would try a task up to 4 times, and http could see" in spark.said
    secret = f"spark.executorEnv.REPLICATOR_REDIS_URL redis://:{SECRET}@127.0.0.1\n"
    (tmp_path / "spark-defaults.conf").write_text(secret, encoding="utf-8")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    spark.options = spark.options[:2]
    spark.spawn()
    assert 2 == spark.process.wait(DIES_SECONDS)
    assert "spark.executorEnv.REPLICATOR_REDIS_URL is unusable: it may have a secret in it" in spark.said
    assert SECRET not in spark.said


# -- one run, many things ------------------------------------------------------------------------------------------

PARTITIONED = """
ALTER TABLE engagement_events RENAME TO rest;
CREATE TABLE engagement_events (LIKE rest INCLUDING DEFAULTS) PARTITION BY RANGE (user_id);
ALTER TABLE engagement_events ATTACH PARTITION rest DEFAULT;
GRANT SELECT ON engagement_events TO replicator
"""
INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, %s, 'direct')"
MOVED = "SELECT confirmed_flush_lsn > %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"


@pytest.mark.spark
def test_what_the_product_does_it_does_on_spark(
    spark: SparkProgram, stack: DevStack, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """One run: a sink that is away, refused events, a part made meanwhile, foreign WAL. Spark shows no secret."""
    port = free_port()
    spark.options = (*spark.options, "--conf", "spark.ui.enabled=true", "--conf", f"spark.ui.port={port}")
    source.execute(PARTITIONED)
    spark.environment["REPLICATOR_POSTGRES_DSN"] += "?options=-c%20wal_sender_timeout%3D1s"
    spark.environment |= {"REPLICATOR_HTTP_TIMEOUT_SECONDS": "1", "REPLICATOR_RETRY_MAX_SECONDS": "0.5"}
    spark.start()

    # The API is away for a while. The others go on, /readyz says so, and the stream stands.
    stack.api.behave(status=503)
    insert_many(source, 2_000)
    wait_until(lambda: "sink http did not take the batch".casefold() in spark.admin("/readyz").casefold(), "trouble")
    assert 2_000 == sum(destinations.counts().values())
    assert 1 == spark.said.count("reading slot")

    # It refuses two events: dead letters, once each, with the API's words. The others arrive.
    stack.api.behave(refuse_event_ids=[7, 70])
    spark.wait_until_caught_up()
    letters = json.loads(succeed(spark.run("dead-letters", "list", "--json")))["dead_letters"]
    assert [7, 70] == sorted(letter["event_id"] for letter in letters)
    stack.api.behave()
    succeed(spark.run("dead-letters", "replay"))

    # A part that is made while it runs.
    source.execute("CREATE TABLE part PARTITION OF engagement_events FOR VALUES FROM (10000) TO (20000)")
    wait_until(lambda: "part is a new part" in spark.said, "it to see the part")
    source.execute(INSERT, [10_001])
    spark.wait_until_caught_up()
    assert assert_exact(database, destinations) < 20, "it was asked with events that it had"

    # Nothing but foreign WAL: the slot moves.
    [lsn] = source.execute("SELECT pg_current_wal_lsn()::text").fetchone() or ("",)
    source.execute("CREATE TABLE noise AS SELECT n FROM generate_series(1, 10000) AS n")
    wait_until(lambda: source.execute(MOVED, [lsn, spark.slot]).fetchone() == (True,), "the slot to move")

    told = shown(port) + "".join(command_line(pid) for pid in spark.workers(""))
    assert f"replicator {spark.slot}" in told
    assert SECRET not in told
    assert_clean(spark.said)
    assert 0 == spark.stop()


@pytest.mark.spark
@pytest.mark.parametrize("breach", ["contents-on-the-nodes", None])
def test_contents_are_those_of_the_commit(  # noqa: PLR0917  fixtures
    spark: SparkProgram,
    stack: DevStack,
    noted: psycopg.Connection,
    destinations: Destinations,
    database: str,
    breach: str | None,
) -> None:
    """However late a write is. Looked up on the nodes they would be today's, and the comparison finds that."""
    spark.altered = ("--breach", breach) if breach else ()
    spark.environment["REPLICATOR_RETRY_MAX_SECONDS"] = "0.5"
    spark.start()
    stack.api.behave(status=503)
    noted.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    insert(noted, 400, 1)
    noted.execute("TRUNCATE content")
    insert_many(noted, 4)
    wait_until(lambda: 404 == sum(destinations.counts().values()), "Redis to have them")
    stack.api.behave()
    spark.wait_until_caught_up()
    assert 0 == spark.stop()
    wanted = expected(database, content_at_commit=True)
    distinct, _ = first_views(destinations.api())
    found = compare(wanted, distinct)
    assert ([], bool(breach)) == (found.missing, bool(found.wrong))
    if not breach:
        assert_exact(database, destinations, content_at_commit=True)


@pytest.mark.spark
def test_a_checkpoint_before_the_sinks(
    spark: SparkProgram, stack: DevStack, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """Broken on purpose, the comparison finds what is lost."""
    spark.altered = ("--breach", "checkpoint-before-sink")
    spark.start()
    stack.api.behave(status=503)
    insert_many(source, 100)
    spark.wait_until_caught_up()
    spark.lose_power()
    stack.api.behave()
    spark.altered, spark.product = (), True
    spark.start()
    insert_many(source, 1)
    spark.wait_until_caught_up()
    assert 0 == spark.stop()
    distinct, _ = first_views(destinations.api())
    assert 100 == len(compare(expected(database), distinct).missing)


# -- contents, repeats, and a sink that is away --------------------------------------------------------------------


@pytest.mark.spark
def test_contents_over_a_restart(
    spark: SparkProgram, stack: DevStack, noted: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """Contents change within a batch, between the end of driver and workers and the next start, and after that.

    The API is away until then, so the new driver reads all of it again: each event has the content of its commit.
    """
    spark.start()
    stack.api.behave(status=503)
    insert(noted, 400, 0)
    wait_until(lambda: 400 == sum(destinations.counts().values()), "Redis to have them")
    spark.lose_power()
    insert(noted, 400, 1)
    stack.api.behave()
    spark.start()
    insert(noted, 400, 2)
    spark.wait_until_caught_up()
    assert 0 == spark.stop()
    assert 0 == assert_exact(database, destinations, content_at_commit=True)


@pytest.mark.spark
def test_a_stop_and_a_start_repeat_nothing(spark: SparkProgram, database: str, destinations: Destinations) -> None:
    """SIGTERM under load: after it each sink is given exactly the events that it does not have."""
    seed = random.randrange(10**6)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test has failed
    spark.start()
    with Load(database, random.Random(seed), rows=200):  # noqa: S311  likewise
        wait_until(lambda: len(destinations.api()) >= 1_000, "the first of them at the API")
        assert 0 == spark.stop()
        before = arrived(destinations)
        spark.start()
    spark.wait_until_caught_up(120)
    given = {sink: spark.metric("sink_events_total", sink=sink) for sink in before}
    assert 0 == spark.stop()
    assert {sink: len(expected(database)) - events for sink, events in before.items()} == given
    assert 0 == assert_exact(database, destinations)


def arrived(destinations: Destinations) -> dict[str, int]:
    """How many events each sink has."""
    return {
        "clickhouse": len(destinations.clickhouse()),
        "redis": sum(destinations.counts().values()),
        "http": len(destinations.api()),
    }


WAL_SENDER_SECONDS = 5
READER = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"


@pytest.mark.spark
def test_a_sink_is_away_for_long(
    spark: SparkProgram, stack: DevStack, noted: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """For more than twice wal_sender_timeout: PostgreSQL keeps the connection, /readyz is red, and nothing is lost."""
    name = sql.Identifier(str(psycopg.conninfo.conninfo_to_dict(database)["dbname"]))
    noted.execute(sql.SQL("ALTER DATABASE {} SET wal_sender_timeout = {}").format(name, f"{WAL_SENDER_SECONDS}s"))
    spark.environment["REPLICATOR_RETRY_MAX_SECONDS"] = "0.5"
    spark.start()
    reader = noted.execute(READER, [spark.slot]).fetchone()
    stack.api.behave(status=503)
    insert(noted, 4_000, 0)
    long = 2.2 * WAL_SENDER_SECONDS
    wait_until(lambda: "sink http did not take the batch" in spark.admin("/readyz").casefold(), "trouble", 120)
    wait_until(lambda: spark.status()["sinks"]["http"]["trouble_seconds"] > long, "the API to be away for long")
    wait_until(lambda: 4_000 == sum(destinations.counts().values()), "Redis to have them", 120)
    assert [] == destinations.api()
    assert "ready" != spark.admin("/readyz").strip()
    stack.api.behave()
    spark.wait_until_caught_up()
    wait_until(lambda: "ready" == spark.admin("/readyz").strip(), "it to be ready")
    assert reader == noted.execute(READER, [spark.slot]).fetchone()
    assert 0 == spark.stop()
    assert 0 == assert_exact(database, destinations, content_at_commit=True)


# -- the nodes -----------------------------------------------------------------------------------------------------


def assert_discreet(folder: Path) -> None:
    """Neither a secret nor a row is in the logs there."""
    logs = [file for file in folder.rglob("*") if file.name in {"log", "stderr", "stdout"}]
    assert len(logs) > 3
    said = [file.read_text(encoding="utf-8", errors="replace") for file in logs]
    assert not [text for text in said if SECRET in text or '"4k' in text or "event_id" in text]


PYTHONS, EXECUTOR = "pyspark.daemon", "CoarseGrainedExecutorBackend"


def below(cluster: SparkCluster, word: str) -> list[int]:
    """Processes of the Workers whose command line has this word."""
    pids = [pid for worker in cluster.workers if worker.running for pid in tree(worker.pid)]
    return [pid for pid in pids if word in command_line(pid)]


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.mark.spark
@pytest.mark.timeout(600)
def test_whatever_dies_on_the_nodes(  # noqa: PLR0917  fixtures
    spark: SparkProgram,
    environment: dict[str, str],
    stack: DevStack,
    noted: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
) -> None:
    """A Master and two Workers: a Python process, an executor, a Worker and the other one die while they write.

    Then a second driver, which waited as the standby, takes over from the first.
    """
    options = [word for option in EXECUTORS for word in ("--conf", option)]
    with stack.spark(**environment) as cluster:
        spark.options = ("--master", cluster.master.url, *options)
        spark.start()
        insert(noted, 400, 0)
        spark.wait_until_caught_up()

        def while_it_writes(turn: int) -> None:
            before = len(destinations.api())
            insert(noted, 12_000, turn)
            wait_until(lambda: len(destinations.api()) > before, "the first of them at the API")

        while_it_writes(1)
        kill(below(cluster, PYTHONS))
        spark.wait_until_caught_up(90)
        while_it_writes(2)
        kill(below(cluster, EXECUTOR)[:1])
        spark.wait_until_caught_up(90)
        wait_until(lambda: WHOLE in spark.said.rpartition("Lost executor")[2], "another executor", 90)
        while_it_writes(3)
        cluster.workers[0].kill()
        spark.wait_until_caught_up(90)
        # Both executors are the other Worker's then. One that was just starting would outlive it.
        wait_until(lambda: WHOLE in spark.said.rpartition("worker lost")[2], "another executor", 90)
        cluster.workers[1].kill()
        insert(noted, 400, 4)
        wait_until(lambda: "no executor of Spark takes the write" in spark.admin("/readyz"), "trouble", 90)
        cluster.workers[1].start()
        spark.wait_until_caught_up(90)
        assert_clean(spark.said)

        second = SparkProgram(environment, database, tmp_path / "second.log")
        second.environment["REPLICATOR_ADMIN_LISTEN"] = ""
        second.options = spark.options
        try:
            second.spawn()
            second.wait_for_log("is held by process")
            while_it_writes(5)
            spark.end()
            second.wait_for_log("reading slot")
            second.wait_until_caught_up(90)
            assert 0 == second.stop()
        finally:
            second.end()
            print(second.log)  # noqa: T201  pytest shows it when the test has failed
        assert_discreet(stack.folder / "spark")
    repeats = assert_exact(database, destinations, content_at_commit=True)
    assert repeats <= 5 * 20_000


SOON = (
    "spark.network.timeout=12s",
    "spark.network.timeoutInterval=2s",
    "spark.executor.heartbeatInterval=2s",
    "spark.task.reaper.killTimeout=5s",
)
"""What Spark takes a minute or two for."""


@pytest.mark.spark
@pytest.mark.timeout(600)
def test_whatever_hangs_on_the_nodes(  # noqa: PLR0917  fixtures
    spark: SparkProgram,
    environment: dict[str, str],
    stack: DevStack,
    noted: psycopg.Connection,
    database: str,
    destinations: Destinations,
) -> None:
    """SIGSTOP while they write: for Python processes, then for the executors, then for all Python on the nodes.

    Spark is named, not the sink; what they had is written again. What hangs is ended and replaced.
    """
    spark.altered = ("--breach", "impatient")
    spark.environment["REPLICATOR_RETRY_MAX_SECONDS"] = "0.5"
    options = [word for option in (*EXECUTORS, *SOON) for word in ("--conf", option)]
    with stack.spark(**environment) as cluster:
        spark.options = ("--master", cluster.master.url, *options)
        spark.start()
        insert(noted, 400, 0)
        spark.wait_until_caught_up()

        def hang(turn: int, pids: Callable[[], list[int]]) -> None:
            stack.api.behave(delay_seconds=5)
            before, said = len(destinations.api()), len(spark.said)
            insert(noted, 4_000, turn)
            wait_until(lambda: len(destinations.api()) > before, "the first of them at the API")
            kill(stopped := pids(), signal.SIGSTOP)
            stack.api.behave()
            wait_until(lambda: GIVEN_UP in spark.said[said:], "trouble", 90)
            spark.wait_until_caught_up(90)
            wait_until(lambda: not any(command_line(pid) for pid in stopped), "the end of what hangs", 90)

        hang(1, lambda: [pid for pid in below(cluster, PYTHONS) if [pid] == tree(pid)])
        hang(2, lambda: below(cluster, EXECUTOR))
        hang(3, lambda: below(cluster, PYTHONS))
        assert 0 == spark.stop()
        assert_clean(spark.said)
    repeats = assert_exact(database, destinations, content_at_commit=True)
    assert repeats <= 3 * 20_000


GIVEN_UP = "Sink http did not take the batch: Spark gave a task up (its process on the node did not answer for 8 s)"
