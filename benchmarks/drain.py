"""How fast a backlog is drained: by pg_recvlogical into /dev/null, and by the replicator into all three sinks.

Both read copies of one slot, over TCP, with the same plugin options. The clock starts when the slot is in use: program
start is not measured. A sink is done when it has the last row, as seen from outside: Redis by that event's seen bit,
ClickHouse and the API by their counts.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec
import psycopg
import redis
from psycopg.conninfo import conninfo_to_dict

from benchmarks import backlog as backlogs
from benchmarks.backlog import Backlog
from benchmarks.machine import cpu_seconds, peak_memory_mb
from devstack import DevStack
from devstack.comparison import count
from devstack.process import DevStackError, wait_until
from devstack.replicator import Replicator
from replicator.source.wal2json import OPTIONS, listed
from sinks.redis.keys import PAGE_BITS

HTTP_BATCH_SIZE = 500  # events a request; the default of 100 costs 1.7 µs more an event
DRAIN_TIMEOUT_SECONDS = 300.0
READER_PID = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """One reader's result."""

    rows: int
    seconds: dict[str, float]
    """Until each sink had everything; for pg_recvlogical, until it had read everything."""
    cpu_us: dict[str, float]
    """CPU time per row in microseconds, by process."""
    peak_memory_mb: float | None = None
    """Of the replicator."""

    @property
    def rows_per_second(self) -> float:
        """Until the last sink had everything."""
        return self.rows / max(self.seconds.values())


def pg_recvlogical(stack: DevStack, backlog: Backlog, slot: str) -> Drained:
    """Measure PostgreSQL's own client, which writes to /dev/null."""
    dsn = conninfo_to_dict(stack.postgres.dsn)
    options = {**OPTIONS, "add-tables": listed([("public", "content"), ("public", "engagement_events")])}
    command = [
        str(stack.postgres.bin_dir / "pg_recvlogical"),
        *("-h", str(dsn["host"]), "-p", str(dsn["port"]), "-U", str(dsn["user"]), "-d", str(dsn["dbname"])),
        *("--slot", slot, "--start", "--no-loop", "--endpos", backlog.end_lsn, "-f", "/dev/null"),
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
    ]
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PGPASSWORD": str(dsn["password"])})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise DevStackError(f"pg_recvlogical ended with status {process.returncode}")
    cpu_us = (usage.ru_utime + usage.ru_stime) / backlog.rows * 1e6
    return Drained(
        rows=backlog.rows,
        seconds={"pg_recvlogical": seconds},
        cpu_us={"pg_recvlogical": cpu_us},
    )


def replicator(stack: DevStack, backlog: Backlog, slot: str) -> Drained:
    """Measure the replicator, with empty sinks."""
    empty_sinks(stack)
    program = stack.replicator(slot, REPLICATOR_HTTP_BATCH_SIZE=str(HTTP_BATCH_SIZE))
    with ThreadPoolExecutor(1) as threads, psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        starting = threads.submit(program.start)
        wait_until(lambda: _reader(connection, slot) is not None or starting.done(), "the slot to be read")
        started = time.monotonic()
        processes = _processes(stack, program, _reader(connection, slot))
        before = {name: cpu_seconds(pid) for name, pid in processes.items()}
        seconds = _watch(stack, backlog, started)
        spent = {name: cpu_seconds(pid) - before[name] for name, pid in processes.items()}
        starting.result()
    peak = peak_memory_mb(program.pid)
    program.stop()
    _verify(stack, backlog)
    return Drained(
        rows=backlog.rows,
        seconds=seconds,
        cpu_us={name: used / backlog.rows * 1e6 for name, used in spent.items()},
        peak_memory_mb=peak,
    )


def empty_sinks(stack: DevStack) -> None:
    """Empty the sinks."""
    with redis.Redis.from_url(stack.redis.url) as client:
        client.flushall()
    stack.clickhouse.reset()
    stack.api.reset()


def _reader(connection: psycopg.Connection, slot: str) -> int | None:
    row = connection.execute(READER_PID, [slot]).fetchone()
    return row[0] if row else None


def _processes(stack: DevStack, program: Replicator, walsender: int | None) -> dict[str, int]:
    if walsender is None:
        raise DevStackError(f"the replicator has released its slot\n{program.log_end()}")
    servers = {"redis": stack.redis.pid, "clickhouse": stack.clickhouse.pid, "api": stack.api.pid}
    return {"replicator": program.pid, "walsender": walsender, **servers}


class _Probe(NamedTuple):
    """How to see that a sink has everything, and how often to look: each look costs the sink time."""

    has_all: Callable[[], bool]
    interval_seconds: float


def _watch(stack: DevStack, backlog: Backlog, started: float) -> dict[str, float]:
    """Seconds until each sink had everything."""
    page, bit = f"engagement:seen:{backlog.last_id >> PAGE_BITS}", backlog.last_id % (1 << PAGE_BITS)
    with redis.Redis.from_url(stack.redis.url) as client, ThreadPoolExecutor(3) as threads:
        probes = {
            "redis": _Probe(lambda: bool(client.getbit(page, bit)), 0.01),
            "clickhouse": _Probe(lambda: _clickhouse_count(stack) >= backlog.rows, 0.1),
            "http": _Probe(lambda: stack.api.stats().events >= backlog.rows, 0.05),
        }
        ends = {name: threads.submit(_end, name, probe) for name, probe in probes.items()}
        return {name: end.result() - started for name, end in ends.items()}


def _end(name: str, probe: _Probe) -> float:
    """Return the time at which it had everything."""
    deadline = time.monotonic() + DRAIN_TIMEOUT_SECONDS
    while not probe.has_all():
        if time.monotonic() > deadline:
            raise DevStackError(f"sink {name} did not get everything within {DRAIN_TIMEOUT_SECONDS:.0f} s")
        time.sleep(probe.interval_seconds)
    return time.monotonic()


def _clickhouse_count(stack: DevStack) -> int:
    return stack.clickhouse.count()


def _verify(stack: DevStack, backlog: Backlog) -> None:
    """Check the counts: a benchmark of something that loses rows is worthless."""
    counts = count(stack)
    for name in ("clickhouse", "redis", "api"):
        if getattr(counts, name) != backlog.rows:
            raise DevStackError(f"{name} has {getattr(counts, name)} events of {backlog.rows}")


def alternate(stack: DevStack, backlog: Backlog, runs: int) -> list[tuple[Drained, Drained]]:
    """Measure both in turn, several times, so that other load on the machine hits both."""
    pairs = []
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        for number in range(runs):
            results = []
            for reader in (pg_recvlogical, replicator):
                slot = f"{backlog.slot}_{number}_{reader.__name__}"
                backlogs.copy(connection, backlog, slot)
                results.append(reader(stack, backlog, slot))
                backlogs.drop(connection, slot)
            pairs.append((results[0], results[1]))
    return pairs
