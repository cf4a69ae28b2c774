"""Redis as people run it: behind proxies with words of their own, shared, with the least rights.

What can happen to every destination is in `test_destination_faults.py`.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis

from devstack import DevStack
from devstack.process import wait_until
from sinks.redis.errors import turned_away_cure
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import Program, assert_clean, succeed

UNKNOWN = ("upstream failure", "ERR max daily request limit exceeded. Limit: 10000", "NOSCRIPT not here \x1b[31m")
"""Of Envoy, of a hosted service, and of something with a sense of colour."""


class Front(socketserver.ThreadingTCPServer):
    """A proxy before Redis. While it has a line to say, it answers every command with that."""

    daemon_threads = True
    block_on_close = False
    line = ""

    def __init__(self, port: int) -> None:
        self.behind = port
        super().__init__(("127.0.0.1", 0), _Pipe)


class _Pipe(socketserver.BaseRequestHandler):
    server: Front

    def handle(self) -> None:
        """Until one side hangs up."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.behind)) as there:
            threading.Thread(target=self._back, args=[there], daemon=True).start()
            while data := self.request.recv(1_000_000):
                if self.server.line:
                    self.request.sendall(f"-{self.server.line}\r\n".encode())
                else:
                    there.sendall(data)

    def _back(self, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := there.recv(1_000_000):
                self.request.sendall(data)


@pytest.fixture
def front(quick: Program, stack: DevStack) -> Iterator[Front]:
    """It stands between the program and Redis."""
    with Front(stack.redis.port) as front:
        threading.Thread(target=front.serve_forever, daemon=True).start()
        quick.environment["REPLICATOR_REDIS_URL"] = f"redis://127.0.0.1:{front.server_address[1]}/0"
        yield front
        front.shutdown()


def test_a_line_that_nobody_knows_is_not_now(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, front: Front
) -> None:
    """Redis's lane waits and quotes the line, the others go on, and it goes on by itself."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    for line in UNKNOWN:
        before = quick.status()["sinks"]["http"]["events"]
        front.line = line
        insert_many(source, 10)
        told = line.partition(" \x1b")[0]
        wait_until(lambda told=told: told in quick.status()["sinks"]["redis"]["trouble"], f"it to say {told!r}")  # type: ignore[misc]  # mypy can't type a lambda's default
        wait_until(lambda before=before: before + 10 == quick.status()["sinks"]["http"]["events"], "http to go on")  # type: ignore[misc]  # likewise
        front.line = ""
        quick.wait_until_caught_up()
    assert "\x1b" not in quick.log
    assert 0 == quick.stop()
    assert_clean(quick.log)
    assert_exact(database, destinations)


OWNER = "engagement:seen:owner"


def test_an_idle_sink_whose_keys_become_another_s_is_not_ready(quick: Program, destinations: Destinations) -> None:
    """Nothing goes through: it shows all the same, and is over by itself."""
    quick.start()
    wait_until(lambda: quick.admin("/readyz") == "ready\n", "it to be ready")
    ours = str(destinations.redis.get(OWNER))
    destinations.redis.set(OWNER, "cluster 7, database other")
    wait_until(lambda: "its keys belong to cluster 7" in quick.admin("/readyz"), "it to say so")
    assert quick.status()["sinks"]["redis"]["trouble"]
    assert 3 == quick.run("status").code
    destinations.redis.set(OWNER, ours)
    wait_until(lambda: quick.admin("/readyz") == "ready\n", "it to be ready again")


def test_two_sources_do_not_share_keys(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Who comes second waits and says so, as do the commands; a Redis that is freed is adopted."""
    other = "cluster 7, database other"
    destinations.redis.set(OWNER, other)
    quick.start()
    insert_many(source, 10)
    told = f"its keys belong to {other}, and these events come from cluster "
    wait_until(lambda: told in quick.status()["sinks"]["redis"]["trouble"], "it to say so")
    wait_until(lambda: 10 == quick.status()["sinks"]["http"]["events"], "http to go on")
    assert told in quick.admin("/readyz")
    for command in (
        "check",
        "backfill --last 1h --sinks redis",
        "rebuild-redis --from-empty --yes",
        "reconcile --last 1h --sinks redis",
    ):
        result = quick.run(*command.split())
        assert (1, True) == (result.code, told in result.stdout + result.stderr), result
    assert other == destinations.redis.get(OWNER)
    destinations.redis.delete(OWNER)
    quick.wait_until_caught_up()
    assert database.rpartition("/")[2] in str(destinations.redis.get(OWNER))
    succeed(quick.run("check"))
    assert 0 == quick.stop()
    assert_clean(quick.log)
    assert_exact(database, destinations)


DENIED = (
    "FLUSHALL", "FLUSHDB", "SWAPDB 0 1", "SCRIPT FLUSH", "FUNCTION FLUSH", "CONFIG GET *", "CONFIG SET maxmemory 1",
    "KEYS *", "GET other:key", "SET other:key 1", "DEL other:key", "CLIENT KILL ID 1", "ACL LIST", "SHUTDOWN NOSAVE",
    "MONITOR", "REPLICAOF NO ONE", "RENAME content:count:1 other:key", "MIGRATE 127.0.0.1 1 a 0 1",
    "SAVE", "PUBLISH channel word", "SCRIPT LOAD return",
)  # fmt: skip
"""What the printed rights do not give."""


def test_the_rights_that_are_printed_are_enough_and_no_more(
    quick: Program, stack: DevStack, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Every command works under them, and nothing of other people's can be read, changed or emptied."""
    admin: Any = destinations.redis
    admin.set("other:key", "theirs")
    rights = turned_away_cure().partition("ACL SETUSER name ")[2].split()
    admin.execute_command("ACL", "SETUSER", "replicator", "on", ">secret", *rights)
    url = f"redis://replicator:secret@127.0.0.1:{stack.redis.port}/0"
    quick.environment["REPLICATOR_REDIS_URL"] = url
    try:
        quick.start()
        insert_many(source, 10)
        quick.wait_until_caught_up()
        wait_until(lambda: "ready" == quick.admin("/readyz").strip(), "its first look at the slot since it is there")
        for command in ("check", "backfill --last 1d --sinks redis", "reconcile --last 1d --repair",
                        "rebuild-redis --from-empty --yes"):  # fmt: skip
            succeed(quick.run(*command.split()))
        ranking = '<th scope="col">content_id</th>'
        wait_until(lambda: ranking in quick.admin("/"), "the page to have the top content")
        assert 0 == quick.stop()
        assert_exact(database, destinations)
        client: Any = redis.Redis.from_url(url)
        for command in DENIED:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        client.close()
    finally:
        admin.execute_command("ACL", "DELUSER", "replicator")
    assert "theirs" == admin.get("other:key")
    assert_clean(quick.log)
