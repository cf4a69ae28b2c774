"""`python -m replicator reconcile`: what is planted is found, named and repaired; under traffic nothing is found."""

from __future__ import annotations

import random
import re
from pathlib import Path

import msgspec
import psycopg
import pytest

from devstack import DevStack
from devstack.process import wait_until
from tests.support.destinations import Destinations, expected
from tests.support.exact import assert_exact, assert_same
from tests.support.load import Load, insert_many
from tests.support.program import Program, Result, assert_clean, succeed

HOUR = ("--start", "2026-01-08T09:00:00", "--end", "2026-01-08T10:00:00")
EVERYTHING = ("--start", "2000-01-01", "--end", "2100-01-01")
WIDE = ("--start", "1900-01-01", "--end", "2300-01-01")

MANY = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device)
SELECT 1 + n %% 3, n, (ARRAY['play', 'a|b', 'größe', ''])[1 + n %% 4],
       timestamptz '2026-01-08 09:00:00+00' + n * %(step)s::interval, nullif(n::bigint * 7919 %% 400000, 0),
       (ARRAY['web', '~', NULL, 'tv "4k" 🎬', '1:x', ''])[1 + n %% 6]
FROM generate_series(0, %(rows)s::bigint - 1) AS n
"""
ODD = """
-- Values at the ends of what there may be, and times with any fraction, before 1970 too.
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device) VALUES
(1, 9223372036854775807, E'tab\\tline\\nend\\\\', '1969-12-31 23:59:59.999999+00', -2147483648, E'\\u00e9'),
(2, -9223372036854775808, 'play', '1905-01-01 00:00:00.000001+00', 2147483647, '|'),
(3, 0, 'play', '2199-12-31 23:59:59.5+00', 5, 'x')
"""
CHANGED = """
INSERT INTO events_enriched SELECT * REPLACE (user_id + 1 AS user_id, _lsn + {newer} AS _lsn)
FROM events_enriched FINAL WHERE event_id = {id}
"""
SENDS = "clickhouse  --repair sends what is missing or different; a backfill of a whole range is faster\n"
COUNTS = "redis       --repair counts what was not counted in this range\n"
CORRECTS = "redis       if it has lost nothing, `python -m replicator rebuild-redis --from-empty` corrects the counts\n"
REBUILDS = "redis       if redis has lost its data, `python -m replicator rebuild-redis` makes it again\n"
HIDDEN = "ALTER TABLE engagement_events ENABLE ROW LEVEL SECURITY"
EXTRA = """
INSERT INTO events_enriched SELECT * REPLACE ({id} AS event_id)
FROM (SELECT * FROM events_enriched FINAL WHERE event_id = 1)
"""


def differences(result: Result) -> str:
    """What a comparison printed that found some."""
    assert_clean(result.stdout + result.stderr)
    assert 3 == result.code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def settings(program: Program) -> Program:
    """The program, made, with its sinks filled by a backfill when a test calls for it."""
    succeed(program.run("init"))
    return program


def fill(program: Program, *arguments: str) -> None:
    """Everything that PostgreSQL has, into ClickHouse and Redis."""
    succeed(program.follow(" ".join(["python backfill.py", *WIDE, *arguments])))


@pytest.mark.parametrize(("step", "index"), [("1 ms", True), ("0", False)], ids=["spread out", "all at one moment"])
def test_what_is_planted_is_found_and_repaired(  # noqa: PLR0917  fixtures
    settings: Program,
    stack: DevStack,
    source: psycopg.Connection,
    database: str,
    destinations: Destinations,
    step: str,
    index: bool,
    rows: int,
) -> None:
    """One row missing, one changed, one too many, among very many, whether times tell them apart or not."""
    source.execute(MANY, {"rows": rows, "step": step})
    if index:
        source.execute("CREATE INDEX ON engagement_events (event_ts, id)")
    fill(settings)
    equal = succeed(settings.run("reconcile", *HOUR)).splitlines()[-1]
    assert equal.startswith("equal, ")
    stack.clickhouse.query("DELETE FROM events_enriched WHERE event_id = 54321")
    stack.clickhouse.query(CHANGED.format(id=777, newer=0))
    stack.clickhouse.query(EXTRA.format(id=20_000_000))
    output = differences(settings.run("reconcile", *HOUR))
    for line in ("missing 1: 54321", "different 1: 777", "extra 1: 20000000", "redis       not counted 0"):
        assert line in output
    assert SENDS in output
    found = output.splitlines()[-1]
    assert found.startswith("different, ")
    repaired = differences(settings.run("reconcile", *HOUR, "--repair"))
    assert "clickhouse  left after the repair 1: 20000000" in repaired
    assert SENDS not in repaired
    assert "--repair --delete-extra deletes extra events" in repaired
    repaired = succeed(settings.run("reconcile", *HOUR, "--repair", "--delete-extra"))
    assert repaired.splitlines()[-1].startswith("repaired, ")
    print(f"{rows} rows: {equal}; {found}; {repaired.splitlines()[-1]}")  # noqa: T201  figures worth seeing
    assert "equal, " in succeed(settings.run("reconcile", *HOUR))
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")


def test_much_is_missing(
    settings: Program, stack: DevStack, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """More than the report names, and more than one chunk: an empty ClickHouse is filled."""
    source.execute(MANY, {"rows": 60_000, "step": "0"})
    source.execute(MANY, {"rows": 10_000, "step": "10 ms"})
    fill(settings, "--sinks redis")
    output = differences(settings.run("reconcile", *HOUR))
    assert "clickhouse  70000 events in PostgreSQL, 0 in clickhouse" in output
    assert re.search(r"missing 70000: (\d+, ){19}\d+ and 69980 more\n", output)
    assert "repaired, " in succeed(settings.run("reconcile", *HOUR, "--repair"))
    assert "70000\n" == stack.clickhouse.query("SELECT count() FROM events_enriched")
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")


def test_any_value_is_equal(settings: Program, source: psycopg.Connection) -> None:
    """Both compute the same from it; the content as well."""
    source.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    source.execute("INSERT INTO content VALUES (8, 'empty', 0), (9, '~|', 7)")
    source.execute(ODD)
    source.execute(ODD.replace("(1, ", "(8, ").replace("(2, ", "(9, ").replace("(3, ", "(-404, "))
    source.execute(MANY, {"rows": 5_000, "step": "333 us"})
    fill(settings)
    assert "5006 events in PostgreSQL, 5006 in" in succeed(settings.run("reconcile", *WIDE))
    assert "equal, " in succeed(settings.run("reconcile", *WIDE, "--with-content"))
    source.execute("UPDATE content SET length_seconds = 8 WHERE content_id = 9")
    assert "equal, " in succeed(settings.run("reconcile", *WIDE))
    assert "different 1: " in differences(settings.run("reconcile", *WIDE, "--with-content"))
    assert "repaired, " in succeed(settings.run("reconcile", *WIDE, "--with-content", "--repair"))


def test_enums_are_text(settings: Program, source: psycopg.Connection) -> None:
    """As for the stream and the backfill."""
    source.execute("CREATE TYPE kind AS ENUM ('play', 'größe')")
    source.execute("ALTER TABLE engagement_events ALTER event_type TYPE kind USING event_type::kind")
    source.execute("ALTER TABLE content ALTER content_type TYPE text")
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'größe')")
    fill(settings)
    assert "equal, " in succeed(settings.run("reconcile", *WIDE, "--with-content"))


def test_under_another_time_or_newer(
    settings: Program, stack: DevStack, source: psycopg.Connection, database: str, destinations: Destinations
) -> None:
    """An event at another time is missing and extra; a view from the future is deleted before it is replaced."""
    source.execute(MANY, {"rows": 1_000, "step": "1 s"})
    fill(settings)
    stack.clickhouse.query(
        "INSERT INTO events_enriched SELECT * REPLACE (event_ts + 60 AS event_ts) FROM events_enriched"
        " WHERE event_id = 5"
    )
    stack.clickhouse.query("DELETE FROM events_enriched WHERE event_id = 5 AND event_ts < '2026-01-08 09:01:00'")
    stack.clickhouse.query(CHANGED.format(id=7, newer=10**15))
    output = differences(settings.run("reconcile", *HOUR))
    assert "missing 1: 5\n" in output
    assert "extra 1: 5\n" in output
    assert "left after the repair 2: " in differences(settings.run("reconcile", *HOUR, "--repair"))
    succeed(settings.run("reconcile", *HOUR, "--repair", "--delete-extra"))
    assert_same(expected(database), destinations.clickhouse(), "ClickHouse")


def test_equal_under_traffic(quick: Program, database: str, destinations: Destinations, chance: random.Random) -> None:
    """What is under way is no difference: three times in a row, all of Redis's counts included."""
    quick.start()
    with Load(database, chance):
        wait_until(lambda: sum(destinations.counts().values()) > 4_000, "traffic")
        for _ in range(3):
            assert "equal, " in succeed(quick.run("reconcile", *EVERYTHING))
        destinations.redis.incrby("content:count:2", 1_000_000)
        too_high = succeed(quick.run("reconcile", *EVERYTHING))
        assert re.search(r"counts too high 1: 2 has 1\d{6} instead", too_high)
        destinations.redis.incrby("content:count:2", -1_000_000)
    quick.wait_until_caught_up()
    assert "equal, " in succeed(quick.run("reconcile", *EVERYTHING))
    assert_exact(database, destinations)


