"""What breaks, breaks under load: the program goes on, nothing is lost, and every sink is exact afterwards."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from devstack import DevStack
from devstack.api import Api
from devstack.process import Service, free_port, wait_until
from tests.acceptance.destinations import Destinations
from tests.acceptance.exact import assert_exact
from tests.acceptance.load import Load, insert_many
from tests.acceptance.program import Program

KILLS = 8
MAX_REPEATS = 5_000


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
def durable_redis(stack: DevStack, redis_url: str) -> Iterator[Service]:
    """Redis, set so that what it has answered survives SIGKILL."""
    before = dict(stack.redis.settings)
    stack.redis.settings |= {"appendonly": "yes", "appendfsync": "always"}
    stack.redis.restart()
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()  # it may have loaded what an earlier test appended
    yield stack.redis
    stack.redis.settings.clear()
    stack.redis.settings |= before
    stack.redis.kill()
    stack.redis.start()


def _wait(seconds: float) -> None:
    """Let the load go on for a while: time is what this is about, there is no condition."""
    threading.Event().wait(seconds)


# -- the program is killed -----------------------------------------------------------------------------------------


def test_killed_again_and_again(
    quick: Program, database: str, destinations: Destinations, chance: random.Random
) -> None:
    """SIGKILL at random moments under mixed load: every field exact in every sink, repeats at the API within bounds."""
    quick.environment["REPLICATOR_HTTP_MAX_REPEATS"] = str(MAX_REPEATS)
    quick.start()  # makes the slot
    with Load(database, chance, rows=10_000, pause_seconds=1.0):
        for _ in range(KILLS):
            _wait(chance.uniform(0.0, 1.0))
            quick.kill()
            quick.start()
    quick.wait_until_caught_up(120)
    assert 0 == quick.stop()
    repeats = assert_exact(database, destinations)
    print(f"{repeats} repeats at the API in {KILLS} kills")  # noqa: T201
    assert repeats <= KILLS * MAX_REPEATS


def test_an_overtaken_transaction_is_not_lost(
    quick: Program,
    database: str,
    source: psycopg.Connection,
    api: Api,
    destinations: Destinations,
) -> None:
    """Begun first, committed last, with keepalives in between and a kill before the API had it (DESIGN, section 2).

    Its rows have LSNs below what was confirmed long ago; a reader that trusts them confirms it too early.
    """
    quick.start()
    with psycopg.connect(database) as long:
        insert_many(long, 10, "long")
        insert_many(source, 1)
        quick.wait_until_caught_up()
        insert_many(long, 10, "long")
        insert_many(source, 1)
        quick.wait_until_caught_up()
        api.behave(hang_seconds=60)
        long.commit()
    [committed] = source.execute("SELECT pg_current_wal_lsn()").fetchone() or ("",)
    wait_until(lambda: 22 == sum(destinations.counts().values()), "Redis to have it")
    source.execute("SELECT pg_switch_wal()")  # the server goes on: keepalives say so
    _wait(1)  # five rounds of feedback, each with a keepalive in return
    past = "SELECT confirmed_flush_lsn >= %s FROM pg_replication_slots WHERE slot_name = %s"
    assert (False,) == source.execute(past, [committed, quick.slot]).fetchone()
    quick.kill()
    api.behave()
    assert 2 == len(api.events())
    quick.start()
    quick.wait_until_caught_up()
    assert 0 == assert_exact(database, destinations)


# -- the program is asked to stop ----------------------------------------------------------------------------------


def test_stopped_under_load_repeats_nothing(
    quick: Program, database: str, api: Api, destinations: Destinations, chance: random.Random
) -> None:
    """SIGTERM or SIGINT under load: exit code 0, and the API gets no event twice and all of them."""
    quick.start()  # makes the slot
    with Load(database, chance, rows=10_000, pause_seconds=0.8):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            before = api.stats().events
            wait_until(lambda before=before: api.stats().events > before, "events to arrive")  # type: ignore[misc]  # mypy can't type a lambda's default
            _wait(chance.uniform(0.0, 0.8))
            quick.process.send_signal(number)
            assert 0 == quick.process.wait(40)
            quick.start()
    quick.wait_until_caught_up(120)
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


@pytest.mark.parametrize("dead", ["api", "clickhouse", "redis", "postgres"])
def test_stopped_while_a_server_is_silent(  # noqa: PLR0917  fixtures
    quick: Program, database: str, stack: DevStack, source: psycopg.Connection, destinations: Destinations, dead: str
) -> None:
    """A server that answers nothing does not keep the program from ending within its bound; nothing is lost."""
    service: Service = getattr(stack, dead)
    quick.environment |= {"REPLICATOR_DRAIN_TIMEOUT_SECONDS": "1", "REPLICATOR_HTTP_TIMEOUT_SECONDS": "30"}
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    if dead == "postgres":
        service.pause()
    else:
        service.pause()
        insert_many(source, 5_000)
    _wait(0.5)  # its requests are under way
    began = time.monotonic()
    quick.process.send_signal(signal.SIGTERM)
    code = quick.process.wait(60)
    seconds = time.monotonic() - began
    service.resume()
    assert 0 == code
    assert seconds < 10, f"the bound is 1 s and a goodbye of 5 s; it took {seconds:.1f} s"
    quick.start()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert_exact(database, destinations)


# -- a server breaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["postgres", "clickhouse", "redis", "api"])
def test_a_server_is_killed_and_comes_back(  # noqa: PLR0917  fixtures
    quick: Program,
    database: str,
    stack: DevStack,
    durable_redis: Service,
    destinations: Destinations,
    chance: random.Random,
    broken: str,
) -> None:
    """Killed under load and started again: the program stays up, reconnects, and everything is exact."""
    service: Service = getattr(stack, broken)
    quick.start()
    with Load(database, chance):
        for _ in range(2):
            _wait(chance.uniform(0.3, 0.8))
            service.kill()
            _wait(chance.uniform(0.0, 0.8))
            service.start()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert durable_redis.running
    assert_exact(database, destinations)


def test_the_walsender_is_terminated(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, chance: random.Random
) -> None:
    """`pg_terminate_backend` again and again: it comes back every time, and repeats nothing at the API."""
    quick.start()
    terminate = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s"
    reading = "SELECT active_pid IS NOT NULL FROM pg_replication_slots WHERE slot_name = %s"
    with Load(database, chance):
        for _ in range(5):
            wait_until(lambda: source.execute(reading, [quick.slot]).fetchone() == (True,), "it to read again")
            _wait(chance.uniform(0.0, 0.5))
            source.execute(terminate, [quick.slot])
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


def test_the_look_up_connection_is_terminated(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Only the look-ups' connection dies: they are made again, and the program is ready again."""
    source.execute("INSERT INTO content SELECT n, 'video', n FROM generate_series(10, 20) AS n")
    quick.start(content_cache_size="1")
    terminate = (
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE application_name ~ 'enrichment'"
    )
    for content in (10, 11, 12):
        source.execute(
            "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (%s, 1, 'play')", [content]
        )
        quick.wait_until_caught_up()
        assert (1,) == source.execute(terminate).fetchone()
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (13, 1, 'play')")
    quick.wait_until_caught_up()
    assert_exact(database, destinations)
    wait_until(lambda: "ready\n" == quick.admin("/readyz"), "it to be ready again", 20)


