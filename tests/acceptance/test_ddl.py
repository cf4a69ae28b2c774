"""Whatever happens to the tables, and whenever: everything arrives, right, or nothing is read and it says why.

The table of all this is in docs/reference/tables.md.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import psycopg
import pytest

from devstack.process import DevStackError, wait_until
from tests.support.destinations import Destinations, expected
from tests.support.exact import assert_same, newest
from tests.support.load import insert_many
from tests.support.program import Program, assert_clean, succeed


def assert_right(dsn: str, destinations: Destinations) -> None:
    """Every sink has what PostgreSQL computes now; at the API the last view of an event counts."""
    events = expected(dsn)
    assert_same(events, destinations.clickhouse(), "ClickHouse")
    assert Counter(event["content_id"] for event in events) == destinations.counts()
    assert newest(events) == destinations.last()
    last = {event["event_id"]: event for event in destinations.api()}
    assert_same(events, [last[event_id] for event_id in sorted(last)], "the API")


def wait_until_right(program: Program, dsn: str, destinations: Destinations) -> None:
    """Also what comes beside the stream has arrived. Nothing became a dead letter."""
    program.wait_until_caught_up()
    with suppress(DevStackError):
        wait_until(lambda: _is_right(dsn, destinations), "everything to arrive", 15)
    assert_right(dsn, destinations)
    assert {"rows": 0, "sinks": {}, "limit": 100_000} == program.status()["dead_letters"]
    assert_clean(program.log)


def _is_right(dsn: str, destinations: Destinations) -> bool:
    try:
        assert_right(dsn, destinations)
    except AssertionError:
        return False
    return True


# -- the events: what the stream goes on with ----------------------------------------------------------------------

PARTITIONED = """
BEGIN;
ALTER TABLE engagement_events RENAME TO engagement_events_old;
CREATE TABLE engagement_events (LIKE engagement_events_old INCLUDING DEFAULTS) PARTITION BY RANGE (user_id);
ALTER TABLE engagement_events ATTACH PARTITION engagement_events_old FOR VALUES FROM (MINVALUE) TO (10000);
GRANT SELECT ON engagement_events TO replicator;
COMMIT
"""
INSERT = "INSERT INTO {} (content_id, user_id, event_type, duration_ms) VALUES (1, {}, 'direct', 3000)"
ODD = 'other."Ca, "".q\'é * x\\"'


def test_partitions(quick: Program, database: str, source: psycopg.Connection, destinations: Destinations) -> None:
    """An ordinary table becomes partitioned; parts are made, filled and attached, moved, renamed and detached."""
    quick.start()
    insert_many(source, 10)
    source.execute(PARTITIONED)
    insert_many(source, 10)
    source.execute("CREATE TABLE next PARTITION OF engagement_events FOR VALUES FROM (10000) TO (20000)")
    source.execute(INSERT.format("engagement_events", 10001))
    wait_until_right(quick, database, destinations)

    source.execute(f"CREATE SCHEMA other; CREATE TABLE {ODD} (extra int, LIKE engagement_events INCLUDING DEFAULTS)")
    source.execute(f"ALTER TABLE {ODD} DROP extra")
    source.execute(INSERT.format(ODD, 20001))
    source.execute(f"ALTER TABLE engagement_events ATTACH PARTITION {ODD} FOR VALUES FROM (20000) TO (30000)")
    source.execute(INSERT.format("engagement_events", 20002))
    source.execute("CREATE TABLE other.next PARTITION OF engagement_events FOR VALUES FROM (30000) TO (40000)")
    source.execute(INSERT.format("engagement_events", 30001))
    insert_many(source, 10)
    wait_until_right(quick, database, destinations)

    source.execute(INSERT.format("engagement_events", 10002))
    source.execute("ALTER TABLE next RENAME TO later")
    source.execute(INSERT.format("engagement_events", 10003))
    source.execute("ALTER TABLE later SET SCHEMA other")
    source.execute(INSERT.format("engagement_events", 10004))
    source.execute("UPDATE engagement_events SET user_id = 20003 WHERE user_id = 10004")  # deleted here, inserted there
    wait_until_right(quick, database, destinations)

    source.execute(f"ALTER TABLE engagement_events DETACH PARTITION {ODD}")
    insert_many(source, 10)
    quick.wait_until_caught_up()
    wait_until(lambda: "is no longer a part of engagement_events" in quick.log, "it to see that")
    wait_until(lambda: "reading slot" in quick.log.rpartition("no longer a part")[2], "the stream to begin again")
    source.execute(INSERT.format(ODD, 20009))  # no event
    source.execute(f"DELETE FROM {ODD} WHERE user_id = 20009")  # noqa: S608  ours
    quick.wait_until_caught_up()
    source.execute(f"ALTER TABLE engagement_events ATTACH PARTITION {ODD} FOR VALUES FROM (20000) TO (30000)")
    source.execute(INSERT.format("engagement_events", 20005))
    wait_until_right(quick, database, destinations)
    assert 0 == quick.stop()


def test_inheritance(quick: Program, database: str, source: psycopg.Connection, destinations: Destinations) -> None:
    """As a hypertable has its rows: in children, routed by a trigger; one is there before the first start."""
    source.execute("""
        CREATE TABLE "A" () INHERITS (engagement_events);
        CREATE FUNCTION route() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN INSERT INTO "A" VALUES (NEW.*); RETURN NULL; END$$;
        CREATE TRIGGER route BEFORE INSERT ON engagement_events FOR EACH ROW EXECUTE FUNCTION route();
    """)
    assert "FAIL" not in succeed(quick.run("init"))
    assert "table public.engagement_events: there, and in the WAL" in quick.run("check").stdout
    quick.start()
    insert_many(source, 100)
    wait_until_right(quick, database, destinations)
    source.execute("CREATE TABLE b () INHERITS (engagement_events); CREATE TABLE c () INHERITS (b)")
    for table in ("b", "c", "engagement_events"):
        source.execute(INSERT.format(table, 1).encode())
    source.execute("ALTER TABLE engagement_events DISABLE TRIGGER route")
    insert_many(source, 10)
    wait_until_right(quick, database, destinations)
    assert 0 == quick.stop()


# -- the events: what has to be mended -----------------------------------------------------------------------------

OTHERS = {
    "renamed": ("ALTER TABLE {} RENAME TO x", "x", "ALTER TABLE x RENAME TO {}", "engagement_events does not exist"),
    "moved": (
        "CREATE SCHEMA s; ALTER TABLE {} SET SCHEMA s",
        "s.{}",
        "ALTER TABLE s.{} SET SCHEMA public; DROP SCHEMA s",
        "engagement_events does not exist",
    ),
    "unlogged": ("ALTER TABLE {} SET UNLOGGED", "{}", "ALTER TABLE {} SET LOGGED", "not in the WAL (UNLOGGED)"),
    "a view": (
        "ALTER TABLE {} RENAME TO x; CREATE VIEW {} AS SELECT * FROM x",
        "{}",
        "DROP VIEW {}; ALTER TABLE x RENAME TO {}",
        "is a view",
    ),
    "retyped": (
        "ALTER TABLE {} ALTER duration_ms TYPE text",
        "{}",
        "ALTER TABLE {} ALTER duration_ms TYPE int USING duration_ms::int",
        "a column duration_ms of type text instead of bigint",
    ),
    "a column renamed": (
        "ALTER TABLE {} RENAME COLUMN device TO dev",
        "{}",
        "ALTER TABLE {} RENAME COLUMN dev TO device",
        "has no column device",
    ),
}
EVENTS = "engagement_events"


def test_mended_while_it_runs(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Nothing is read, PostgreSQL keeps it, it says why and both agree; mended, it goes on with nothing missing.

    Also when it is taken back before anybody could look.
    """
    quick.start()
    for there, table, back, told in OTHERS.values():
        insert_many(source, 5)
        source.execute(there.format(EVENTS, EVENTS).encode())
        source.execute(INSERT.format(table.format(EVENTS), 1).encode())
        wait_until(lambda told=told: told in quick.admin("/readyz"), f"it to say {told}")  # type: ignore[misc]  # mypy can't type a lambda's default
        assert "Once the tables fit, the replicator continues by itself" in quick.admin("/readyz")
        assert told in quick.run("check").stdout
        source.execute(back.format(EVENTS, EVENTS).encode())
        insert_many(source, 5)
        wait_until_right(quick, database, destinations)
        for statement in (there, INSERT.format(table, 1), back):
            source.execute(statement.format(EVENTS, EVENTS).encode())
        insert_many(source, 5)
        wait_until_right(quick, database, destinations)
    assert 0 == quick.stop()


