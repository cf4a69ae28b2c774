"""The results as Markdown, ready for `docs/performance.md`: medians, and the range where pairs are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.drain import Drained
from benchmarks.history import Backfilled
from benchmarks.latency import Latencies
from benchmarks.machine import CORES

YARDSTICK = "pg_recvlogical"
PROCESSES = ("replicator", "main thread", "walsender", "redis", "clickhouse", "api", "all")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    lines = [list(header), ["---", *["--:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def throughput(title: str, rounds: list[dict[str, Drained]]) -> Iterator[str]:
    """All readers side by side; then who spends the replicator's CPU, and how large writes get."""
    by_name = {name: [found[name] for found in rounds] for name in rounds[0]}
    ours = {name: results for name, results in by_name.items() if results[0].batches}
    rows = by_name[YARDSTICK][0].rows
    header = ["", "rows/s", f"of {YARDSTICK}", "steady rows/s", "its CPU µs", "all CPU µs", "peak MB"]
    yield table(f"{rows:,} rows, {title}", header, [_speed(name, by_name) for name in by_name])
    header = ["CPU µs a row", *PROCESSES, "so at most rows/s"]
    yield table("Who spends it", header, [_costs(name, results) for name, results in ours.items()])
    header = ["events a write", "redis", "clickhouse", "http", "longest Redis call"]
    yield table("How large writes get", header, [_batches(name, results) for name, results in ours.items()])
    if len(ours) > 1:
        first, second = ours
        ratios = _ratios(ours[first], ours[second])
        yield f"{first} beside {second}: {_range(ratios)} times the rows/s.\n"
    others = [100 * found.others for results in by_name.values() for found in results]
    yield f"Others took {median(others):.0f} % of the machine ({min(others):.0f} to {max(others):.0f}).\n"


def _speed(name: str, by_name: dict[str, list[Drained]]) -> list[str]:
    results = by_name[name]
    steady = [found.steady for found in results if found.steady is not None]
    peaks = [found.peak_memory_mb for found in results if found.peak_memory_mb is not None]
    own = "replicator" if "replicator" in results[0].cpu_us else "reader"
    return [
        name,
        f"{median(found.rows_per_second for found in results):,.0f}",
        "" if name == YARDSTICK else _range(_ratios(results, by_name[YARDSTICK])),
        f"{median(steady):,.0f}" if steady else "",
        _cost(results, own),
        _cost(results, "all"),
        f"{max(peaks):.0f}" if peaks else "",
    ]


def _ratios(ours: list[Drained], theirs: list[Drained]) -> list[float]:
    return [one.rows_per_second / other.rows_per_second for one, other in zip(ours, theirs, strict=True)]


def _range(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _cost(results: list[Drained], process: str) -> str:
    return f"{median(found.cpu_us[process] for found in results):.1f}"


def _costs(name: str, results: list[Drained]) -> list[str]:
    ceiling = median(CORES * 1e6 / found.cpu_us["all"] for found in results)
    return [name, *(_cost(results, process) for process in PROCESSES), f"{ceiling:,.0f}"]


def _batches(name: str, results: list[Drained]) -> list[str]:
    sizes = (median((found.batches or {})[sink] for found in results) for sink in ("redis", "clickhouse", "http"))
    longest = max(found.redis_longest_ms or 0 for found in results)
    return [name, *(f"{size:,.0f}" for size in sizes), f"{longest:.0f} ms" if longest > 1 else "under 1 ms"]


def latency(found: Latencies) -> Iterator[str]:
    """From commit to visible."""
    title = f"From commit to visible at {found.commits_per_second:,.0f} commits/s, {found.commits:,} commits"
    rows = [[sink, f"{lag.p50_ms:.1f}", f"{lag.p99_ms:.1f}", f"{lag.max_ms:.1f}"] for sink, lag in found.sinks.items()]
    yield table(title, ["", "p50 ms", "p99 ms", "max ms"], rows)
    yield f"The replicator took {found.cpu_us:.0f} µs of CPU a row and {found.peak_memory_mb:.0f} MB at most.\n"


def backfill(found: list[list[Backfilled]]) -> Iterator[str]:
    """`backfill.py` into ClickHouse and Redis."""
    header = ["events", "seconds", "rows/s", "of COPY", "of ClickHouse's insert", "CPU µs", "peak MB", "reconcile s"]
    yield table("backfill.py into ClickHouse and Redis", header, [_filled(runs) for runs in found])


def _filled(runs: list[Backfilled]) -> list[str]:
    seconds = median(run.seconds for run in runs)
    return [
        f"{runs[0].rows:,}",
        f"{seconds:.1f}",
        f"{runs[0].rows / seconds:,.0f}",
        f"{median(run.copy_seconds / run.seconds for run in runs):.2f}",
        f"{median(run.ingest_seconds / run.seconds for run in runs):.2f}",
        f"{median(run.cpu_us for run in runs):.1f}",
        f"{max(run.peak_memory_mb for run in runs):.0f}",
        f"{median(run.reconcile_seconds for run in runs):.1f}",
    ]
