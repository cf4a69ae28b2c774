"""The crash matrix: kill the real program at each place, in each shape of transactions, restart it, compare.

    python -m tests.prove --case answered-redis/interleaved --seed 7

A case begins with an empty database, slot, checkpoint and sinks. The program dies when it first passes its place after
a number of rows, which the seed draws (`failpoints.py`). Restarted unaltered, it catches up. Then every field of every
event in every sink is compared with what PostgreSQL computes.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psycopg

from devstack import DevStack
from devstack.process import DevStackError, wait_until
from tests.prove.failpoints import PLACES
from tests.prove.shapes import SHAPES
from tests.support import environment as ground
from tests.support.destinations import Destinations, expected
from tests.support.exact import compare, first_views, newest
from tests.support.program import Program

MAX_REPEATS = 5_000
DIES_SECONDS = 120.0
CAUGHT_UP_SECONDS = 180.0
TOP_SECONDS = 10.0  # how late the window may be, by contract

SETTINGS = {
    "REPLICATOR_RETRY_MAX_SECONDS": "0.5",
    "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.2",
    "REPLICATOR_CHECKPOINT_INTERVAL_SECONDS": "0.05",
    "REPLICATOR_CLICKHOUSE_LINGER_SECONDS": "0.1",
    "REPLICATOR_CLICKHOUSE_MAX_EVENTS": "3000",
    "REPLICATOR_HTTP_BATCH_SIZE": "200",
    "REPLICATOR_HTTP_MAX_REPEATS": str(MAX_REPEATS),
}
"""Small steps, so that there are many places to die at, and a bound far below a large transaction."""


class Case(msgspec.Struct, frozen=True):
    """One cell of the matrix."""

    place: str
    shape: str
    seed: int

    @classmethod
    def named(cls, name: str, seed: int) -> Case:
        """From `PLACE/SHAPE`."""
        place, _, shape = name.partition("/")
        return cls(place, shape, seed)

    @property
    def name(self) -> str:
        """As for `--case`."""
        return f"{self.place}/{self.shape}"

    @property
    def again(self) -> str:
        """The command that repeats it."""
        return f"python -m tests.prove --case {self.name} --seed {self.seed}"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a case. Every number but `events`, `replaced` and `repeats` must be 0."""

    case: Case
    events: int
    lost: dict[str, int]
    """Events that a sink lacks, by sink."""
    wrong: dict[str, int]
    """Events that differ in some field, or that PostgreSQL does not have; in Redis, contents whose last one differs."""
    double: int
    """Rows in ClickHouse that are duplicates even under FINAL."""
    replaced: int
    """Rows in ClickHouse that a merge will remove: written again after the kill."""
    counts: int
    """Contents whose count, or value in the top list, differs from PostgreSQL."""
    repeats: int
    """Events that the API got again, at most MAX_REPEATS."""
    trouble: str = ""
    """Why nothing could be compared, in words."""

    @property
    def good(self) -> bool:
        """Nothing lost, nothing wrong, everything within its bound."""
        found = (*self.lost.values(), *self.wrong.values(), self.double, self.counts)
        return not self.trouble and not any(found) and self.repeats <= MAX_REPEATS


def cases(seed: int) -> Iterator[Case]:
    """All of them."""
    return (Case(place, shape, seed) for shape in SHAPES for place in PLACES)


def play(stack: DevStack, case: Case, *altered: str) -> Outcome:
    """Run one case on a stack of servers. `altered` are arguments of `failpoints.py` that break the rule."""
    shape = SHAPES[case.shape]
    chance = random.Random(f"{case.seed} {case.name}")  # noqa: S311  not a secret
    with ExitStack() as cleanup:
        dsn = cleanup.enter_context(ground.fresh_database(stack))
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="matrix-")))
        urls = ground.empty_clickhouse(stack), ground.empty_redis(stack), ground.empty_api(stack)
        settings = ground.environment(ground.plain_role(stack, dsn), *urls, folder=folder) | SETTINGS
        program = Program(settings, dsn, folder / "log")
        cleanup.callback(program.end)
        altered = altered or program.altered
        after = chance.randint(1, shape.events)
        try:
            program.altered = (*altered, "--die", case.place, "--after", str(after))
            program.start()
            shape.write(dsn, chance)
            died = program.process.wait(DIES_SECONDS)
            assert died == -signal.SIGKILL, f"it ended with {died} and not at its place"
            _see_slot_free(program, dsn)
            program.altered = altered
            program.start()
            program.wait_until_caught_up(CAUGHT_UP_SECONDS)
            outcome = judge(case, dsn, stack)
            assert 0 == program.stop(), "it does not end in order"
        except (AssertionError, DevStackError, subprocess.TimeoutExpired) as exc:
            message = f"{type(exc).__name__}: {exc}\n{program.log}"[:4000]
            return Outcome(
                case=case,
                events=shape.events,
                lost={},
                wrong={},
                double=0,
                replaced=0,
                counts=0,
                repeats=0,
                trouble=message,
            )
    return outcome


def _see_slot_free(program: Program, dsn: str) -> None:
    query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
    with psycopg.connect(dsn, autocommit=True) as looking:
        wait_until(lambda: looking.execute(query, [program.slot]).fetchone() == (None,), "the slot to be free")


def judge(case: Case, dsn: str, stack: DevStack) -> Outcome:
    """Compare every field of every event."""
    destinations = Destinations(stack)
    with contextlib.closing(destinations.redis):
        shape = SHAPES[case.shape]
        events = expected(dsn, content_at_commit=shape.content_at_commit)
        assert len(events) == shape.events
        rows = compare(events, destinations.clickhouse())
        distinct, repeats = first_views(destinations.api())
        taken = compare(events, distinct)
        wanted = Counter(event["content_id"] for event in events)
        counts = destinations.counts()
        last, last_wanted = destinations.last(), newest(events)
        stale = [content for content in wanted if last.get(content) != last_wanted[content]]
        with contextlib.suppress(DevStackError):  # counted below
            wait_until(lambda: wanted == destinations.top(), "the top list", TOP_SECONDS)
        top = destinations.top()
        stored = int(stack.clickhouse.query("SELECT count() FROM events_enriched"))
    differ = {content for content in wanted.keys() | counts.keys() if counts.get(content) != wanted[content]}
    differ |= {content for content in wanted.keys() | top.keys() if top.get(content) != wanted[content]}
    return Outcome(
        case=case,
        events=len(events),
        lost={
            "clickhouse": len(rows.missing),
            "redis": sum((wanted - Counter(counts)).values()),
            "http": len(taken.missing),
        },
        wrong={
            "clickhouse": len(rows.wrong) + len(rows.surplus),
            "redis": len(stale),
            "http": len(taken.wrong) + len(taken.surplus),
        },
        double=rows.double,
        replaced=stored - len(events) + len(rows.missing) - len(rows.surplus) - rows.double,
        counts=len(differ),
        repeats=repeats,
    )
