"""Fixtures for every tier: one stack of real servers a session, each of them clean for a test that asks for it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from devstack import DevStack
from devstack.api import Api
from tests.prove.failpoints import BREACHES
from tests.support import environment as ground
from tests.support import program
from tests.support.destinations import Destinations
from tests.support.launcher import Launcher
from tests.support.warehouse import Warehouse

# How fast a busy machine makes up examples, and runs one, says nothing about the program.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# Programs that tests start would compile all of their modules at every start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Started in the background of a script, or by `nohup`, these are ignored, and so they would be in every program that
# tests signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


PACKAGES = ("replicator", "enrichment", "sinks", "checkpoint_store")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--breach NAME`: every replicator of this session breaks the rule, and the suite has to notice.

    `--rows N`: tests of history that take the fixture of that name have so many, instead of a number of their own.
    """
    parser.addoption("--breach", choices=BREACHES, help="break the rule on purpose: %(choices)s")
    parser.addoption("--rows", type=int, default=60_000, help="events in tests of backfill and reconcile (60000)")


def pytest_configure(config: pytest.Config) -> None:
    """Tell those that start replicators."""
    if breach := config.getoption("--breach"):
        program.ALTERED = ("--breach", breach)


@pytest.fixture(autouse=True)
def _file_rights() -> Iterator[None]:
    """The program keeps its files to itself; run within a test, it must not do so for the servers of later tests."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(scope="session", autouse=True)
def _launcher() -> Iterator[None]:
    """Programs that tests start have their libraries at once."""
    with Launcher() as program.LAUNCHER:
        yield
    program.LAUNCHER = None


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Logging, and what Python prints by itself, as pytest made them: the program takes over both."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in ours]
    handlers, level, factory = [*root.handlers], root.level, logging.getLogRecordFactory()
    shown, thread, ignored = warnings.showwarning, threading.excepthook, sys.unraisablehook
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, before in zip(ours, levels, strict=True):
        logger.setLevel(before)
    logging.setLogRecordFactory(factory)
    warnings.showwarning, threading.excepthook, sys.unraisablehook = shown, thread, ignored


@pytest.fixture
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a `.env`, a home, and an environment without settings of ours."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("REPLICATOR_") or name in {"STATE_DIRECTORY", "XDG_STATE_HOME"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> int:
    """How many events a test of history has."""
    return int(pytestconfig.getoption("--rows"))


@pytest.fixture(scope="session")
def stack() -> Iterator[DevStack]:
    """All servers, for the whole session. A test may stop, kill and pause them; it starts them again."""
    with DevStack(*DevStack.SERVICES, postgres_settings={"max_prepared_transactions": "10"}) as running:
        yield running


@pytest.fixture
def database(stack: DevStack) -> Iterator[str]:
    """DSN of a new database with the source tables, dropped afterwards together with its slots."""
    with ground.fresh_database(stack) as dsn:
        yield dsn


@pytest.fixture
def redis_url(stack: DevStack) -> str:
    """URL of an empty Redis."""
    return ground.empty_redis(stack)


@pytest.fixture
def clickhouse_url(stack: DevStack) -> str:
    """URL of an empty, well behaved ClickHouse."""
    return ground.empty_clickhouse(stack)


@pytest.fixture
def api(stack: DevStack) -> Api:
    """The API, well behaved and without memory."""
    ground.empty_api(stack)
    return stack.api


@pytest.fixture
def plain_dsn(stack: DevStack, database: str) -> str:
    """DSN of the role that sql/roles.sql makes, for the test's own database."""
    return ground.plain_role(stack, database)


@pytest.fixture
def warehouse(stack: DevStack) -> Iterator[Warehouse]:
    """Another database of the same server, with the tables that `examples/sinks/postgres_sink` writes to."""
    with ground.fresh_database(stack) as dsn:
        warehouse = Warehouse(stack, dsn)
        warehouse.make()
        yield warehouse


@pytest.fixture
def environment(plain_dsn: str, redis_url: str, clickhouse_url: str, api: Api, tmp_path: Path) -> dict[str, str]:
    """The settings of a replicator with a slot, a checkpoint and an admin port of its own."""
    return ground.environment(plain_dsn, clickhouse_url, redis_url, api.url, folder=tmp_path)


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
