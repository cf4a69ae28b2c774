"""Parts and locks of the events' table, while a sink is paused and while others are never done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg

from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.load import insert_many
from tests.support.program import Program, succeed

PARTITIONED = """
ALTER TABLE engagement_events RENAME TO rest;
CREATE TABLE engagement_events (LIKE rest INCLUDING DEFAULTS) PARTITION BY RANGE (user_id);
ALTER TABLE engagement_events ATTACH PARTITION rest DEFAULT;
GRANT SELECT ON engagement_events TO replicator
"""
INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 10001, 'direct')"


def test_a_part_comes_and_goes_while_a_sink_is_paused(
    quick: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """The sink gets what was in it: no other trace of the part is left in the catalog, nor a row in the table."""
    source.execute(PARTITIONED)
    quick.start()
    insert_many(source, 5)
    quick.wait_until_caught_up()
    succeed(quick.run("pause", "http"))
    insert_many(source, 5)
    source.execute("CREATE TABLE part PARTITION OF engagement_events FOR VALUES FROM (10000) TO (20000)")
    wait_until(lambda: "part is a new part" in quick.log, "it to see the part")
    source.execute(INSERT)
    wait_until(lambda: 10001 in {event["user_id"] for event in destinations.clickhouse()}, "the event")
    source.execute("ALTER TABLE engagement_events DETACH PARTITION part")
    wait_until(lambda: "part is no longer a part" in quick.log, "it to see that it is gone")
    source.execute("DROP TABLE part")
    succeed(quick.run("resume", "http"))
    quick.wait_until_caught_up()
    assert [10001] == [event["user_id"] for event in destinations.api() if event["user_id"] > 5]
    assert 0 == quick.stop()


@contextmanager
def always_locked(dsn: str) -> Iterator[None]:
    """At every moment somebody holds the table's lock, never for long."""
    stopping = threading.Event()

    def write() -> None:
        with psycopg.connect(dsn) as connection:
            while not stopping.is_set():
                connection.execute("LOCK TABLE engagement_events IN EXCLUSIVE MODE")
                connection.execute(INSERT)
                time.sleep(0.02)
                connection.commit()

    threads = [threading.Thread(target=write) for _ in range(3)]
    with ExitStack() as ends:
        for thread in threads:
            ends.callback(thread.join)
            thread.start()
        ends.callback(stopping.set)
        yield


def test_writers_that_lock_the_table_hold_up_nothing(quick: Program, database: str, source: psycopg.Connection) -> None:
    """A position is verified when those are over that held the lock then; there are others by now."""
    quick.start()
    with always_locked(database):
        time.sleep(1)
        [(lsn,)] = source.execute("SELECT pg_current_wal_flush_lsn()::text").fetchall()
        asked = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
        wait_until(lambda: source.execute(asked, [lsn, quick.slot]).fetchone() == (True,), "the slot to move", 6)
    assert 0 == quick.stop()


def test_another_table_takes_the_name(quick: Program, source: psycopg.Connection) -> None:
    """Its ids may begin again; it says what that means before somebody wonders about counts."""
    quick.start()
    source.execute("""
        BEGIN; ALTER TABLE engagement_events RENAME TO last_year;
        CREATE TABLE engagement_events (LIKE last_year INCLUDING ALL);
        GRANT SELECT ON engagement_events TO replicator; COMMIT
    """)
    insert_many(source, 5)
    quick.wait_for_log("public.engagement_events is another table than before. Ids must never be reused")
    quick.wait_until_caught_up()
    assert 0 == quick.stop()


def test_a_bulk_load_of_old_events_while_unlogged(
    quick: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Not one event was seen before: neither the ids nor the times of these say that they are new, and they are."""
    quick.start()
    source.execute("ALTER TABLE engagement_events SET UNLOGGED")
    source.execute("INSERT INTO engagement_events VALUES (7, 1, 1, 'old', '2020-01-01')")
    source.execute("ALTER TABLE engagement_events SET LOGGED")
    wait_until(lambda: [7] == [event["event_id"] for event in destinations.api()], "the event")
    source.execute("ALTER TABLE engagement_events RENAME TO x; ALTER TABLE content RENAME TO y")
    quick.wait_for_log("public.content does not exist, and table public.engagement_events does not exist")
    assert 1 == quick.admin("/readyz").count("Rename it back")
    assert 0 == quick.stop()