def test_redis(settings: Program, source: psycopg.Connection, destinations: Destinations) -> None:
    """A count is named with what it should be, and one above that is history; --repair counts what was not counted."""
    source.execute("SELECT setval('engagement_events_id_seq', 60000)")
    source.execute(MANY, {"rows": 10_000, "step": "1 ms"})  # on two of Redis's pages of seen bits
    fill(settings)
    destinations.redis.incrby("content:count:2", 5)
    destinations.redis.set("content:count:-77", 3)
    for foreign in ("20260108120000123456789", "007", "x"):
        destinations.redis.set(f"content:count:{foreign}", 1)
    output = succeed(settings.run("reconcile", *HOUR))
    assert "redis       not counted 0\nredis       counts too low 0\n" in output
    assert "counts too high 1: 2 has 3338 instead of 3333\n" in output
    destinations.redis.incrby("content:count:2", -6)
    output = differences(settings.run("reconcile", *HOUR))
    assert "redis       counts too low 1: 2 has 3332 instead of 3333\n" in output
    assert REBUILDS in output
    assert CORRECTS in output
    assert COUNTS not in output
    assert REBUILDS in differences(settings.run("reconcile", "--start", "1999-01-01", "--end", "1999-01-02"))
    destinations.redis.incr("content:count:2")
    destinations.redis.delete("content:count:-77", "content:count:20260108120000123456789")
    destinations.redis.delete("content:count:007", "content:count:x")

    destinations.redis.setbit("engagement:seen:1", 66_000 - 65_536, 0)
    destinations.redis.incrby("content:count:3", -1)
    output = differences(settings.run("reconcile", *HOUR))
    assert "redis       not counted 1: 66000\n" in output
    assert "counts too low 1: 3 has 3332 instead of 3333\n" in output
    assert COUNTS in output
    assert CORRECTS not in output
    assert "repaired, " in succeed(settings.run("reconcile", *HOUR, "--repair"))
    assert "equal, " in succeed(settings.run("reconcile", *HOUR, "--sinks", "redis"))

    destinations.redis.flushall()
    output = differences(settings.run("reconcile", *HOUR))
    assert "not counted 10000: 60001, 60002, " in output
    assert COUNTS in output
    assert REBUILDS in output
    assert "repaired, " in succeed(settings.run("reconcile", *HOUR, "--repair"))
    assert 10_000 == sum(destinations.counts().values())


