"""`peek` and `tail` on the real program: what comes next, what goes through; slot and stream stay as they are."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO, cast

import psycopg
import pytest
from psycopg.types.json import Jsonb

from devstack.api import Api
from devstack.process import wait_until
from replicator.contracts.errors import SourceUnavailable
from replicator.operations.follow import peek as peeks
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import ROOT, Program, succeed

SLOTS = "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
MEMORY_BYTES = 300_000_000
PEEK = "import sys; sys.argv[1:] = ['peek', '20', '--json']; runpy.run_module('replicator', run_name='__main__')"
CONFIRMED = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"


def test_peek_takes_nothing(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, api: Api
) -> None:
    """While nobody reads the slot and while the replicator does; no copy is left, and every event still comes."""
    assert "does not exist, or is being made" in quick.run("peek").stderr
    succeed(quick.run("init"))
    insert_many(source, 5)
    source.execute("UPDATE content SET length_seconds = length_seconds WHERE content_id = 2")
    before = source.execute(CONFIRMED, [quick.slot]).fetchone()
    found = json.loads(succeed(quick.run("peek", "3", "--json")))
    assert [1, 2, 3] == [change["columns"]["id"] for change in found["changes"]]
    first = found["changes"][0]
    assert ("insert", "public.engagement_events", True) == (first["action"], first["table"], found["more"])
    assert "\n1 row after " in succeed(quick.run("peek", "1"))
    text = succeed(quick.run("peek"))
    assert " update public.content " in text
    assert text.endswith("the confirmed position; nothing else is waiting\n")
    assert [(quick.slot,)] == source.execute(SLOTS).fetchall()
    assert before == source.execute(CONFIRMED, [quick.slot]).fetchone()
    api.behave(status=503)
    quick.start()
    wait_until(lambda: 5 == len(destinations.clickhouse()), "ClickHouse to have them")
    assert 3 == len(json.loads(succeed(quick.run("peek", "3", "--json")))["changes"]), "the API lacks them"
    api.behave()
    quick.wait_until_caught_up()
    assert_exact(database, destinations)
    assert [(quick.slot,)] == source.execute(SLOTS).fetchall()
    assert 2 == quick.run("peek", "none").code


def test_large_rows_are_cut(quick: Program, source: psycopg.Connection) -> None:
    """However large and many they are, no more than one is in memory, and it ends soon."""
    succeed(quick.run("init"))
    row = "INSERT INTO engagement_events (content_id, user_id, event_type, raw_payload) VALUES (1, 1, 'play', %s)"
    for _ in range(12):
        source.execute(row, [Jsonb("x" * 10_000_000)])
    limited = ["-c", f"import resource, runpy; resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY_BYTES},) * 2);{PEEK}"]
    done = subprocess.run(
        [sys.executable, *limited], cwd=ROOT, env={**os.environ, **quick.environment}, capture_output=True, check=False
    )
    assert 0 == done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["more"]
    assert 7 == len(found["changes"]), "that are 64 MB"
    assert {1_001} == {len(change["columns"]["raw_payload"]) for change in found["changes"]}


async def test_a_large_transaction_is_not_waited_for(
    quick: Program, source: psycopg.Connection, plain_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what PostgreSQL does, and the copy is gone."""
    succeed(quick.run("init"))
    insert_many(source, 50_000)
    monkeypatch.setattr(peeks, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(SourceUnavailable, match="nothing came in 0 s"):
        await peeks.peek(plain_dsn, quick.slot, [("public", "engagement_events")], 5)
    wait_until(lambda: [(quick.slot,)] == source.execute(SLOTS).fetchall(), "the copy to be gone")


@pytest.fixture
def viewer(quick: Program) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `tail` with these options; ended at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-m", "replicator", "tail", *options]
        environment = {**os.environ, **quick.environment}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_tail_shows_what_goes_through(
    quick: Program,
    database: str,
    source: psycopg.Connection,
    destinations: Destinations,
    viewer: Callable[..., subprocess.Popen[str]],
) -> None:
    """A few of a batch, and how many more there were; a viewer that stands still holds nobody up."""
    quick.start()
    slow, of_api = viewer(), viewer("--sink", "http", "--json", "--limit", "2")
    output = cast("IO[str]", slow.stdout)

    def seen() -> bool:
        insert_many(source, 1)
        looks_on, _, _ = select.select([output], [], [], 0)
        return bool(looks_on) and of_api.poll() is not None

    wait_until(seen, "the events to be shown")
    assert of_api.stdout
    assert 0 == of_api.returncode
    first = json.loads(of_api.stdout.readline())
    assert ("http", 0) == (first["sink"], first["skipped"])
    assert first["event"]["event_id"] in {event["event_id"] for event in destinations.api()}
    slow.send_signal(signal.SIGSTOP)
    insert_many(source, 20_000)
    quick.wait_until_caught_up()
    slow.send_signal(signal.SIGCONT)
    lines = iter(output.readline, "")
    assert any(" more\n" in line for line in lines), "those that were not shown are counted"
    slow.send_signal(signal.SIGINT)
    assert 0 == slow.wait(10)
    assert_exact(database, destinations)
    assert 0 == quick.stop()
