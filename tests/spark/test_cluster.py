"""Several programs on one standalone cluster, started as a person starts them: spark-submit, and a slot beside another.

The sinks are PostgreSQL's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.process import free_port, wait_until
from devstack.spark import EXECUTORS
from tests.support import environment as ground
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import assert_clean, succeed
from tests.support.spark import PYTHON, SparkBackfill, SparkProgram

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-spark: make spark-setup"),
]

EVERYTHING = ("--start", "2000-01-01", "--end", "2100-01-01")


def options(*settings: str) -> list[str]:
    """For the command line."""
    return [word for setting in settings for word in ("--conf", setting)]


def test_spark_submit(  # noqa: PLR0917  fixtures
    spark: SparkProgram,
    environment: dict[str, str],
    stack: DevStack,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
) -> None:
    """It runs both commands, with the master that it is given.

    It does not hand SIGTERM on, so that is as a crash: it leaves no process behind, and what was in flight is written
    again by whoever goes on, here the replicator itself.
    """
    with stack.spark(**environment) as cluster:
        given = ["--master", cluster.master.url, *options(*EXECUTORS)]
        spark.submitted, spark.options = True, tuple(given)
        spark.start()
        insert_many(source, 2_000)
        spark.wait_until_caught_up()
        assert f"carried out by Spark at {cluster.master.url} (2 executors, 4 cores)" in succeed(spark.run("status"))
        arguments = (*EVERYTHING, "--sinks", "clickhouse,redis", "--slices", "4")
        running = SparkBackfill(environment, tmp_path / "backfill.log", *arguments, submit=given)
        assert "redis       2000 written (0 new, 2000 already there)" in succeed(running.result())
        insert_many(source, 2_000)
        assert 143 == spark.stop()
        spark.kill()  # until the slot is free
        assert_clean(spark.said)
    spark.product = True
    spark.start()
    insert_many(source, 10)
    spark.wait_until_caught_up()
    assert 0 == spark.stop()
    assert assert_exact(database, destinations) <= 2_000


@pytest.mark.timeout(600)  # Spark starts four times
def test_two_slots(  # noqa: PLR0917  fixtures
    spark: SparkProgram,
    environment: dict[str, str],
    stack: DevStack,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
) -> None:
    """Two databases with the same ids, and the same Redis and ClickHouse: each has a prefix, a database, an API.

    An application without a bound on its cores takes all. The other, and a backfill, say that they get none, and go on
    as soon as there are some.
    """
    with ExitStack() as ends:
        api = ends.enter_context(DevStack("api")).api
        other = ends.enter_context(ground.fresh_database(stack))
        second = SparkProgram(own(environment, stack, other, api.url, tmp_path), other, tmp_path / "second.log")
        ends.callback(lambda: print(second.log))  # noqa: T201  pytest shows it when the test has failed
        ends.callback(second.end)
        cluster = ends.enter_context(stack.spark(**environment))
        bounded = ("--master", cluster.master.url, *options(*EXECUTORS))
        of_nodes = options(*(f"spark.executorEnv.{setting}" for setting in apart_on_nodes(second, tmp_path)))
        spark.options, second.options = (*bounded, "--conf", "spark.cores.max=8"), (*bounded, *of_nodes)

        spark.start()
        wait_until(lambda: "Spark has 4 executors, 8 cores" in spark.said, "the first to have all")
        insert_many(source, 2_000)
        spark.wait_until_caught_up()
        second.start()
        beside = ends.enter_context(psycopg.connect(other, autocommit=True))
        beside.execute("UPDATE content SET content_type = 'song', length_seconds = 1000")
        insert_many(beside, 3_000)
        arguments = (*EVERYTHING, "--sinks", "clickhouse,redis", *bounded)
        running = SparkBackfill(environment, tmp_path / "backfill.log", *arguments)
        ends.callback(running.end)
        wait_until(lambda: "no executor of Spark takes the write" in second.admin("/readyz"), "it to say so", 60)
        assert "(0 executors, 0 cores)" in succeed_or_not_ready(second)
        wait_until(lambda: "0 of 1 slices; no executor of Spark takes it" in running.said, "the backfill, too")

        assert 0 == spark.stop()
        second.wait_until_caught_up()
        assert "redis       2000 written (0 new, 2000 already there)" in succeed(running.result())
        spark.options = bounded
        spark.start()
        insert_many(source, 2_000)
        insert_many(beside, 1_000)
        for program in (spark, second):
            program.wait_until_caught_up()
            assert "(2 executors, 4 cores)" in succeed(program.run("status"))
            assert 0 == program.stop()
            assert_clean(program.said)
        assert 0 == assert_exact(database, destinations)
        apart = Destinations(stack, database="two", prefix="two:", api_url=api.url)
        assert 0 == assert_exact(other, apart)
        apart.redis.close()
        stack.clickhouse.query("DROP DATABASE two SYNC")


def apart_on_nodes(program: SparkProgram, folder: Path) -> Iterator[str]:
    """What keeps its events apart, for nodes that have the first one's settings. Addresses are in files there."""
    yield f"REPLICATOR_REDIS_PREFIX={program.environment['REPLICATOR_REDIS_PREFIX']}"
    for name in ("REPLICATOR_CLICKHOUSE_URL", "REPLICATOR_HTTP_URL"):
        (folder / name).write_text(program.environment[name], encoding="utf-8")
        yield from (f"{name}=", f"{name}_FILE={folder / name}")


def own(environment: dict[str, str], stack: DevStack, database: str, api_url: str, folder: Path) -> dict[str, str]:
    """The settings of the second."""
    stack.clickhouse.query("CREATE DATABASE two")
    return environment | {
        "REPLICATOR_POSTGRES_DSN": ground.plain_role(stack, database),
        "REPLICATOR_SLOT": "two",
        "REPLICATOR_CHECKPOINT_URL": f"sqlite:///{folder}/two.db",
        "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}",
        "REPLICATOR_CLICKHOUSE_URL": stack.clickhouse.url.removesuffix("engagement") + "two",
        "REPLICATOR_REDIS_PREFIX": "two:",
        "REPLICATOR_HTTP_URL": api_url,
    }


def succeed_or_not_ready(program: SparkProgram) -> str:
    """What `status` says while it is not ready."""
    found = program.run("status")
    assert 3 == found.code
    return found.stdout
