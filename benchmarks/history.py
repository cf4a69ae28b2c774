"""How fast history is backfilled: `backfill.py` into ClickHouse and Redis, beside what the two databases do alone.

PostgreSQL's yardstick is a COPY of the same rows, joined with their content, with the output discarded. ClickHouse's is
an insert of the same JSON, in inserts of the same size, into an empty table. The clock of the backfill includes the
start of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import psycopg

from benchmarks.drain import empty_sinks
from devstack import DevStack
from devstack.comparison import count
from devstack.process import ROOT, DevStackError
from enrichment import EVENT
from sinks.clickhouse.table import columns

SIZES = (10_000, 100_000, 1_000_000, 5_000_000)
BEGIN = datetime(2026, 1, 8, tzinfo=UTC)
STEP = timedelta(milliseconds=1)  # between two events, so that a time range has a known number of rows
INSERT_ROWS = 40_000  # REPLICATOR_CLICKHOUSE_MAX_EVENTS

FILL = """
TRUNCATE public.engagement_events;
INSERT INTO public.engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device)
SELECT 1 + floor(1000 * ((hashint8(n) & 65535) / 65536.0::float8) ^ 3), n * 31,
       (ARRAY['play', 'pause', 'seek', 'finish'])[1 + n % 4], timestamptz '{begin}' + n * interval '1 ms',
       nullif(n::bigint * 1047 % 900000, 0), (ARRAY['web', 'ios', 'android', NULL])[1 + n / 1000 % 4]
FROM generate_series(0, {rows} - 1) AS n;
CREATE INDEX IF NOT EXISTS engagement_events_event_ts_id ON public.engagement_events (event_ts, id);
"""
COPY = """
COPY (SELECT e.id, e.content_id, e.user_id, e.event_type, e.event_ts, e.duration_ms, e.device, c.content_type,
             c.length_seconds
      FROM public.engagement_events e LEFT JOIN public.content c USING (content_id)
      WHERE e.event_ts >= '{begin}' AND e.event_ts < '{end}' ORDER BY e.event_ts, e.id) TO STDOUT
"""
SAME_JSON = """
SELECT {columns} FROM events_enriched WHERE event_ts >= '{begin}' AND event_ts < '{end}'
SETTINGS date_time_output_format = 'iso', output_format_json_quote_64bit_integers = 0 FORMAT JSONEachRow
"""


class Backfilled(msgspec.Struct, frozen=True, kw_only=True):
    """One run over one range."""

    rows: int
    seconds: float
    """From the start of the process to its end."""
    cpu_us: float
    """CPU time of the backfill, microseconds per row."""
    peak_memory_mb: float
    copy_seconds: float
    ingest_seconds: float
    reconcile_seconds: float
    """Of `python -m replicator reconcile` over the same range; the whole process."""


def prepare(connection: psycopg.Connection, rows: int) -> None:
    """Insert so many events, one a millisecond."""
    connection.execute(FILL.format(begin=BEGIN.isoformat(), rows=rows).encode())
    connection.execute("VACUUM ANALYZE public.engagement_events")


def measure(stack: DevStack, sizes: Sequence[int], runs: int) -> list[list[Backfilled]]:
    """Measure every size `runs` times."""
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        prepare(connection, max(sizes))
        return [[_run(stack, connection, rows) for _ in range(runs)] for rows in sizes]


def _run(stack: DevStack, connection: psycopg.Connection, rows: int) -> Backfilled:
    copy_seconds = _copy(connection, rows)
    empty_sinks(stack)
    program = stack.replicator(f"backfill_{time.monotonic_ns()}", REPLICATOR_SINKS="clickhouse,redis")
    command = [sys.executable, str(ROOT / "backfill.py"), "--start", text(0), "--end", text(rows)]
    environment = program.variables()
    subprocess.run(
        [sys.executable, "-m", "replicator", "init"], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    _verify(stack, process, rows)
    reconcile_seconds = _reconcile(environment, rows)
    connection.execute("SELECT pg_drop_replication_slot(%s)", [program.settings["REPLICATOR_SLOT"]])
    return Backfilled(
        rows=rows,
        seconds=seconds,
        cpu_us=(usage.ru_utime + usage.ru_stime) / rows * 1e6,
        peak_memory_mb=usage.ru_maxrss / 1000,
        copy_seconds=copy_seconds,
        ingest_seconds=_ingest(stack, rows),
        reconcile_seconds=reconcile_seconds,
    )


def _verify(stack: DevStack, process: subprocess.Popen[bytes], rows: int) -> None:
    """Check the counts: a benchmark of something that loses rows is worthless."""
    assert process.stderr is not None  # noqa: S101  it is a pipe
    with process.stderr as said:
        if process.returncode:
            raise DevStackError(f"the backfill ended with {process.returncode}: {said.read().decode()}")
    counts = count(stack)
    if (counts.clickhouse, counts.redis) != (rows, rows):
        raise DevStackError(f"ClickHouse has {counts.clickhouse} and Redis {counts.redis} events of {rows}")


def _reconcile(environment: Mapping[str, str], rows: int) -> float:
    """Without Redis: it counts over all times, and PostgreSQL has more than this range."""
    command = [sys.executable, "-m", "replicator", "reconcile", "--start", text(0), "--end", text(rows)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--sinks", "clickhouse"], cwd=ROOT, env=environment, check=False, capture_output=True
    )
    if done.returncode:
        raise DevStackError(f"reconcile ended with {done.returncode}: {done.stdout.decode()}{done.stderr.decode()}")
    return time.monotonic() - started


def _copy(connection: psycopg.Connection, rows: int) -> float:
    started = time.monotonic()
    with connection.cursor().copy(COPY.format(begin=text(0), end=text(rows)).encode()) as copy:
        for _ in copy:
            pass
    return time.monotonic() - started


def _ingest(stack: DevStack, rows: int) -> float:
    """Insert what the backfill has written, again; only the inserts are timed."""
    stack.clickhouse.query("CREATE TABLE again AS events_enriched")
    names = ", ".join(columns(EVENT))
    seconds = 0.0
    for body in _bodies(stack, rows):
        started = time.monotonic()
        stack.clickhouse.query(f"INSERT INTO again ({names}) FORMAT JSONEachRow\n{body}")
        seconds += time.monotonic() - started
    found = stack.clickhouse.query("SELECT count() FROM again")
    stack.clickhouse.query("DROP TABLE again SYNC")
    if int(found) != rows:
        raise DevStackError(f"ClickHouse took {found.strip()} rows of {rows}")
    return seconds


def _bodies(stack: DevStack, rows: int) -> Iterator[str]:
    names = ", ".join(columns(EVENT))
    for first in range(0, rows, INSERT_ROWS):
        begin, end = (_clickhouse_text(at) for at in (first, min(first + INSERT_ROWS, rows)))
        yield stack.clickhouse.query(SAME_JSON.format(columns=names, begin=begin, end=end))


def text(row: int) -> str:
    """The time of a row."""
    return (BEGIN + row * STEP).isoformat()


def _clickhouse_text(row: int) -> str:
    return (BEGIN + row * STEP).strftime("%Y-%m-%d %H:%M:%S.%f")
