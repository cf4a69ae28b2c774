"""What stays bounded whatever happens: memory, repeats, what is confirmed; and that one slow sink holds no other."""

from __future__ import annotations

import random
import re
import statistics
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from checkpoint_store import SqlCheckpointStore
from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from replicator.contracts.events import Checkpoint, Lsn, parse_lsn
from replicator.delivery.queue import WRITE_MAX_BYTES
from tests.support.destinations import EXPECTED_SQL, FIELDS, Destinations
from tests.support.exact import assert_exact
from tests.support.load import Load, insert_many
from tests.support.program import Program

MEMORY_LIMIT_KB = 300_000
CHECKPOINT_LIMIT_BYTES = 8_000_000  # SQLite's write-ahead log is most of it
HUGE_VALUES_LIMIT_KB = 700_000
LONG_SECONDS = 240.0  # for a million rows on a busy machine
IN_FLIGHT_REQUESTS = 16  # REPLICATOR_HTTP_CONCURRENCY's default
SILENT_SECONDS = 60


@pytest.fixture
def quick(program: Program) -> Program:
    """The program with short pauses; PostgreSQL cuts it off after 2 s of silence."""
    program.environment["REPLICATOR_POSTGRES_DSN"] += "?options=-c%20wal_sender_timeout%3D2s"
    program.environment |= {
        "REPLICATOR_RETRY_MAX_SECONDS": "0.5",
        "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.3",
        "REPLICATOR_CLICKHOUSE_LINGER_SECONDS": "0.2",
        "REPLICATOR_HTTP_BATCH_SIZE": "500",
    }
    return program


def _peak_kb(program: Program) -> int:
    """The most memory that it ever had."""
    with open(f"/proc/{program.process.pid}/status", encoding="ascii") as status:  # noqa: PTH123  not a file of ours
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read())
    assert found
    return int(found[1])


def _checkpoint(program: Program) -> Checkpoint:
    """What is on disk now."""
    store = SqlCheckpointStore(program.environment["REPLICATOR_CHECKPOINT_URL"])
    found = store.load(program.slot)
    store.close()
    assert found
    return found


def _lsn(connection: psycopg.Connection, what: str, *values: str) -> Lsn:
    [text] = connection.execute(f"SELECT ({what})::text", values).fetchone() or (None,)
    return parse_lsn(str(text))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


def _confirmed(connection: psycopg.Connection, slot: str) -> Lsn:
    return _lsn(connection, "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s", slot)


# -- one huge transaction ------------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """Of a million events, what two databases can agree on cheaply."""

    events: int
    ids: int
    hashes: int
    """Sum of 60 bits of the MD5 of every event's eleven fields as text."""


def _sum_in_postgres(dsn: str) -> Sum:
    line = ", ".join(f"coalesce({field}::text, '~')" for field in FIELDS)
    query = f"""
        SELECT count(*), sum(event_id), sum(('x' || left(md5(concat_ws('|', {line})), 15))::bit(60)::bigint)
        FROM ({EXPECTED_SQL}) AS expected
    """  # noqa: S608  texts of ours
    with psycopg.connect(dsn, options="-c TimeZone=UTC -c DateStyle=ISO") as connection:
        return Sum(*map(int, connection.execute(query).fetchone() or ()))


def _sum_in_clickhouse(stack: DevStack) -> Sum:
    texts = {field: f"ifNull(toString({field}), '~')" for field in FIELDS}
    texts["event_ts"] = "concat(replaceOne(toString(event_ts), ' ', 'T'), 'Z')"
    line = f"arrayStringConcat([{', '.join(texts.values())}], '|')"
    number = f"reinterpretAsUInt64(reverse(unhex(concat('0', left(hex(MD5({line})), 15)))))"
    query = f"SELECT count(), sum(event_id), sum(toUInt128({number})) FROM events_enriched FINAL"  # noqa: S608  texts of ours
    return Sum(*map(int, stack.clickhouse.query(query).split()))


