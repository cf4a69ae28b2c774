"""A clean environment for a replicator on a stack of servers: its own database, a plain role, empty sinks, settings.

Tests get it from fixtures (`tests/conftest.py`, `tests/acceptance/conftest.py`); `tests/prove` calls it directly.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis
from psycopg import sql

from devstack import DevStack
from devstack.process import Service, free_port, wait_until

SQL = Path(__file__).parents[2] / "sql"

SECRET = "planted"  # noqa: S105  part of every password and token in these tests; must never be printed
ROLE, PASSWORD = "replicator", f"{SECRET}-postgres"


def up(service: Service) -> None:
    """Start it if a failed test has left it down: one failure is enough."""
    if service.running:
        service.resume()
    else:
        service.kill()
        service.start()


@contextmanager
def fresh_database(stack: DevStack) -> Iterator[str]:
    """DSN of a new database with the source tables, dropped afterwards together with its slots."""
    up(stack.postgres)
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    dsn = stack.postgres.dsn_for(database=name)
    with psycopg.connect(dsn) as connection:
        connection.execute((SQL / "source_schema.sql").read_bytes())
    yield dsn
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        _drop_slots(admin, name)
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _drop_slots(admin: psycopg.Connection, database: str) -> None:
    """Drop the database's slots, after ending the processes that read them."""
    query = "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s"
    readers = [pid for _, pid in admin.execute(query, [database]) if pid is not None]
    for pid in readers:
        admin.execute("SELECT pg_terminate_backend(%s)", [pid])
    wait_until(lambda: not any(pid for _, pid in admin.execute(query, [database])), "the slots' readers to end")
    for slot, _ in admin.execute(query, [database]).fetchall():
        admin.execute("SELECT pg_drop_replication_slot(%s)", [slot])


def plain_role(stack: DevStack, database: str, role: str = ROLE, password: str = PASSWORD) -> str:
    """DSN of the role that sql/roles.sql makes, for this database."""
    variables = ["-v", f"role={role}", "-v", f"password={password}"]
    psql = ["psql", "-X", "-q", database, *variables, "-f", str(SQL / "roles.sql")]
    subprocess.run(psql, check=True, timeout=60)
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    return stack.postgres.dsn_for(database=str(name), user=role, password=password)


def empty_redis(stack: DevStack) -> str:
    """Its URL."""
    up(stack.redis)
    with redis.Redis.from_url(stack.redis.url) as client:
        client.flushall()
    return stack.redis.url


def empty_clickhouse(stack: DevStack) -> str:
    """URL of a well-behaved ClickHouse without tables."""
    up(stack.clickhouse)
    stack.clickhouse.reset()
    return stack.clickhouse.url


def empty_api(stack: DevStack) -> str:
    """URL of a well-behaved API that has forgotten everything."""
    up(stack.api)
    stack.api.reset()
    return stack.api.url


def environment(dsn: str, clickhouse_url: str, redis_url: str, http_url: str, *, folder: Path) -> dict[str, str]:
    """The settings of a replicator with its own slot, checkpoint and admin port."""
    return {
        "REPLICATOR_POSTGRES_DSN": dsn,
        "REPLICATOR_SLOT": dsn.rpartition("/")[2],  # the database: as unique in the cluster
        "REPLICATOR_SINKS": "clickhouse,redis,http",
        "REPLICATOR_CLICKHOUSE_URL": clickhouse_url,
        "REPLICATOR_REDIS_URL": redis_url,
        "REPLICATOR_HTTP_URL": http_url,
        "REPLICATOR_CHECKPOINT_URL": f"sqlite:///{folder}/checkpoint.db",
        "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}",
        "REPLICATOR_PROGRAM": "python -m replicator",  # in messages, wherever Python is
    }
