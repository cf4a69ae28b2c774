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


class Shape(NamedTuple):
    """What is written, and how many events that is."""

    events: int
    write: Callable[[str, random.Random], None]
    """Given a DSN."""


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


SHAPES: Mapping[str, Shape] = {
    "single": _one_transaction(1),
    "ten-thousand": _one_transaction(10_000),
    "three-hundred-thousand": _one_transaction(300_000),
    "interleaved": Shape(ROUNDS * (4 * 31 + 3), _interleaved),
    "empties": Shape(ROUNDS, _empties),
}
