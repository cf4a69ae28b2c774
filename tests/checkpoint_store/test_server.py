"""The checkpoint store on servers that change under it: poolers, standbys, settings of other people."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import event

from checkpoint_store import SqlCheckpointStore
from devstack import DevStack
from replicator.contracts.errors import CheckpointUnavailable
from replicator.contracts.events import Checkpoint, Position, SinkPosition
from tests.support.pgbouncer import PgBouncer, pgbouncer


def at(lsn: int) -> Checkpoint:
    """A checkpoint there."""
    sinks = {"redis": SinkPosition(position=Position(lsn - 1, 1), end_lsn=lsn)}
    return Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=lsn, sinks=sinks)


def end_lsn(store: SqlCheckpointStore) -> int:
    """Where it is."""
    stored = store.load("s")
    assert stored is not None
    return stored.end_lsn


@pytest.fixture(scope="module")
def stack() -> Iterator[DevStack]:
    """PostgreSQL, once for this module."""
    with DevStack("postgres") as stack:
        yield stack


@pytest.fixture
def empty(stack: DevStack) -> Iterator[DevStack]:
    """It, without the tables of the test before, or its settings."""
    yield stack
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        for statement in ("ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()", "DROP DATABASE engagement WITH (FORCE)",
                          "CREATE DATABASE engagement"):  # fmt: skip
            admin.execute(statement)


@pytest.fixture
def pooler(empty: DevStack) -> Iterator[PgBouncer]:
    """PgBouncer in transaction mode."""
    with pgbouncer(empty) as pooler:
        yield pooler


def test_through_a_pooler_life_after_life(pooler: PgBouncer) -> None:
    """Two replicators share one server connection, and each life leaves its own behind without a word."""
    lives = [SqlCheckpointStore(pooler.dsn) for _ in range(4)]
    lives[0].create()
    for number in range(40):  # psycopg would prepare a statement when it comes for the sixth time
        store = lives[number % 4]
        store.save(at(100 + number))
        assert 100 + number == end_lsn(store)
    for store in lives:
        store.close()


@pytest.mark.parametrize("configured", ["off", "local", "on", "remote_apply"])
def test_commits_are_durable_and_wait_for_no_standby(empty: DevStack, configured: str) -> None:
    """On the server's own disk, whatever server, role or URL say; a standby that never confirms holds nothing up."""
    with psycopg.connect(empty.postgres.superuser_dsn, autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        admin.execute("SELECT pg_reload_conf()")
    used: list[str] = []

    def look(connection: psycopg.Connection[tuple[str]]) -> None:
        used.extend(connection.execute("SHOW synchronous_commit").fetchone() or ())

    store = SqlCheckpointStore(f"{empty.postgres.dsn}?options=-csynchronous_commit%3D{configured}")
    event.listen(store._engine, "commit", lambda connection: look(connection.connection.dbapi_connection))  # noqa: SLF001
    store.create()
    store.save(at(100))
    assert 100 == end_lsn(store)
    assert {"local"} == {*used}
    store.close()


def _save_until_refused(store: SqlCheckpointStore) -> None:
    for number in range(1_000):  # the server reads its settings in a moment
        store.save(at(200 + number))


def test_a_standby_under_us_is_tried_again_on_a_new_connection(empty: DevStack) -> None:
    """After a failover the connection may lead to a server that only reads. The next one leads to the primary."""
    store = SqlCheckpointStore(empty.postgres.dsn)
    store.create()
    store.save(at(100))
    pids = []
    event.listen(store._engine, "begin", lambda c: pids.append(c.connection.dbapi_connection.info.backend_pid))  # noqa: SLF001
    with psycopg.connect(empty.postgres.superuser_dsn, autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        admin.execute("SELECT pg_reload_conf()")
        with pytest.raises(CheckpointUnavailable, match="ReadOnlySqlTransaction"):
            _save_until_refused(store)
        admin.execute("ALTER SYSTEM RESET ALL")
        admin.execute("SELECT pg_reload_conf()")
    store.save(at(3_000))
    assert 3_000 == end_lsn(store)
    assert pids[-1] != pids[0]
    store.close()


def test_a_locked_table_is_not_waited_for_whatever_the_pooler_keeps(pooler: PgBouncer, empty: DevStack) -> None:
    """The bound on waiting holds for the transaction, not for a session that a pooler forgets."""
    store = SqlCheckpointStore(pooler.dsn)
    store.create()
    with psycopg.connect(empty.postgres.dsn) as other:
        other.execute("LOCK TABLE replicator_checkpoints")
        with pytest.raises(CheckpointUnavailable, match="LockNotAvailable"):
            store.save(at(100))
    store.save(at(100))
    store.close()
