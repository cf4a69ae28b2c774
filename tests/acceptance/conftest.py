"""Fixtures of the acceptance tests: the real program on a clean stack, logged in as a plain role; see `program.py`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from devstack.process import free_port
from tests.acceptance.destinations import Destinations
from tests.acceptance.program import SECRET, Program

ROLES = Path(__file__).parents[2] / "sql" / "roles.sql"
ROLE, PASSWORD = "replicator", f"{SECRET}-postgres"


@pytest.fixture
def plain_dsn(stack: DevStack, database: str) -> str:
    """DSN of the role that sql/roles.sql makes, for the test's own database."""
    variables = ["-v", f"role={ROLE}", "-v", f"password={PASSWORD}"]
    psql = ["psql", "-X", "-q", database, *variables, "-f", str(ROLES)]
    subprocess.run(psql, check=True, timeout=60)
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    return stack.postgres.dsn_for(database=str(name), user=ROLE, password=PASSWORD)


@pytest.fixture
def environment(plain_dsn: str, redis_url: str, clickhouse_url: str, api: Api, tmp_path: Path) -> dict[str, str]:
    """The settings of a replicator with a slot, a checkpoint and an admin port of its own."""
    return {
        "REPLICATOR_POSTGRES_DSN": plain_dsn,
        "REPLICATOR_SLOT": plain_dsn.rpartition("/")[2],  # the database: as unique in the cluster
        "REPLICATOR_SINKS": "clickhouse,redis,http",
        "REPLICATOR_CLICKHOUSE_URL": clickhouse_url,
        "REPLICATOR_REDIS_URL": redis_url,
        "REPLICATOR_HTTP_URL": api.url,
        "REPLICATOR_CHECKPOINT_URL": f"sqlite:///{tmp_path}/checkpoint.db",
        "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}",
    }


@pytest.fixture
def program(environment: dict[str, str], database: str, tmp_path: Path) -> Iterator[Program]:
    """A replicator, not started; its log is shown on failure."""
    program = Program(environment, database, tmp_path / "replicator.log")
    yield program
    program.end()
    print(program.log)  # noqa: T201  pytest shows it when the test has failed


@pytest.fixture
def destinations(stack: DevStack) -> Iterator[Destinations]:
    """What has arrived."""
    destinations = Destinations(stack)
    yield destinations
    destinations.redis.close()


@pytest.fixture
def source(database: str) -> Iterator[psycopg.Connection]:
    """The superuser's connection to the source database, each statement a transaction."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection
