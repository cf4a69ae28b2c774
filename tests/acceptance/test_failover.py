"""PostgreSQL as people run it: shut down while a sink is behind, restarted, failed over. Nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.postgres import Postgres
from devstack.process import wait_until
from devstack.standby import Standby
from tests.support import environment as ground
from tests.support.destinations import Destinations, expected
from tests.support.exact import assert_exact, assert_same
from tests.support.load import insert_many
from tests.support.program import Program, assert_clean, succeed

LIMIT_BYTES = 1_000_000
PAGE = Path(__file__).parents[2] / "docs/how-to/postgresql/failover.md"
SYNCS_SLOTS = 170_000  # PostgreSQL 17
SHUTDOWN_SECONDS = 9.0  # two looks of the watchdog, 5 s and 1 s apart; a sink that is down would hold it up for ever


@pytest.mark.parametrize("full", [False, True], ids=["reads on", "reading has stopped"])
def test_a_fast_shutdown_does_not_wait_for_a_sink(
    quick: Program, database: str, stack: DevStack, destinations: Destinations, *, full: bool
) -> None:
    """The API is down and events wait: PostgreSQL ends within seconds, and afterwards everything arrives."""
    if full:
        quick.environment["REPLICATOR_MEMORY_LIMIT_MB"] = "1"
    quick.start()
    with psycopg.connect(database, autocommit=True) as writer:
        insert_many(writer, 100)
        quick.wait_until_caught_up()
        stack.api.behave(status=503)
        insert_many(writer, 20_000 if full else 100)
    waiting = "the API to hold it up"
    wait_until(lambda: quick.status()["sinks"]["http"]["waiting"] > 0, waiting)
    wait_until(lambda: full == (quick.status()["replicator"]["held_bytes"] > LIMIT_BYTES), waiting)
    [stop] = page("Restart, or upgrade to a minor version", "bash")
    type_stop(stack.postgres, stop)
    stack.postgres.start()
    stack.api.behave()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


def test_commits_do_not_wait_for_the_sinks_without_a_word(
    quick: Program, source: psycopg.Connection, stack: DevStack
) -> None:
    """`synchronous_standby_names` would choose the replicator: `check` fails, and `/readyz` and the log say it."""
    quick.start()
    assert "ok    synchronous_standby_names = ''" in quick.run("check").stdout
    stack.api.behave(status=503)
    source.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    source.execute("SELECT pg_reload_conf()")
    try:
        quick.wait_for_log("commits in PostgreSQL wait for the sinks")
        assert "commits in PostgreSQL wait for the sinks" in quick.admin("/readyz")
        assert "FAIL  synchronous_standby_names = '*': commits would wait for the sinks" in quick.run("check").stdout
    finally:
        source.execute("ALTER SYSTEM RESET synchronous_standby_names")
        source.execute("SELECT pg_reload_conf()")


# -- two servers ---------------------------------------------------------------------------------------------------


def page(heading: str, language: str) -> list[str]:
    """The blocks in that language under a heading of the page on failover."""
    [section] = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    indented = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{spaces}", "", block, flags=re.MULTILINE) for spaces, block in indented]


def type_stop(server: Postgres, line: str) -> None:
    """As the server's account. It ends within seconds."""
    variables = {"PATH": f"{server.bin_dir}:{os.environ['PATH']}", "PGDATA": str(server.folder / "data")}
    subprocess.run(["sh", "-c", line], env=variables, user=server.user, check=True, timeout=SHUTDOWN_SECONDS)
    server.stop()


def type_sql(server: Postgres, text: str) -> list[tuple[object, ...]]:
    """As the superuser; what the last statement returns."""
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        for statement in filter(str.strip, text.split(";")):
            cursor = admin.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@contextmanager
def pair(quick: Program) -> Iterator[tuple[Postgres, Standby]]:
    """A primary and its standby, each in the DSN; the source tables; the program looks for its slot on the primary."""
    with DevStack("postgres") as own:
        primary, standby = own.postgres, own.standby()
        with psycopg.connect(primary.dsn) as admin:
            admin.execute((ground.SQL / "source_schema.sql").read_bytes())
        login = ground.plain_role(own, primary.dsn).rpartition("@")[0]
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        quick.environment["REPLICATOR_POSTGRES_DSN"] = f"{login}@{hosts}/engagement?target_session_attrs=read-write"
        quick.move_to(primary.dsn)
        standby.start()
        yield primary, standby