def test_without_a_replicator_it_says_so(settings: Program, source: psycopg.Connection) -> None:
    """What is missing may still come."""
    insert_many(source, 10)
    output = differences(settings.run("reconcile", *EVERYTHING))
    assert "missing 10: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10\n" in output
    assert "the differences may be events that are still on their way: no replicator runs, slot" in output


def test_what_is_still_open_is_not_deleted(
    settings: Program, stack: DevStack, source: psycopg.Connection, database: str
) -> None:
    """An extra event may be of a transaction that is not visible yet: it is reported and kept."""
    source.execute(MANY, {"rows": 10, "step": "1 s"})
    fill(settings)
    stack.clickhouse.query(EXTRA.format(id=99))
    with psycopg.connect(database) as late:
        insert_many(late, 1)
        output = differences(settings.run("reconcile", *HOUR, "--repair", "--delete-extra", "--wait", "1"))
        assert "may belong to a transaction that is still open" in output
        assert "11\n" == stack.clickhouse.query("SELECT count() FROM events_enriched")
        late.rollback()
    assert "repaired, " in succeed(settings.run("reconcile", *HOUR, "--repair", "--delete-extra"))


def test_many_wrong_counts(settings: Program, source: psycopg.Connection, destinations: Destinations) -> None:
    """The first are named, the others counted."""
    source.execute("INSERT INTO content SELECT n, 'video', 5 FROM generate_series(10, 12009) AS n")
    source.execute(
        "INSERT INTO engagement_events (content_id, user_id, event_type) SELECT content_id, 1, 'x' FROM content"
    )
    fill(settings)
    with destinations.redis.pipeline() as pipeline:
        for content in range(10, 12_010):
            pipeline.decr(f"content:count:{content}")
        pipeline.execute()
    output = differences(settings.run("reconcile", *EVERYTHING))
    assert "redis       counts too low 12000: 10 has 0 instead of 1, 11 has " in output
    assert " and 11980 more\n" in output