# -- two of them ---------------------------------------------------------------------------------------------------


def test_a_standby_takes_over(
    quick: Program, database: str, destinations: Destinations, chance: random.Random, tmp_path: Path
) -> None:
    """Two on one slot and one checkpoint: the second waits, says so, and goes on where the first was killed."""
    listen = {"REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}"}
    standby = Program(quick.environment | listen, database, tmp_path / "standby.log")
    first, second = quick, standby
    try:
        first.start()
        with Load(database, chance):
            for _ in range(2):
                second.spawn()
                waits = f"slot {quick.slot} is held by process {_reader(database, quick.slot)}"
                wait_until(lambda who=second, what=waits: what in who.log, "the standby to say that it waits")  # type: ignore[misc]  # mypy can't type a lambda's default
                assert waits in second.admin("/readyz")
                wait_until(lambda who=first: "ready\n" == who.admin("/readyz"), "the first to be ready", 10)  # type: ignore[misc]  # as above
                _wait(chance.uniform(0.2, 0.6))
                first.process.kill()
                first.process.wait()
                wait_until(lambda who=second: "ready\n" == who.admin("/readyz"), "the standby to take over", 10)  # type: ignore[misc]  # as above
                first, second = second, first
        first.wait_until_caught_up()
        assert 0 == first.stop()
    finally:
        standby.end()
        print(standby.log)  # noqa: T201  pytest shows it when the test has failed
    assert_exact(database, destinations)


