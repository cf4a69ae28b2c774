"""Writers that keep the source database busy while a test breaks things.

Three at once: single rows, transactions of many rows, and long ones that others overtake, some of them rolled back.
`tests/prove/traffic.py` has worse ones. PostgreSQL alone knows what they committed.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeAlias

import psycopg

SINGLE = """
INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, device)
VALUES (%(content)s, %(user)s, 'single', %(duration)s, 'web')
"""

MANY = """
INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms, device)
SELECT 1 + n %% 3, n, %(kind)s, nullif(n::bigint * 7919 %% 400000, 0),
       (ARRAY['web', 'ios', NULL, 'tv "4k"'])[1 + n %% 4]
FROM generate_series(1, %(rows)s) AS n
"""


def insert_many(connection: psycopg.Connection, rows: int, kind: str = "many") -> None:
    """`rows` events of all kinds of values in one statement."""
    connection.execute(MANY, {"rows": rows, "kind": kind})


Step: TypeAlias = Callable[[psycopg.Connection, random.Random], None]
"""What a writer repeats on its own connection. What it leaves open is committed for it."""


class Load:
    """`with Load(dsn, random) as load:` runs the writers; on exit they finish what they have begun."""

    def __init__(self, dsn: str, chance: random.Random, *, rows: int = 2_000, pause_seconds: float = 0.6) -> None:
        self._dsn = dsn
        self._rows = rows
        self._pause_seconds = pause_seconds
        self._stopping = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._forever, args=(step, random.Random(chance.random())))  # noqa: S311  not a secret
            for step in self.steps()
        ]

    def steps(self) -> Sequence[Step]:
        """A writer for each."""
        return self._single, self._many, self._long

    def wait(self, seconds: float) -> None:
        """A writer's pause, which ends early when the load ends."""
        self._stopping.wait(seconds)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _forever(self, step: Step, chance: random.Random) -> None:
        try:
            while not self._stopping.is_set():
                # The server may be taken down: what was not committed never happened.
                with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._dsn) as connection:
                    while not self._stopping.is_set():
                        step(connection, chance)
                        connection.commit()
                self._stopping.wait(0.05)
        except BaseException as exc:  # noqa: BLE001  raised again in the test's thread
            self._failures.append(exc)

    def _single(self, connection: psycopg.Connection, chance: random.Random) -> None:
        values = {"content": chance.randint(1, 3), "user": chance.getrandbits(62), "duration": chance.randint(0, 10**6)}
        connection.execute(SINGLE, values)
        self._stopping.wait(0.002)

    def _many(self, connection: psycopg.Connection, chance: random.Random) -> None:
        insert_many(connection, self._rows)
        connection.commit()
        self._stopping.wait(chance.uniform(0.5, 1.5) * self._pause_seconds)

    def _long(self, connection: psycopg.Connection, chance: random.Random) -> None:
        """A transaction that begins before others commit and commits after them."""
        for _ in range(3):
            insert_many(connection, chance.randint(1, 30), "long")
            self._stopping.wait(chance.uniform(0.02, 0.2))
        if chance.random() < 0.2:
            connection.rollback()
