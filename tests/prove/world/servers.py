"""Secrets that are rotated, PostgreSQL that is shut down, a replicator that is stopped while tables change."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import psycopg
import redis

from devstack.process import STOP_TIMEOUT_SECONDS
from tests.prove.world.answers import hangs
from tests.prove.world.world import FAULTS, World, WrongError, fault
from tests.support.environment import ROLE, SECRET

STOP_SECONDS = 60.0  # more than REPLICATOR_DRAIN_TIMEOUT_SECONDS
READS = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active_pid IS NOT NULL"
ALL_OF_ROLE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s"


def _rotate_postgres(world: World) -> None:
    """And end its connections, as for Redis. The others are asked for theirs with every request."""
    world.alter(f"ALTER ROLE {ROLE} PASSWORD '{world.passwords['postgres']}'")
    with world.postgres_is_ours, psycopg.connect(world.dsn, autocommit=True) as connection:
        connection.execute(ALL_OF_ROLE, [ROLE])


def _rotate_redis(world: World) -> None:
    service = world.stack.redis
    # It may be stopped at the moment, and is let go on by the fault that did it.
    with redis.Redis.from_url(service.url, socket_timeout=STOP_SECONDS) as client:
        client.config_set("requirepass", world.passwords["redis"])
        service.settings["requirepass"] = world.passwords["redis"]
    world.redis.cut()


def _rotate_clickhouse(world: World) -> None:
    world.clickhouse.secret = world.passwords["clickhouse"]


def _rotate_api(world: World) -> None:
    world.api.secret = world.passwords["api"]


def _rotation(name: str, server: str, rotate: Callable[[World], None]) -> None:
    """Register a fault: a new secret, at the server first, or in the file first."""

    @fault("secrets", name)
    def script(world: World, chance: random.Random) -> Iterator[None]:
        world.passwords[server] = f"{SECRET}-{server}-{chance.getrandbits(40)}"
        file_first = chance.random() < 0.3
        if file_first:
            world.write_secret(server)
            world.wait(chance.uniform(0, 2))
        rotate(world)
        yield
        if not file_first:
            world.write_secret(server)


_rotation("postgresql s is rotated", "postgres", _rotate_postgres)
_rotation("redis s is rotated", "redis", _rotate_redis)
_rotation("clickhouse s is rotated", "clickhouse", _rotate_clickhouse)
_rotation("the api s is rotated", "api", _rotate_api)


# -- PostgreSQL ----------------------------------------------------------------------------------------------------


@fault("postgres")
def shut_down_fast(world: World, chance: random.Random) -> Iterator[None]:
    """It may never wait for a sink."""
    yield from _shut_down(world, chance)


@fault("postgres")
def shut_down_while_the_api_is_down(world: World, chance: random.Random) -> Iterator[None]:
    """What waits for the API must not keep PostgreSQL."""
    world.api.lie = hangs
    world.wait(chance.uniform(0.5, 4))
    yield from _shut_down(world, chance)
    world.api.lie = None


def _shut_down(world: World, chance: random.Random) -> Iterator[None]:
    with world.postgres_is_ours:
        began = time.monotonic()
        world.stack.postgres.stop()
        seconds = time.monotonic() - began
        if seconds >= STOP_TIMEOUT_SECONDS:
            raise WrongError(f"a fast shutdown of PostgreSQL had not ended after {seconds:.0f} s")
        world.wait(chance.uniform(0, 3))
        world.stack.postgres.start()
    yield


@fault("postgres")
def its_walsenders_are_terminated(world: World, chance: random.Random) -> Iterator[None]:
    """Again and again."""
    for _ in range(chance.randint(1, 6)):
        with world.postgres_is_ours, psycopg.connect(world.dsn, autocommit=True) as connection:
            connection.execute(READS)
        world.wait(chance.uniform(0, 1.5))
    yield


# -- the replicator ------------------------------------------------------------------------------------------------


@fault("replicator")
def stopped_and_started(world: World, chance: random.Random) -> Iterator[None]:
    """By SIGTERM."""
    _end(world, chance)
    yield
    world.program.spawn()


@fault("replicator")
def killed_and_started(world: World, chance: random.Random) -> Iterator[None]:
    """By SIGKILL."""
    _end(world, chance, kill=True)
    yield
    world.program.spawn()


def _while_it_is_down(world: World, chance: random.Random, table: Literal["events", "content"]) -> Iterator[None]:
    """A change begins while nobody looks, and ends while somebody does, or the other way round."""
    script = chance.choice([one.script for one in FAULTS if one.victim == table])
    with world.tables[table]:
        change = script(world, chance)
        before = chance.random() < 0.4
        if before:
            next(change)
            world.wait(chance.uniform(0, 3))
        _end(world, chance)
        if not before or chance.random() < 0.5:
            next(change, None)
        if not before and chance.random() < 0.5:
            next(change, None)
        world.wait(chance.uniform(0, 1))
        world.program.spawn()
        yield
        for _ in change:
            pass


# Any of the faults of that table.
fault("replicator", "events change while it is down")(partial(_while_it_is_down, table="events"))
fault("replicator", "content changes while it is down")(partial(_while_it_is_down, table="content"))


def _end(world: World, chance: random.Random, *, kill: bool = False) -> None:
    program = world.program
    if not program.running:
        raise WrongError(f"it ended by itself, with {program.process.returncode}")
    if kill or chance.random() < 0.3:
        program.process.kill()
        program.process.wait()
        return
    program.process.terminate()
    code = program.process.wait(STOP_SECONDS)
    if not program.ended_in_order:
        raise WrongError(f"SIGTERM ended it with {code}")