def _reader(dsn: str, slot: str) -> int:
    with psycopg.connect(dsn) as connection:
        query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
        [pid] = connection.execute(query, [slot]).fetchone() or (0,)
        return int(pid)


# -- the slot or the checkpoint is gone ----------------------------------------------------------------------------


def test_the_slot_was_dropped(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """It says what may be missing and the cure, ends with 1, and the cure works."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    source.execute("SELECT pg_drop_replication_slot(%s)", [quick.slot])
    for command in ("run", "init"):
        result = quick.run(command)
        assert 1 == result.code
        assert f"Replication slot {quick.slot} does not exist" in result.stderr
        assert "`python -m replicator init --accept-gap`" in result.stderr
        assert "Traceback" not in result.stderr
    assert 0 == quick.run("init", "--accept-gap").code
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


def test_the_slot_was_dropped_and_made_again(quick: Program, source: psycopg.Connection) -> None:
    """The new slot begins past the checkpoint: what lies between is a gap, and no one goes on over it unasked."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    source.execute("SELECT pg_drop_replication_slot(%s)", [quick.slot])
    insert_many(source, 10)
    source.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [quick.slot])
    result = quick.run("run")
    assert 1 == result.code
    assert f"Replication slot {quick.slot} is not continuous with the checkpoint" in result.stderr
    assert "init --accept-gap" in result.stderr
    accepted = quick.run("init", "--accept-gap")
    assert 0 == accepted.code
    assert "gap accepted" in accepted.stdout
    quick.start()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()


def test_the_slot_is_dropped_while_it_runs(quick: Program, source: psycopg.Connection) -> None:
    """It finds no slot when it comes back, and does not make a new one over the gap."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    quick.process.send_signal(signal.SIGSTOP)  # else it is back before the slot can be dropped
    terminate = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s"
    source.execute(terminate, [quick.slot])
    source.execute("SELECT pg_drop_replication_slot(%s)", [quick.slot])
    quick.process.send_signal(signal.SIGCONT)
    assert 1 == quick.process.wait(30)
    assert f"Replication slot {quick.slot} does not exist" in quick.log


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_the_slot_lost_its_wal(
    quick: Program, source: psycopg.Connection, database: str, destinations: Destinations, running: bool
) -> None:
    """PostgreSQL threw away what the slot needed (max_slot_wal_keep_size): named, exit 1, and the cure works."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    if running:
        quick.process.send_signal(signal.SIGSTOP)  # it hangs, and its slot stands still
    else:
        assert 0 == quick.stop()
    source.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    source.execute("SELECT pg_reload_conf()")
    try:
        _lose(source, quick.slot)
        if running:
            quick.process.send_signal(signal.SIGCONT)
        else:
            quick.spawn()
        assert 1 == quick.process.wait(30)
    finally:
        source.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        source.execute("SELECT pg_reload_conf()")
    assert "wal_status lost" in quick.log
    assert "Traceback" not in quick.log
    assert 1 == quick.run("init", "--accept-gap").code  # a lost slot has to go first, as it says
    assert 0 == quick.run("drop-slot", "--yes").code
    assert 0 == quick.run("init", "--accept-gap").code
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert_exact(database, destinations)


def _lose(source: psycopg.Connection, slot: str) -> None:
    def lost() -> bool:
        source.execute("SELECT pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()")
        source.execute("CHECKPOINT")
        query = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
        return source.execute(query, [slot]).fetchone() == ("lost",)

    wait_until(lost, "the slot to be lost")


def test_the_checkpoint_was_deleted(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """With the slot still there nothing is lost: it begins where the slot was confirmed."""
    quick.start()
    insert_many(source, 1_000)
    quick.wait_until_caught_up()
    quick.kill()
    insert_many(source, 1_000)
    for file in tmp_path.glob("checkpoint.db*"):
        file.unlink()
    quick.start()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert assert_exact(database, destinations) <= 1_000


def test_a_sink_is_taken_out(quick: Program, source: psycopg.Connection, api: Api, destinations: Destinations) -> None:
    """Without the sink that held everything up it goes on; with it again it says that the sink lacks something."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    api.behave(status=500)
    for _ in range(10):
        insert_many(source, 1_000)  # more than is read at once
    wait_until(lambda: 10_010 == len(destinations.clickhouse()), "ClickHouse to have it")
    assert 0 == quick.stop()
    quick.start(sinks="redis,clickhouse")
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert "Traceback" not in quick.log
    result = quick.run("run")
    assert 1 == result.code
    assert "sink http was left out" in result.stderr
