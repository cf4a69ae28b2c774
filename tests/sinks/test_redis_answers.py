"""Answers that no Redis gives: without an end, too large, too slow. Memory and time stay bounded."""

from __future__ import annotations

import resource
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat

import pytest
from pydantic import SecretStr
from redis.connection import DefaultParser

from enrichment import EVENT
from replicator.contracts.errors import SinkUnavailable, SinkUnusable
from replicator.contracts.events import Event
from replicator.contracts.sink import SinkContext
from sinks.redis.errors import sink_error
from sinks.redis.settings import RedisSettings
from sinks.redis.sink import RedisSink

EVENT_1 = Event(commit_lsn=1, ordinal=1, id=1, key=1, ts_us=0, json=b"{}")
PATIENCE_SECONDS = 1.0
ROOM_MB = 60


def _slowly() -> Iterator[bytes]:
    while True:
        yield b"x"
        time.sleep(0.01)


ANSWERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "an error without an end": lambda: chain([b"-ERR "], repeat(b"x" * 1_000_000)),
    "two thousand million numbers": lambda: chain([b"*2147483647\r\n"], repeat(b":1\r\n" * 250_000)),
    "a text of 500 MB": lambda: chain([b"$500000000\r\n"], repeat(b"x" * 1_000_000)),
    "never silent, never done": lambda: chain([b"-ERR "], _slowly()),
    "lists in lists": lambda: iter([b"*1\r\n" * 200_000]),
    "no number": lambda: iter([b"*many\r\n"]),
    "OK to everything": lambda: repeat(b"+OK\r\n", 20),
    "one number": lambda: iter([b":1\r\n"]),
    "nothing": lambda: iter([b"$-1\r\n"]),
    "two words": lambda: iter([b"*2\r\n+a\r\n+b\r\n"]),
    "a web page": lambda: iter([b"HTTP/1.1 400 Bad Request\r\n\r\n"]),
}


@contextmanager
def server(answer: Callable[[], Iterator[bytes]]) -> Iterator[int]:
    """Answers everybody like this; its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.recv(100_000)
                for data in answer():
                    self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield int(listening.server_address[1])
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "is_cluster"),
    [
        ("MOVED 3999 127.0.0.1:6381", True),
        ("ASK 3999 127.0.0.1:6381", True),
        ("CROSSSLOT Keys in request don't hash to the same slot", True),
        ("ERR ASK your administrator", False),
        ("BUSY it has MOVED away", False),
    ],
)
def test_a_cluster_is_told_by_its_answers(answer: str, is_cluster: bool) -> None:
    """Not by words that anybody may use."""
    error = sink_error("redis", DefaultParser.parse_error(answer))  # type: ignore[no-untyped-call]  # redis-py's own
    assert is_cluster == isinstance(error, SinkUnusable)
    assert is_cluster == ("Redis Cluster" in error.cure)


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_is_bounded(answer: str) -> None:
    """It is not now, in time, and costs no memory."""
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with server(ANSWERS[answer]) as port:
        began = time.monotonic()
        url = SecretStr(f"redis://127.0.0.1:{port}/0")
        sink = RedisSink(RedisSettings(redis_url=url, redis_timeout_seconds=PATIENCE_SECONDS), SinkContext(EVENT))
        with pytest.raises(SinkUnavailable) as caught:
            await sink.write([EVENT_1])
        with pytest.raises(SinkUnavailable):
            await sink.open()
        await sink.close()
        assert time.monotonic() - began < 5 * PATIENCE_SECONDS
    assert len(str(caught.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < ROOM_MB * 1_000
