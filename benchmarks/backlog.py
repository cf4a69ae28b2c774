"""Rows that wait in a slot, and copies of the slot, so that every reader gets the same work."""

from __future__ import annotations

from typing import NamedTuple

import psycopg

from devstack.process import wait_until

CONTENTS = 1_000
MANY_CONTENTS = 100_000

INSERT_CONTENTS = """
INSERT INTO public.content (content_id, content_type, length_seconds)
SELECT id, 'video', 1 + id %% 900 FROM generate_series(1, %s) AS id ON CONFLICT (content_id) DO NOTHING
"""
SCHEMA = """
CREATE PUBLICATION bench FOR TABLE public.engagement_events;

-- `transactions` of `size` rows each. With a skew of 3 some contents are far more popular than others, with 1 none is.
-- The numbers look random, but are the same every time.
CREATE OR REPLACE PROCEDURE make_backlog(transactions int, size int, contents int, skew int) LANGUAGE plpgsql AS $$
BEGIN
    FOR number IN 1..transactions LOOP
        INSERT INTO public.engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device)
        SELECT 1 + floor(contents * ((hashint8(number * size + row) & 1048575) / 1048576.0::float8) ^ skew),
               number * 31 + row, (ARRAY['play', 'pause', 'seek', 'finish'])[1 + row % 4], clock_timestamp(),
               nullif((number * 7919 + row * 1047::bigint) % 900000, 0),
               (ARRAY['web', 'ios', 'android', NULL])[1 + number % 4]
        FROM generate_series(1, size) AS row;
        COMMIT;
    END LOOP;
END $$;
"""

CREATE_SLOT = "SELECT pg_create_logical_replication_slot(%s, %s)"
LAST_ROW = """
INSERT INTO public.engagement_events (content_id, user_id, event_type, duration_ms) VALUES (1, 1, 'last', 1)
RETURNING id
"""


class Backlog(NamedTuple):
    """The rows that wait in a slot."""

    slot: str
    rows: int
    end_lsn: str
    """Everything but the last row, which is a transaction of its own, is before this position."""
    last_id: int


def prepare(connection: psycopg.Connection) -> None:
    """Insert contents and create the procedure that makes backlogs. The source tables must exist."""
    connection.execute(SCHEMA.encode())
    connection.execute(INSERT_CONTENTS, [CONTENTS])


def make(
    connection: psycopg.Connection, slot: str, *, transactions: int, size: int, contents: int = CONTENTS, skew: int = 3
) -> Backlog:
    """Make a slot, and another for `pgoutput`, and rows that wait in both; the contents, if there are fewer."""
    connection.execute(INSERT_CONTENTS, [contents])
    connection.execute(CREATE_SLOT, [slot, "wal2json"])
    connection.execute(CREATE_SLOT, [f"{slot}_pgoutput", "pgoutput"])
    connection.execute("SET synchronous_commit = off")
    connection.execute("CALL make_backlog(%s, %s, %s, %s)", [transactions, size, contents, skew])
    connection.execute("SET synchronous_commit = on")  # committing the last row flushes all before it
    [end_lsn] = _row(connection, "SELECT pg_current_wal_insert_lsn()::text")
    [last_id] = _row(connection, LAST_ROW)
    return Backlog(slot, transactions * size + 1, str(end_lsn), int(str(last_id)))


def copy(connection: psycopg.Connection, backlog: Backlog, slot: str, plugin: str = "wal2json") -> None:
    """Copy the slot."""
    source = backlog.slot if plugin == "wal2json" else f"{backlog.slot}_{plugin}"
    connection.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", [source, slot])


def drop(connection: psycopg.Connection, slot: str) -> None:
    """Drop the slot, and what `make` made beside it, as soon as nobody reads it."""
    active = "SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = %s"
    wait_until(lambda: connection.execute(active, [slot]).fetchone() == (0,), f"slot {slot} to be released")
    connection.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name IN (%s, %s)",
        [slot, f"{slot}_pgoutput"],
    )


def _row(connection: psycopg.Connection, query: str) -> tuple[object, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None  # noqa: S101  both queries return one
    return tuple(row)
