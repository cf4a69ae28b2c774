"""`python -m devstack.demo`: watch the replicator work, on private servers, until Ctrl-C.

Starts the stack and the real replicator with a plain replication role. `traffic` inserts, `screen` shows what happens,
and at the end `comparison` checks that the sinks have what PostgreSQL has. Exit code 0: they do.
"""

from __future__ import annotations

import argparse
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

import psycopg
from rich.console import Console
from rich.live import Live
from rich.table import Table

from devstack import screen
from devstack.comparison import Verdict, compare, count
from devstack.process import ROOT, DevStackError, wait_until
from devstack.replicator import Replicator
from devstack.stack import DevStack
from devstack.traffic import Traffic

ROLE = "replicator"
LOOK_SECONDS = 1.0
DIFFERENCES_SHOWN = 5  # per sink; one bug makes thousands
LINE_EVERY_LOOKS = 2  # a log needs fewer
SETTLE_TIMEOUT_SECONDS = 30.0  # the last insert takes a second, longer on a busy machine

console = Console(soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0 if the sinks agree with PostgreSQL."""
    parser = argparse.ArgumentParser(prog="python -m devstack.demo", description="Watch the replicator work.")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds of traffic (default: never)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the traffic")  # noqa: S311
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args.seconds, args.seed)
    except DevStackError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except KeyboardInterrupt:  # before there was anything to compare, or a second Ctrl-C
        sys.stderr.write("interrupted: nothing was compared\n")
        return 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(seconds: float | None, seed: int) -> int:
    console.print(f"starting PostgreSQL, Redis, ClickHouse and an HTTP API (traffic has seed {seed})")
    with DevStack(*DevStack.SERVICES) as stack:
        dsn = prepare(stack)
        replicator = stack.replicator(REPLICATOR_POSTGRES_DSN=dsn)
        replicator.start()
        console.print(look_around(stack, replicator))
        traffic = Traffic(stack.postgres.dsn, seed)
        with inserting(traffic) as running:
            _watch(stack, replicator, running, seconds)
        console.print("traffic has stopped; waiting for the sinks")
        settle(stack)
        replicator.stop()
        verdicts = compare(stack)
    return report(verdicts)


def prepare(stack: DevStack) -> str:
    """Create the schema and a plain replication role from sql/. Returns the role's DSN."""
    with psycopg.connect(stack.postgres.dsn) as connection:
        connection.execute((ROOT / "sql" / "source_schema.sql").read_bytes())
    password = secrets.token_hex(8)
    psql = [str(stack.postgres.bin_dir / "psql"), "--no-psqlrc", "--quiet", stack.postgres.dsn]
    given = ["-v", f"role={ROLE}", "-v", f"password={password}", "-f", str(ROOT / "sql" / "roles.sql")]
    done = subprocess.run([*psql, *given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DevStackError(f"sql/roles.sql failed: {done.stderr.strip()}")
    return stack.postgres.dsn_for(user=ROLE, password=password)


INSERT = """INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, device) \
VALUES (1, 999, 'play', 7000, 'web');"""


def look_around(stack: DevStack, replicator: Replicator) -> str:
    """Commands for another terminal."""
    redis_cli = f"redis-cli -p {stack.redis.port}"
    curl = f"curl -s 'http://127.0.0.1:{stack.clickhouse.port}/?database=engagement' -d"
    api = stack.api.url.removesuffix("/events")
    return f"""the page: {replicator.url}/

look around, from another terminal:
  psql {stack.postgres.dsn} -f {ROOT}/sql/slot_lag.sql
  psql {stack.postgres.dsn} -c "{INSERT}"
  {redis_cli} GET content:last:1
  {redis_cli} ZREVRANGE top:content:10m 0 10 WITHSCORES
  {curl} 'SELECT * FROM events_enriched FINAL ORDER BY event_id DESC LIMIT 5 FORMAT Vertical'
  curl -s {api}/stats
  cd {ROOT} && {sys.executable} -m replicator top --url {replicator.url}
  curl -s {replicator.url}/status     (and /metrics, /readyz)
  tail -f {replicator.log} {stack.api.log}
"""  # noqa: S608  printed, not run


@contextmanager
def inserting(traffic: Traffic) -> Iterator[Future[None]]:
    """Run traffic in a thread; raise its failure on exit."""
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(traffic.run)
        try:
            yield future
        finally:
            traffic.stop()
        future.result()


def _watch(stack: DevStack, replicator: Replicator, running: Future[None], seconds: float | None) -> None:
    """Show what happens until time is up, Ctrl-C, or something fails."""
    started = time.monotonic()
    before = None
    try:
        with Live(console=Console(highlight=False), auto_refresh=False) if console.is_terminal else _plain() as live:
            for number in _looks(started, seconds):
                if running.done():
                    return
                now = _look(stack, replicator, started)
                if isinstance(live, Live):
                    live.update(screen.as_picture(now, replicator.history()), refresh=True)
                elif number % LINE_EVERY_LOOKS == 0:
                    console.print(screen.as_line(now, before))
                before = now
    except KeyboardInterrupt:
        console.print("ending; once more ends at once")


@contextmanager
def _plain() -> Iterator[None]:
    yield None


def _looks(started: float, seconds: float | None) -> Iterator[int]:
    """Yield the number of each look when it is due."""
    number = 0
    while seconds is None or time.monotonic() < started + seconds:
        yield number
        number += 1
        end = started + number * LOOK_SECONDS
        if seconds is not None:
            end = min(end, started + seconds)
        time.sleep(max(0.0, end - time.monotonic()))


def _look(stack: DevStack, replicator: Replicator, started: float) -> screen.Look:
    try:
        return screen.look(stack, replicator, time.monotonic() - started)
    except OSError:
        raise DevStackError(f"the replicator does not answer\n{replicator.log_end()}") from None


def settle(stack: DevStack) -> None:
    """Wait until every sink has as many events as PostgreSQL. If that takes too long, the comparison shows why."""
    try:
        wait_until(lambda: len(set(count(stack))) == 1, "the sinks to catch up", SETTLE_TIMEOUT_SECONDS)
    except DevStackError as exc:
        console.print(str(exc))


def report(verdicts: Sequence[Verdict]) -> int:
    """Print the summary. Returns the exit code."""
    table = Table(title="summary", title_justify="left")
    for heading in ("", "events", "", ""):
        table.add_column(heading, justify="right" if heading == "events" else "left")
    reference = verdicts[0]
    for verdict in verdicts:
        differences = len(verdict.differences)
        agrees = "the reference" if verdict is reference else f"{differences} differences" if differences else "equal"
        table.add_row(verdict.sink, str(verdict.events), agrees, verdict.note)
    console.print(table)
    wrong = [verdict for verdict in verdicts if verdict.differences or verdict.events != reference.events]
    for verdict in wrong:
        for line in verdict.differences[:DIFFERENCES_SHOWN]:
            console.print(f"{verdict.sink}: {line}")
    if not reference.events:
        console.print("there was nothing to compare")
        return 1
    console.print("the sinks DIFFER from PostgreSQL" if wrong else "every sink has every event, each field right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
