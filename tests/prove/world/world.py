"""What a fault needs: the servers, what stands before them, the program, and the application's place in PostgreSQL.

A fault is a generator function: what it does before its `yield` begins it, what it does after that ends it. `@fault`
registers it under its name. `tables.py`, `answers.py` and `servers.py` have them; `rounds.py` plays them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import psycopg

from devstack import DevStack
from tests.prove.world import writers
from tests.prove.world.fronts import Elsewhere, HttpFront, RedisFront, answer
from tests.prove.world.writers import Place
from tests.support import environment as ground
from tests.support.program import Program

LOCK_TIMEOUT_MS = 3_000
"""DDL that waits for a lock gives up and tries again: nobody may wait for it for ever."""
DDL_SECONDS = 60.0
"""For one change, with all its tries."""

POISON = "INSERT INTO {table} (id, content_id, user_id, event_type) VALUES (%s, 1, 7, 'poison')"

SETTINGS = {
    "REPLICATOR_RETRY_MAX_SECONDS": "0.5",
    "REPLICATOR_HTTP_BATCH_SIZE": "100",
    "REPLICATOR_HTTP_TIMEOUT_SECONDS": "2",
    "REPLICATOR_CLICKHOUSE_LINGER_SECONDS": "0.2",
    "REPLICATOR_CLICKHOUSE_TIMEOUT_SECONDS": "3",
    "REPLICATOR_REDIS_TIMEOUT_SECONDS": "2",
    "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.5",
    "REPLICATOR_DRAIN_TIMEOUT_SECONDS": "3",
}
"""Pauses that fit into a minute. Real ones differ only in length."""

CLICKHOUSE_SAYS_NO = answer(
    "403 Forbidden",
    b"Code: 516. DB::Exception: default: Authentication failed. (AUTHENTICATION_FAILED)\n",
    "X-ClickHouse-Exception-Code: 516",
)

Victim: TypeAlias = Literal["events", "content", "clickhouse", "redis", "api", "secrets", "postgres", "replicator"]
Script: TypeAlias = Callable[["World", random.Random], Iterator[None]]


class WrongError(Exception):
    """What was found."""


class Fault(NamedTuple):
    """One thing that the world does."""

    victim: Victim
    name: str
    script: Script

    @property
    def full_name(self) -> str:
        """As for `--fault`."""
        return f"{self.victim}: {self.name}"


FAULTS: list[Fault] = []
"""Every fault there is, in a fixed order: a seed deals them."""


def fault(victim: Victim, name: str = "") -> Callable[[Script], Script]:
    """Register a fault; without a name it has its function's."""

    def register(script: Script) -> Script:
        FAULTS.append(Fault(victim, name or getattr(script, "__name__", "").strip("_").replace("_", " "), script))
        return script

    return register


