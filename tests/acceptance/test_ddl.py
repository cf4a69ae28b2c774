"""Whatever happens to the tables, and whenever: everything arrives, right, or nothing is read and it says why.

The table of all this is in docs/reference/faults.md.
"""

from __future__ import annotations

import psycopg

from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import Program

PARTITIONED = """
BEGIN;
ALTER TABLE engagement_events RENAME TO engagement_events_old;
CREATE TABLE engagement_events (LIKE engagement_events_old INCLUDING DEFAULTS) PARTITION BY RANGE (id);
ALTER TABLE engagement_events ATTACH PARTITION engagement_events_old FOR VALUES FROM (MINVALUE) TO (1000000);
COMMIT
"""


def test_becomes_partitioned(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """While it runs."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    source.execute(PARTITIONED)
    insert_many(source, 100)
    quick.wait_until_caught_up()
    wait_until(lambda: 110 == sum(destinations.counts().values()), "110")
    assert 0 == quick.stop()
    assert_exact(database, destinations)


def test_view_and_back(quick: Program, database: str, source: psycopg.Connection, destinations: Destinations) -> None:
    """While it runs."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    source.execute("ALTER TABLE engagement_events RENAME TO v2; CREATE VIEW engagement_events AS SELECT * FROM v2")
    insert_many(source, 100)
    wait_until(lambda: "is a view" in quick.admin("/readyz"), "it to say so")
    source.execute("DROP VIEW engagement_events; ALTER TABLE v2 RENAME TO engagement_events")
    insert_many(source, 100)
    wait_until(lambda: 210 == sum(destinations.counts().values()), "210")
    quick.wait_until_caught_up()
    assert "ready\n" == quick.admin("/readyz")
    assert 0 == quick.stop()
    assert_exact(database, destinations)
