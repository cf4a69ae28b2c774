"""`python -m devstack.spark_demo`: stream and backfill on a Spark cluster, on private servers.

A Master and two Workers write to the sinks what `traffic` inserts while it changes contents, and beside that bring
100,000 older events. At the end `comparison` checks every field of every event. Exit code 0: the sinks have what
PostgreSQL has.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence

import psycopg

from devstack.comparison import compare
from devstack.demo import console, inserting, look_around, prepare, report, settle
from devstack.process import ROOT, DevStackError
from devstack.replicator import PREFIX
from devstack.spark import EXECUTORS, PYTHON
from devstack.stack import DevStack
from devstack.traffic import Traffic

SHOWN = PYTHON.relative_to(ROOT)
OLDER_EVENTS = 100_000
RANGE = ("--start", "2026-01-08T09:00:00", "--end", "2026-01-08T10:00:00")

ADD_OLDER = """
INSERT INTO content (content_id, content_type, length_seconds)
SELECT 1000 + n, 'video', 60 * n FROM generate_series(1, 9) AS n;
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms, raw_payload)
SELECT content_id, n, 'play', timestamptz '2026-01-08 09:00:00+00' + n * interval '30 ms', n, to_jsonb(content)
FROM generate_series(1, {events}) AS n JOIN content ON content_id = 1001 + n % 9;
CREATE INDEX ON engagement_events (event_ts, id);
"""
"""As `traffic` notes it, each event has its content with it, for `comparison`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0 if the sinks agree with PostgreSQL."""
    parser = argparse.ArgumentParser(prog="python -m devstack.spark_demo", description="Watch the replicator on Spark.")
    parser.add_argument("--seconds", type=float, default=30.0, help="of traffic, at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the traffic")  # noqa: S311
    args = parser.parse_args(arguments)
    try:
        return _run(args.seconds, args.seed)
    except DevStackError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was compared\n")
        return 1


def _run(seconds: float, seed: int) -> int:
    console.print(f"starting PostgreSQL, Redis, ClickHouse and an HTTP API (traffic has seed {seed})")
    with DevStack(*DevStack.SERVICES) as stack:
        dsn = prepare(stack)
        with psycopg.connect(stack.postgres.dsn) as connection:
            connection.execute(ADD_OLDER.format(events=OLDER_EVENTS).encode())
        replicator = stack.replicator(REPLICATOR_POSTGRES_DSN=dsn)
        console.print("starting a Spark Master and two Workers")
        with stack.spark(**replicator.settings) as spark:
            options = ["--master", spark.master.url, *(word for option in EXECUTORS for word in ("--conf", option))]
            command = ["-m", "replicator_spark", "stream", *options]
            console.print(f"$ {SHOWN} {' '.join(command)}")
            replicator.program = [str(PYTHON), *command]
            replicator.start()
            console.print(look_around(stack, replicator))
            time_is_up = threading.Event()
            with inserting(Traffic(stack.postgres.dsn, seed)):
                threading.Timer(seconds, time_is_up.set).start()
                _backfill(replicator.settings, options)
                console.print("traffic goes on until its time is up")
                time_is_up.wait()
            settle(stack)
            replicator.stop()
        verdicts = compare(stack)
    return report(verdicts)


def _backfill(settings: dict[str, str], options: Sequence[str]) -> None:
    """The command, on the cluster. Raises DevStackError unless it ends well."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    sinks = ["--sinks", "clickhouse,redis,http", "--slices", "10"]
    command = ["-m", "replicator_spark", "backfill", *RANGE, *sinks, *options]
    console.print(f"$ {SHOWN} {' '.join(command)}")
    environment = {**outside, **settings, "SPARK_LOCAL_IP": "127.0.0.1"}  # else Java wonders which address is meant
    done = subprocess.run([str(PYTHON), *command], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise DevStackError(f"the backfill ended with {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
