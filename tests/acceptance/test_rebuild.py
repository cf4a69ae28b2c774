"""`python -m replicator rebuild-redis`: after a flush, beside the stream, interrupted, and where keys were wrong."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import Load, insert_many
from tests.support.program import ROOT, Program, assert_clean, succeed
from tests.support.progress import events_before

OLD = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms)
SELECT 1 + n %% 3, n, 'old', timestamptz '2026-01-08 09:00:00+00' + n * interval '1 ms', n
FROM generate_series(1, %(rows)s) AS n
"""
RECENT = """
SELECT content_id, count(*) FROM engagement_events
WHERE event_ts BETWEEN now() - interval '9 minutes' AND now() GROUP BY 1
"""
LAST_MOMENT = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts)
VALUES (3, 1, 'sentinel', '9999-12-31 23:59:59.999999+00'), (3, 1, 'sentinel', '0001-01-01 00:00:00+00')
"""


def read_by(out: str) -> int:
    """How many events it has read, according to its output."""
    found = re.search(r"^read +(\d+) events", out, re.MULTILINE)
    assert found
    return int(found[1])


def assert_rebuilt(program: Program, source: psycopg.Connection, database: str, destinations: Destinations) -> None:
    """Counts, last events, the ranking: as if nothing had happened."""
    program.wait_until_caught_up()
    assert_exact(database, destinations)
    ranking: dict[int, int] = dict(source.execute(RECENT).fetchall())
    wait_until(lambda: destinations.top() == ranking, "the window")
    # All is counted, and known to be: the same rows once more add nothing.
    again = succeed(program.run("rebuild-redis"))
    assert f"({0} new, {read_by(again)} already there)" in again
    assert_exact(database, destinations)


def test_after_a_flush_under_traffic(
    *,
    quick: Program,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    chance: random.Random,
) -> None:
    """Every key is as if nothing had happened."""
    quick.start()
    source.execute(OLD, {"rows": 30_000})
    source.execute(LAST_MOMENT)
    with Load(database, chance):
        wait_until(lambda: sum(destinations.counts().values()) > 33_000, "traffic")
        destinations.redis.flushall()
        assert read_by(succeed(quick.run("rebuild-redis"))) > 33_000
    assert_rebuilt(quick, source, database, destinations)


def test_from_empty_under_traffic(
    *,
    quick: Program,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    chance: random.Random,
) -> None:
    """Counts that are too high, a content that there is not, seen bits of what was never counted: all made right."""
    quick.start()
    source.execute(OLD, {"rows": 30_000})
    destinations.redis.set("content:foreign", "not ours")
    with Load(database, chance):
        wait_until(lambda: sum(destinations.counts().values()) > 33_000, "traffic")
        destinations.redis.incrby("content:count:1", 7)
        destinations.redis.delete("content:count:2")
        destinations.redis.set("content:count:77", 5)
        destinations.redis.setbit("engagement:seen:0", 65_535, 1)
        out = succeed(quick.run("rebuild-redis", "--from-empty", "--yes"))
        assert re.search(r"^deleted +\d+ keys$", out, re.MULTILINE)
    assert "not ours" == destinations.redis.get("content:foreign")
    destinations.redis.delete("content:foreign")
    assert_rebuilt(quick, source, database, destinations)


@pytest.mark.parametrize("runs", [True, False], ids=["beside the replicator", "alone"])
def test_counts_that_no_rebuild_makes_right(
    quick: Program, source: psycopg.Connection, destinations: Destinations, *, runs: bool
) -> None:
    """Keys that are gone while their events are marked as seen: it names them, and the cure that it names is one."""
    quick.start()
    insert_many(source, 30)
    quick.wait_until_caught_up()
    right = destinations.counts()
    assert "redis       counts too low 0" in succeed(quick.run("rebuild-redis"))
    if not runs:
        assert 0 == quick.stop()
    destinations.redis.delete("content:count:1")
    destinations.redis.decr("content:count:2")
    done = quick.run("rebuild-redis")
    assert 3 == done.code
    assert f"counts too low 2: 1 has 0 instead of {right[1]}, 2 has {right[2] - 1} instead of {right[2]}" in done.stdout
    [cure] = re.findall(r"`python -m (replicator rebuild-redis --from-empty)` corrects the counts", done.stdout)
    assert "counts too low 0" in succeed(quick.run(*cure.split()[1:], "--yes"))
    assert right == destinations.counts()


def test_ids_that_were_given_again(quick: Program, source: psycopg.Connection, destinations: Destinations) -> None:
    """Told at once with the command that counts them, typed as it is printed; nothing less does."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    source.execute("TRUNCATE engagement_events RESTART IDENTITY")
    insert_many(source, 10)
    quick.wait_until_caught_up()
    [command] = re.findall(r"was truncated.*?(python -m replicator [^`]*)` counts what is in the table", quick.log)
    succeed(quick.run("rebuild-redis"))
    assert 10 == sum(destinations.counts().values()), "ids that are seen are not counted again"
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')")
    quick.wait_until_caught_up()
    succeed(quick.follow(f"{command} --yes"))
    quick.wait_until_caught_up()
    assert 11 == sum(destinations.counts().values())
    assert 0 == quick.stop()