def _counts_in_postgres(connection: psycopg.Connection) -> dict[int, int]:
    return dict(connection.execute("SELECT content_id, count(*) FROM engagement_events GROUP BY 1").fetchall())


def test_a_million_rows_in_one_transaction(
    quick: Program,
    database: str,
    stack: DevStack,
    source: psycopg.Connection,
    destinations: Destinations,
) -> None:
    """It passes in bounded memory, and every sink has all of it, each event as PostgreSQL computes it."""
    quick.start(http_batch_size="1000")
    insert_many(source, 1_000_000)
    quick.wait_until_caught_up(LONG_SECONDS)
    peak_kb = _peak_kb(quick)
    print(f"peak memory {peak_kb / 1000:.0f} MB")  # noqa: T201  pytest shows it when the test has failed
    assert peak_kb < MEMORY_LIMIT_KB
    assert 0 == quick.stop()
    assert _sum_in_postgres(database) == _sum_in_clickhouse(stack)
    assert _counts_in_postgres(source) == destinations.counts()
    ids = stack.api.event_ids()
    assert (1_000_000, 1_000_000) == (len(ids), len(set(ids)))
    assert (1, 1_000_000) == (min(ids), max(ids))


def test_killed_inside_a_transaction(  # noqa: PLR0917  fixtures
    quick: Program, database: str, stack: DevStack, source: psycopg.Connection, destinations: Destinations, api: Api
) -> None:
    """After SIGKILL a huge transaction goes on after the row that each sink's stored position names."""
    rows = 100_000
    api.behave(delay_seconds=0.05)  # else it is through before it can be killed
    quick.start()
    before = _checkpoint(quick).end_lsn
    insert_many(source, rows)
    wait_until(lambda: _checkpoint(quick).sinks["http"].position.ordinal > rows // 4, "the API to have a quarter of it")
    quick.kill()
    api.behave()
    stored = _checkpoint(quick)
    http, clickhouse = (stored.sinks[name].position.ordinal for name in ("http", "clickhouse"))
    taken = api.event_ids()
    assert before <= stored.end_lsn < _lsn(source, "pg_current_wal_lsn()")
    assert rows // 4 < http <= len(taken) < rows, "it was not killed in the middle"
    assert _confirmed(source, quick.slot) <= stored.end_lsn
    inserted = int(stack.clickhouse.query("SELECT count() FROM events_enriched"))

    quick.start()
    quick.wait_until_caught_up(LONG_SECONDS)
    assert 0 == quick.stop()
    repeats = assert_exact(database, destinations)
    print(f"{http} of {rows} were stored as taken, {len(taken)} were; {repeats} repeats")  # noqa: T201
    assert repeats <= len(taken) - http + IN_FLIGHT_REQUESTS * 500
    again = [event_id for event_id, times in Counter(api.event_ids()).items() if times > 1]
    assert [] == [event_id for event_id in again if event_id <= http]
    twice = int(stack.clickhouse.query("SELECT count() FROM events_enriched")) - rows
    assert twice <= max(inserted - clickhouse, 0) + 40_000, "ClickHouse was begun again"


def test_a_million_rows_for_a_dead_api(quick: Program, source: psycopg.Connection, api: Api) -> None:
    """One transaction that a dead sink can't take: reading stops in bounded memory; that it goes on is told below."""
    quick.start(http_timeout_seconds="3")
    api.behave(hang_seconds=60)
    insert_many(source, 1_000_000)
    wait_until(lambda: bool(quick.status()["replicator"]["reading_stopped"]), "reading to stop", LONG_SECONDS)
    wait_until(lambda: "reading has stopped" in quick.log, "it to say so")  # 10 s in which it may not grow
    peak_kb = _peak_kb(quick)
    print(f"peak memory {peak_kb / 1000:.0f} MB")  # noqa: T201  pytest shows it when the test has failed
    assert peak_kb < MEMORY_LIMIT_KB
    assert 0 == len(api.event_ids())


def test_huge_values(
    quick: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """3 MB a row, in fields that every sink gets and in one that none gets: no write weighs more than 32 MB."""
    quick.start()
    values = (
        "SELECT 1, n, 'play', repeat(chr(97 + n % 26), 3000000), to_json(repeat('x', 3000000)) FROM generate_series"
    )
    insert = "INSERT INTO engagement_events (content_id, user_id, event_type, device, raw_payload)"
    source.execute(f"{insert} {values}(1, 10) AS n".encode())
    quick.wait_until_caught_up(LONG_SECONDS)
    once_kb = _peak_kb(quick)
    source.execute(f"{insert} {values}(1, 30) AS n".encode())
    quick.wait_until_caught_up(LONG_SECONDS)
    peak_kb = _peak_kb(quick)
    print(f"peak memory {once_kb / 1000:.0f} MB, of three times as much {peak_kb / 1000:.0f} MB")  # noqa: T201
    assert peak_kb < HUGE_VALUES_LIMIT_KB
    assert 0 == quick.stop()
    assert max(request.body_bytes for request in api.requests()) <= WRITE_MAX_BYTES
    assert_exact(database, destinations)


def test_the_checkpoint_stays_small(quick: Program, source: psycopg.Connection, tmp_path: Path) -> None:
    """Saved again and again, it is as large as it was: its rows are written in place, its log is used again."""
    quick.start(checkpoint_interval_seconds="0.01", clickhouse_linger_seconds="0")
    for _ in range(2_000):
        insert_many(source, 1)
    quick.wait_until_caught_up()
    running = sum(file.stat().st_size for file in tmp_path.glob("checkpoint.db*"))
    assert 0 == quick.stop()
    print(f"{running} bytes")  # noqa: T201  pytest shows it when the test has failed
    assert running < CHECKPOINT_LIMIT_BYTES


# -- dead letters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cure", ["replay", "drop"])
def test_dead_letters_are_bounded(  # noqa: PLR0917  fixtures
    quick: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations, cure: str
) -> None:
    """An API that refuses nearly all events is waited for at the bound, visibly; nothing is confirmed past it."""
    bound = 50
    quick.environment |= {"REPLICATOR_DEAD_LETTERS_MAX": str(bound), "REPLICATOR_HTTP_BATCH_SIZE": "10"}
    quick.start()
    api.behave(refuse_event_ids=[*range(101, 301)])
    insert_many(source, 300)
    first_missing = _lsn(source, "pg_current_wal_lsn()")
    told = "`python -m replicator dead-letters list --sink http`"
    wait_until(lambda: told in quick.admin("/readyz"), "it to wait for somebody")
    wait_until(lambda: sum(destinations.counts().values()) == 300, "Redis to have them all")
    assert told in quick.log
    # A request has 10 events, or fewer where the lane found no more: the last ones that fit need not fill the bound.
    kept = range(bound - 10 + 1, bound + 1)
    assert quick.metric("dead_letters", sink="http", stage="event") in kept
    status = quick.run("status").stdout
    assert int(_found(rf"dead letters (\d+) of http \(at most {bound} of each sink\)", status)) in kept
    assert told in status
    assert _confirmed(source, quick.slot) < first_missing
    api.behave()
    letters = partial(quick.run, "dead-letters")
    assert letters("list", "--sink", "http").stdout.count("  http  event ") in kept
    dropped = 0
    while letters("list").stdout:
        done = letters(cure, "--sink", "http", *(["--yes"] if cure == "drop" else []))
        assert 0 == done.code
        if cure == "drop":
            dropped += int(done.stdout.split()[1])
    quick.wait_until_caught_up()
    while letters("list").stdout:  # what had been refused before the API was mended, and had no room
        done = letters(cure, *(["--yes"] if cure == "drop" else []))
        dropped += int(done.stdout.split()[1]) if cure == "drop" else 0
    wait_until(lambda: 0 == quick.metric("dead_letters", sink="http", stage="event"), "it to see that")
    assert 0 == quick.stop()
    assert 300 - dropped == len(set(api.event_ids()))
    if cure == "replay":
        assert_exact(database, destinations)


# -- a slow or dead sink -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 500}, {"hang_seconds": SILENT_SECONDS}], ids=["500", "hangs"])
def test_a_failing_api_holds_nobody_else(  # noqa: PLR0917  fixtures
    quick: Program,
    database: str,
    source: psycopg.Connection,
    api: Api,
    destinations: Destinations,
    stack: DevStack,
    fault: dict[str, int],
) -> None:
    """Redis at once, ClickHouse soon, nothing confirmed past what the API has, and all of it arrives afterwards."""
    quick.start(http_timeout_seconds="3")
    insert_many(source, 10)
    quick.wait_until_caught_up()
    api.behave(**fault)
    insert_many(source, 1)
    first_missing = _lsn(source, "pg_current_wal_lsn()")
    delays: list[float] = []
    for written in range(12, 32):
        insert_many(source, 1)
        began = time.monotonic()
        wait_until(lambda written=written: written == sum(destinations.counts().values()), "Redis")  # type: ignore[misc]  # mypy can't type a lambda's default
        delays.append(time.monotonic() - began)
        assert _confirmed(source, quick.slot) < first_missing
    print(f"Redis: median {statistics.median(delays):.3f} s, worst {max(delays):.3f} s")  # noqa: T201
    assert statistics.median(delays) < 1
    count = "SELECT count() FROM events_enriched"
    wait_until(lambda: stack.clickhouse.query(count) == "31\n", "ClickHouse", 10)
    threading.Event().wait(3.5)  # longer than a request's timeout: the next ones hang too, keepalives go on
    assert _confirmed(source, quick.slot) < first_missing
    assert 10 == len(api.event_ids())
    status = quick.status()
    assert (True, False) == (bool(status["sinks"]["http"]["trouble"]), status["replicator"]["reading_stopped"])
    api.behave()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


def test_reading_stops_at_the_memory_limit(
    quick: Program,
    database: str,
    source: psycopg.Connection,
    api: Api,
    destinations: Destinations,
) -> None:
    """Says why, keeps PostgreSQL's connection alive for many times its timeout, and goes on when the sink does.

    However long the feedback interval is: some providers have a timeout of 5 s.
    """
    del quick.environment["REPLICATOR_FEEDBACK_INTERVAL_SECONDS"]
    quick.start(memory_limit_mb="1", http_timeout_seconds="1")
    reader = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
    pid = source.execute(reader, [quick.slot]).fetchone()
    api.behave(hang_seconds=SILENT_SECONDS)
    insert_many(source, 50_000)  # 20 MB: more than all the buffers between
    wait_until(lambda: bool(quick.status()["replicator"]["reading_stopped"]), "reading to stop")
    wait_until(
        lambda: "reading has stopped" in quick.log, "it to say so"
    )  # after 10 s, five times PostgreSQL's patience
    status = quick.status()
    assert status["replicator"]["held_bytes"] < 2_000_000
    assert status["replicator"]["connected"]
    assert status["sinks"]["http"]["trouble"] in quick.log
    assert "wait for sink http" in quick.log
    assert 0 == _checkpoint(quick).sinks["http"].position.ordinal
    assert pid == source.execute(reader, [quick.slot]).fetchone()
    assert sum(destinations.counts().values()) < 50_000
    api.behave()
    quick.wait_until_caught_up()
    assert pid == source.execute(reader, [quick.slot]).fetchone()
    assert _peak_kb(quick) < MEMORY_LIMIT_KB
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


# -- confirmed ≤ checkpoint ≤ written by the slowest sink ----------------------------------------------------------


class Sample(NamedTuple):
    """One look at a busy run; in this order, since each can only have grown when the next is looked at."""

    confirmed: Lsn
    checkpoint: Checkpoint
    clickhouse: set[int]
    api: set[int]
    counted: int


def test_the_rule_holds_at_every_moment(
    quick: Program, database: str, stack: DevStack, source: psycopg.Connection, destinations: Destinations
) -> None:
    """PostgreSQL never knows more than the checkpoint, and the checkpoint never more than any sink has."""
    seed = random.randrange(10**9)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test has failed
    quick.start()
    wait_until(lambda: bool(_checkpoint(quick).sinks), "the first checkpoint of the sinks")
    samples: list[Sample] = []

    def moved() -> bool:
        return len({sample.checkpoint.end_lsn for sample in samples}) > 2

    with Load(database, random.Random(seed), rows=3_000, pause_seconds=0.2):  # noqa: S311  as above
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < 5 or (not moved() and seconds < LONG_SECONDS):
            for _ in range(20):
                assert _confirmed(source, quick.slot) <= _checkpoint(quick).end_lsn
            samples.append(_look(quick, source, stack, destinations))
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    rows = [
        line.split() for line in stack.clickhouse.query("SELECT event_id, _lsn FROM events_enriched FINAL").splitlines()
    ]
    commits = [(int(event_id), int(lsn)) for event_id, lsn in rows]
    assert moved(), "the checkpoint hardly moved"
    for sample in samples:
        _assert_rule(sample, commits)


def _look(quick: Program, source: psycopg.Connection, stack: DevStack, destinations: Destinations) -> Sample:
    return Sample(
        confirmed=_confirmed(source, quick.slot),
        checkpoint=_checkpoint(quick),
        clickhouse=set(map(int, stack.clickhouse.query("SELECT event_id FROM events_enriched").split())),
        api=set(stack.api.event_ids()),
        counted=sum(destinations.counts().values()),
    )


def _assert_rule(sample: Sample, commits: list[tuple[int, Lsn]]) -> None:
    assert sample.confirmed <= sample.checkpoint.end_lsn
    assert sample.checkpoint.end_lsn <= min(sink.end_lsn for sink in sample.checkpoint.sinks.values())

    def due(sink: str) -> set[int]:
        end_lsn = sample.checkpoint.sinks[sink].end_lsn
        return {event_id for event_id, commit_lsn in commits if commit_lsn < end_lsn}

    assert set() == due("clickhouse") - sample.clickhouse
    assert set() == due("http") - sample.api
    assert len(due("redis")) <= sample.counted


# -- idle databases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", ["another table", "another database", "nothing"])
def test_an_idle_slot_keeps_up(
    quick: Program, database: str, stack: DevStack, source: psycopg.Connection, busy: str
) -> None:
    """Where only others write, or nobody, the slot moves with the server and holds no WAL back."""
    quick.start()
    other = database if busy == "another table" else stack.postgres.dsn
    for _ in range(3):
        with psycopg.connect(other) as writer:
            if busy != "nothing":
                writer.execute("CREATE TABLE IF NOT EXISTS noise (text text)")
                writer.execute("INSERT INTO noise SELECT repeat('x', 500) FROM generate_series(1, 20000)")
        quick.wait_until_caught_up(20)
    with psycopg.connect(other) as writer:
        writer.execute("DROP TABLE IF EXISTS noise")
    source.execute("SELECT pg_switch_wal()")
    quick.wait_until_caught_up(20)
    assert _confirmed(source, quick.slot) <= _checkpoint(quick).end_lsn
    assert _confirmed(source, quick.slot) <= _lsn(source, "pg_current_wal_lsn()")
    insert_many(source, 1)
    quick.wait_until_caught_up(20)
    assert [1] == stack.api.event_ids()
