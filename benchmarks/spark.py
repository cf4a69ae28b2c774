"""`python -m benchmarks.spark`: stream and backfill on Spark beside the single process, on private servers.

`backlog` and `drain` have the rows and the clocks of the stream, `history` those of the backfill. Executors are
processes of this machine, so the CPU that each kind of process takes says more than rows a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psycopg

from benchmarks import backlog, drain, history, machine
from benchmarks.backlog import Backlog
from benchmarks.tables import table
from devstack import DevStack, DevStackError
from devstack.process import ROOT, python, wait_until
from devstack.replicator import Replicator
from devstack.spark import PYTHON
from devstack.watchdog import tree

KINDS = {"pyspark.daemon": "tasks", "CoarseGrainedExecutorBackend": "executors' Java", "java": "driver's Java"}
"""By a word of the command line; what has none of them is the driver."""
DRIVER = "driver"
WHO = (DRIVER, *reversed(KINDS.values()))

NOWHERE, SINGLE = "reading and enriching alone", "replicator"
MASTERS = {"local[3]": "local[3]", "1 executor": "local-cluster[1,3,512]", "2 executors": "local-cluster[2,3,512]"}
"""Three cores each, one for each sink."""
SLICE_MASTERS = {"1 executor": "local-cluster[1,1,512]", "2 executors": "local-cluster[2,1,512]"}
"""One core each: what a backfill gains by another one."""
MEMORY = ("--conf", "spark.executor.memory=512m")
LONE_EVENTS = 30
LOOK_SECONDS = 0.1
LONE = "INSERT INTO public.engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'lone')"
CONFIRMED = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"


class Streamed(NamedTuple):
    """One run of a stream."""

    rows_per_second: float | None
    """None: it has written nothing."""
    cpu_us: Mapping[str, float]
    """A row, by kind of process."""
    memory_mb: Mapping[str, float]
    """The largest process of each kind."""
    start_seconds: float
    lone_ms: float | None
    """From the INSERT of an event that comes alone until the API gets it; the median."""
    lone_cpu_ms: float
    """CPU that such an event costs, in all three sinks together."""


def main() -> int:
    """Run the chosen parts. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spark", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("stream", "backfill"), help="run this part (both)")
    parser.add_argument("--rows", type=int, default=400_000, help="of the stream's backlog (400000)")
    parser.add_argument("--backfill-rows", type=int, default=1_000_000, help="of the backfill (1000000)")
    args = parser.parse_args()
    try:
        with DevStack(*DevStack.SERVICES) as stack:
            with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
                connection.execute((ROOT / "sql" / "source_schema.sql").read_bytes())
                backlog.prepare(connection)
                if args.only != "backfill":
                    print(_stream(stack, connection, args.rows))
                if args.only != "stream":
                    print(_backfill(stack, connection, args.backfill_rows))
            print(f"{machine.facts(stack.postgres.dsn)}; everything on one machine.")
    except DevStackError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


# --- the stream