def keep_slot(primary: Postgres, standby: Standby, slot: str) -> None:
    """The standby gets a copy of the slot: by itself from 17 on, before that as Patroni does it."""
    with psycopg.connect(primary.dsn) as looking:
        version = looking.info.server_version
    if version >= SYNCS_SLOTS:
        [on_primary, on_standby] = page("Let standbys keep the slot", "sql")[:2]
        type_sql(primary, "SELECT 1" if "physical" not in on_primary else on_primary)
        type_sql(standby, on_standby)
        [ready] = page("Let standbys keep the slot", "sql")[2:]
        wait_until(lambda: [(True,)] == type_sql(standby, ready.replace("engagement_slot", slot)), "the slot", 60)
        return
    type_sql(primary, "CHECKPOINT")  # the slot's state is written
    standby.stop()
    folders = [server.folder / "data/pg_replslot" / slot for server in (primary, standby)]
    shutil.rmtree(folders[1], ignore_errors=True)
    subprocess.run(["cp", "-a", *folders], check=True)
    standby.start()


def insert(server: Postgres, count: int) -> None:
    """So many events."""
    with psycopg.connect(server.dsn, autocommit=True) as writer:
        insert_many(writer, count)


def test_a_switchover_is_followed(quick: Program, destinations: Destinations, stack: DevStack) -> None:
    """Typed from the page, while it runs and the API is down: it finds the new primary, and nothing is missing.

    What the API took while there was no server to verify it comes again: at most what was waiting for it.
    """
    quick.environment["REPLICATOR_MEMORY_LIMIT_MB"] = "1"
    with pair(quick) as (primary, standby):
        quick.start()
        insert(primary, 100)
        quick.wait_until_caught_up()
        keep_slot(primary, standby, quick.slot)
        stack.api.behave(status=503)
        insert(primary, 10_000)
        wait_until(lambda: quick.status()["replicator"]["held_bytes"] > LIMIT_BYTES, "reading to stop")
        [stop, status] = page("Switch over", "bash")
        type_stop(primary, stop)
        [promote] = page("Switch over", "sql")
        type_sql(standby, promote)
        insert(standby, 100)
        stack.api.behave()
        quick.move_to(standby.dsn)
        quick.wait_for_log("timeline 2 of PostgreSQL continues 1 from ")
        quick.wait_until_caught_up()
        wait_until(lambda: "ready\n" == quick.admin("/readyz"), "it to be ready", 15)
        for command in (status, "python -m replicator check", "python -m replicator backfill --last 1h --dry-run"):
            succeed(quick.follow(command))
        assert 0 == quick.stop()
        assert assert_exact(standby.dsn, destinations) < 5_000


def test_init_makes_a_failover_slot_of_an_older_one(quick: Program, source: psycopg.Connection) -> None:
    """From PostgreSQL 17 on: `check` says that standbys keep no copy of it, and `init` changes that."""
    knows_failover = source.info.server_version >= SYNCS_SLOTS
    succeed(quick.run("init", failover_slot="false"))
    assert knows_failover == ("standbys keep no copy of it" in quick.run("check").stdout)
    assert knows_failover == ("standbys keep a copy of replication slot" in succeed(quick.run("init")))
    assert knows_failover == ("standbys keep a copy of it" in quick.run("check").stdout)
    assert "standbys keep" not in succeed(quick.run("init"))


def test_a_failover_that_lost_commits(quick: Program, destinations: Destinations) -> None:
    """The standby had not received what the sinks have: that is told, and the printed commands make them equal."""
    with pair(quick) as (primary, standby):
        quick.start()
        insert(primary, 100)
        quick.wait_until_caught_up()
        keep_slot(primary, standby, quick.slot)
        _wait_for_no_standby(primary)
        standby.stop()
        insert(primary, 100)
        quick.wait_until_caught_up()
        primary.kill()
        standby.start()
        type_sql(standby, "SELECT pg_promote()")
        insert(standby, 50)
        assert 1 == quick.process.wait(30)
        assert_clean(quick.log)
        assert "the server's timeline 2 left the checkpoint's, 1, at" in quick.log
        told = succeed(quick.run("init", "--accept-gap"))
        assert "the sinks may have events that PostgreSQL lost in the failover" in told
        assert "backfill" not in told
        quick.move_to(standby.dsn)
        quick.start()
        quick.wait_until_caught_up()
        for line in re.findall(r"^  (python -m replicator .*)$", told, re.MULTILINE):
            assert quick.follow(f"{line}{' --yes' * ('--from-empty' in line)}").code in (0, 3)
        assert 0 == quick.stop()
        events = expected(standby.dsn)
        assert_same(events, destinations.clickhouse(), "ClickHouse")
        assert Counter(event["content_id"] for event in events) == destinations.counts()


def _wait_for_no_standby(primary: Postgres) -> None:
    """As before PostgreSQL 17, and as long as nobody sets it."""
    if type_sql(primary, "SELECT 1 FROM pg_settings WHERE name = 'synchronized_standby_slots'"):
        type_sql(primary, "ALTER SYSTEM RESET synchronized_standby_slots; SELECT pg_reload_conf()")
