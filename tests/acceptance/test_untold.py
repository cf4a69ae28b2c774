"""Rows that go without a delete in the WAL: somebody has to see it, over restarts, until they have decided."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.process import wait_until
from tests.support.program import Program, succeed

MADE = """
CREATE TABLE loads (id bigint, at timestamptz, weight bigint DEFAULT 0, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE january PARTITION OF loads FOR VALUES FROM ('2026-01-01Z') TO ('2026-02-01Z');
CREATE TABLE february PARTITION OF loads FOR VALUES FROM ('2026-02-01Z') TO ('2026-03-01Z');
CREATE TABLE later PARTITION OF loads FOR VALUES FROM ('2026-03-01Z') TO ('2027-01-01Z');
CREATE TABLE crates (id bigint PRIMARY KEY, at timestamptz DEFAULT '2026-01-15Z', weight bigint DEFAULT 0);
CREATE TABLE others (LIKE crates INCLUDING ALL);
GRANT SELECT ON ALL TABLES IN SCHEMA public TO replicator;
"""
DECLARED = """
from dataclasses import replace
from replicator import *

LOADS = Stream("loads", table="public.loads", updates="upsert", deletes="delete", fields=(
    Field("id", BIGINT, role=Role.IDENTITY), Field("at", TIMESTAMPTZ, role=Role.TIME),
    Field("weight", BIGINT, role=Role.KEY),
))
CRATES = replace(LOADS, name="crates", table="public.crates")
KEEPING = replace(LOADS, deletes="ignore")
"""
GONE = {
    "dropped": "DROP TABLE {}",
    "detached": "ALTER TABLE loads DETACH PARTITION {}",
    "detached concurrently": "ALTER TABLE loads DETACH PARTITION {} CONCURRENTLY",
}
INSERT = "INSERT INTO loads VALUES (1, '2026-01-15Z'), (2, '2026-02-15Z'), (3, '2026-03-15Z')"
NO_PART = "public.{} is no longer a part of public.loads, and the WAL has no deletes for the rows that went with it"
FOR_A_WHILE = "for a while the WAL did not tell which rows of public.crates were deleted, or got another identity"
ALWAYS = ("--start", "2000-01-01", "--end", "2100-01-01")


@pytest.fixture
def program(program: Program, source: psycopg.Connection, tmp_path: Path) -> Program:
    """A replicator of loads."""
    source.execute(MADE.encode())
    (tmp_path / "untold_streams.py").write_text(DECLARED, encoding="utf-8")
    program.environment |= {"REPLICATOR_STREAM": "untold_streams:LOADS", "PYTHONPATH": str(tmp_path)}
    return program


@pytest.fixture
def crates(quick: Program) -> Program:
    """One of crates, which are in one table."""
    quick.environment["REPLICATOR_STREAM"] = "untold_streams:CRATES"
    return quick


def in_clickhouse(stack: DevStack, table: str) -> list[int]:
    """Ids."""
    return [int(line) for line in stack.clickhouse.query(f"SELECT id FROM {table} FINAL ORDER BY id").splitlines()]  # noqa: S608


def letters(program: Program) -> dict[int, str]:
    """The reason of each, by its number."""
    found = json.loads(succeed(program.run("dead-letters", "list", "--json")))["dead_letters"]
    return {letter["id"]: letter["reason"] for letter in found}


def restart(program: Program) -> None:
    """And read something, so that all of the start is over."""
    assert 0 == program.stop()
    program.start()
    program.wait_until_caught_up()


@pytest.mark.parametrize("how", GONE)
def test_a_part_is_gone(quick: Program, source: psycopg.Connection, stack: DevStack, how: str) -> None:
    """While the program runs, or not: one dead letter for each; one way to end it keeps the rows, one does not."""
    succeed(quick.run("init"))
    quick.start()
    source.execute(INSERT)
    quick.wait_until_caught_up()
    source.execute(GONE[how].format("january").encode())
    quick.wait_for_log(NO_PART.format("january"))
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    source.execute(GONE[how].format("february").encode())
    source.execute("INSERT INTO loads VALUES (4, '2026-03-15Z')")
    quick.start()
    quick.wait_until_caught_up()
    restart(quick)
    assert [NO_PART.format(part) for part in ("january", "february")] == [
        reason.partition(":")[0] for reason in letters(quick).values()
    ]
    assert [1, 2, 3, 4] == in_clickhouse(stack, "loads")
    january, february = letters(quick)
    succeed(quick.run("dead-letters", "drop", "--yes", "--id", str(january)))
    when = ("--start", "2026-02-01", "--end", "2026-03-01")
    assert 3 == quick.run("reconcile", *when, "--repair", "--delete-extra").code, "Redis counts it still"
    assert [1, 3, 4] == in_clickhouse(stack, "loads")
    assert f"dead letter {february} stays: public.february" in quick.run("dead-letters", "replay").stdout
    succeed(quick.run("rebuild-redis", "--from-empty", "--yes"))
    succeed(quick.run("dead-letters", "drop", "--yes"))
    restart(quick)
    assert {} == letters(quick)


def test_another_table_has_the_name(crates: Program, source: psycopg.Connection, stack: DevStack) -> None:
    """There and back, once while it runs and once while it does not."""
    succeed(crates.run("init"))
    crates.start()
    source.execute("INSERT INTO crates (id) VALUES (1); INSERT INTO others (id) VALUES (2)")
    crates.wait_until_caught_up()
    there = "ALTER TABLE crates RENAME TO away; ALTER TABLE others RENAME TO crates"
    source.execute(there)
    wait_until(lambda: in_clickhouse(stack, "crates") == [1, 2], "the other table's row")
    assert 0 == crates.stop()
    source.execute("ALTER TABLE crates RENAME TO others; ALTER TABLE away RENAME TO crates")
    source.execute("INSERT INTO crates (id) VALUES (3)")
    crates.start()
    wait_until(lambda: in_clickhouse(stack, "crates") == [1, 2, 3], "the row of the first one")
    restart(crates)
    found = letters(crates).values()
    assert 2 == len(found)
    assert all(reason.startswith("public.crates is another table now, and the WAL has no deletes") for reason in found)
    assert 3 == crates.run("reconcile", *ALWAYS, "--repair", "--delete-extra").code, "Redis counts it still"
    assert [1, 3] == in_clickhouse(stack, "crates")


SILENT = {
    "no identity": ("ALTER TABLE crates REPLICA IDENTITY NOTHING", "ALTER TABLE crates REPLICA IDENTITY DEFAULT"),
    "unlogged": ("ALTER TABLE crates SET UNLOGGED", "ALTER TABLE crates SET LOGGED"),
    "away": ("ALTER TABLE crates RENAME TO away", "ALTER TABLE away RENAME TO crates"),
}


@pytest.mark.parametrize("how", SILENT)
def test_deletes_were_not_told_for_a_while(
    crates: Program, source: psycopg.Connection, stack: DevStack, how: str
) -> None:
    """It is told when it is over, by another process, and beside another stream; not again once it is dropped."""
    crates.environment["REPLICATOR_STREAM"] += ",enrichment.contract:EVENT"
    begin, end = SILENT[how]
    succeed(crates.run("init"))
    crates.start()
    source.execute("INSERT INTO crates (id) VALUES (1), (2)")
    crates.wait_until_caught_up()
    source.execute(begin.encode())
    crates.wait_for_log("but not which rows are deleted until this is corrected")
    crates.kill()
    table = "away" if how == "away" else "crates"
    source.execute(f"DELETE FROM {table} WHERE id = 1; UPDATE {table} SET weight = 7 WHERE id = 2".encode())  # noqa: S608
    source.execute(end.encode())
    succeed(crates.run("pause", "http/crates", "--for", "1h"))
    crates.start()
    wait_until(lambda: "7" in stack.clickhouse.query("SELECT weight FROM crates FINAL WHERE id = 2"), "the update")
    [(number, reason)] = letters(crates).items()
    assert FOR_A_WHILE in reason
    succeed(crates.run("dead-letters", "drop", "--yes", "--id", str(number)))
    assert 0 == crates.stop()
    crates.start()
    succeed(crates.run("resume", "http/crates"))
    crates.wait_until_caught_up()
    assert {} == letters(crates)
    assert [1, 2] == in_clickhouse(stack, "crates")


def test_deletes_were_not_told_before_the_first_start(
    crates: Program, source: psycopg.Connection, stack: DevStack
) -> None:
    """The sinks have rows by then: a backfill brought them."""
    source.execute("INSERT INTO crates (id) VALUES (1), (2)")
    succeed(crates.run("init"))
    succeed(crates.run("backfill", *ALWAYS))
    source.execute("ALTER TABLE crates REPLICA IDENTITY NOTHING; DELETE FROM crates WHERE id = 1")
    crates.spawn()
    crates.wait_for_log("but not which rows are deleted until this is corrected")
    crates.kill()
    source.execute("ALTER TABLE crates REPLICA IDENTITY DEFAULT")
    crates.start()
    [reason] = letters(crates).values()
    assert FOR_A_WHILE in reason
    assert [1, 2] == in_clickhouse(stack, "crates")


@pytest.mark.parametrize("stream", ["untold_streams:KEEPING", "enrichment.contract:EVENT"])
def test_where_deletes_are_ignored_nothing_is_told(quick: Program, source: psycopg.Connection, stream: str) -> None:
    """The sinks keep what is deleted in any case."""
    quick.environment["REPLICATOR_STREAM"] = stream
    source.execute("CREATE TABLE part () INHERITS (engagement_events)")
    succeed(quick.run("init"))
    quick.start()
    source.execute(INSERT)
    source.execute("INSERT INTO part (content_id, user_id, event_type) VALUES (1, 1, 'play')")
    quick.wait_until_caught_up()
    source.execute("DROP TABLE january; DROP TABLE part")
    quick.wait_for_log("R403")
    quick.wait_until_caught_up()
    restart(quick)
    assert {} == letters(quick)


def test_a_part_that_is_gone_before_a_paused_sink_had_it(quick: Program, source: psycopg.Connection) -> None:
    """Until then the tables count as they were before it was there; it is told once all the same."""
    succeed(quick.run("init"))
    quick.start()
    succeed(quick.run("pause", "http", "--for", "1h"))
    source.execute("CREATE TABLE next_year PARTITION OF loads FOR VALUES FROM ('2027-01-01Z') TO ('2028-01-01Z')")
    source.execute("INSERT INTO loads VALUES (1, '2027-01-15Z')")
    quick.wait_for_log("public.next_year is a new part of loads")
    wait_until(lambda: 2 == quick.log.count("reading slot"), "the stream to begin again")
    quick.kill()
    source.execute("DROP TABLE next_year")
    for _ in range(2):
        quick.start()
        assert [NO_PART.format("next_year")] == [reason.partition(":")[0] for reason in letters(quick).values()]
        assert 0 == quick.stop()
    succeed(quick.run("dead-letters", "drop", "--yes"))
    quick.start()
    assert {} == letters(quick)
