"""`python backfill.py` as it stands: beside the stream, interrupted, repeated, refused; the sinks are PostgreSQL's."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from replicator.contracts.events import parse_lsn
from tests.support.destinations import Destinations, expected
from tests.support.exact import assert_exact, assert_same, newest
from tests.support.load import Load
from tests.support.program import ROOT, Program, Result, assert_clean, succeed
from tests.support.progress import events_before, saved_progress

CONTRACT = ("--start", "2026-01-08T09:00:00", "--end", "2026-01-08T10:00:00")
EVERYTHING = ("--start", "2000-01-01", "--end", "2100-01-01")
TIMEOUT_SECONDS = 120.0
NONE: Mapping[str, str] = MappingProxyType({})
MEMORY_MB = 200.0
HUGE_MB = 300.0  # what waits for the sinks, 24 MB, stands in memory several times on its way
GROWTH_MB = 50.0  # what is held for the sinks; the table it is read from is several times that

INDEX = "CREATE INDEX ON engagement_events (event_ts, id)"

HOURS = """
-- Four hours around the contract's, a second apart, in random order of id, with ties at both ends and in between.
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device)
SELECT 1 + n % 3, n, 'play', timestamptz '2026-01-08 08:00:00+00' + (n / 2) * interval '1 second', n * 7919 % 400000,
       (ARRAY['web', 'ios', NULL])[1 + n % 3]
FROM generate_series(0, 4 * 2 * 3600 - 1) AS n ORDER BY md5(n::text)
"""

MANY = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms)
SELECT 1 + n %% 3, n, 'play', timestamptz '2026-01-08 09:00:00+00' + n * interval '1 ms', n
FROM generate_series(0, %(rows)s::bigint - 1) AS n
"""


Process: TypeAlias = subprocess.Popen[str]