def spawn(program: Program, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """The command, left running."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "replicator", "rebuild-redis", *arguments],
        cwd=ROOT,
        env=program.environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_resumed(
    *,
    number: signal.Signals,
    quick: Program,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    tmp_path: Path,
) -> None:
    """The rest only, by the command that it prints; and after another flush all of it."""
    succeed(quick.run("init"))
    source.execute(OLD, {"rows": 30_000})
    quick.start()
    quick.wait_until_caught_up()
    destinations.redis.flushall()
    with spawn(quick, "--batch-size", "1000", "--rate", "5000") as running:
        wait_until(lambda: events_before(tmp_path / "checkpoint.db") >= 10_000, "a third of it")
        running.send_signal(number)
        out, err = running.communicate(timeout=30)
    assert 0 != running.returncode
    if number is signal.SIGTERM:
        assert_clean(out + err)
        command = re.search(r"not finished; to continue: `(python .*)`", err)
        assert command
        assert "python -m replicator rebuild-redis --batch-size 1000 --rate 5000 --resume" == command[1]
    rest = read_by(succeed(quick.run("rebuild-redis", "--resume")))
    assert 0 < rest <= 20_000
    assert_exact(database, destinations)
    with spawn(quick, "--rate", "5000") as running:
        wait_until(lambda: quick.run("status").code == 0, "some time")
        running.kill()
    destinations.redis.flushall()
    assert 30_000 == read_by(succeed(quick.run("rebuild-redis", "--resume")))
    assert_exact(database, destinations)


def test_emptied_while_it_is_filled(quick: Program, source: psycopg.Connection, destinations: Destinations) -> None:
    """It fails, and says why."""
    succeed(quick.run("init"))
    source.execute(OLD, {"rows": 20_000})
    with spawn(quick, "--rate", "5000") as running:
        wait_until(lambda: sum(destinations.counts().values()) >= 5_000, "a part")
        destinations.redis.flushall()
        out, err = running.communicate(timeout=30)
    assert_clean(out + err)
    assert 1 == running.returncode
    assert (
        "it was emptied, restarted or replaced while it was filled. Run `python -m replicator rebuild-redis` again"
        in err
    )


@pytest.mark.parametrize(("answer", "counts"), [("n", {1: 5}), ("y", {1: 1, 2: 1, 3: 1})])
def test_from_empty_asks(
    program: Program, source: psycopg.Connection, destinations: Destinations, answer: str, counts: dict[int, int]
) -> None:
    """On a terminal; any answer but yes changes nothing."""
    succeed(program.run("init"))
    source.execute(OLD, {"rows": 3})
    destinations.redis.set("content:count:1", 5)
    ours, theirs = os.openpty()
    os.write(ours, f"{answer}\n".encode())
    with spawn(program, "--from-empty", stdin=theirs) as running:
        out, err = running.communicate(timeout=30)
    os.close(ours)
    os.close(theirs)
    assert_clean(out + err)
    assert (answer == "n") == running.returncode
    assert out.startswith("Delete all of the replicator's keys in Redis? ")
    assert counts == destinations.counts()


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        ((), {"postgres_dsn": "postgresql://app:planted@127.0.0.1:1/engagement"}, 1, "Reading from PostgreSQL failed"),
        (
            ("--from-empty", "--yes"),
            {"postgres_dsn": "postgresql://app@127.0.0.1:1/x"},
            1,
            "Reading from PostgreSQL failed",
        ),
        (("--from-empty",), {}, 2, "Standard input is unusable: it is not a terminal. It takes a terminal to ask on"),
        ((), {"redis_url": "redis://127.0.0.1:1"}, 1, "Sink redis failed"),
        ((), {"redis_url": "ftp://planted"}, 2, "REPLICATOR_REDIS_URL is unusable"),
        (("--from-empty", "--resume"), {}, 2, "--resume is unusable: --from-empty starts over"),
    ],
)
def test_what_can_not_be_is_one_line(  # noqa: PLR0917  fixtures
    program: Program,
    destinations: Destinations,
    tmp_path: Path,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    code: int,
    message: str,
) -> None:
    """Nothing is deleted or written either."""
    destinations.redis.set("content:count:1", 5)
    result = program.run("rebuild-redis", *arguments, **variables)
    assert_clean(result.stdout + result.stderr)
    assert (code, "", 1) == (result.code, result.stdout, result.stderr.count("\n"))
    assert message in result.stderr
    assert {1: 5} == destinations.counts()
    assert not (tmp_path / "checkpoint.db").exists()


@pytest.mark.parametrize(
    ("statement", "variables", "message"),
    [
        ("DROP TABLE engagement_events", {}, 'relation "public.engagement_events" does not exist'),
        ("REVOKE SELECT ON engagement_events FROM replicator", {}, "permission denied for table engagement_events"),
        ("REVOKE SELECT ON content FROM replicator", {}, "permission denied for table content"),
        ("ALTER TABLE engagement_events ENABLE ROW LEVEL SECURITY", {}, "affected by row-level security policy"),
        ("SELECT", {"checkpoint_url": "sqlite:////no/such/directory/checkpoint.db"}, "does not exist. Make it"),
    ],
)
def test_what_can_not_be_made_again_is_not_deleted(  # noqa: PLR0917  fixtures
    program: Program,
    source: psycopg.Connection,
    destinations: Destinations,
    statement: str,
    variables: dict[str, str],
    message: str,
) -> None:
    """`--from-empty` first checks that the rows can be read and its progress can be saved."""
    insert_many(source, 3)
    source.execute(statement.encode())
    destinations.redis.set("content:count:1", 5)
    result = program.run("rebuild-redis", "--from-empty", "--yes", **variables)
    assert (1, "", 1) == (result.code, result.stdout, result.stderr.count("\n"))
    assert message in result.stderr
    assert {1: 5} == destinations.counts()