def test_a_first_start_makes_no_slot_for_tables_that_do_not_fit(
    quick: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """It would keep WAL until somebody looks. Mended, it is made, and a backfill brings what is older."""
    there, table, back, told = OTHERS["retyped"]
    source.execute(there.format(EVENTS).encode())
    source.execute(INSERT.format(table.format(EVENTS), 1).encode())
    quick.spawn()
    quick.wait_for_log("No slot is made until this is mended")
    wait_until(lambda: told in quick.admin("/readyz"), f"it to say {told}")
    slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
    assert (0,) == source.execute(slots, [quick.slot]).fetchone()
    source.execute(back.format(EVENTS).encode())
    quick.wait_for_log("reading slot")
    assert f"made slot {quick.slot}" in quick.log
    insert_many(source, 1)
    quick.wait_until_caught_up()
    assert 1 == len(destinations.clickhouse())
    assert 0 == quick.run("backfill", "--last", "1h").code
    assert 2 == len(destinations.clickhouse())
    assert 0 == quick.stop()


def test_mended_while_it_is_down(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """What the tables were at the end of the last run is known to the next one."""
    quick.start()
    for there, table, back, _ in OTHERS.values():
        insert_many(source, 5)
        wait_until_right(quick, database, destinations)
        assert 0 == quick.stop()
        for statement in (there, INSERT.format(table, 1), back):
            source.execute(statement.format(EVENTS, EVENTS).encode())
        quick.start()
        wait_until_right(quick, database, destinations)
    assert 0 == quick.stop()


def test_mapped(program: Program, database: str, source: psycopg.Connection, destinations: Destinations) -> None:
    """Renamed for good, and named in the setting: stream, look-ups, backfill, reconcile and check follow."""
    program.start()
    insert_many(source, 10)
    wait_until_right(program, database, destinations)
    source.execute("ALTER TABLE engagement_events RENAME device TO dev")
    source.execute("ALTER TABLE engagement_events RENAME event_ts TO at")
    source.execute("ALTER TABLE engagement_events ADD device int")  # another one
    source.execute("ALTER TABLE content RENAME content_id TO number")
    insert = (
        "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, dev) VALUES (1, 1, 'new', 1, 'x')"
    )
    source.execute(insert)
    wait_until(lambda: "REPLICATOR_COLUMNS=event_ts=…" in program.admin("/readyz"), "it to say how to name it")
    assert 0 == program.stop()
    program.environment["REPLICATOR_COLUMNS"] = "device=dev, event_ts=at, content.content_id=number"
    checked = program.run("check")
    assert "table public.engagement_events: has the columns it needs" in checked.stdout
    program.start()
    source.execute(insert)
    source.execute("UPDATE content SET length_seconds = 10 WHERE number = 2")
    source.execute(insert.replace("(1, 1", "(2, 1"))
    program.wait_until_caught_up()
    wait_until(lambda: 13 == sum(destinations.counts().values()), "all of them")
    last = destinations.clickhouse()[-1]
    assert (2, "x", 10) == (last["content_id"], last["device"], last["length_seconds"])
    succeed(program.run("reconcile", "--last", "1h"))
    assert "13 events" in succeed(program.run("backfill", "--last", "1h"))
    assert 0 == program.stop()


# -- the content ---------------------------------------------------------------------------------------------------

CONTENT = {
    "swapped": """
        CREATE TABLE green (LIKE content INCLUDING ALL); INSERT INTO green SELECT content_id, 'v2', 600 FROM content;
        BEGIN; ALTER TABLE content RENAME TO blue; ALTER TABLE green RENAME TO content; COMMIT""",
    "rewritten": "ALTER TABLE content ALTER length_seconds TYPE int USING length_seconds * 2",
    "an enum": """
        CREATE TYPE kind AS ENUM ('v1', 'v2'); ALTER TABLE content ALTER content_type TYPE kind USING 'v2'::kind""",
    "a value of an enum is renamed": "ALTER TYPE kind RENAME VALUE 'v2' TO 'v3'",
    "a column made again": "ALTER TABLE content DROP length_seconds, ADD length_seconds int DEFAULT 700",
    "key made again": """
        ALTER TABLE content DROP CONSTRAINT IF EXISTS content_pkey, DROP CONSTRAINT IF EXISTS green_pkey;
        UPDATE content SET length_seconds = 800; ALTER TABLE content ADD CONSTRAINT key PRIMARY KEY (content_id)""",
    "key deferrable": "ALTER TABLE content DROP CONSTRAINT key, ADD CONSTRAINT key PRIMARY KEY (content_id) DEFERRABLE",
    "updated with it": "UPDATE content SET length_seconds = 850",
    "key as it was": "ALTER TABLE content DROP CONSTRAINT key, ADD CONSTRAINT key PRIMARY KEY (content_id)",
    "unlogged and back": """
        ALTER TABLE content SET UNLOGGED; UPDATE content SET length_seconds = 900; ALTER TABLE content SET LOGGED""",
    "partitioned": """
        BEGIN; ALTER TABLE content RENAME TO part;
        CREATE TABLE content (LIKE part INCLUDING DEFAULTS) PARTITION BY RANGE (content_id);
        ALTER TABLE content ATTACH PARTITION part DEFAULT; GRANT SELECT ON content TO replicator; COMMIT;
        UPDATE content SET length_seconds = 1000""",
    "a part is made": """
        CREATE TABLE few (LIKE content, PRIMARY KEY (content_id));
        ALTER TABLE content ATTACH PARTITION few FOR VALUES FROM (100) TO (200)""",
    "a part is emptied": "TRUNCATE few",
    "identity nothing": "ALTER TABLE part REPLICA IDENTITY NOTHING; UPDATE content SET length_seconds = 1100",
    "a view": """
        ALTER TABLE content RENAME TO below; CREATE VIEW content AS SELECT * FROM below;
        GRANT SELECT ON content TO replicator; UPDATE below SET length_seconds = 1200""",
    "unlogged": """
        DROP VIEW content; CREATE UNLOGGED TABLE content (LIKE below); INSERT INTO content SELECT * FROM below;
        GRANT SELECT ON content TO replicator; UPDATE content SET length_seconds = 1300""",
    "made again, empty": """
        DROP TABLE content; CREATE TABLE content (content_id bigint PRIMARY KEY, content_type text, length_seconds int);
        GRANT SELECT ON content TO replicator""",
    "filled": "INSERT INTO content VALUES (1, 'audio', 50), (2, 'audio', 60)",
    "truncated": "TRUNCATE content",
}


def test_content(quick: Program, database: str, source: psycopg.Connection, destinations: Destinations) -> None:
    """Whatever happens to it: an event that comes at once has what it says then."""
    source.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    quick.start()
    insert_many(source, 3)
    quick.wait_until_caught_up()
    for kind, statements in CONTENT.items():
        source.execute(statements.encode())
        source.execute("DELETE FROM engagement_events")
        insert_many(source, 3, kind)
        if kind == "swapped":  # the new table has rights of its own
            wait_until(lambda: "permission denied for table content" in quick.admin("/readyz"), "it to say so")
            source.execute("GRANT SELECT ON content TO replicator")
        quick.wait_until_caught_up()
        wait_until(lambda: not wrong(database, destinations), f"the right contents ({kind})", 20)
    assert {"rows": 0, "sinks": {}, "limit": 100_000} == quick.status()["dead_letters"]
    assert 0 == quick.stop()


def wrong(dsn: str, destinations: Destinations) -> list[object]:
    """The events that are in the table now and not so in the sinks."""
    events = {event["event_id"]: event for event in expected(dsn)}
    clickhouse = {event["event_id"]: event for event in destinations.clickhouse()}
    api = {event["event_id"]: event for event in destinations.api()}
    return [key for key, event in events.items() if not event == clickhouse.get(key) == api.get(key)]


SWAP = """
ALTER TABLE engagement_events RENAME COLUMN device TO x;
ALTER TABLE engagement_events RENAME COLUMN event_type TO device;
ALTER TABLE engagement_events RENAME COLUMN x TO event_type
"""
THERE_AND_BACK = {
    "swapped": (SWAP, SWAP),
    "retyped": (
        "ALTER TABLE engagement_events ALTER duration_ms TYPE text",
        "ALTER TABLE engagement_events ALTER duration_ms TYPE int USING duration_ms::int + 1",
    ),
    "made again": ("", "ALTER TABLE engagement_events DROP device; ALTER TABLE engagement_events ADD device text"),
}
OLD = """
INSERT INTO engagement_events (id, content_id, user_id, event_type, event_ts, duration_ms, device)
VALUES ({}, 1, 1, 'play', '{}', '3000', 'web')
"""


@pytest.mark.parametrize("change", THERE_AND_BACK)
def test_columns_that_were_different_for_a_moment(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, change: str
) -> None:
    """Rows of that moment are as the table has them now, also those whose ids and times are old."""
    there, back = THERE_AND_BACK[change]
    quick.start()
    source.execute(OLD.format(1_000_000, "now").replace("'web'", "NULL"))
    quick.wait_until_caught_up()
    source.execute(there)
    source.execute(OLD.format(1_000_001, "now"))
    source.execute(OLD.format(7, "2020-01-01"))
    source.execute(back)
    source.execute(OLD.format(9, "2020-01-02"))
    wait_until_right(quick, database, destinations)
    assert 0 == quick.stop()
