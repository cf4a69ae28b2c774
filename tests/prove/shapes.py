"""The shapes of transactions that the crash matrix writes; see `matrix.py`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import psycopg

from tests.support.load import insert_many

ROUNDS = 20
NOISE = 200  # transactions on other tables between two events

# One connection writes, so what it sees is what is committed before the event.
NOTE_CONTENT = """
CREATE TABLE content_was (event_id bigint PRIMARY KEY, content_type text, length_seconds int);
CREATE FUNCTION note_content() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO content_was SELECT NEW.id, content_type, length_seconds FROM content WHERE content_id = NEW.content_id;
    RETURN NULL;
END $$;
CREATE TRIGGER note_content AFTER INSERT ON engagement_events FOR EACH ROW EXECUTE FUNCTION note_content();
"""
CHANGE_CONTENT = "UPDATE content SET content_type = %s, length_seconds = %s WHERE content_id = %s"
OF_CONTENT = "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms) VALUES (%s, 1, 'of', %s)"


class Shape(NamedTuple):
    """What is written, and how many events that is."""

    events: int
    write: Callable[[str, random.Random], None]
    """Given a DSN."""
    content_at_commit: bool = False
    """The table `content_was` has each event's content as of its commit; today's may be another one."""


def _one_transaction(rows: int) -> Shape:
    def write(dsn: str, _: random.Random) -> None:
        with psycopg.connect(dsn) as connection:
            insert_many(connection, rows)

    return Shape(rows, write)


def _interleaved(dsn: str, chance: random.Random) -> None:
    """Three concurrent transactions, committed in another order than begun, with single rows in between."""
    with ExitStack() as connections:
        long = [connections.enter_context(psycopg.connect(dsn)) for _ in range(3)]
        single = connections.enter_context(psycopg.connect(dsn, autocommit=True))
        for _ in range(ROUNDS):
            for _ in range(4):
                for connection in chance.sample(long, len(long)):
                    insert_many(connection, 10, "long")
                insert_many(single, 1, "single")
            for connection in chance.sample(long, len(long)):
                connection.commit()
                insert_many(single, 1, "single")


def _empties(dsn: str, chance: random.Random) -> None:
    """Single rows with many transactions on other tables between them."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE noise (n int)")
        for _ in range(ROUNDS):
            for _ in range(chance.randint(0, NOISE)):
                connection.execute("INSERT INTO noise VALUES (1)")
            insert_many(connection, 1)
        for _ in range(NOISE):
            connection.execute("INSERT INTO noise VALUES (1)")


def _contents(dsn: str, chance: random.Random) -> None:
    """Contents change before, between and after their events, in the same transactions and in others.

    The last changes are committed long before the program reads the first events again.
    """
    with psycopg.connect(dsn) as connection:
        connection.execute(NOTE_CONTENT)
        connection.commit()
        for _ in range(ROUNDS):
            for _ in range(4):
                for content in chance.sample(range(1, 4), 3):
                    if chance.random() < 0.7:
                        kind, seconds = chance.choice(["video", "film", "podcast"]), chance.choice([None, 0, 60, 300])
                        connection.execute(CHANGE_CONTENT, [kind, seconds, content])
                    connection.execute(OF_CONTENT, [content, chance.randint(0, 10**6)])
                if chance.random() < 0.6:
                    connection.commit()
            insert_many(connection, 18)
            connection.execute("SAVEPOINT undone")
            connection.execute("UPDATE content SET content_type = 'never', length_seconds = 1")
            connection.execute("ROLLBACK TO undone")
        connection.execute("UPDATE content SET content_type = 'today', length_seconds = 7")


SHAPES: Mapping[str, Shape] = {
    "single": _one_transaction(1),
    "ten-thousand": _one_transaction(10_000),
    "three-hundred-thousand": _one_transaction(300_000),
    "interleaved": Shape(ROUNDS * (4 * 31 + 3), _interleaved),
    "empties": Shape(ROUNDS, _empties),
    "contents": Shape(ROUNDS * 30, _contents, content_at_commit=True),
}
