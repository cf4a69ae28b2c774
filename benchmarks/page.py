"""`python -m benchmarks.page`: CPU of the replicator while people look at its page, and while nobody does.

In turn, beside 1,000 events a second into all sinks: what differs is the page's.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import psycopg

from benchmarks.machine import cpu_seconds
from devstack import DevStack
from devstack.process import ROOT
from devstack.replicator import Replicator

TICKS = 20
"""Transactions a second."""
INSERT = """
INSERT INTO public.engagement_events (content_id, user_id, event_type, duration_ms)
SELECT 1 + n % 3, n, 'play', n FROM generate_series(1, {}) n
"""


@contextmanager
def _traffic(dsn: str, events: int) -> Iterator[None]:
    """So many events a second, meanwhile."""
    ended = threading.Event()

    def insert() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not ended.wait(1 / TICKS):
                connection.execute(INSERT.format(events // TICKS).encode())

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _viewers(replicator: Replicator, count: int) -> Iterator[list[int]]:
    """So many that read everything; the bytes that they got."""
    got: list[int] = []

    def read(connection: socket.socket) -> None:
        while data := connection.recv(65_536):
            got.append(len(data))

    with ExitStack() as opened:
        threads = []
        for _ in range(count):
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", replicator.port)))
            connection.sendall(b"GET /updates HTTP/1.1\r\n\r\n")
            threads.append(threading.Thread(target=read, args=[connection]))
            threads[-1].start()
            opened.callback(connection.shutdown, socket.SHUT_RDWR)
        yield got
    for thread in threads:
        thread.join()


def _share(replicator: Replicator, viewers: int, seconds: float) -> float:
    """CPU seconds a second."""
    with _viewers(replicator, viewers) as got:
        before, began = cpu_seconds(replicator.pid), time.monotonic()
        time.sleep(seconds)
        share = (cpu_seconds(replicator.pid) - before) / (time.monotonic() - began)
    print(f"{viewers} viewers: {100 * share:.2f} % of a core, {sum(got) / seconds / max(1, viewers):,.0f} bytes/s each")
    return share


def main() -> None:
    """Start everything, measure in turn, print the difference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=1_000, help="a second (1000)")
    parser.add_argument("--viewers", type=int, default=5, help="with a page each (5)")
    parser.add_argument("--seconds", type=float, default=15, help="of each turn (15)")
    parser.add_argument("--turns", type=int, default=3, help="of each kind (3)")
    args = parser.parse_args()
    with DevStack(*DevStack.SERVICES) as stack:
        with psycopg.connect(stack.postgres.dsn) as connection:
            connection.execute((ROOT / "sql" / "source_schema.sql").read_bytes())
        replicator = stack.replicator()
        replicator.start()
        with _traffic(stack.postgres.dsn, args.events):
            time.sleep(args.seconds)  # until it runs as it will
            pairs = [
                (_share(replicator, 0, args.seconds), _share(replicator, args.viewers, args.seconds))
                for _ in range(args.turns)
            ]
    differences = [looked - alone for alone, looked in pairs]
    print(f"the page, {args.viewers} viewers: {100 * median(differences):.2f} % of a core")


if __name__ == "__main__":
    main()
