"""A name server that stays silent holds up the one destination whose name it is asked for."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import redis

from devstack import DevStack
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.network import blackhole
from tests.support.program import Program, assert_clean

SITE = """
import os, socket, time

before = socket.getaddrinfo

def getaddrinfo(host, *args, **options):
    if host == "silent.test":
        while os.path.exists({flag!r}):
            time.sleep(0.05)
        host = "127.0.0.1"
    return before(host, *args, **options)

socket.getaddrinfo = getaddrinfo
"""
TWO = """
import socket

before = socket.getaddrinfo

def getaddrinfo(host, port, *args, **options):
    if host == "two.test":
        return [*before("127.0.0.1", {blackhole}, *args, **options), *before("127.0.0.1", port, *args, **options)]
    return before(host, port, *args, **options)

socket.getaddrinfo = getaddrinfo
"""
TRIES_SECONDS = 5.0


@pytest.fixture
def silence(quick: Program, stack: DevStack, tmp_path: Path) -> Path:
    """While this file is there, nobody learns where Redis is."""
    flag = tmp_path / "silence"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(flag=str(flag)), encoding="utf-8")
    quick.environment |= {
        "PYTHONPATH": str(tmp_path / "site"),
        "REPLICATOR_REDIS_URL": f"redis://silent.test:{stack.redis.port}/0",
        "REPLICATOR_REDIS_TIMEOUT_SECONDS": "0.3",
        "REPLICATOR_RETRY_MAX_SECONDS": "0.1",
    }
    return flag


def threads(program: Program) -> int:
    """How many it has."""
    return len([*Path(f"/proc/{program.process.pid}/task").iterdir()])


def test_a_silent_name_server_holds_up_nobody_else(
    *,
    quick: Program,
    database: str,
    source: psycopg.Connection,
    destinations: Destinations,
    silence: Path,
    stack: DevStack,
    tmp_path: Path,
) -> None:
    """ClickHouse, the API and the checkpoint go on, threads do not pile up, and a stop is quick."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    before = threads(quick)
    silence.touch()
    with redis.Redis.from_url(stack.redis.url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    for number in range(5):
        insert_many(source, 10)
        for sink in ("clickhouse", "http"):
            wait_until(
                lambda sink=sink, number=number: quick.status()["sinks"][sink]["events"] == 20 + 10 * number,  # type: ignore[misc]  # mypy can't type a lambda's default
                f"{sink} to go on",
                TRIES_SECONDS,
            )
    wait_until(lambda: quick.status()["sinks"]["redis"]["retries"] >= 8, "many tries")
    assert threads(quick) <= before + 3  # one look-up, a save, and one more
    assert 10 == quick.status()["sinks"]["redis"]["events"]
    with closing(sqlite3.connect(tmp_path / "checkpoint.db")) as checkpoint:
        [(saved_at,)] = checkpoint.execute("SELECT updated_at FROM replicator_checkpoints")
    assert time.time() - saved_at < TRIES_SECONDS
    quick.process.terminate()
    assert 0 == quick.process.wait(TRIES_SECONDS)
    silence.unlink()
    quick.start()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert_clean(quick.log)
    assert_exact(database, destinations)


def test_an_address_that_does_not_answer(
    *,
    quick: Program,
    database: str,
    source: psycopg.Connection,
    destinations: Destinations,
    stack: DevStack,
    tmp_path: Path,
) -> None:
    """Of two addresses of a name the network drops what is sent to the first, as where IPv6 leads nowhere."""
    names = [("REPLICATOR_CLICKHOUSE_URL", stack.clickhouse), ("REPLICATOR_REDIS_URL", stack.redis)]
    for name, server in [*names, ("REPLICATOR_HTTP_URL", stack.api)]:
        address = quick.environment[name]
        quick.environment[name] = address.replace(f"127.0.0.1:{server.port}", f"two.test:{server.port}")
        assert "two.test" in quick.environment[name]
    with blackhole() as port:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(TWO.format(blackhole=port), encoding="utf-8")
        quick.environment["PYTHONPATH"] = str(tmp_path / "site")
        quick.start()
        insert_many(source, 10)
        quick.wait_until_caught_up(TRIES_SECONDS)
        assert 0 == quick.stop()
    assert "did not take the batch" not in quick.log
    assert_exact(database, destinations)
