"""What is proved: engagement events, or the example's orders, a stream of its own whose rows change.

A subject makes the tables, keeps writing hostile traffic into them, and compares the sinks with PostgreSQL.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import psycopg

from devstack import DevStack
from devstack.process import wait_until
from tests.prove.traffic import HostileTraffic, settle
from tests.support import orders
from tests.support.destinations import Destinations
from tests.support.exact import assert_exact
from tests.support.load import Load, Step

TOP_SECONDS = 10.0  # how late the window may be, by contract
LARGE_ROWS = 6_000
LOCK_TIMEOUT_MS = 500
"""DDL that waits for a lock gives up; otherwise every writer would queue behind it."""

DDL = (
    "ALTER TABLE shop.orders ADD COLUMN IF NOT EXISTS hint text DEFAULT 'none'",
    "ALTER TABLE shop.orders DROP COLUMN IF EXISTS hint",
    "ALTER TABLE shop.customers ADD COLUMN IF NOT EXISTS since date",
    "ALTER TABLE shop.customers DROP COLUMN IF EXISTS since",
    "CREATE INDEX IF NOT EXISTS by_status ON shop.orders (status)",
    "DROP INDEX IF EXISTS shop.by_status",
    "VACUUM shop.orders",
    "ANALYZE",
)


class Verdict(NamedTuple):
    """Every sink was exact."""

    events: int
    repeats: int
    """Events that the API got again."""


class Subject(Protocol):
    """Needs a database with the tables of `sql/source_schema.sql`."""

    settings: Mapping[str, str]

    def create(self, dsn: str) -> None:
        """Its tables."""

    def traffic(self, dsn: str, chance: random.Random) -> Load:
        """Its writers."""

    def judge(self, dsn: str, stack: DevStack) -> Verdict:
        """Compare every field in every sink. Raises AssertionError, DevStackError."""


class Engagement:
    """Events of the built-in stream, which do not change."""

    settings: Mapping[str, str] = {}

    def __init__(self, chance: random.Random) -> None:
        """Nothing is drawn."""

    def create(self, dsn: str) -> None:
        """There are some already."""

    def traffic(self, dsn: str, chance: random.Random) -> Load:
        """Its writers."""
        return HostileTraffic(dsn, chance, rows=1_000, pause_seconds=1.0)

    def judge(self, dsn: str, stack: DevStack) -> Verdict:
        """Every field in every sink."""
        destinations = Destinations(stack)
        with contextlib.closing(destinations.redis):
            repeats = assert_exact(dsn, destinations)
            counts = destinations.counts()
            wait_until(lambda: counts == destinations.top(), "the top list to be right", TOP_SECONDS)
        return Verdict(sum(counts.values()), repeats)


class Orders:
    """Orders of the example, which change, move and come back.

    In some rounds the tables are altered meanwhile: rows are then read from them again, with their customer of today.
    """

    settings: Mapping[str, str] = {"REPLICATOR_STREAM": orders.STREAM}

    def __init__(self, chance: random.Random) -> None:
        self._identity = chance.choice(("FULL", "DEFAULT"))
        self._altered = chance.random() < 0.5

    def create(self, dsn: str) -> None:
        """The example's tables."""
        with psycopg.connect(dsn, autocommit=True) as connection:
            orders.create(connection)
            orders.replica_identity(connection, self._identity)

    def traffic(self, dsn: str, chance: random.Random) -> Load:
        """Its writers."""
        return AlteredTraffic(dsn, chance) if self._altered else OrdersTraffic(dsn, chance)

    def judge(self, dsn: str, stack: DevStack) -> Verdict:
        """Every field in every sink; where the tables stayed as they were, also every write at the API."""
        destinations = Destinations(stack)
        with contextlib.closing(destinations.redis), psycopg.connect(dsn, autocommit=True) as connection:
            orders.assert_exact(connection, stack, destinations, exactly_as_of=not self._altered)
            repeats = 0 if self._altered else orders.assert_every_write(connection, stack)
            [(writes,)] = connection.execute("SELECT count(*) FROM shop.writes").fetchall()
            orders.wait_for_top(connection, destinations, TOP_SECONDS)
        return Verdict(writes, repeats)


SUBJECTS: Mapping[str, Callable[[random.Random], Subject]] = {"engagement": Engagement, "orders": Orders}


class OrdersTraffic(Load):
    """Six writers at once. What one of them loses to another, to a deadlock for instance, it does not do again."""

    alters = False
    """Whether the tables become others."""

    def steps(self) -> Sequence[Step]:
        """A writer for each."""
        return self._trade, self._trade, self._large, self._nested, self._overtaken, self._prepared

    def _trade(self, connection: psycopg.Connection, chance: random.Random) -> None:
        shop = orders.Shop(connection, chance)
        shop.steps()
        if chance.random() < 0.05:
            shop.customers(truncates=self.alters)
        connection.commit()
        self.wait(chance.uniform(0.0, 0.02))

    def _large(self, connection: psycopg.Connection, chance: random.Random) -> None:
        orders.Shop(connection, chance).many(chance.choice((200, 1_000, LARGE_ROWS)))
        connection.commit()
        self.wait(chance.uniform(1.0, 4.0))

    def _nested(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Savepoints in savepoints, some rolled back."""
        shop = orders.Shop(connection, chance)
        with connection.transaction():
            for depth in range(chance.randint(1, 4)):
                with contextlib.ExitStack() as savepoints:
                    for _ in range(depth):
                        savepoints.enter_context(connection.transaction(force_rollback=chance.random() < 0.3))
                    shop.steps()
        self.wait(chance.uniform(0.02, 0.2))

    def _overtaken(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """A transaction that begins before others commit and commits after them, or not at all."""
        shop = orders.Shop(connection, chance)
        for _ in range(3):
            shop.steps()
            self.wait(chance.uniform(0.02, 0.2))
        if chance.random() < 0.2:
            connection.rollback()

    def _prepared(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Two-phase commits. Nothing stays prepared for long: nobody else could commit."""
        settle(connection, chance)  # what a crash of PostgreSQL left prepared would hold up all writers, this one too
        orders.Shop(connection, chance).steps()
        connection.execute(f"PREPARE TRANSACTION 'o{chance.getrandbits(60)}'".encode())
        connection.commit()
        self.wait(chance.uniform(0.0, 0.1))
        settle(connection, chance)
        self.wait(chance.uniform(0.3, 0.8))


class AlteredTraffic(OrdersTraffic):
    """And the tables are altered."""

    alters = True

    def steps(self) -> Sequence[Step]:
        """One more."""
        return *super().steps(), self._alter

    def _alter(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """Replica identities in turn, and what changes nothing that is replicated."""
        connection.autocommit = True
        connection.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}".encode())
        with contextlib.suppress(psycopg.errors.LockNotAvailable):
            if chance.random() < 0.5:
                orders.replica_identity(connection, chance.choice(("FULL", "DEFAULT")))
            else:
                connection.execute(chance.choice(DDL).encode())
        self.wait(chance.uniform(0.3, 1.5))