class World:
    """One round's environment."""

    def __init__(self, stack: DevStack, dsn: str, folder: Path, cleanup: ExitStack) -> None:
        self.stack = stack
        self.dsn = dsn
        self.folder = folder
        self.place = Place()
        self.elsewhere = cleanup.enter_context(Elsewhere())
        self.clickhouse = cleanup.enter_context(HttpFront(stack.clickhouse.port, CLICKHOUSE_SAYS_NO))
        self.redis = cleanup.enter_context(RedisFront(stack.redis.port))
        self.api = cleanup.enter_context(HttpFront(stack.api.port, answer("401 Unauthorized")))
        self.tables: dict[str, threading.RLock] = {"events": threading.RLock(), "content": threading.RLock()}
        """Held by the fault that has the table."""
        self.postgres_is_ours = threading.RLock()
        """Held during a change in PostgreSQL, and while PostgreSQL is down."""
        self.partitions = 0
        self.partitioned = self.has_children = self.content_partitioned = False
        self.frozen = threading.Event()
        """Set while a destination's process is: nobody should ask it."""
        self.complaints = set[str]()
        """What a fault itself has seen to be wrong."""
        self.over = threading.Event()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(writers.SETUP.encode())
        self.program = Program(self._settings(), dsn, folder / "log")
        cleanup.callback(self.program.end)

    def _settings(self) -> dict[str, str]:
        """Every secret is in a file, every destination behind its front."""
        source = ground.plain_role(self.stack, self.dsn)
        urls = ground.empty_clickhouse(self.stack), ground.empty_redis(self.stack), ground.empty_api(self.stack)
        settings = ground.environment(source, *urls, folder=self.folder) | SETTINGS
        self.passwords = {"postgres": ground.PASSWORD, "clickhouse": "", "redis": "", "api": f"{ground.SECRET}-api"}
        self.api.secret = self.passwords["api"]
        for name in ("POSTGRES_DSN", "CLICKHOUSE_URL", "REDIS_URL", "HTTP_URL"):
            settings.pop(f"REPLICATOR_{name}")
        settings["REPLICATOR_HTTP_URL"] = f"http://127.0.0.1:{self.api.port}/events"
        for name in self.passwords:
            variable, _ = self._secret(name)
            settings[f"REPLICATOR_{variable}_FILE"] = str(self.folder / variable)
            self.write_secret(name)
        return settings

    def _secret(self, name: str) -> tuple[str, str]:
        """The setting that has this password, and its value."""
        password, before = self.passwords[name], f":{self.passwords[name]}@" if self.passwords[name] else ""
        database = self.dsn.rpartition("/")[2]
        match name:
            case "postgres":
                return "POSTGRES_DSN", self.stack.postgres.dsn_for(
                    database=database, user=ground.ROLE, password=password
                )
            case "clickhouse":
                return "CLICKHOUSE_URL", f"http://default{before or '@'}127.0.0.1:{self.clickhouse.port}/engagement"
            case "redis":
                return "REDIS_URL", f"redis://{before}127.0.0.1:{self.redis.port}/0"
            case _:
                return "HTTP_BEARER_TOKEN", password

    def write_secret(self, name: str) -> None:
        """Put the password that is valid now into its file, as a rotation does: a new file in place of the old one."""
        variable, value = self._secret(name)
        new = self.folder / f"{variable}.new"
        new.write_text(value, encoding="utf-8")
        new.replace(self.folder / variable)

    def wait(self, seconds: float) -> None:
        """A fault's pause, which ends with the round."""
        self.over.wait(seconds)

    def alter(self, *statements: str) -> None:
        """Run them in one transaction, as the superuser; again until it gets its locks."""
        self._retry(lambda connection: [connection.execute(statement.encode()) for statement in statements])

    def change_content(self, *statements: str, grant: bool = True) -> None:
        """The same, while no event is written: afterwards another epoch has begun."""
        lock = f"SELECT pg_advisory_xact_lock({writers.EPOCH_LOCK})"
        rights = [f"GRANT SELECT ON public.content TO {ground.ROLE}"] if grant else []
        self.alter(lock, writers.BEFORE_CHANGE, *statements, *rights, writers.AFTER_CHANGE)

    def refuse_one(self, chance: random.Random) -> None:
        """An event among good ones that the API never takes. Its id is known before it is committed."""
        with psycopg.connect(self.dsn) as connection:
            [event_id] = connection.execute("SELECT nextval('public.engagement_events_id_seq')").fetchone() or (0,)
            self.place.poison.add(event_id)
            self.stack.api.behave(refuse_event_ids=sorted(self.place.poison))
            writers.write(connection, self.place.table, chance, chance.choice((0, 1, 50)), "good")
            connection.execute(POISON.format(table=self.place.table).encode(), [event_id])
            writers.write(connection, self.place.table, chance, chance.choice((0, 1, 50)), "good")

    def _retry(self, work: Callable[[psycopg.Connection], object]) -> None:
        """Alone with PostgreSQL, which is up meanwhile."""
        deadline = time.monotonic() + DDL_SECONDS
        while True:
            try:
                with self.postgres_is_ours, psycopg.connect(self.dsn) as connection:
                    connection.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}".encode())
                    connection.execute(b"SET search_path = public")
                    work(connection)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.05, 0.4))  # noqa: S311  not a secret
            else:
                return


def clean(stack: DevStack) -> None:
    """Undo what a round that failed has left in the servers that rounds share."""
    password = stack.redis.settings.pop("requirepass", None)
    if password and stack.redis.running:
        stack.redis.kill()
    ground.up(stack.redis)
    ground.up(stack.postgres)