def _stream(stack: DevStack, connection: psycopg.Connection, rows: int) -> str:
    made = backlog.make(connection, "bench_spark", transactions=rows // 1_000, size=1_000)
    found = {}
    for number, name in enumerate((NOWHERE, SINGLE, *MASTERS)):
        slot = f"{made.slot}_{number}"
        backlog.copy(connection, made, slot)
        drain.empty_sinks(stack)
        stack.api.behave(trusting=True)
        program = stack.replicator(slot)
        program.program = _program(name)
        found[name] = _streamed(stack, connection, program, made, writes=name != NOWHERE)
        backlog.drop(connection, slot)
        speed = found[name].rows_per_second
        sys.stderr.write(f"{name}: {f'{speed:,.0f} rows/s' if speed else 'done'}\n")
    backlog.drop(connection, made.slot)
    return "\n".join(_tables(made.rows, found))


def _program(name: str) -> list[str]:
    if name in MASTERS:
        return [str(PYTHON), "-P", "-m", "replicator_spark", "stream", "--master", MASTERS[name], *MEMORY]
    return python("benchmarks.nowhere" if name == NOWHERE else "replicator")


def _streamed(
    stack: DevStack, connection: psycopg.Connection, program: Replicator, made: Backlog, *, writes: bool
) -> Streamed:
    slot, seconds, began = program.settings["REPLICATOR_SLOT"], None, time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(program.start)
        wait_until(lambda: drain.reads(connection, slot) is not None or starting.done(), "the slot to be read")
        started, before = time.monotonic(), spent(program.pid)
        if starting.done():
            starting.result()  # it may have failed
        if writes:
            seconds = max(ends[-1] for ends in drain.watch(stack, made, started).values())
        starting.result()
    wait_until(lambda: connection.execute(CONFIRMED, [made.end_lsn, slot]).fetchone() == (True,), "all to be read")
    used = _difference(spent(program.pid), before)
    before = spent(program.pid)
    lone_ms = _lone_ms(stack, connection) if writes else None
    lone = _difference(spent(program.pid), before)
    memory = peak_memory(program.pid)
    program.stop()
    return Streamed(
        rows_per_second=made.rows / seconds if seconds else None,
        cpu_us={who: 1e6 * seconds / made.rows for who, seconds in used.items()},
        memory_mb=memory,
        start_seconds=started - began,
        lone_ms=lone_ms,
        lone_cpu_ms=1e3 * sum(lone.values()) / LONE_EVENTS,
    )


def _lone_ms(stack: DevStack, connection: psycopg.Connection) -> float:
    """The first ones wake processes up: the median leaves them out."""
    found = []
    for _ in range(LONE_EVENTS):
        before, began = stack.api.stats().events, time.time()
        connection.execute(LONE)
        wait_until(lambda before=before: stack.api.stats().events > before, "the event at the API")  # type: ignore[misc]  # mypy guesses no default's type
        found.append(1e3 * (stack.api.requests()[-1].time - began))
    return median(found)


def _tables(rows: int, found: Mapping[str, Streamed]) -> Iterator[str]:
    header = ["", "rows/s", *WHO, "seconds to start", "a lone event, ms", "its CPU, ms"]
    lines = [
        [
            name,
            f"{run.rows_per_second:,.0f}" if run.rows_per_second else "",
            *(_number(run.cpu_us.get(who)) for who in WHO),
            f"{run.start_seconds:.1f}",
            _number(run.lone_ms),
            f"{run.lone_cpu_ms:.0f}" if run.lone_ms else "",
        ]
        for name, run in found.items()
    ]
    yield table(f"A backlog of {rows:,} rows into all sinks; CPU in µs a row, by process", header, lines)
    lines = [[name, *(_number(run.memory_mb.get(who), 0) for who in WHO)] for name, run in found.items()]
    yield table("Memory in MB, of the largest process of each kind", ["", *WHO], lines)


def _number(value: float | None, decimals: int = 1) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


# --- the backfill


def _backfill(stack: DevStack, connection: psycopg.Connection, rows: int) -> str:
    history.prepare(connection, rows)
    lines: list[list[str]] = []
    for name in (SINGLE, *SLICE_MASTERS):
        drain.empty_sinks(stack)
        program = stack.replicator(f"slices_{len(lines)}", REPLICATOR_SINKS="clickhouse,redis")
        environment = {**program.variables(), "PYTHONPATH": str(ROOT)}  # which the nodes inherit
        subprocess.run([*python("replicator"), "init"], env=environment, check=True, stdout=subprocess.DEVNULL)
        master = SLICE_MASTERS.get(name)
        command = [*python("replicator"), "backfill"]
        if master:
            command = [str(PYTHON), "-P", "-m", "replicator_spark", "backfill", "--slices", "8", "--master", master]
            command += MEMORY
        command += ["--start", history.text(0), "--end", history.text(rows), "--json"]
        lines.append([name, *_filled(command, environment, program.folder / "backfill.log", rows)])
        sys.stderr.write(f"{name}: {lines[-1][1]} rows/s\n")
        connection.execute("SELECT pg_drop_replication_slot(%s)", [program.settings["REPLICATOR_SLOT"]])
    header = ["", "rows/s", "CPU µs a row, start included", "seconds to start and end"]
    return table(f"A backfill of {rows:,} rows into ClickHouse and Redis", header, lines)


def _filled(command: list[str], environment: Mapping[str, str], log: Path, rows: int) -> list[str]:
    used: dict[int, float] = {}
    began = time.monotonic()
    with log.open("w") as said, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said) as run:
        while run.poll() is None:
            for pid in (run.pid, *tree(run.pid)):
                with contextlib.suppress(OSError):  # it has ended
                    used[pid] = machine.cpu_seconds(pid)
            time.sleep(LOOK_SECONDS)
        took = time.monotonic() - began
        out = run.communicate()[0]
    if run.returncode:
        raise DevStackError(f"the backfill ended with {run.returncode}: {log.read_text(encoding='utf-8')}")
    done = json.loads(out)
    if rows != done["sinks"]["redis"]["new"] or rows != done["sinks"]["clickhouse"]["written"]:
        raise DevStackError(f"the sinks did not get all {rows} events: {done['sinks']}")
    cpu = 1e6 * sum(used.values()) / rows
    return [f"{rows / done['seconds']:,.0f}", f"{cpu:.1f}", f"{took - done['seconds']:.1f}"]


# --- processes


def spent(pid: int) -> dict[str, float]:
    """CPU seconds of a driver and all under it, by kind."""
    found: dict[str, float] = {}
    for each in tree(pid):
        with contextlib.suppress(OSError):  # it has ended
            found[_kind(each)] = found.get(_kind(each), 0.0) + machine.cpu_seconds(each)
    return found


def peak_memory(pid: int) -> dict[str, float]:
    """The most that one process of each kind took, megabytes."""
    found: dict[str, float] = {}
    for each in tree(pid):
        with contextlib.suppress(OSError):
            found[_kind(each)] = max(found.get(_kind(each), 0.0), machine.peak_memory_mb(each))
    return found


def _kind(pid: int) -> str:
    said = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return next((who for word, who in KINDS.items() if word in said), DRIVER)


def _difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {who: seconds - before.get(who, 0.0) for who, seconds in after.items()}


if __name__ == "__main__":
    sys.exit(main())
