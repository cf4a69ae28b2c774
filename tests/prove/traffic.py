"""Hostile traffic: what `tests/support/load.py` writes, and what else an application can do to the tables.

Committed events do not change, so PostgreSQL can compute what the sinks must have.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import psycopg

from tests.support.load import Load, Step, insert_many

LARGE_ROWS = 8_000
PAYLOAD_BYTES = (50_000, 2_000_000)
LOCK_TIMEOUT_MS = 500
"""DDL that waits for a lock gives up; otherwise every writer would queue behind it."""

PAYLOAD = """
INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, device, raw_payload)
SELECT 1 + n %% 3, n, 'payload', n, repeat('é"\\', 20), jsonb_build_object('x', repeat(md5(n::text), %(bytes)s / 32))
FROM generate_series(1, %(rows)s) AS n
"""
NEW_CONTENT = """
INSERT INTO content (content_id, content_type, length_seconds) VALUES (%s, 'video', %s) ON CONFLICT DO NOTHING
"""
EVENT_OF = "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms) VALUES (%s, 1, 'new', %s)"

DDL = (
    "ALTER TABLE engagement_events ADD COLUMN IF NOT EXISTS note text DEFAULT 'none'",
    "ALTER TABLE engagement_events DROP COLUMN IF EXISTS note",
    "ALTER TABLE engagement_events ADD COLUMN IF NOT EXISTS extra numeric DEFAULT 1.5",
    "ALTER TABLE engagement_events DROP COLUMN IF EXISTS extra",
    "ALTER TABLE engagement_events ALTER COLUMN duration_ms TYPE bigint",
    "ALTER TABLE engagement_events ALTER COLUMN duration_ms TYPE int",
    "ALTER TABLE content ADD COLUMN IF NOT EXISTS title text DEFAULT 'none'",
    "ALTER TABLE content DROP COLUMN IF EXISTS title",
    "CREATE TABLE IF NOT EXISTS noise AS SELECT n FROM generate_series(1, 1000) AS n",
    "DROP TABLE IF EXISTS noise",
    "CREATE INDEX IF NOT EXISTS by_user ON engagement_events (user_id)",
    "DROP INDEX IF EXISTS by_user",
)

PREPARED = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"


class HostileTraffic(Load):
    """Seven writers at once."""

    def steps(self) -> Sequence[Step]:
        """Those of `Load`, and worse."""
        return *super().steps(), self._large, self._nested, self._prepared, self._alter

    def _large(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """An import, or rows with a long payload."""
        if chance.random() < 0.5:
            insert_many(connection, LARGE_ROWS, "large")
        else:
            connection.execute(PAYLOAD, {"rows": chance.randint(1, 5), "bytes": chance.randint(*PAYLOAD_BYTES)})
        connection.commit()
        self.wait(chance.uniform(2, 6))

    def _nested(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Savepoints in savepoints, some rolled back; a new content and its first events in one transaction."""
        with connection.transaction():
            content = chance.randint(4, 200)
            connection.execute(NEW_CONTENT, [content, content])
            for depth in range(chance.randint(1, 4)):
                with contextlib.ExitStack() as savepoints:
                    for _ in range(depth):
                        savepoints.enter_context(connection.transaction(force_rollback=chance.random() < 0.3))
                    connection.execute(EVENT_OF, [content, chance.randint(0, 10**6)])
                    insert_many(connection, chance.randint(1, 20), "nested")
        self.wait(chance.uniform(0.02, 0.2))

    def _prepared(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Two-phase commits. Nothing stays prepared for long: it would block DDL."""
        insert_many(connection, chance.randint(1, 50), "prepared")
        connection.execute(f"PREPARE TRANSACTION 'p{chance.getrandbits(60)}'".encode())
        connection.commit()
        self.wait(chance.uniform(0.0, 0.3))
        settle(connection, chance)
        self.wait(chance.uniform(0.2, 0.6))

    def _alter(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """DDL, maintenance, and updates of events, which change nothing that is replicated."""
        connection.autocommit = True
        connection.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}".encode())
        with contextlib.suppress(psycopg.errors.LockNotAvailable):
            match chance.randrange(5):
                case 0:
                    connection.execute("VACUUM engagement_events")
                case 1:
                    connection.execute("ANALYZE")
                case 2:
                    connection.execute("UPDATE engagement_events SET raw_payload = '{}' WHERE id % 997 = 0")
                case _:
                    connection.execute(chance.choice(DDL).encode())
        self.wait(chance.uniform(0.2, 1.0))


def settle(connection: psycopg.Connection, chance: random.Random) -> None:
    """Commit or roll back what is prepared in this database."""
    connection.commit()
    connection.autocommit = True
    for (gid,) in connection.execute(PREPARED).fetchall():
        end = "COMMIT" if chance.random() < 0.7 else "ROLLBACK"
        connection.execute(f"{end} PREPARED '{gid}'".encode())
    connection.autocommit = False
