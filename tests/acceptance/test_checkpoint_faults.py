"""The checkpoint database as people run it: behind a pooler, in the source's own PostgreSQL, on a shared machine."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.pgbouncer import pgbouncer
from tests.support.program import Program, assert_clean, succeed

INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"


def test_a_pooler_before_the_checkpoint(
    quick: Program, stack: DevStack, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """In transaction mode: it may be killed, stopped and started as often as you like."""
    with pgbouncer(stack) as pooler:
        quick.environment["REPLICATOR_CHECKPOINT_URL"] = pooler.dsn_for(
            stack.postgres.dsn_for(database=database.rpartition("/")[2])
        )
        for end in (quick.kill, quick.stop):
            quick.start()
            for _ in range(7):  # psycopg would prepare a statement when it comes for the sixth time
                insert_many(source, 2)
                quick.wait_until_caught_up()
            end()
        quick.start()
        succeed(quick.run("check"))
        assert 0 == quick.stop()
    assert_clean(quick.log)
    assert_exact(database, destinations)


def test_a_checkpoint_database_that_only_reads(
    quick: Program, plain_dsn: str, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """Somebody has fenced it, or its user: `check` fails, and nothing is confirmed until it takes writes again."""
    source.execute("GRANT CREATE ON SCHEMA public TO replicator")
    quick.environment["REPLICATOR_CHECKPOINT_URL"] = plain_dsn
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    name = database.rpartition("/")[2]
    source.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
    told = quick.run("check")
    assert 1 == told.code
    assert "FAIL  the checkpoint database fails: postgresql: ReadOnlySqlTransaction" in told.stdout
    quick.spawn()
    insert_many(source, 10)  # over a session from before
    wait_until(lambda: "ReadOnlySqlTransaction" in quick.said, "it to say so")
    source.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert_exact(database, destinations)


@contextmanager
def everybody_is_synchronous(stack: DevStack) -> Iterator[None]:
    """Whoever streams from PostgreSQL has to confirm every commit before it ends."""
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        admin.execute("SET synchronous_commit = local")
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        admin.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            admin.execute("SELECT pg_reload_conf()")


def _waits(session: psycopg.Connection) -> bool:
    return session.execute("SHOW synchronous_standby_names").fetchone() == ("*",)


def test_commits_that_wait_for_us_do_not_wait_for_our_checkpoint(
    quick: Program, stack: DevStack, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """The checkpoint is in the source's PostgreSQL, and our slot was chosen as the synchronous standby."""
    quick.environment["REPLICATOR_CHECKPOINT_URL"] = database
    quick.start()
    with everybody_is_synchronous(stack):
        wait_until(partial(_waits, source), "the setting")
        source.execute("SET statement_timeout = '10s'")
        for _ in range(3):
            source.execute(INSERT)  # returns once we have confirmed it
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert_clean(quick.log)
    assert_exact(database, destinations)


def test_files_are_ours_alone(quick: Program, source: psycopg.Connection, api: Api, tmp_path: Path) -> None:
    """Whatever the umask; what others can read after all, `check` names."""
    api.behave(status=422)
    before = os.umask(0o022)
    try:
        quick.start()
        source.execute(INSERT)
        wait_until((tmp_path / "checkpoint.db-wal").exists, "the checkpoint")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("checkpoint.db*")}
    assert {"checkpoint.db": 0o600, "checkpoint.db-wal": 0o600, "checkpoint.db-shm": 0o600} == modes
    assert "every user" not in quick.run("check").stdout
    folders = [folder for folder in tmp_path.parents if not folder.stat().st_mode & stat.S_IXOTH]
    for path in (*folders, tmp_path):
        path.chmod(path.stat().st_mode | stat.S_IXOTH)
    (tmp_path / "checkpoint.db").chmod(0o644)
    try:
        told = quick.run("check").stdout
        assert f"every user of this machine can read {tmp_path}/checkpoint.db\n" in told
        assert re.search(rf"^note  .*\n      → chmod o= {tmp_path}/checkpoint.db\n", told, re.MULTILINE)
    finally:
        for folder in folders:
            folder.chmod(folder.stat().st_mode & ~stat.S_IXOTH)
    quick.end()


def test_the_embedded_engine_s_files_are_ours_alone(quick: Program, tmp_path: Path) -> None:
    """Event rows are in them; `check` names the directory when others can read it."""
    (tmp_path / "data").mkdir(mode=0o755)
    quick.environment["REPLICATOR_CLICKHOUSE_URL"] = f"chdb://{tmp_path}/data/ours/engagement"
    before = os.umask(0o022)
    try:
        succeed(quick.run("init"))
    finally:
        os.umask(before)
    made = [tmp_path / "data" / "ours", *(tmp_path / "data" / "ours").rglob("*")]
    assert len(made) > 5
    assert not [path for path in made if not path.is_symlink() and path.stat().st_mode & 0o077]
