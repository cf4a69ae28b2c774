"""How fast a backlog is drained: by the replicator into all three sinks, beside plain readers that keep nothing.

All read copies of one slot, over TCP; the wal2json ones with the same plugin options. The clock starts when the slot is
in use: program start is not measured. A sink is done when it has the last row, as seen from outside: Redis by that
event's seen bit, ClickHouse and the API by their counts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import psycopg
import redis
from psycopg.conninfo import conninfo_to_dict

from benchmarks import backlog as backlogs
from benchmarks.backlog import Backlog
from benchmarks.machine import Meter, cpu_seconds, main_thread_seconds, peak_memory_mb, wait_until_quiet
from devstack import DevStack
from devstack.comparison import count
from devstack.control import fetch
from devstack.process import ROOT, DevStackError, wait_until
from devstack.replicator import Replicator
from replicator.source.wal2json import OPTIONS, listed
from sinks.redis.keys import PAGE_BITS

HTTP_BATCH_SIZE = 500  # events a request; the default
DRAIN_TIMEOUT_SECONDS = 600.0
MARKS = (0.1, 0.9, 1.0)  # of the backlog; the steady rate is that between the first two
SLOW_US = 1_000  # Redis remembers calls that hold it for longer
READER_PID = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
PLUGIN_OPTIONS = {**OPTIONS, "add-tables": listed([("public", "content"), ("public", "engagement_events")])}


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """One reader's result."""

    rows: int
    seconds: dict[str, list[float]]
    """Until each sink had a tenth, nine tenths and all; of a plain reader, until it had read everything."""
    cpu_us: dict[str, float]
    """CPU time per row in microseconds, by process, and `all` of the programs that were started."""
    others: float
    """What everybody else took of the machine's CPU, 0 to 1."""
    peak_memory_mb: float | None = None
    """Of the replicator."""
    batches: dict[str, float] | None = None
    """Events a write, by sink."""
    redis_longest_ms: float | None = None
    """How long one call held Redis at most."""

    @property
    def rows_per_second(self) -> float:
        """Until the last sink had everything."""
        return self.rows / max(seconds[-1] for seconds in self.seconds.values())

    @property
    def steady(self) -> float | None:
        """Rows a second between a tenth and nine tenths, of the slowest sink."""
        if any(len(seconds) != len(MARKS) for seconds in self.seconds.values()):
            return None
        share = self.rows * (MARKS[1] - MARKS[0])
        return min(share / max(late - early, 0.001) for early, late, _ in self.seconds.values())


class Round(NamedTuple):
    """What a reader gets."""

    stack: DevStack
    backlog: Backlog
    slot: str


Reader: TypeAlias = Callable[[Round], Drained]


def pg_recvlogical(given: Round) -> Drained:
    """PostgreSQL's own client, which writes to /dev/null."""
    postgres = given.stack.postgres
    dsn = conninfo_to_dict(postgres.dsn)
    command = [
        str(postgres.bin_dir / "pg_recvlogical"),
        *("-h", str(dsn["host"]), "-p", str(dsn["port"]), "-U", str(dsn["user"]), "-d", str(dsn["dbname"])),
        *("--slot", given.slot, "--start", "--no-loop", "--endpos", given.backlog.end_lsn, "-f", "/dev/null"),
        *(word for name, value in PLUGIN_OPTIONS.items() for word in ("-o", f"{name}={value}")),
    ]
    return _plain(given, command, PGPASSWORD=str(dsn["password"]))


def reader(name: str, python: str, given: Round) -> Drained:
    """One of `readers.py`, with this interpreter."""
    high, low = given.backlog.end_lsn.split("/")
    end = given.backlog.last_id if name == "debezium" else (int(high, 16) << 32) + int(low, 16)
    script = str(Path(__file__).with_name("readers.py"))
    command = [python, script, name, given.stack.postgres.dsn, given.slot, json.dumps(PLUGIN_OPTIONS), str(end)]
    return _plain(given, command)


