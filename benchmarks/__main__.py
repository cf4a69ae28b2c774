"""`python -m benchmarks`: throughput and latency of the real programs on private servers, beside yardsticks.

`drain` measures throughput, `latency` latency, `history` backfills. This module runs them and prints the figures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from statistics import median
from types import FrameType
from typing import Any

import msgspec
import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks import backlog, drain, history, latency, machine
from benchmarks.drain import Drained
from benchmarks.history import Backfilled
from benchmarks.latency import Latencies
from devstack import DevStack, DevStackError
from devstack.process import ROOT

PARTS = ("bulk", "single", "latency", "backfill")
BULK_TRANSACTION_ROWS = 1_000
WIDTH = 100  # the tables need some 80 columns, and a log has no width
SINGLE_SHARE = 5  # the backlog of single-row transactions has a fifth of --rows

Pairs = list[tuple[Drained, Drained]]


def main() -> int:
    """Run the chosen parts. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part (all)")
    parser.add_argument("--rows", type=int, default=500_000, help="of the bulk backlog; single has a fifth (500000)")
    parser.add_argument("--runs", type=int, default=3, help="of each reader, in turn (3)")
    parser.add_argument("--rate", type=int, default=1_000, help="commits/s of the latency part (1000)")
    parser.add_argument("--seconds", type=int, default=15, help="of the latency part, after its warm-up (15)")
    sizes = ",".join(map(str, history.SIZES))
    parser.add_argument("--backfill-rows", default=sizes, help=f"of each backfill, separated by commas ({sizes})")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = run(args, args.only or PARTS)
    except DevStackError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except KeyboardInterrupt:
        return 1
    print(msgspec.json.format(msgspec.json.encode(result)).decode()) if args.json else show(result)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(args: argparse.Namespace, parts: Sequence[str]) -> dict[str, Any]:
    """Run every part on one stack."""
    settings = {"track_commit_timestamp": "on"}  # for the latency part
    with DevStack(*DevStack.SERVICES, postgres_settings=settings) as stack:
        with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
            connection.execute((ROOT / "sql" / "source_schema.sql").read_bytes())
            backlog.prepare(connection)
        result: dict[str, Any] = {
            "machine": machine.facts(stack.postgres.dsn),
            "http_batch_size": drain.HTTP_BATCH_SIZE,
        }
        if "bulk" in parts:
            result["bulk"] = _drain(stack, "bulk", args.rows // BULK_TRANSACTION_ROWS, BULK_TRANSACTION_ROWS, args.runs)
        if "single" in parts:
            result["single"] = _drain(stack, "single", args.rows // SINGLE_SHARE, 1, args.runs)
        if "latency" in parts:
            _say(f"latency at {args.rate} commits/s for {args.seconds} s")
            result["latency"] = latency.measure(stack, rate=args.rate, seconds=args.seconds)
        if "backfill" in parts:
            _say(f"backfills of {args.backfill_rows} rows, {args.runs} runs each")
            result["backfill"] = history.measure(stack, [*map(int, args.backfill_rows.split(","))], args.runs)
        return result


def _drain(stack: DevStack, name: str, transactions: int, size: int, runs: int) -> Pairs:
    _say(f"{name}: {transactions} transactions of {size}, {runs} runs each")
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        made = backlog.make(connection, f"bench_{name}", transactions=transactions, size=size)
        pairs = drain.alternate(stack, made, runs)
        backlog.drop(connection, made.slot)
    return pairs


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=WIDTH, soft_wrap=True, highlight=False)
    for part, title in (("bulk", "transactions of 1,000 rows"), ("single", "single-row transactions")):
        if part in result:
            console.print(_throughput(title, result[part]))
    if "latency" in result:
        console.print(_latency(result["latency"]))
    if "backfill" in result:
        console.print(_backfill(result["backfill"]))
    console.print(
        f"{result['machine']}; HTTP batch size {result['http_batch_size']}; medians; everything on one machine"
    )


def _throughput(title: str, pairs: Pairs) -> Table:
    rows = pairs[0][0].rows
    table = Table(title=f"{rows:,} rows, {title}", title_justify="left")
    table.add_column("")
    for heading in ("rows/s", "of pg_recvlogical", "CPU µs a row", "peak MB"):
        table.add_column(heading, justify="right")
    plain, ours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    table.add_row("pg_recvlogical", *_rates(plain, "pg_recvlogical"), _cost(plain, "pg_recvlogical"))
    for sink in ours[0].seconds:
        table.add_row(f"  until {sink} has all", *_rates(ours, sink, plain))
    ratios = [our.rows_per_second / their.rows_per_second for their, our in pairs]
    speed = median(our.rows_per_second for our in ours)
    peak = max(our.peak_memory_mb or 0 for our in ours)
    share = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    table.add_row("replicator, all sinks", f"{speed:,.0f}", share, _cost(ours, "replicator"), f"{peak:.0f}")
    for name in list(ours[0].cpu_us)[1:]:
        table.add_row(f"  {name} meanwhile", "", "", _cost(ours, name))
    return table


def _rates(results: list[Drained], name: str, plain: list[Drained] | None = None) -> tuple[str, str]:
    rates = [result.rows / result.seconds[name] for result in results]
    if plain is None:
        return f"{median(rates):,.0f}", ""
    ratios = [rate / their.rows_per_second for rate, their in zip(rates, plain, strict=True)]
    return f"{median(rates):,.0f}", f"{median(ratios):.2f}"


def _cost(results: list[Drained], process: str) -> str:
    return f"{median(result.cpu_us[process] for result in results):.1f}"


def _latency(found: Latencies) -> Table:
    title = f"commit to visible at {found.commits_per_second:,.0f} commits/s, {found.commits:,} commits"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("p50 ms", "p99 ms", "max ms"):
        table.add_column(heading, justify="right")
    for sink, lag in found.sinks.items():
        table.add_row(sink, f"{lag.p50_ms:.1f}", f"{lag.p99_ms:.1f}", f"{lag.max_ms:.1f}")
    table.caption = f"replicator: {found.cpu_us:.0f} µs of CPU a row, {found.peak_memory_mb:.0f} MB at most"
    return table


def _backfill(found: list[list[Backfilled]]) -> Table:
    table = Table(title="backfill.py into ClickHouse and Redis", title_justify="left")
    for heading in ("rows", "seconds", "rows/s", "of COPY", "of ClickHouse", "CPU µs a row", "peak MB", "reconcile s"):
        table.add_column(heading, justify="right")
    for runs in found:
        seconds = median(run.seconds for run in runs)
        table.add_row(
            f"{runs[0].rows:,}",
            f"{seconds:.1f}",
            f"{runs[0].rows / seconds:,.0f}",
            f"{median(run.copy_seconds / run.seconds for run in runs):.2f}",
            f"{median(run.ingest_seconds / run.seconds for run in runs):.2f}",
            f"{median(run.cpu_us for run in runs):.1f}",
            f"{max(run.peak_memory_mb for run in runs):.0f}",
            f"{median(run.reconcile_seconds for run in runs):.1f}",
        )
    table.caption = "beside PostgreSQL's COPY of the rows, and ClickHouse's insert of the JSON, each alone"
    return table


if __name__ == "__main__":
    sys.exit(main())