class Backfill:
    """The program: run to its end, or started and left running."""

    def __init__(self, program: Program) -> None:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("REPLICATOR_")}
        self._program = program
        self._environment = {**outside, **program.environment}
        self._started: list[Process] = []

    def run(self, *arguments: str, **variables: str) -> Result:
        """To its end."""
        return self._program.follow(shlex.join(["python", "backfill.py", *arguments]), **variables)

    def spawn(self, *arguments: str, stderr: int = subprocess.PIPE, settings: Mapping[str, str] = NONE) -> Process:
        """Start it."""
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "backfill.py", *arguments],
            cwd=ROOT,
            env=self._environment | {f"REPLICATOR_{name.upper()}": value for name, value in settings.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Leave nothing running."""
        for process in self._started:
            with process:  # closes its pipes
                process.kill()


@pytest.fixture
def backfill(environment: dict[str, str], database: str, tmp_path: Path) -> Iterator[Backfill]:
    """It, with the settings of the test's replicator."""
    program = Program(environment, database, tmp_path / "backfill.log")
    running = Backfill(program)
    yield running
    running.end()
    print(program.log)  # noqa: T201  pytest shows it when the test has failed


@pytest.fixture
def made(program: Program) -> Program:
    """The replicator after `init`: table, checkpoint and slot are there."""
    succeed(program.run("init"))
    return program


def read_by(result: Result) -> int:
    """How many events a backfill that succeeded says it has read."""
    told = re.search(r"^read +(\d+) events", succeed(result), re.MULTILINE)
    assert told
    return int(told[1])


Position: TypeAlias = tuple[object, ...]


def positions(source: psycopg.Connection, program: Program, checkpoint: Path) -> list[Position]:
    """Everything that a backfill must not touch: the slot and the checkpoint."""
    slot = source.execute(
        "SELECT restart_lsn, confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s", [program.slot]
    ).fetchall()
    with closing(sqlite3.connect(checkpoint)) as connection:
        return [
            *slot,
            *connection.execute("SELECT * FROM replicator_checkpoints"),
            *connection.execute("SELECT * FROM replicator_sink_positions"),
        ]


def in_the_hour(dsn: str) -> list[dict[str, object]]:
    """What PostgreSQL computes for the contract's hour."""
    return [event for event in expected(dsn) if "2026-01-08T09" <= event["event_ts"] < "2026-01-08T10"]


# --- what it brings


@pytest.mark.parametrize("index", [None, INDEX], ids=["by id", "by event_ts"])
def test_the_contracts_command_twice(
    *,
    index: str | None,
    backfill: Backfill,
    made: Program,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
) -> None:
    """The hour and nothing else, start included and end not; the second run changes nothing; pages of any size do."""
    source.execute(HOURS)
    if index:
        source.execute(index)
    before = positions(source, made, tmp_path / "checkpoint.db")
    first = backfill.run(*CONTRACT)
    assert 7200 == read_by(first)
    assert "redis       7200 written (7200 new, 0 already there)" in first.stdout
    hour = in_the_hour(database)
    assert_same(hour, destinations.clickhouse(), "ClickHouse")
    counts, last = destinations.counts(), destinations.last()
    assert Counter(event["content_id"] for event in hour) == counts
    second = backfill.run(*CONTRACT, "--batch-size", "997")
    assert 7200 == read_by(second)
    assert "redis       7200 written (0 new, 7200 already there)" in second.stdout
    assert_same(hour, destinations.clickhouse(), "ClickHouse")
    assert (counts, last) == (destinations.counts(), destinations.last())
    assert before == positions(source, made, tmp_path / "checkpoint.db")
    assert [] == destinations.api()


@pytest.mark.parametrize("index", [None, INDEX], ids=["by id", "by event_ts"])
@pytest.mark.usefixtures("made")
def test_the_table_is_read_once(
    index: str | None, backfill: Backfill, source: psycopg.Connection, database: str
) -> None:
    """Whatever the number of pages: with an index what is wanted, without one each row at most twice, counting once."""
    source.execute(HOURS)
    source.execute("VACUUM ANALYZE engagement_events")
    if index:
        source.execute(index)
    source.execute("SELECT pg_stat_reset()")
    read_by(backfill.run(*CONTRACT, "--batch-size", "200"))
    fetched = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'engagement_events'"

    def told() -> int:
        with psycopg.connect(database) as looking:  # each session sees one moment of the statistics
            [read] = looking.execute(fetched).fetchone() or (0,)
        return int(read)

    wait_until(lambda: told() >= 7200, "the statistics")
    assert told() <= (2.1 * 7200 if index else 2.1 * 4 * 7200)


def test_beside_traffic_and_a_killed_replicator(
    *,
    backfill: Backfill,
    program: Program,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
) -> None:
    """Older rows and today's, everything again and again while rows arrive late and the replicator dies and comes back.

    Afterwards every sink has what PostgreSQL computes, each event counted once.
    """
    checkpoint = tmp_path / "checkpoint.db"
    seed = random.randrange(2**32)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  for whoever has to repeat it
    source.execute(HOURS)
    succeed(program.run("init"))
    program.start()
    chance = random.Random(seed)  # noqa: S311  not a secret
    with Load(database, chance):
        read_by(backfill.run(*EVERYTHING, "--sinks", "clickhouse,redis,http"))
        running = backfill.spawn(*EVERYTHING, "--batch-size", "500", "--rate", "10000")
        wait_until(lambda: events_before(checkpoint) >= 5_000, "the first pages")
        program.kill()
        assert running.poll() is None, "it was to be in the middle"
        out, err = running.communicate(timeout=TIMEOUT_SECONDS)
        succeed(Result(running.returncode, out, err))
        program.start()
        read_by(backfill.run(*EVERYTHING))
    program.wait_until_caught_up()
    assert_exact(database, destinations)


def test_what_commits_late_is_the_streams(
    backfill: Backfill, made: Program, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """An event inside the range, by id and by time, whose transaction ends when the backfill is over."""
    with psycopg.connect(database) as late:
        late.execute(MANY, {"rows": 5})
        source.execute(MANY, {"rows": 100})
        assert 100 == read_by(backfill.run(*EVERYTHING, "--sinks", "clickhouse,redis,http"))
    assert 100 == len(destinations.clickhouse())
    made.start()
    made.wait_until_caught_up()
    assert 105 == sum(destinations.counts().values())
    assert_exact(database, destinations)


# --- the order of views


def test_a_correction_of_content_is_brought(
    backfill: Backfill, program: Program, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """The stream's view of an event is that of its commit; a backfill's, which comes later, replaces it."""
    program.start()
    source.execute(MANY, {"rows": 300})
    program.wait_until_caught_up()
    source.execute("UPDATE content SET content_type = 'film', length_seconds = 7 WHERE content_id = 1")
    program.wait_until_caught_up()
    assert expected(database) != destinations.clickhouse()
    read_by(backfill.run(*CONTRACT))
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")
    assert newest(expected(database)) == destinations.last()


def test_content_that_changes_meanwhile(
    *,
    backfill: Backfill,
    program: Program,
    stack: DevStack,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
) -> None:
    """Each page is of one moment: pages from before the change have the old content, later ones the new.

    Which it is shows in `_lsn`, so the newer view wins, whichever is written last. The next backfill levels it.
    """
    program.start()
    source.execute(MANY, {"rows": 4000})
    program.wait_until_caught_up()
    running = backfill.spawn(*CONTRACT, "--sinks", "clickhouse", "--rate", "1000", "--batch-size", "100")
    backfilled = "SELECT count() FROM events_enriched FINAL WHERE _lsn > {lsn}"
    [streamed] = source.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone() or ("",)
    query = backfilled.format(lsn=parse_lsn(streamed) - 1)
    wait_until(lambda: int(stack.clickhouse.query(query)) > 500, "the first pages")
    source.execute("UPDATE content SET content_type = 'film'")
    [changed] = source.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("",)
    out, err = running.communicate(timeout=TIMEOUT_SECONDS)
    assert 4000 == read_by(Result(running.returncode, out, err))
    views = stack.clickhouse.query(
        f"SELECT content_type = 'film', _lsn >= {parse_lsn(changed)}, count() FROM events_enriched FINAL"  # noqa: S608
        " GROUP BY 1, 2 ORDER BY 1, 2 FORMAT TSV"
    )
    kinds = {tuple(line.split("\t")[:2]) for line in views.splitlines()}
    assert {("0", "0"), ("1", "1")} == kinds
    read_by(backfill.run(*CONTRACT))
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")


# --- Redis


def test_the_window_is_the_replicators_to_keep(
    backfill: Backfill, made: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Without a replicator there is no window, and one that is about to expire does so.

    With one, events of the last ten minutes are in it once, and older ones not.
    """
    source.execute(
        "INSERT INTO engagement_events (content_id, user_id, event_type, event_ts)"
        " SELECT 1, n, 'play', now() - n * interval '1 minute' FROM generate_series(1, 30) AS n"
    )
    assert 30 == read_by(backfill.run(*EVERYTHING))
    assert ({1: 30}, {}) == (destinations.counts(), destinations.top())
    made.start()
    wait_until(lambda: destinations.top() == {1: 9}, "the window")
    made.kill()
    destinations.redis.expire("top:content:10m", 60)
    destinations.redis.expire("top:content:window", 60)
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (2, 1, 'play')")
    assert 31 == read_by(backfill.run(*EVERYTHING))
    assert {1: 9} == destinations.top()
    left = [int(destinations.redis.ttl(key)) for key in ("top:content:10m", "top:content:window")]
    assert max(left) <= 60


def test_an_older_event_replaces_no_newer_one(
    backfill: Backfill, program: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """The newest event of a content stays what the stream has written."""
    program.start()
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'newest')")
    program.wait_until_caught_up()
    newest = destinations.last()
    source.execute(MANY, {"rows": 50})
    program.wait_until_caught_up()
    read_by(backfill.run(*CONTRACT))
    assert newest[1] == destinations.last()[1]


# --- interrupted


@pytest.mark.usefixtures("made")
def test_killed_and_resumed(
    *,
    backfill: Backfill,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
    rows: int,
) -> None:
    """SIGKILL in the middle: `--resume` does the rest only; then there is nothing to resume."""
    checkpoint = tmp_path / "checkpoint.db"
    source.execute(MANY, {"rows": rows})
    running = backfill.spawn(*CONTRACT, "--rate", str(rows // 6), "--batch-size", str(rows // 200))
    wait_until(lambda: events_before(checkpoint) >= rows // 3, "a third")
    running.kill()
    running.communicate()
    stage = saved_progress(checkpoint)
    assert stage
    assert rows // 3 <= stage.events < rows
    rest = backfill.run(*CONTRACT, "--resume")
    print(f"killed with {stage.events} kept as done; then:\n{rest.stdout}")  # noqa: T201  figures worth seeing
    assert rows - stage.events == read_by(rest)
    assert f"of {rows}, {stage.events} before," in rest.stdout
    assert saved_progress(checkpoint) is None
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")
    assert Counter(event["content_id"] for event in expected(database)) == destinations.counts()
    again = backfill.run(*CONTRACT, "--resume")
    assert "there is no interrupted backfill of this range" in again.stderr
    assert rows == read_by(again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("made")
def test_stopped_it_says_how_to_go_on(
    number: signal.Signals, backfill: Backfill, source: psycopg.Connection, tmp_path: Path
) -> None:
    """In good order: what it says was read is kept, and the command it prints goes on there."""
    source.execute(MANY, {"rows": 20_000})
    running = backfill.spawn(*CONTRACT, "--rate", "2000")
    wait_until(lambda: events_before(tmp_path / "checkpoint.db") > 0, "a page")
    running.send_signal(number)
    out, err = running.communicate(timeout=TIMEOUT_SECONDS)
    assert_clean(out + err)
    stage = saved_progress(tmp_path / "checkpoint.db")
    assert stage
    assert 1 == running.returncode
    assert f"read        {stage.events} events of 20000" in out
    hint = re.search(r"not finished; to continue: `python -m replicator backfill (.*)`", err)
    assert hint
    zoned = [f"{word}Z" if word.startswith("2026") else word for word in CONTRACT]
    assert [*zoned, "--sinks", "clickhouse,redis", "--rate", "2000", "--resume"] == hint[1].split()
    assert 20_000 - stage.events == read_by(backfill.run(*CONTRACT, "--resume"))


@pytest.mark.usefixtures("made")
def test_a_sink_that_is_away_is_waited_for(
    backfill: Backfill, stack: DevStack, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """Redis and then PostgreSQL go away in the middle; both come back, and nothing is missing."""
    source.execute(MANY, {"rows": 10_000})
    running = backfill.spawn(*CONTRACT, "--rate", "2500", "--batch-size", "500", settings={"retry_max_seconds": "0.2"})
    wait_until(lambda: sum(destinations.counts().values()) > 0, "the first page")
    stack.redis.pause()
    stack.postgres.stop()
    stack.postgres.start()
    stack.redis.resume()
    out, err = running.communicate(timeout=TIMEOUT_SECONDS)
    assert 10_000 == read_by(Result(running.returncode, out, err))
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")
    assert 10_000 == sum(destinations.counts().values())


def read_screen(terminal: int) -> str:
    """Everything that is written to the other side of a pseudo-terminal until it is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # EIO: that is how Linux says that it is closed
        while part := os.read(terminal, 65_536):
            shown += part
    os.close(terminal)
    return shown.decode()


@pytest.mark.usefixtures("made")
def test_on_a_terminal_there_is_a_bar(backfill: Backfill, source: psycopg.Connection, tmp_path: Path) -> None:
    """With the rate and the time that is left; what is logged stands above it."""
    source.execute(MANY, {"rows": 4_000})
    ours, theirs = os.openpty()
    running = backfill.spawn(*CONTRACT, "--rate", "1000", stderr=theirs)
    os.close(theirs)
    shown = read_screen(ours)
    out, _ = running.communicate(timeout=TIMEOUT_SECONDS)
    assert "read        4000 events of 4000" in out
    assert re.search(r"backfill .*\d/4000.* \d[\d,]*/s .*0:00:0\d", shown), shown
    assert_clean(shown)
    assert saved_progress(tmp_path / "checkpoint.db") is None


# --- refused


def test_what_is_refused_is_kept_once(
    backfill: Backfill, made: Program, api: Api, source: psycopg.Connection, destinations: Destinations
) -> None:
    """By a sink, or because no event can be made of the row; a second run adds nothing, and a replay brings both."""
    source.execute("ALTER TABLE engagement_events ALTER COLUMN event_type DROP NOT NULL")
    source.execute(MANY, {"rows": 10})
    source.execute("UPDATE engagement_events SET event_type = NULL WHERE id = 3")
    api.behave(refuse_event_ids=[5])
    for _ in range(2):
        result = backfill.run(*CONTRACT, "--sinks", "http,redis")
        assert 10 == read_by(result)
        assert "http        8 written, 1 dead letter" in result.stdout
        assert "rows        1 that no event can be made of" in result.stdout
    listed = succeed(made.run("dead-letters", "list"))
    assert ["3", "5"] == sorted(re.findall(r"  event (\d+)  backfill  ", listed))
    api.behave()
    assert 1 == made.run("dead-letters", "replay", sinks="http").code
    assert {1, 2, 4, 5, 6, 7, 8, 9, 10} == {event["event_id"] for event in destinations.api()}
    assert ["3"] == re.findall(r"  event (\d+)  ", succeed(made.run("dead-letters", "list")))


# --- asked wrongly, or only asked


def test_dry_run_writes_nothing(
    backfill: Backfill, made: Program, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """Events an hour, and what the sinks lack of them."""
    source.execute(HOURS)
    before = positions(source, made, tmp_path / "checkpoint.db")
    read_by(backfill.run(*CONTRACT, "--sinks", "clickhouse"))
    told = succeed(backfill.run("--start", "2026-01-08T08:30:00", "--end", "2026-01-08T10:00:00", "--dry-run"))
    assert [
        "hour                    postgresql    clickhouse",
        "2026-01-08T08:00:00Z          3600             0  differs",
        "2026-01-08T09:00:00Z          7200          7200",
        "10800 events; 3600 missing in clickhouse; 10800 not counted in redis; nothing was written",
    ] == [line.rstrip() for line in told.splitlines()]
    assert ({}, 7200) == (destinations.counts(), len(destinations.clickhouse()))
    assert before == positions(source, made, tmp_path / "checkpoint.db")


@pytest.mark.usefixtures("made")
def test_json(backfill: Backfill, source: psycopg.Connection) -> None:
    """One object on standard output; docs/reference/commands.md has its fields."""
    source.execute(HOURS)
    run = (*CONTRACT, "--sinks", "redis", "--json")
    only = {"hour": "2026-01-08T09:00:00Z", "postgresql": 7200}
    dry = {"outcome": "dry run", "events": 7200, "hours": [only], "sinks": {"redis": {"not_counted": 7200}}}
    assert dry == json.loads(succeed(backfill.run(*run, "--dry-run")))
    done = json.loads(succeed(backfill.run(*run)))
    assert done.pop("seconds") > 0
    redis = {"written": 7200, "new": 7200, "dead_letters": 0}
    counts = {"events": 7200, "events_before": 0, "events_total": 7200, "rows_refused": 0}
    assert {"outcome": "done", **counts, "sinks": {"redis": redis}} == done


@pytest.mark.usefixtures("made")
def test_nothing_in_the_range(backfill: Backfill) -> None:
    """That is no failure."""
    assert 0 == read_by(backfill.run("--start", "1999-01-01", "--end", "1999-01-02"))


@pytest.mark.parametrize(
    ("prepare", "variables", "code", "told"),
    [
        ("", {"postgres_dsn": "postgresql://app:planted@127.0.0.1:1/engagement"}, 1, "Reading from PostgreSQL failed"),
        ("DROP TABLE engagement_events", {}, 1, 'relation "public.engagement_events" does not exist'),
        ("REVOKE SELECT ON content FROM replicator", {}, 1, "permission denied for table content"),
        ("REVOKE SELECT ON engagement_events FROM replicator", {}, 1, "denied for table engagement_events"),
        ("ALTER TABLE engagement_events ENABLE ROW LEVEL SECURITY", {}, 1, "affected by row-level security policy"),
        ("ALTER TABLE engagement_events DROP COLUMN device", {}, 1, 'column "device" does not exist'),
        ("", {"postgres_dsn": "planted nonsense"}, 2, "REPLICATOR_POSTGRES_DSN is unusable"),
        ("", {"clickhouse_url": "ftp://planted"}, 2, "REPLICATOR_CLICKHOUSE_URL is unusable"),
        ("", {"checkpoint_url": "nonsense"}, 2, "REPLICATOR_CHECKPOINT_URL is unusable"),
    ],
)
def test_what_can_not_be_is_one_line(
    *,
    prepare: str,
    variables: dict[str, str],
    code: int,
    told: str,
    backfill: Backfill,
    source: psycopg.Connection,
    tmp_path: Path,
) -> None:
    """No database, no table, settings that are none: one clear line, and nothing written, not even a checkpoint."""
    if prepare:
        source.execute(prepare)
    result = backfill.run(*CONTRACT, **variables)
    assert_clean(result.stdout + result.stderr)
    assert (code, "", 1) == (result.code, result.stdout, result.stderr.count("\n"))
    assert told in result.stderr
    assert not (tmp_path / "checkpoint.db").exists()


def test_without_the_table_in_clickhouse_it_ends(
    backfill: Backfill, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """One line with the cure, before anything is written anywhere."""
    source.execute(MANY, {"rows": 10})
    result = backfill.run(*CONTRACT)
    assert_clean(result.stdout + result.stderr)
    assert (1, "", 1) == (result.code, result.stdout, result.stderr.count("\n"))
    assert "Run `python -m replicator init`" in result.stderr
    assert {} == destinations.counts()
    assert not (tmp_path / "checkpoint.db").exists()


# --- memory


def peak_mb(process: Process) -> float:
    """The most memory it had, over its whole life but the last moments; it must succeed."""
    peak_kb = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        peak_kb = max(peak_kb, int(found[1]) if found else 0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    assert 0 == process.returncode
    return peak_kb / 1000


@pytest.mark.usefixtures("made")
def test_memory_stays_flat(backfill: Backfill, source: psycopg.Connection) -> None:
    """A table of 120,000 events takes hardly more than one of 20,000."""
    source.execute(MANY, {"rows": 120_000})

    few = peak_mb(backfill.spawn("--start", "2026-01-08T09:00:00", "--end", "2026-01-08T09:00:20"))
    many = peak_mb(backfill.spawn(*CONTRACT))
    print(f"20,000 rows: {few:.0f} MB, 120,000: {many:.0f} MB")  # noqa: T201  a figure worth seeing
    assert many < MEMORY_MB
    assert many - few < GROWTH_MB


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("index", [None, INDEX], ids=["by id", "by event_ts"])
def test_huge_values(
    index: str | None, backfill: Backfill, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """A page is bounded in bytes too: 150 events of a megabyte, with ordinary ones between them, are all brought."""
    source.execute(MANY, {"rows": 450})
    source.execute("UPDATE engagement_events SET device = repeat(chr(65 + id::int % 26), 1000000) WHERE id % 3 = 0")
    if index:
        source.execute(index)
    peak = peak_mb(backfill.spawn(*CONTRACT))
    print(f"{peak:.0f} MB")  # noqa: T201  a figure worth seeing
    assert peak < HUGE_MB
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")
    assert 450 == sum(destinations.counts().values())
