"""Steady traffic, and the truth about it: what content was when an event was committed.

The application inserts into the table at its place of the moment (`Place`); DDL moves it. While the table is not there,
or lacks a column, a writer tries again. A version of a content belongs to an epoch: a counter that moves on with every
change of `content`, and that each event keeps in raw_payload, which no sink gets. An event has to carry its content as
it was in the event's epoch or in a later one, for what is sent again is looked up again.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import psycopg

from tests.prove.traffic import settle
from tests.support.load import Load, Step

EPOCH_LOCK = 4711
"""Held shared by every transaction with an event, and exclusively by one that changes content."""
NOBODY_HOLDS = "infinity"
"""A time that no sink can say: each of them makes a dead letter of it, by contract."""

SETUP = f"""
CREATE SCHEMA chaos;
CREATE TABLE chaos.epoch (number int);
INSERT INTO chaos.epoch VALUES (0);
CREATE TABLE chaos.versions (content_id bigint, content_type text, length_seconds int, there bool, until int);
CREATE FUNCTION chaos.stamp() RETURNS jsonb LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared({EPOCH_LOCK});
    RETURN jsonb_build_object('epoch', (SELECT number FROM chaos.epoch));
END $$;
ALTER TABLE public.engagement_events ALTER raw_payload SET DEFAULT chaos.stamp(),
    DROP CONSTRAINT engagement_events_content_id_fkey;
INSERT INTO public.content SELECT n, 'kind ' || n % 4, nullif(n % 7, 0) * 60 FROM generate_series(4, 40) AS n;
"""
"""Without the foreign key, which would only forbid some of the DDL."""

BEFORE_CHANGE = """
INSERT INTO chaos.versions SELECT content_id, content_type, length_seconds, true FROM public.content AS c
WHERE NOT EXISTS (
    SELECT FROM chaos.versions AS v WHERE v.content_id = c.content_id AND v.until IS NULL AND v.there
    AND (v.content_type, v.length_seconds) IS NOT DISTINCT FROM (c.content_type, c.length_seconds)
)
"""
AFTER_CHANGE = """
UPDATE chaos.epoch SET number = number + 1;
UPDATE chaos.versions AS v SET until = (SELECT number FROM chaos.epoch)
WHERE until IS NULL AND there <> EXISTS (SELECT FROM public.content AS c WHERE c.content_id = v.content_id)
   OR until IS NULL AND there AND NOT EXISTS (
    SELECT FROM public.content AS c WHERE v.content_id = c.content_id
    AND (v.content_type, v.length_seconds) IS NOT DISTINCT FROM (c.content_type, c.length_seconds)
);
INSERT INTO chaos.versions
SELECT content_id, c.content_type, c.length_seconds, c.content_type IS NOT NULL
FROM (SELECT DISTINCT content_id FROM chaos.versions) AS known
LEFT JOIN public.content AS c USING (content_id)
WHERE NOT EXISTS (SELECT FROM chaos.versions AS v WHERE v.content_id = known.content_id AND v.until IS NULL)
"""

INSERT = """
INSERT INTO {table} (content_id, user_id, event_type, event_ts, duration_ms, device)
SELECT 1 + (n * 7) %% 40, n, %(kind)s, {time}, nullif(n::bigint * 7919 %% 400000, 0),
       (ARRAY['web', 'ios', NULL, 'tv "4k"'])[1 + n %% 4]
FROM generate_series(%(first)s::bigint, %(first)s::bigint + %(rows)s - 1) AS n
"""
TIMES = ("now()", "now() - interval '3 h'", "'1950-03-01 00:00+00'", "'2199-12-31 23:59:59.999999+00'")
AWAY = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.FeatureNotSupported,  # a prepared statement whose table has become another
)
"""The application meets a table that is not what it was: it tries again."""
AWAY_SECONDS = 0.3


class Place:
    """Where the application writes its events now."""

    def __init__(self) -> None:
        self.table = "public.engagement_events"
        self.poison: set[int] = set()
        """Events that the API may never take; see `answers.py`."""


def write(
    connection: psycopg.Connection, table: str, chance: random.Random, rows: int, kind: str, *, time: str = "now()"
) -> None:
    """Insert events."""
    values = {"kind": kind, "first": chance.randrange(10**6), "rows": rows}
    connection.execute(INSERT.format(table=table, time=time).encode(), values)


class Application(Load):
    """Five writers at once, none of them fast: the point is what happens to the tables."""

    def __init__(self, dsn: str, chance: random.Random, place: Place) -> None:
        self._place = place
        super().__init__(dsn, chance)

    def steps(self) -> Sequence[Step]:
        """A writer for each."""
        wanted = (self._one, self._some, self._nested, self._overtaken, self._prepared_ones)
        return [self._again(step) for step in wanted]

    def _again(self, step: Step) -> Step:
        def patient(connection: psycopg.Connection, chance: random.Random) -> None:
            try:
                step(connection, chance)
            except AWAY:
                connection.rollback()
                self.wait(AWAY_SECONDS)

        return patient

    def _write(self, connection: psycopg.Connection, chance: random.Random, rows: int, kind: str) -> None:
        write(connection, self._place.table, chance, rows, kind)

    def _one(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """A single row; now and then one at a time that is far away, or that nobody can say."""
        time = chance.choice(TIMES) if chance.random() < 0.1 else "now()"
        odd = chance.random() < 0.01
        kind, time = ("odd", f"'{NOBODY_HOLDS}'") if odd else ("one", time)
        write(connection, self._place.table, chance, 1, kind, time=time)
        connection.commit()
        self.wait(chance.uniform(0.0, 0.05))

    def _some(self, connection: psycopg.Connection, chance: random.Random) -> None:
        self._write(connection, chance, chance.choice((50, 200, 2_000)), "some")
        connection.commit()
        self.wait(chance.uniform(0.5, 3.0))

    def _nested(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Savepoints in savepoints, some of them rolled back."""
        with connection.transaction():
            for depth in range(chance.randint(1, 4)):
                with contextlib.ExitStack() as savepoints:
                    for _ in range(depth):
                        savepoints.enter_context(connection.transaction(force_rollback=chance.random() < 0.3))
                    self._write(connection, chance, chance.randint(1, 20), "nested")
        self.wait(chance.uniform(0.1, 0.4))

    def _overtaken(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Begun before others commit, committed after them, or rolled back."""
        for _ in range(3):
            self._write(connection, chance, chance.randint(1, 30), "overtaken")
            self.wait(chance.uniform(0.02, 0.2))
        if chance.random() < 0.2:
            connection.rollback()
        connection.commit()
        self.wait(chance.uniform(0.1, 0.5))

    def _prepared_ones(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Two-phase commits. Nothing stays prepared for long: it would block DDL."""
        self._write(connection, chance, chance.randint(1, 50), "prepared")
        connection.execute(f"PREPARE TRANSACTION 'p{chance.getrandbits(60)}'".encode())
        connection.commit()
        self.wait(chance.uniform(0.0, 0.2))
        settle(connection, chance)
        self.wait(chance.uniform(0.5, 1.0))
