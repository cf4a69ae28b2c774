"""Rows that wait in a slot, and copies of the slot, so that every reader gets the same work."""

from __future__ import annotations

from typing import NamedTuple

import psycopg

SCHEMA = """
INSERT INTO public.content (content_id, content_type, length_seconds)
SELECT id, 'video', 1 + id % 900 FROM generate_series(1, 1000) AS id ON CONFLICT (content_id) DO NOTHING;

-- `transactions` of `size` rows each, some contents far more popular than others. The numbers look random, but are
-- the same every time.
CREATE OR REPLACE PROCEDURE make_backlog(transactions int, size int) LANGUAGE plpgsql AS $$
BEGIN
    FOR number IN 1..transactions LOOP
        INSERT INTO public.engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device)
        SELECT 1 + floor(1000 * ((hashint8(number * size + row) & 65535) / 65536.0::float8) ^ 3),
               number * 31 + row, (ARRAY['play', 'pause', 'seek', 'finish'])[1 + row % 4], clock_timestamp(),
               nullif((number * 7919 + row * 1047) % 900000, 0),
               (ARRAY['web', 'ios', 'android', NULL])[1 + number % 4]
        FROM generate_series(1, size) AS row;
        COMMIT;
    END LOOP;
END $$;
"""

CREATE_SLOT = "SELECT pg_create_logical_replication_slot(%s, 'wal2json')"
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


def make(connection: psycopg.Connection, slot: str, *, transactions: int, size: int) -> Backlog:
    """Make a slot, and rows that wait in it."""
    connection.execute(CREATE_SLOT, [slot])
    connection.execute("SET synchronous_commit = off")
    connection.execute("CALL make_backlog(%s, %s)", [transactions, size])
    connection.execute("SET synchronous_commit = on")  # committing the last row flushes all before it
    [end_lsn] = _row(connection, "SELECT pg_current_wal_insert_lsn()::text")
    [last_id] = _row(connection, LAST_ROW)
    return Backlog(slot, transactions * size + 1, str(end_lsn), int(str(last_id)))


def copy(connection: psycopg.Connection, backlog: Backlog, slot: str) -> None:
    """Copy the slot."""
    connection.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", [backlog.slot, slot])


def drop(connection: psycopg.Connection, slot: str) -> None:
    """Drop the slot."""
    connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])


def _row(connection: psycopg.Connection, query: str) -> tuple[object, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None  # noqa: S101  both queries return one
    return tuple(row)
