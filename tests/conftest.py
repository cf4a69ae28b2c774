"""Fixtures for every tier: one stack of real servers a session, each of them clean for a test that asks for it."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from psycopg import sql

from devstack import DevStack
from devstack.api import Api
from devstack.process import Service, wait_until

SCHEMA = Path(__file__).parents[1] / "sql" / "source_schema.sql"


# Started in the background of a script, SIGINT is ignored, and so it would be in every program that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stack() -> Iterator[DevStack]:
    """All servers, for the whole session. A test may stop, kill and pause them; it starts them again."""
    with DevStack(*DevStack.SERVICES, postgres_settings={"max_prepared_transactions": "10"}) as running:
        yield running


def _up(service: Service) -> None:
    """See that it runs even if the test before has failed and left it down: one failure is enough."""
    if service.running:
        service.resume()
    else:
        service.kill()
        service.start()


@pytest.fixture
def database(stack: DevStack) -> Iterator[str]:
    """DSN of a new database with the source tables, dropped afterwards together with its slots."""
    _up(stack.postgres)
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    dsn = stack.postgres.dsn_for(database=name)
    with psycopg.connect(dsn) as connection:
        connection.execute(SCHEMA.read_bytes())
    yield dsn
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        _drop_slots(admin, name)
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _drop_slots(admin: psycopg.Connection, database: str) -> None:
    """Drop the database's slots; who still reads one is cut off first."""
    query = "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s"
    readers = [pid for _, pid in admin.execute(query, [database]) if pid is not None]
    for pid in readers:
        admin.execute("SELECT pg_terminate_backend(%s)", [pid])
    wait_until(lambda: not any(pid for _, pid in admin.execute(query, [database])), "the slots' readers to end")
    for slot, _ in admin.execute(query, [database]).fetchall():
        admin.execute("SELECT pg_drop_replication_slot(%s)", [slot])


@pytest.fixture
def redis_url(stack: DevStack) -> str:
    """URL of an empty Redis."""
    _up(stack.redis)
    with redis.Redis.from_url(stack.redis.url) as client:
        client.flushall()
    return stack.redis.url


@pytest.fixture
def clickhouse_url(stack: DevStack) -> str:
    """URL of an empty, well behaved ClickHouse."""
    _up(stack.clickhouse)
    stack.clickhouse.reset()
    return stack.clickhouse.url


@pytest.fixture
def api(stack: DevStack) -> Api:
    """The API, well behaved and without memory."""
    _up(stack.api)
    stack.api.reset()
    return stack.api