def test_interrupted(settings: Program, database: str) -> None:
    """SIGTERM while PostgreSQL does not answer: one line, and it does not wait."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with psycopg.connect(database) as holder, psycopg.connect(database, autocommit=True) as looking:
        holder.execute("LOCK TABLE engagement_events IN ACCESS EXCLUSIVE MODE")
        running = settings.spawn("reconcile", *HOUR)
        wait_until(lambda: looking.execute(waiting).fetchone() == (1,), "it to wait")
        assert 1 == settings.stop()
        assert "replicator: stopped before it was done\n" in settings.log
        assert_clean(settings.log)
        assert running.poll() == 1


def test_json(settings: Program, stack: DevStack, source: psycopg.Connection) -> None:
    """The whole output is one JSON document, whose form tests/replicator/reconcile/test_report.py holds."""
    source.execute(MANY, {"rows": 3, "step": "1 s"})
    fill(settings)
    stack.clickhouse.query("DELETE FROM events_enriched WHERE event_id = 2")
    report = msgspec.json.decode(differences(settings.run("reconcile", *HOUR, "--json")))
    assert report.pop("seconds") > 0
    assert report.pop("doubt").startswith("no replicator runs, slot ")
    nothing = {"count": 0, "first": []}
    clickhouse, redis = report.pop("sinks")
    assert {"outcome": "different", "start": "2026-01-08T09:00:00Z", "end": "2026-01-08T10:00:00Z"} == report
    assert {
        "sink": "clickhouse",
        "source_events": 3,
        "sink_events": 2,
        "found": {"missing": {"count": 1, "first": [2]}, "different": nothing, "extra": nothing},
        "left": {"count": 1, "first": [2]},
        "hints": ["--repair sends what is missing or different; a backfill of a whole range is faster"],
        "deletes": False,
    } == clickhouse
    assert {
        "sink": "redis",
        "source_events": None,
        "sink_events": None,
        "found": {"not_counted": nothing, "counts_too_low": nothing},
        "left": nothing,
        "hints": [],
        "deletes": False,
    } == redis
    repaired = msgspec.json.decode(succeed(settings.run("reconcile", *HOUR, "--json", "--repair")))
    assert ("repaired", nothing) == (repaired["outcome"], repaired["sinks"][0]["left"])


def test_nothing_in_the_range(settings: Program) -> None:
    """An empty range is equal."""
    assert "equal, " in succeed(settings.run("reconcile", "--start", "1999-01-01", "--end", "1999-01-02"))


@pytest.mark.parametrize(
    ("arguments", "variables", "prepare", "code", "message"),
    [
        (("--start", "yesterday", *HOUR[2:]), {}, "", 2, "'yesterday' is not a time"),
        (HOUR[:2], {}, "", 2, "--end is unusable: it is missing"),
        ((*HOUR[:3], HOUR[1]), {}, "", 2, "is not before --end 2026-01-08T09:00:00Z"),
        (
            (*HOUR, "--sinks", "http"),
            {},
            "",
            2,
            "what sink http has can't be compared: nobody can ask it. It takes one or more of clickhouse, redis",
        ),
        ((*HOUR, "--delete-extra"), {}, "", 2, "--delete-extra is unusable: --repair is missing"),
        ((*HOUR, "--repair"), {"postgres_dsn": "postgresql://app@127.0.0.1:1/x"}, "", 1, "PostgreSQL failed"),
        ((*HOUR, "--repair"), {}, "DROP TABLE engagement_events", 1, '"public.engagement_events" does not exist'),
        ((*HOUR, "--repair", "--delete-extra"), {}, HIDDEN, 1, "affected by row-level security policy"),
        ((*HOUR, "--repair"), {}, "REVOKE SELECT ON content FROM replicator", 1, "permission denied for table content"),
        ((*HOUR, "--repair"), {}, "", 1, "does not exist. Run `python -m replicator init`"),
        ((*HOUR, "--sinks", "redis"), {"redis_url": "redis://127.0.0.1:1"}, "", 1, "Sink redis failed"),
        (HOUR, {"clickhouse_url": "ftp://planted"}, "", 2, "REPLICATOR_CLICKHOUSE_URL is unusable"),
    ],
)
def test_what_can_not_be_is_one_line(  # noqa: PLR0917  fixtures
    program: Program,
    source: psycopg.Connection,
    tmp_path: Path,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    prepare: str,
    code: int,
    message: str,
) -> None:
    """Nothing is written either."""
    insert_many(source, 3)
    if prepare:
        source.execute(prepare)
    result = program.run("reconcile", *arguments, **variables)
    assert_clean(result.stdout + result.stderr)
    assert (code, 1) == (result.code, result.stderr.count("\n")), result.stderr
    assert message in result.stderr
    assert not (tmp_path / "checkpoint.db").exists()
