"""What the demo shows while it runs: the picture of `replicator top` on a terminal, or a line in a log.

All of it is read from outside: from PostgreSQL, the sinks, and the replicator's admin endpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import psycopg
import redis
from rich.console import Group
from rich.text import Text

from devstack.comparison import Counts, count
from devstack.replicator import Replicator
from devstack.stack import DevStack
from replicator.cli.operate.picture import picture
from replicator.operations.status.collect import History
from replicator.operations.status.form import Status

TOP = 5

LAG = """
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::bigint, confirmed_flush_lsn::text,
       pg_current_wal_lsn()::text
FROM pg_replication_slots WHERE slot_name = %s
"""

COUNTED_AS = {"clickhouse": "ClickHouse", "redis": "Redis", "http": "API"}


class Look(NamedTuple):
    """One look at everything."""

    second: float
    counts: Counts
    lag_bytes: int
    confirmed: str
    server: str
    status: dict[str, Any]
    top: list[tuple[str, int]]
    """Content and events in the last 10 minutes."""

    @property
    def sinks(self) -> dict[str, dict[str, Any]]:
        """What the replicator says about each."""
        return dict(self.status["sinks"])


def look(stack: DevStack, replicator: Replicator, second: float) -> Look:
    """Ask all of them. Raises OSError if the replicator does not answer."""
    status = replicator.status()
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        found = connection.execute(LAG, [replicator.settings["REPLICATOR_SLOT"]]).fetchone()
    lag_bytes, confirmed, server = found or (0, "-", "-")
    with redis.Redis.from_url(stack.redis.url, decode_responses=True) as client:
        top = client.zrange("top:content:10m", 0, TOP - 1, desc=True, withscores=True)
    return Look(second, count(stack), lag_bytes, confirmed, server, status, [(name, int(n)) for name, n in top])


def lag_seconds(now: Look) -> float:
    """The slowest sink's."""
    return max((float(sink["lag_seconds"]) for sink in now.sinks.values()), default=0.0)


def dead_letters(now: Look) -> int:
    """Of all sinks."""
    return sum(int(sink["dead_letters"]) for sink in now.sinks.values())


def as_picture(now: Look, history: bytes) -> Group:
    """For a terminal: what `replicator top` shows, and beside it what only the demo can know."""
    shown = picture(msgspec.convert(now.status, Status), msgspec.json.decode(history, type=History))
    counts = "  ".join(f"{COUNTED_AS[name]} {_count(now, name):,}" for name in now.sinks)
    facts = Text(f"after {now.second:.0f} s: PostgreSQL {now.counts.postgres:,}  {counts}", "dim")
    top = "  ".join(f"{content}: {events:,}" for content, events in now.top)
    last = Text(f"top content of 10 minutes: {top}", "dim")
    return Group(shown, Text(), facts, last)


def as_line(now: Look, before: Look | None) -> str:
    """For a log."""
    counts = " ".join(f"{COUNTED_AS[name]} {_count(now, name)}" for name in now.sinks)
    top = " ".join(f"{content}:{events}" for content, events in now.top)
    rate = _rate(now, before, now.counts.postgres, before.counts.postgres if before else 0)
    return (
        f"{now.second:4.0f} s  {rate} events/s  PostgreSQL {now.counts.postgres} {counts}  "
        f"lag {now.lag_bytes} bytes {lag_seconds(now):.1f} s  dead letters {dead_letters(now)}  top {top}"
    )


def _count(now: Look, sink: str) -> int:
    return {"clickhouse": now.counts.clickhouse, "redis": now.counts.redis, "http": now.counts.api}[sink]


def _rate(now: Look, before: Look | None, count_now: int, count_before: int) -> str:
    if before is None or now.second <= before.second:
        return "-"
    return f"{(count_now - count_before) / (now.second - before.second):,.0f}"
