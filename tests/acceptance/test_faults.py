"""What breaks, breaks under load: the program goes on, nothing is lost, and every sink is exact afterwards."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest
import redis

from devstack import DevStack
from devstack.api import Api
from devstack.process import Service, wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import Load, insert_many
from tests.support.pgbouncer import pgbouncer
from tests.support.program import Program, succeed

KILLS = 5
MAX_REPEATS = 5_000


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
    with Load(database, chance, rows=5_000, pause_seconds=1.0):
        for _ in range(KILLS):
            _wait(chance.uniform(0.0, 1.0))
            quick.kill()
            quick.start()
    quick.wait_until_caught_up(120)
    assert 0 == quick.stop()
    repeats = assert_exact(database, destinations)
    print(f"{repeats} repeats at the API in {KILLS} kills")  # noqa: T201
    assert repeats <= KILLS * MAX_REPEATS


# -- the program is asked to stop ----------------------------------------------------------------------------------


def test_stopped_under_load_repeats_nothing(
    quick: Program, database: str, api: Api, destinations: Destinations, chance: random.Random
) -> None:
    """SIGTERM or SIGINT under load: exit code 0, and the API gets no event twice and all of them."""
    quick.start()  # makes the slot
    with Load(database, chance, rows=5_000, pause_seconds=0.8):
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


def test_stopped_while_the_checkpoint_s_database_is_silent(
    quick: Program, database: str, stack: DevStack, source: psycopg.Connection, destinations: Destinations
) -> None:
    """It keeps its connections and answers nothing: the program ends with the reason, nothing is lost."""
    with pgbouncer(stack) as pooler:
        url = "postgresql+psycopg://" + pooler.dsn_for(database).partition("://")[2]
        quick.environment |= {"REPLICATOR_DRAIN_TIMEOUT_SECONDS": "1", "REPLICATOR_CHECKPOINT_URL": url}
        stack.api.behave(hang_seconds=60)
        quick.start(http_timeout_seconds="1")
        insert_many(source, 10)
        wait_until(lambda: bool(quick.status()["sinks"]["http"]["trouble"]), "the API to be asked")
        pooler.pause()
        stack.api.behave()
        wait_until(lambda: "takes events again" in quick.log, "something to save")
        silent = "the checkpoint database has not answered for"
        wait_until(lambda: silent in quick.admin("/readyz"), "the save that hangs to be told")
        began = time.monotonic()
        quick.process.send_signal(signal.SIGTERM)
        code = quick.process.wait(60)
        seconds = time.monotonic() - began
        pooler.resume()
        assert 1 == code
        assert "checkpoint database fails: no answer for" in quick.log
        assert seconds < 20, f"1 s, 2 s for a look, 8 s for the save and 5 s for the goodbye; it took {seconds:.1f} s"
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
        assert source.execute(terminate).fetchone() != (0,), (
            "that of the look-ups, and the one that looks at the tables"
        )
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (13, 1, 'play')")
    quick.wait_until_caught_up()
    assert_exact(database, destinations)
    wait_until(lambda: "ready\n" == quick.admin("/readyz"), "it to be ready again", 20)


# -- a sink is taken out ----------------------------------------------------------------------------------------------


def test_a_sink_is_taken_out(
    quick: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """Without the sink that held everything up it goes on. With it again that sink alone has a gap, which is closed."""
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
    assert "Sink http was left out" in result.stderr
    api.behave()
    accepted = succeed(quick.run("init", "--accept-gap"))
    [backfill] = [line for line in accepted.splitlines() if " backfill " in line]
    assert "--sinks http   #" in backfill
    assert "0001-01-01" not in backfill, "it is known since when"
    quick.start()
    assert 0 == quick.follow(backfill.strip()).code
    quick.wait_until_caught_up()
    assert_exact(database, destinations)