def _plain(given: Round, command: Sequence[str], **environment: str) -> Drained:
    """Run a program that ends when it has read everything."""
    name, log = Path(command[0]).name, given.stack.folder / f"{given.slot}.log"
    with log.open("wb") as output, psycopg.connect(given.stack.postgres.dsn, autocommit=True) as connection:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output, cwd=given.stack.folder
        )
        wait_until(lambda: reads(connection, given.slot) is not None or _ended(process.pid), "the slot to be read")
        meter, started, before = Meter(), time.monotonic(), 0.0 if _ended(process.pid) else cpu_seconds(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        spent = meter.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise DevStackError(f"{name} ended with status {process.returncode}: {log.read_text(encoding='utf-8')[-2000:]}")
    rows = given.backlog.rows
    cpu_us = {"reader": (usage.ru_utime + usage.ru_stime - before) / rows * 1e6, "all": spent.ours / rows * 1e6}
    return Drained(rows=rows, seconds={name: [seconds]}, cpu_us=cpu_us, others=spent.others)


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def replicator(code: Path, http_batch_size: int, given: Round) -> Drained:
    """The replicator of this checkout, with empty sinks that do no more than they must."""
    stack, slot, rows = given.stack, given.slot, given.backlog.rows
    empty_sinks(stack)
    stack.api.behave(trusting=True)
    checkpoint = f"sqlite:///{stack.folder}/{slot}.db"  # an earlier commit may have other tables
    program = stack.replicator(
        slot, REPLICATOR_HTTP_BATCH_SIZE=str(http_batch_size), REPLICATOR_CHECKPOINT_URL=checkpoint
    )
    program.code = code
    with ThreadPoolExecutor(1) as threads, psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        starting = threads.submit(program.start)
        wait_until(lambda: reads(connection, slot) is not None or starting.done(), "the slot to be read")
        meter, started = Meter(), time.monotonic()
        processes = _processes(stack, program, reads(connection, slot))
        clocks = {name: partial(cpu_seconds, pid) for name, pid in processes.items()}
        clocks["main thread"] = partial(main_thread_seconds, program.pid)
        before = {name: clock() for name, clock in clocks.items()}
        seconds = watch(stack, given.backlog, started)
        used = {name: clock() - before[name] for name, clock in clocks.items()}
        spent = meter.read()
        starting.result()
    used["all"] = sum(used[name] for name in processes)
    peak, batches, longest = peak_memory_mb(program.pid), _batches(program), _longest_ms(stack)
    program.stop()
    verify(stack, given.backlog)
    return Drained(
        rows=rows,
        seconds=seconds,
        cpu_us={name: seconds / rows * 1e6 for name, seconds in used.items()},
        others=spent.others,
        peak_memory_mb=peak,
        batches=batches,
        redis_longest_ms=longest,
    )


def empty_sinks(stack: DevStack) -> None:
    """Empty the sinks."""
    with redis.Redis.from_url(stack.redis.url) as client:
        client.flushall()
        client.config_set("slowlog-log-slower-than", SLOW_US)
        client.slowlog_reset()
    stack.clickhouse.reset()
    stack.api.reset()


def reads(connection: psycopg.Connection, slot: str) -> int | None:
    """PostgreSQL's process that sends the slot; None: nobody reads it."""
    row = connection.execute(READER_PID, [slot]).fetchone()
    return row[0] if row else None


def _processes(stack: DevStack, program: Replicator, walsender: int | None) -> dict[str, int]:
    if walsender is None:
        raise DevStackError(f"the replicator has released its slot\n{program.log_end()}")
    servers = {"redis": stack.redis.pid, "clickhouse": stack.clickhouse.pid, "api": stack.api.pid}
    return {"replicator": program.pid, "walsender": walsender, **servers}


class _Probe(NamedTuple):
    """How to see that a sink has so many rows, and how often to look: each look costs the sink time."""

    has: Callable[[int], bool]
    interval_seconds: float


def watch(stack: DevStack, backlog: Backlog, started: float) -> dict[str, list[float]]:
    """Seconds until each sink had what the marks say."""
    with redis.Redis.from_url(stack.redis.url) as client, ThreadPoolExecutor(3) as threads:

        def in_redis(rows: int) -> bool:
            event_id = backlog.last_id - backlog.rows + rows
            return bool(client.getbit(f"engagement:seen:{event_id >> PAGE_BITS}", event_id % (1 << PAGE_BITS)))

        probes = {
            "redis": _Probe(in_redis, 0.01),
            "clickhouse": _Probe(lambda rows: stack.clickhouse.count() >= rows, 0.1),
            "http": _Probe(lambda rows: stack.api.stats().events >= rows, 0.05),
        }
        ends = {name: threads.submit(_times, name, probe, backlog.rows) for name, probe in probes.items()}
        return {name: [at - started for at in end.result()] for name, end in ends.items()}


def _times(name: str, probe: _Probe, rows: int) -> list[float]:
    """When it had what the marks say."""
    deadline, found = time.monotonic() + DRAIN_TIMEOUT_SECONDS, []
    for mark in MARKS:
        while not probe.has(int(mark * rows)):
            if time.monotonic() > deadline:
                raise DevStackError(f"sink {name} did not get everything within {DRAIN_TIMEOUT_SECONDS:.0f} s")
            time.sleep(probe.interval_seconds)
        found.append(time.monotonic())
    return found


def _batches(program: Replicator) -> dict[str, float]:
    """Events a write, as the replicator counts them."""
    text = fetch(f"{program.url}/metrics").decode()
    found = re.findall(r'^replicator_sink_(events|writes)_total{sink="(\w+)".*} (\S+)$', text, re.MULTILINE)
    totals = {(what, sink): float(value) for what, sink, value in found}
    return {
        sink: totals["events", sink] / max(writes, 1) for (what, sink), writes in totals.items() if what == "writes"
    }


def _longest_ms(stack: DevStack) -> float:
    with redis.Redis.from_url(stack.redis.url) as client:
        calls = [
            float(entry["duration"]) for entry in client.slowlog_get(-1) if entry["command"].upper().startswith(b"EVAL")
        ]
    return max([SLOW_US, *calls]) / 1000


def verify(stack: DevStack, backlog: Backlog) -> None:
    """Check the counts: a benchmark of something that loses rows is worthless."""
    counts, ids = count(stack), len(set(stack.api.event_ids()))
    distinct = int(stack.clickhouse.query("SELECT uniqExact(event_id) FROM events_enriched"))
    found = {"clickhouse": counts.clickhouse, "redis": counts.redis, "api": ids, "clickhouse (distinct)": distinct}
    for name, events in found.items():
        if events != backlog.rows:
            raise DevStackError(f"{name} has {events} events of {backlog.rows}")


def in_turn(
    stack: DevStack, backlog: Backlog, readers: dict[str, Reader], *, runs: int, patience_seconds: float
) -> list[dict[str, Drained]]:
    """Measure all in turn, every other time in reversed order, so that other load on the machine hits all alike."""
    rounds = []
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        for number in range(runs):
            results = {}
            for at, name in list(enumerate(readers))[:: -1 if number % 2 else 1]:
                wait_until_quiet(patience_seconds)
                slot = f"{backlog.slot}_{number}_{at}"
                backlogs.copy(connection, backlog, slot, "pgoutput" if name == "debezium" else "wal2json")
                results[name] = readers[name](Round(stack, backlog, slot))
                backlogs.drop(connection, slot)
                sys.stderr.write(f"  {name}: {results[name].rows_per_second:,.0f} rows/s\n")
            rounds.append({name: results[name] for name in readers})
    return rounds


def yardsticks(peers: str | None) -> dict[str, Reader]:
    """Who reads beside the replicator; others' programs with that interpreter."""
    own: dict[str, Reader] = {
        "pg_recvlogical": pg_recvlogical,
        "plain reader": partial(reader, "plain", sys.executable),
    }
    theirs: dict[str, Reader] = {name: partial(reader, name, peers) for name in ("psycopg2", "debezium") if peers}
    return own | theirs


def contenders(earlier: tuple[str, Path] | None, http_batch_size: int) -> dict[str, Reader]:
    """This checkout's replicator, and that of an earlier commit."""
    found: dict[str, Reader] = {"replicator": partial(replicator, ROOT, http_batch_size)}
    if earlier:
        found[f"replicator {earlier[0]}"] = partial(replicator, earlier[1], http_batch_size)
    return found
