"""Fixtures of the acceptance tests: the real program on a clean stack, logged in as a plain role; see `program.py`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from tests.support import environment as ground
from tests.support.destinations import Destinations
from tests.support.program import Program


@pytest.fixture
def plain_dsn(stack: DevStack, database: str) -> str:
    """DSN of the role that sql/roles.sql makes, for the test's own database."""
    return ground.plain_role(stack, database)


@pytest.fixture
def environment(plain_dsn: str, redis_url: str, clickhouse_url: str, api: Api, tmp_path: Path) -> dict[str, str]:
    """The settings of a replicator with a slot, a checkpoint and an admin port of its own."""
    return ground.environment(plain_dsn, clickhouse_url, redis_url, api.url, folder=tmp_path)


@pytest.fixture
def program(environment: dict[str, str], database: str, tmp_path: Path) -> Iterator[Program]:
    """A replicator, not started; its log is shown on failure."""
    program = Program(environment, database, tmp_path / "replicator.log")
    yield program
    program.end()
    print(program.log)  # noqa: T201  pytest shows it when the test has failed


@pytest.fixture
def chance() -> random.Random:
    """A generator whose seed is shown when the test fails."""
    seed = random.randrange(10**9)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test has failed
    return random.Random(seed)  # noqa: S311


@pytest.fixture
def quick(program: Program) -> Program:
    """The program, with pauses that fit a test: real ones differ only in how long they are."""
    program.environment |= {
        "REPLICATOR_RETRY_MAX_SECONDS": "0.5",
        "REPLICATOR_HTTP_BATCH_SIZE": "500",
        "REPLICATOR_HTTP_TIMEOUT_SECONDS": "2",
        "REPLICATOR_CLICKHOUSE_LINGER_SECONDS": "0.2",
        "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.2",
    }
    return program


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
