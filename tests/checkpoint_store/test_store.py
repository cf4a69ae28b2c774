"""The contract of `CheckpointStore`, on SQLite and on PostgreSQL, and what is peculiar to each."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import (
    Engine,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.pool import Pool
from sqlalchemy.schema import CreateTable

from checkpoint_store import SqlCheckpointStore, schema
from devstack import DevStack
from replicator.contracts.errors import (
    CheckpointBackward,
    CheckpointLost,
    CheckpointUnavailable,
    CheckpointUnusable,
    DeadLettersFull,
    SettingsError,
)
from replicator.contracts.events import (
    Checkpoint,
    ContentChange,
    DeadLetter,
    LetterCounts,
    Position,
    SinkPosition,
    Stage,
    parse_lsn,
)
from replicator.contracts.stores import CheckpointStore

ROOT = Path(__file__).parents[2]
LAST_LSN = 2**64 - 1
BLOCKED_SECONDS = 0.3  # a save takes a millisecond; one that takes this long waits for a lock

SAVE_IN_A_PROCESS = """
import sys, time
from checkpoint_store import SqlCheckpointStore
from replicator.contracts.events import Checkpoint, Position, SinkPosition

store = SqlCheckpointStore(sys.argv[1])
for lsn in range(1000, 1 << 40, 1000):
    sinks = {"redis": SinkPosition(position=Position(lsn - 50, 3), end_lsn=lsn)}
    at = 1_768_000_000.123456 + lsn
    store.save(Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=lsn, sinks=sinks, committed_at=at))
    print(lsn, flush=True)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Database:
    """One database for one test, and a way around the store."""

    url: str

    def engine(self) -> Engine:
        """Ours, not the store's."""
        return create_engine(self.url)

    def execute(self, statement: str) -> None:
        """Change something behind the store's back."""
        engine = self.engine()
        with engine.begin() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def shape(self) -> dict[str, list[str]]:
        """Tables and columns."""
        engine = self.engine()
        inspector = inspect(engine)
        tables = {name: [str(column) for column in inspector.get_columns(name)] for name in inspector.get_table_names()}
        engine.dispose()
        return tables


@pytest.fixture(scope="module")
def stack() -> Iterator[DevStack]:
    """PostgreSQL, once for this module."""
    with DevStack("postgres") as stack:
        yield stack


def make_postgres_database(stack: DevStack) -> Database:
    """A schema of its own; the URL is of the plain form, and chooses it by libpq's options."""
    name = f"s{uuid.uuid4().hex}"
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    url = make_url(stack.postgres.dsn).set(drivername="postgresql+psycopg", query={"options": f"-csearch_path={name}"})
    return Database(url=url.render_as_string(hide_password=False))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return Database(url=f"sqlite:///{tmp_path}/checkpoint.db")
    return make_postgres_database(request.getfixturevalue("stack"))


@pytest.fixture
def store(database: Database) -> Iterator[SqlCheckpointStore]:
    """A store with its tables made."""
    store = SqlCheckpointStore(database.url)
    store.create()
    yield store
    store.close()


@pytest.fixture
def other(database: Database) -> Iterator[SqlCheckpointStore]:
    """Another replicator's store in the same database."""
    store = SqlCheckpointStore(database.url)
    yield store
    store.close()


@contextmanager
def on_pool(identifier: str, listener: Callable[..., None]) -> Iterator[None]:
    """Listen to every connection pool, the store's among them."""
    event.listen(Pool, identifier, listener)
    try:
        yield
    finally:
        event.remove(Pool, identifier, listener)


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    """A database file with tables."""
    path = tmp_path / "made.db"
    store = SqlCheckpointStore(f"sqlite:///{path}")
    store.create()
    store.save(at(100))
    store.close()
    return path


def sink_at(commit_lsn: int, ordinal: int, end_lsn: int) -> SinkPosition:
    """Shorthand."""
    return SinkPosition(position=Position(commit_lsn, ordinal), end_lsn=end_lsn)


def at(end_lsn: int, slot: str = "s", **sinks: SinkPosition) -> Checkpoint:
    """A checkpoint of cluster 7."""
    committed_at = 1_768_000_000.123456 + end_lsn % 2**32  # any, told apart by the position
    return Checkpoint(
        slot=slot, system_identifier="7", timeline=1, end_lsn=end_lsn, sinks=sinks, committed_at=committed_at
    )


def letter(number: int, sink: str | None = "http", reason: str = "refused") -> DeadLetter:
    """A dead letter that is told apart by its number."""
    payload = f'{{"n":{number}}}'.encode()
    return DeadLetter(sink=sink, position=Position(500, number), event_id=number, reason=reason, payload=payload)


def loaded(store: CheckpointStore, slot: str = "s") -> Checkpoint | None:
    """What is stored, without its time."""
    checkpoint = store.load(slot)
    return checkpoint and msgspec.structs.replace(checkpoint, updated_at=0.0)


# --- checkpoints


def test_nothing_is_loaded_before_something_is_saved(store: CheckpointStore) -> None:
    """A slot nobody saved has no checkpoint."""
    assert store.load("s") is None


def test_what_is_saved_is_loaded(store: CheckpointStore, other: CheckpointStore) -> None:
    """Every field comes back, in another store too, with the time of saving."""
    checkpoint = at(1000, http=sink_at(990, 7, 980), redis=sink_at(990, 12, 1000))
    before = time.time()
    store.save(checkpoint)
    assert checkpoint == loaded(store)
    assert checkpoint == loaded(other)
    stored = store.load("s")
    assert stored is not None
    assert before <= stored.updated_at <= time.time()


def test_the_largest_lsn_survives(store: CheckpointStore) -> None:
    """All 64 bits, on both sides of the signed limit."""
    for lsn in (0, 2**32 - 1, 2**32, 2**63 - 1, 2**63, LAST_LSN):
        checkpoint = at(lsn, redis=sink_at(lsn, 2**62, lsn))
        store.save(checkpoint)
        assert checkpoint == loaded(store)


def test_a_position_moves_forward(store: CheckpointStore) -> None:
    """A later save replaces an earlier one; sinks that did not move stay."""
    store.save(at(1000, http=sink_at(990, 7, 980), redis=sink_at(990, 12, 1000)))
    moved = at(2000, http=sink_at(990, 7, 980), redis=sink_at(1990, 1, 2000))
    store.save(msgspec.structs.replace(moved, timeline=2))
    assert msgspec.structs.replace(moved, timeline=2) == loaded(store)


def test_the_same_position_may_be_saved_again(store: CheckpointStore) -> None:
    """Equal is not backward."""
    checkpoint = at(1000, redis=sink_at(990, 12, 1000))
    store.save(checkpoint)
    store.save(checkpoint)
    assert checkpoint == loaded(store)


def test_sinks_that_are_not_named_stay_and_new_ones_come_in(store: CheckpointStore) -> None:
    """A replicator with other sinks leaves the position of a sink that it lacks."""
    store.save(at(1000, redis=sink_at(990, 12, 1000)))
    store.save(at(2000, http=sink_at(1990, 1, 2000)))
    assert at(2000, redis=sink_at(990, 12, 1000), http=sink_at(1990, 1, 2000)) == loaded(store)


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        (at(0x16_0000_0FFF, redis=sink_at(990, 12, 1000)), "from 16/1000 to 16/FFF"),
        (at(0x16_0000_1000, redis=sink_at(990, 11, 1000)), "sink redis at row 12 of commit 0/3DE"),
        (at(0x16_0000_1000, redis=sink_at(989, 99, 1000)), "sink redis at row 99 of commit 0/3DD"),
        (at(0x16_0000_1000, redis=sink_at(990, 12, 999)), r"from 0/3E8 .* to 0/3E7"),
        (at(0x16_0000_2000, http=sink_at(9, 9, 9), redis=sink_at(990, 11, 1000)), "sink redis at row 11"),
    ],
    ids=["end_lsn", "ordinal", "commit_lsn", "sink end_lsn", "one of two sinks"],
)
def test_going_back_is_refused(store: CheckpointStore, offered: Checkpoint, words: str) -> None:
    """Whichever part would go back, nothing at all is stored, and the error says from where to where."""
    checkpoint = at(0x16_0000_1000, redis=sink_at(990, 12, 1000))
    store.save(checkpoint)
    with pytest.raises(CheckpointBackward, match=words):
        store.save(offered)
    assert checkpoint == loaded(store)


def test_a_position_moved_by_another_replicator_is_seen(store: CheckpointStore, other: CheckpointStore) -> None:
    """The comparison is with what is stored, not with what this store remembers."""
    store.save(at(1000))
    other.save(at(3000))
    with pytest.raises(CheckpointBackward):
        store.save(at(2000))
    assert at(3000) == loaded(store)


@pytest.mark.parametrize("backup", [None, at(1000, redis=sink_at(990, 12, 1000)), at(2000)])
def test_a_database_that_lost_what_was_saved_is_no_place_to_go_on(
    store: CheckpointStore, other: CheckpointStore, database: Database, backup: Checkpoint | None
) -> None:
    """It was restored, or failed over to a server that was behind: so were the contents and the dead letters."""
    known = at(2000, redis=sink_at(1990, 1, 2000))
    store.save(known)
    store.save(at(3000, redis=sink_at(2990, 1, 3000)), (), known)
    if backup:
        other.replace(backup)
    else:
        engine = database.engine()
        with engine.begin() as operator:
            for table in ("sink_positions", "checkpoints"):
                operator.execute(text(f"DELETE FROM replicator_{table}"))  # noqa: S608  our own names
        engine.dispose()
    told = "it has lost what was saved: the checkpoint of slot .* is (gone|at 0/3E8|at 0/7D0), and was at 0/BB8"
    with pytest.raises(CheckpointLost, match=told):
        store.save(at(4000), (), at(3000, redis=sink_at(2990, 1, 3000)))


def test_two_replicators_cannot_both_move_it(database: Database, store: CheckpointStore) -> None:
    """A save waits for one under way in another process, and then compares with its result."""
    store.save(at(1000))
    engine = database.engine()
    with ThreadPoolExecutor(1) as threads, engine.connect() as rival:
        if rival.dialect.name == "sqlite":
            rival.exec_driver_sql("BEGIN IMMEDIATE")
        rival.execute(text("UPDATE replicator_checkpoints SET end_lsn = '00000000/00003000'"))
        save = threads.submit(store.save, at(2000))
        with pytest.raises(TimeoutError):
            save.result(BLOCKED_SECONDS)
        rival.commit()
        with pytest.raises(CheckpointBackward, match="from 0/3000 to 0/7D0"):
            save.result()
    engine.dispose()


def test_reading_does_not_wait_for_a_writer(database: Database, store: CheckpointStore, other: CheckpointStore) -> None:
    """`status` answers while `run` is in the middle of a save."""
    store.save(at(1000))
    engine = database.engine()
    with engine.connect() as writer:
        if writer.dialect.name == "sqlite":
            writer.exec_driver_sql("BEGIN IMMEDIATE")
        writer.execute(text("UPDATE replicator_checkpoints SET end_lsn = '00000000/00003000'"))
        assert at(1000) == loaded(other)
        writer.rollback()
    engine.dispose()


def test_racing_replicators_leave_the_furthest(store: CheckpointStore, other: CheckpointStore) -> None:
    """Whatever the interleaving, the end is the greatest position that any save returned for."""
    seed = time.time_ns()
    print(f"seed {seed}")  # noqa: T201  shown when the test fails
    rng = random.Random(seed)  # noqa: S311  no secret is made of it
    store.save(at(0))

    def save_some(racer: CheckpointStore, lsns: list[int]) -> int:
        furthest = 0
        for lsn in lsns:
            try:
                racer.save(at(lsn, redis=sink_at(lsn, 1, lsn)))
            except CheckpointBackward:
                continue
            assert lsn >= furthest
            furthest = lsn
        return furthest

    with ThreadPoolExecutor(2) as threads:
        tries = [[rng.randrange(10_000) for _ in range(50)] for _ in range(2)]
        furthest = max(threads.map(save_some, (store, other), tries))
    assert at(furthest, redis=sink_at(furthest, 1, furthest)) == loaded(store)


def test_slots_do_not_touch_each_other(store: CheckpointStore) -> None:
    """Two replicators with two slots share a database."""
    store.save(at(2000, "a", redis=sink_at(1990, 1, 2000)))
    store.save(at(1000, "b", redis=sink_at(990, 1, 1000)))
    assert at(2000, "a", redis=sink_at(1990, 1, 2000)) == loaded(store, "a")
    assert at(1000, "b", redis=sink_at(990, 1, 1000)) == loaded(store, "b")


def test_another_cluster_is_refused(store: CheckpointStore) -> None:
    """LSNs of two clusters can't be compared; the default slot name makes this mistake easy."""
    store.save(at(1000))
    with pytest.raises(CheckpointUnusable, match="belongs to the PostgreSQL cluster 7, not to 8"):
        store.save(msgspec.structs.replace(at(2000), system_identifier="8"))
    assert at(1000) == loaded(store)


def test_replace_accepts_anything(store: CheckpointStore) -> None:
    """Backward, another cluster, fewer sinks: the operator has said so. Other slots stay."""
    store.save(at(9, "neighbour", redis=sink_at(8, 1, 9)))
    store.save(at(1000, http=sink_at(990, 1, 1000), redis=sink_at(990, 1, 1000)))
    replacement = msgspec.structs.replace(at(500, redis=sink_at(400, 0, 500)), system_identifier="8", timeline=3)
    store.replace(replacement)
    assert replacement == loaded(store)
    assert at(9, "neighbour", redis=sink_at(8, 1, 9)) == loaded(store, "neighbour")


def test_replace_makes_a_first_checkpoint(store: CheckpointStore) -> None:
    """Nothing need be there."""
    store.replace(at(500, redis=sink_at(400, 0, 500)))
    assert at(500, redis=sink_at(400, 0, 500)) == loaded(store)


def test_calls_may_come_from_any_thread(store: CheckpointStore) -> None:
    """As asyncio.to_thread does it: one call at a time, each from another thread."""
    for lsn in range(1, 6):
        with ThreadPoolExecutor(1) as threads:
            threads.submit(store.save, at(lsn)).result()
    assert at(5) == loaded(store)


def test_nothing_saved_is_lost_by_a_kill(database: Database, store: CheckpointStore) -> None:
    """SIGKILL at once after save() has returned: another process finds that checkpoint, or the next one, whole."""
    program = [sys.executable, "-c", SAVE_IN_A_PROCESS, database.url]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            lsn = int(process.stdout.readline())
        process.kill()
        lsn = max([lsn, *map(int, process.stdout.read().split())])
    assert process.returncode == -signal.SIGKILL
    stored = loaded(store)
    assert stored in [at(lsn, redis=sink_at(lsn - 50, 3, lsn)) for lsn in (lsn, lsn + 1000)]


def test_close_may_come_twice(store: CheckpointStore) -> None:
    """Closing is safe at any time."""
    store.close()
    store.close()


# --- schema


def test_create_twice_is_create_once(database: Database, store: CheckpointStore) -> None:
    """The second time nothing is done, nothing is said, and what is stored stays."""
    store.save(at(1000))
    before = database.shape()
    assert store.create() == []
    assert before == database.shape()
    assert at(1000) == loaded(store)


def test_create_says_what_it_made(database: Database) -> None:
    """One line; every table has our prefix."""
    store = SqlCheckpointStore(database.url)
    (line,) = store.create()
    store.close()
    assert f"schema version {schema.VERSION}" in line
    tables = [name for name in database.shape() if name.startswith("replicator_")]
    assert sorted(schema.metadata.tables) == sorted(tables)


def test_replicators_that_start_together_create_together(database: Database) -> None:
    """Several `init` at the same moment: one makes the tables, the others find them."""
    stores = [SqlCheckpointStore(database.url) for _ in range(4)]
    with ThreadPoolExecutor(len(stores)) as threads:
        lines = list(threads.map(SqlCheckpointStore.create, stores))
    for store in stores:
        store.close()
    assert sorted(map(len, lines)) == [0, 0, 0, 1]


def test_a_database_without_tables_says_what_to_run(database: Database) -> None:
    """Before `init`, every call names it."""
    store = SqlCheckpointStore(database.url)
    with pytest.raises(CheckpointUnusable, match="python -m replicator init"):
        store.load("s")
    with pytest.raises(CheckpointUnusable, match="python -m replicator init"):
        store.save(at(1))
    store.close()


@pytest.mark.parametrize("version", [schema.OLDEST - 1, schema.VERSION + 1])
def test_another_schema_is_refused(
    database: Database, store: CheckpointStore, other: CheckpointStore, version: int
) -> None:
    """The program neither changes nor reads tables that it does not know, older or newer, and names the cure."""
    store.save(at(1000))
    database.execute(f"UPDATE replicator_schema SET version = {version}")  # noqa: S608  a number of the test's
    words = f"schema version {version}, this program needs {schema.VERSION}. Run the release that made them, or name"
    for call in (store.create, partial(other.load, "s"), partial(other.save, at(2000))):
        with pytest.raises(CheckpointUnusable, match=words):
            call()
    database.execute(f"UPDATE replicator_schema SET version = {schema.VERSION}")  # noqa: S608  likewise
    assert at(1000) == loaded(other)


@pytest.mark.parametrize("version", range(schema.OLDEST, schema.VERSION))
def test_an_older_version_is_brought_up(database: Database, store: CheckpointStore, version: int) -> None:
    """What it holds stays; until then every other call names the command that does it."""
    store.save(at(1000, redis=sink_at(990, 12, 1000)))
    if version == schema.OLDEST:
        database.execute("DROP TABLE replicator_contents")
        database.execute("ALTER TABLE replicator_checkpoints DROP COLUMN contents")
    database.execute("DROP TABLE replicator_named_contents")
    database.execute("ALTER TABLE replicator_dead_letters DROP COLUMN event_name")
    database.execute(f"UPDATE replicator_schema SET version = {version}")  # noqa: S608  a number of ours
    other = SqlCheckpointStore(database.url)
    with pytest.raises(CheckpointUnusable, match="python -m replicator init`, or `run`: both bring them up to it"):
        other.load("s")
    assert [f"brought the checkpoint tables to schema version {schema.VERSION}"] == other.create()
    assert [] == other.create()
    assert at(1000, redis=sink_at(990, 12, 1000)) == loaded(other)
    other.save(at(2000), [ContentChange(1500, 1, "one"), ContentChange(1500, "a", "two", "orders")])
    assert {1: "one"} == other.find_contents("s", [1, 2])
    assert {"a": "two"} == other.find_contents("s/orders", ["a"])
    other.close()


def test_contents_may_have_names(store: CheckpointStore, other: CheckpointStore) -> None:
    """Of one stream among several, by uuid: copied, changed, found, and paged from the highest down."""
    ids = [f"00000000-0000-4000-8000-{number:012x}" for number in range(40)]
    store.save(at(1000))
    store.add_contents("s/orders", {one: f"first {one}" for one in ids})
    store.add_contents("s", {1: "a number's"})
    changes = [
        ContentChange(1500, ids[3], "changed", "orders"),
        ContentChange(1500, 1, "changed"),
        ContentChange(1600, ids[4], None, "orders"),
    ]
    store.save(at(2000), changes)
    assert {ids[3]: "changed", ids[5]: f"first {ids[5]}"} == other.find_contents("s/orders", ids[3:6])
    assert {1: "changed"} == other.find_contents("s", [1])
    assert [*reversed(ids[18:21])] == list(other.newest_contents("s/orders", ids[20], 3))
    store.save(at(3000), [ContentChange(2500, None, None, "orders"), ContentChange(2600, ids[7], "new", "orders")])
    assert {ids[7]: "new"} == other.find_contents("s/orders", ids)
    store.clear_contents("s/orders")
    assert {} == other.find_contents("s/orders", ids)
    assert {1: "changed"} == other.find_contents("s", [1])


def test_an_event_may_have_a_name(store: CheckpointStore, other: CheckpointStore) -> None:
    """An identity that is a text, of any length, comes back as it was, and tells two letters apart."""
    names = ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "ü" * 500, "ü" * 499 + "u", "7", ""]
    letters = [
        DeadLetter(sink=sink, origin="backfill", position=None, event_id=name, reason="no", payload=name.encode())
        for name in names
        for sink in ("http", None)
    ]
    store.add_dead_letters("s", letters)
    store.add_dead_letters("s", letters)
    assert [letter.event_id for letter in letters] == [letter.event_id for letter in other.dead_letters("s")]


def test_contents_are_as_of_the_checkpoint(store: CheckpointStore, other: CheckpointStore) -> None:
    """Copied, then changed with the checkpoint; one that is refused changes nothing. Slots do not share them."""
    store.save(at(1000))
    store.add_contents("s", {number: f"first {number}" for number in range(-600, 600)})
    store.add_contents("t", {1: "neighbour"})
    store.save(
        msgspec.structs.replace(at(2000), contents="a table"),
        [ContentChange(1500, 1, "changed"), ContentChange(1600, 1, "again"), ContentChange(1600, 2, None)],
    )
    with pytest.raises(CheckpointBackward):
        store.save(at(1500), [ContentChange(1500, None, None)])
    assert {1: "again", 3: "first 3", -600: "first -600"} == other.find_contents("s", [1, 2, 3, -600, 700])
    assert {599: "first 599", 598: "first 598"} == other.newest_contents("s", 2**63 - 1, 2)
    assert ["first 3", "again", "first 0"] == [*other.newest_contents("s", 3, 3).values()]
    assert {number: f"first {number}" for number in range(-600, 0)} == other.find_contents("s", range(-600, 0))
    assert "a table" == (loaded(other) or at(0)).contents
    store.save(at(3000), [ContentChange(2500, 1, "x"), ContentChange(2600, None, None), ContentChange(2700, 7, "y")])
    assert {7: "y"} == other.newest_contents("s", 2**63 - 1, 9)
    store.clear_contents("s")
    assert (loaded(other) or at(0)).contents is None, "half a copy would be taken for a whole one"
    assert {} == other.newest_contents("s", 2**63 - 1, 9)
    assert {1: "neighbour"} == other.newest_contents("t", 2**63 - 1, 9)


def test_a_gap_ends_the_use_of_the_contents(store: CheckpointStore) -> None:
    """They are as of a checkpoint that no longer counts."""
    store.save(msgspec.structs.replace(at(2000), contents="a table"))
    store.replace(at(1000))
    assert (loaded(store) or at(0)).contents is None


def test_a_table_that_is_gone_is_not_waited_for(database: Database, store: CheckpointStore) -> None:
    """Trying again would not bring it back: the error stops the program and names the cure."""
    store.save(at(1000))
    database.execute("DROP TABLE replicator_sink_positions")
    with pytest.raises(CheckpointUnusable, match=r"replicator_sink_positions.*python -m replicator init"):
        store.save(at(2000))


# --- tasks beside the stream


def test_progress_is_kept_until_the_task_is_done(store: CheckpointStore, other: CheckpointStore) -> None:
    """The last word counts, each slot and task has its own, and what is done is forgotten."""
    store.save_progress("s", "backfill a", "1")
    store.save_progress("s", "backfill a", "2")
    store.save_progress("s", "backfill b", "länge ✓")
    store.save_progress("t", "backfill a", "4")
    store.save_progress("t", "backfill a", None)
    found = [other.load_progress(slot, f"backfill {name}") for slot in "st" for name in "ab"]
    assert ["2", "länge ✓", None, None] == found
    tasks = other.tasks("s")
    assert [("backfill b", "länge ✓"), ("backfill a", "2")] == [(task.name, task.progress) for task in tasks]
    assert all(time.time() - 60 < task.updated_at <= time.time() for task in tasks)
    assert [] == other.tasks("t")


# --- dead letters


def test_dead_letters_come_back_whole(store: CheckpointStore, other: CheckpointStore) -> None:
    """Any bytes, no event id, the largest positions; numbered and dated by the store."""
    every_byte = DeadLetter(
        sink=None,
        position=Position(LAST_LSN, 2**62),
        event_id=None,
        reason="länge ✓",
        payload=bytes(range(256)) * 500,
    )
    before = time.time()
    store.add_dead_letters("s", [every_byte, letter(1)])
    first, second = other.dead_letters("s")
    assert every_byte == msgspec.structs.replace(first, id=None, created_at=0.0)
    assert letter(1) == msgspec.structs.replace(second, id=None, created_at=0.0)
    assert first.id is not None
    assert second.id is not None
    assert first.id < second.id
    assert before <= first.created_at <= time.time()


def test_a_reason_that_text_columns_refuse_is_kept_readable(store: CheckpointStore) -> None:
    """A destination's own words may hold NUL or half a surrogate pair: they are replaced, the letter is kept."""
    store.add_dead_letters("s", [letter(1, reason="a\0b\ud800c")])
    assert [found.reason for found in store.dead_letters("s")] == ["a\N{REPLACEMENT CHARACTER}b?c"]


def test_a_dead_letter_is_kept_once(store: CheckpointStore) -> None:
    """After a restart the same events are refused again: within one call and between calls, the first stays."""
    store.add_dead_letters("s", [letter(1, reason="first"), letter(1, reason="again"), letter(2)])
    store.add_dead_letters("s", [letter(2, reason="again"), letter(3)])
    assert [(found.event_id, found.reason) for found in store.dead_letters("s")] == [
        (1, "first"),
        (2, "refused"),
        (3, "refused"),
    ]


def test_what_makes_two_dead_letters_the_same(store: CheckpointStore) -> None:
    """Sink, origin, and position, or the event's id where there is no position: NULLs are no different keys."""
    backfilled = msgspec.structs.replace(letter(1), origin="backfill", position=None)
    different = [
        letter(1),
        letter(1, sink="redis"),
        letter(1, sink=None),
        backfilled,
        msgspec.structs.replace(backfilled, event_id=2),
        msgspec.structs.replace(backfilled, sink=None, payload=b"another row with this id"),
    ]
    for _ in range(2):
        store.add_dead_letters("s", different)
    found = [msgspec.structs.replace(kept, id=None, created_at=0.0) for kept in store.dead_letters("s")]
    assert different == found
    assert LetterCounts(rows=2, sinks={"http": 3, "redis": 1}) == store.count_dead_letters("s")


def test_a_row_is_kept_once_whichever_way_it_came(store: CheckpointStore) -> None:
    """From the stream and from the table: the first stays. A sink's refusals of its event are as many as it refuses."""
    streamed = letter(1, sink=None)
    read = msgspec.structs.replace(streamed, origin="backfill", position=None)
    nameless = msgspec.structs.replace(letter(2, sink=None), event_id=None)
    for first, second in ((streamed, read), (read, streamed)):
        store.add_dead_letters("s", [first, nameless])
        store.add_dead_letters("s", [second, nameless])
        assert [first.origin, "stream"] == [found.origin for found in store.dead_letters("s")]
        store.drop_dead_letters("s", [found.id or 0 for found in store.dead_letters("s")])


def test_dead_letters_of_a_stage(store: CheckpointStore) -> None:
    """Rows that no event could be made of are for no sink in particular."""
    store.add_dead_letters("s", [letter(1), letter(2, sink=None), letter(3, sink="redis")])
    stages: tuple[Stage | None, ...] = ("row", "event", None)
    found = {stage: [kept.event_id for kept in store.dead_letters("s", stage=stage)] for stage in stages}
    assert {"row": [2], "event": [1, 3], None: [1, 2, 3]} == found
    assert [3] == [kept.event_id for kept in store.dead_letters("s", sink="redis", stage="event")]


def test_who_reads_makes_no_file(tmp_path: Path) -> None:
    """A path that leads nowhere is named, with the cure."""
    path = tmp_path / "none.db"
    store = SqlCheckpointStore(f"sqlite:///{path}")
    for read in (store.load, store.count_dead_letters, store.dead_letters):
        with pytest.raises(CheckpointUnusable, match=rf"there is no file {path}\. Run `python -m replicator init`"):
            read("s")
    assert not path.exists()


def test_dead_letters_are_bounded(store: CheckpointStore) -> None:
    """More is refused with nothing stored; what is there already is no more; what comes together fits when empty."""
    ten = [letter(n) for n in range(1, 11)]
    assert LetterCounts(sinks={"http": 10}) == store.add_dead_letters("s", ten, 5)
    assert LetterCounts(sinks={"http": 10}) == store.add_dead_letters("s", ten, 10), "the same after a restart"
    with pytest.raises(DeadLettersFull, match=r"has 10 dead letters; 1 more would pass the limit of 10\.") as caught:
        store.add_dead_letters("s", [letter(11), letter(1, sink="redis"), letter(10)], 10)
    assert "http has 10 dead letters; 1 more would pass the limit of 10" in str(caught.value)
    assert LetterCounts(sinks={"http": 10}) == store.count_dead_letters("s")
    assert LetterCounts(sinks={"http": 10, "redis": 1}) == store.add_dead_letters("s", [letter(1, sink="redis")], 10)
    assert LetterCounts(sinks={"http": 11, "redis": 1}) == store.add_dead_letters("s", [letter(11)])


def test_dead_letters_of_rows_are_bounded(store: CheckpointStore) -> None:
    """Likewise; the message names the commands that show them."""
    store.add_dead_letters("s", [letter(n, sink=None) for n in range(1, 11)], 10)
    with pytest.raises(DeadLettersFull, match=r"Rows .* 10 dead letters; 1 more would pass .*list --stage row"):
        store.add_dead_letters("s", [letter(11, sink=None), letter(1)], 10)
    assert LetterCounts(rows=10) == store.count_dead_letters("s")


def test_an_accepted_gap_frees_the_positions_of_dead_letters(store: CheckpointStore) -> None:
    """In a restored server another event may have one: it is kept beside those that wait, in this slot only."""
    for slot in "st":
        store.save(at(100, slot))
        store.add_dead_letters(slot, [letter(1, reason="old"), letter(2, reason="old")])
    store.replace(at(50))
    store.add_dead_letters("s", [letter(1, reason="new")])
    assert ["old", "old", "new"] == [found.reason for found in store.dead_letters("s")]
    restored = store.dead_letters("s")[:2]
    assert [("restored", None)] * 2 == [(found.origin, found.position) for found in restored]
    assert [(0, found.id) for found in restored] == [found.replay_position for found in restored]
    store.replace(at(50))
    store.add_dead_letters("s", [letter(1, reason="newer")])
    assert ["old", "old", "new", "newer"] == [found.reason for found in store.dead_letters("s")]
    store.add_dead_letters("t", [letter(1, reason="again")])
    assert ["old", "old"] == [found.reason for found in store.dead_letters("t")]


def test_dead_letters_of_other_sinks_and_slots_are_others(store: CheckpointStore) -> None:
    """The same position refused by two sinks, or in two slots, is as many letters."""
    store.add_dead_letters("s", [letter(1), letter(1, sink="redis")])
    store.add_dead_letters("t", [letter(1)])
    assert LetterCounts(sinks={"http": 1, "redis": 1}) == store.count_dead_letters("s")
    assert LetterCounts(sinks={"http": 1}) == store.count_dead_letters("t")
    assert [found.sink for found in store.dead_letters("s", sink="redis")] == ["redis"]


def test_dead_letters_are_read_in_pages(store: CheckpointStore) -> None:
    """Each page goes on after the last id; the last one is empty."""
    store.add_dead_letters("s", [letter(n, sink="http" if n % 2 else "redis") for n in range(1, 26)])
    seen: list[int | None] = []
    after = 0
    while page := store.dead_letters("s", sink="http", after_id=after, limit=5):
        assert len(page) <= 5
        seen += [found.event_id for found in page]
        after = page[-1].id or 0
    assert list(range(1, 26, 2)) == seen


def test_no_dead_letters_count_as_nothing(store: CheckpointStore) -> None:
    """Sinks without any are absent; storing none is fine."""
    store.add_dead_letters("s", [])
    assert LetterCounts() == store.count_dead_letters("s")
    assert store.dead_letters("s") == []
    assert store.drop_dead_letters("s", []) == 0


def test_dropping_takes_the_named_ones(store: CheckpointStore) -> None:
    """Of this slot only; what is not there any more is not counted; more ids than a statement takes are fine."""
    store.add_dead_letters("s", [letter(n) for n in range(1, 1201)])
    store.add_dead_letters("t", [letter(1)])
    (neighbour,) = store.dead_letters("t")
    ids = [
        found.id for found in store.dead_letters("s", limit=2000) if found.id is not None and (found.event_id or 0) > 2
    ]
    assert store.drop_dead_letters("s", [*ids, neighbour.id or 0]) == 1198
    assert store.drop_dead_letters("s", ids) == 0
    assert LetterCounts(sinks={"http": 2}) == store.count_dead_letters("s")
    assert LetterCounts(sinks={"http": 1}) == store.count_dead_letters("t")


def test_numbers_are_not_given_again(store: CheckpointStore) -> None:
    """A page read after a dropped letter's number misses nothing that came later."""
    store.add_dead_letters("s", [letter(1)])
    (first,) = store.dead_letters("s")
    assert first.id is not None
    store.drop_dead_letters("s", [first.id])
    store.add_dead_letters("s", [letter(2)])
    assert [found.event_id for found in store.dead_letters("s", after_id=first.id)] == [2]


def test_lsns_sort_in_the_database_as_numbers(database: Database, store: CheckpointStore) -> None:
    """An operator's ORDER BY is right on both sides of every power of two that could matter."""
    lsns = sorted({lsn for power in (0, 4, 31, 32, 36, 63, 64) for lsn in (2**power - 1, 2**power) if lsn <= LAST_LSN})
    letters = [msgspec.structs.replace(letter(1), position=Position(lsn, 1)) for lsn in lsns]
    store.add_dead_letters("s", letters[::-1])
    engine = database.engine()
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT commit_lsn FROM replicator_dead_letters ORDER BY commit_lsn")).all()
    engine.dispose()
    assert lsns == [parse_lsn(commit_lsn) for (commit_lsn,) in rows]


# --- settings


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("hunter2", "can't be parsed"),
        ("postgresql://app:hunter2@host:port/db", "can't be parsed"),
        ("postgresql://app:p@hunter2@host:1/db", "an @ too many"),
        ("nonsense://app:hunter2@host/db", "no driver nonsense"),
        ("postgresql+nonsense://app:hunter2@host/db", r"no driver postgresql\+nonsense"),
        ("mssql+pyodbc://app:hunter2@host/db", "pyodbc is not installed"),
        ("mysql+pymysql://app:hunter2@host/db", "pymysql is not installed"),
        ("postgresql+psycopg_async://app:hunter2@host/db", "asynchronous"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("sqlite:////tmp/x?timeout=hunter2", "of the wrong kind"),
        ("sqlite:////tmp/x?hunter2=1", "an option that the driver ignores"),
        ("postgresql://app:hunter2@host/db?prepare_threshold=0", "libpq has no option prepare_threshold"),
        ("postgresql://app:hunter2@host/db?autocommit=1&nonsense=2", "libpq has no option autocommit, nonsense"),
    ],
)
def test_an_unusable_url_names_the_setting(url: str, problem: str) -> None:
    """What is wrong and what it takes, never the password, not even in the errors behind it."""
    with pytest.raises(SettingsError, match=f"REPLICATOR_CHECKPOINT_URL is unusable: .*{problem}") as caught:
        SqlCheckpointStore(url)
    assert "It takes any SQLAlchemy URL" in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_rotated_password_is_used_by_the_next_connection(stack: DevStack) -> None:
    """The setting's file has another one by now; the connection that there is goes on."""
    url = make_url(make_postgres_database(stack).url)
    password = f"{url.password}"
    store = SqlCheckpointStore(
        url.set(password="yesterday's").render_as_string(hide_password=False),  # noqa: S106  wrong on purpose
        lambda: url.set(password=password).render_as_string(hide_password=False),
    )
    store.create()
    password = "tomorrow's"  # noqa: S105  as wrong
    store.save(at(1000))
    store.close()
    with pytest.raises(CheckpointUnavailable, match="authentication failed"):
        store.load("s")


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_plain_postgresql_url_means_psycopg_3(stack: DevStack, scheme: str) -> None:
    """No driver need be named."""
    url = make_postgres_database(stack).url.replace("postgresql+psycopg", scheme)
    store = SqlCheckpointStore(url)
    store.create()
    store.save(at(1000))
    assert at(1000) == loaded(store)
    store.close()


# --- SQLite


def test_an_option_that_the_driver_does_not_take_is_a_setting_to_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some drivers notice it when they connect, with an error of Python's that quotes it."""

    def connect(*_: object, **__: object) -> None:
        raise TypeError("hunter2")

    store = SqlCheckpointStore(f"sqlite:///{tmp_path}/c.db")
    monkeypatch.setattr(sqlite3.dbapi2, "connect", connect)
    with pytest.raises(
        SettingsError, match="REPLICATOR_CHECKPOINT_URL is unusable: the driver does not take"
    ) as caught:
        store.create()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    store.close()


def test_sqlite_commits_reach_the_disk(tmp_path: Path) -> None:
    """WAL journal and synchronous FULL, on the connection the store really uses."""
    pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "secure_delete")
    found: list[object] = []

    def look(connection: sqlite3.Connection, *_: object) -> None:
        found[:] = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]

    store = SqlCheckpointStore(f"sqlite:///{tmp_path}/c.db")
    with on_pool("checkout", look):
        store.create()
    assert found == ["wal", 2, 1, 5000, 1]
    store.close()


def test_a_missing_directory_names_its_cure(tmp_path: Path) -> None:
    """Which directory, and the command that makes it."""
    store = SqlCheckpointStore(f"sqlite:///{tmp_path}/no/where/c.db")
    with pytest.raises(CheckpointUnusable, match=rf"directory {tmp_path}/no/where does not exist.*mkdir -p"):
        store.create()
    store.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """It is left as it was."""
    path = tmp_path / "c.db"
    path.write_text("a shopping list\n" * 100, encoding="utf-8")
    store = SqlCheckpointStore(f"sqlite:///{path}")
    with pytest.raises(CheckpointUnusable, match="file is not a database"):
        store.create()
    store.close()
    assert path.read_text(encoding="utf-8") == "a shopping list\n" * 100


def test_a_file_that_can_be_opened_soon_is_tried_again(sqlite_path: Path) -> None:
    """The process has no file descriptors left: nothing is wrong with the file."""
    store = SqlCheckpointStore(f"sqlite:///{sqlite_path}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [Path(os.devnull).open() for _ in range(20)]  # noqa: SIM115  closed below
    resource.setrlimit(resource.RLIMIT_NOFILE, (used[0].fileno(), hard))
    try:
        with pytest.raises(CheckpointUnavailable, match="unable to open"):
            store.load("s")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in used:
            file.close()
    assert at(100) == loaded(store)
    store.close()


def test_a_directory_in_the_file_s_place_is_refused(tmp_path: Path) -> None:
    """A volume mounted on the file's path makes one."""
    store = SqlCheckpointStore(f"sqlite:///{tmp_path}")
    with pytest.raises(CheckpointUnusable, match="unable to open database file"):
        store.create()
    store.close()


def test_a_file_that_is_removed_under_us_takes_nothing(sqlite_path: Path) -> None:
    """SQLite would go on in the file that nobody finds again; the file in its old place is as good as before."""
    store = SqlCheckpointStore(f"sqlite:///{sqlite_path}")
    store.save(at(1010))
    away = sqlite_path.rename(sqlite_path.with_name("away"))
    for _ in range(2):
        with pytest.raises(CheckpointUnavailable, match="was removed or replaced while it was in use"):
            store.save(at(1020))
        assert not sqlite_path.exists()
    away.rename(sqlite_path)
    store.save(at(1030))
    store.close()


def test_a_read_only_file_says_so(sqlite_path: Path) -> None:
    """Reading works, saving says why not."""
    store = SqlCheckpointStore(f"sqlite:///file:{sqlite_path}?mode=ro&uri=true")
    assert at(100) == loaded(store)
    with pytest.raises(CheckpointUnavailable, match="readonly database"):
        store.save(at(200))
    store.close()


def test_a_locked_file_says_so(sqlite_path: Path) -> None:
    """After the time in which an ordinary writer would have let go; afterwards saving goes on."""
    store = SqlCheckpointStore(f"sqlite:///{sqlite_path}?timeout=0.05")
    holder = sqlite3.connect(sqlite_path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(CheckpointUnavailable, match="database is locked"):
        store.save(at(200))
    holder.execute("ROLLBACK")
    holder.close()
    store.save(at(200))
    assert at(200) == loaded(store)
    store.close()


def test_a_full_disk_says_so_and_keeps_what_was_stored(sqlite_path: Path) -> None:
    """SQLite's own page limit gives the error of a full disk; nothing of the failed call is stored."""

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # below what there is: means "not one page more"

    store = SqlCheckpointStore(f"sqlite:///{sqlite_path}")
    letters = [letter(n, reason="x" * 1000) for n in range(100)]
    with on_pool("connect", limit), pytest.raises(CheckpointUnavailable, match="disk is full") as caught:
        store.add_dead_letters("s", letters)
    assert "xxx" not in "".join(traceback.format_exception(caught.value))
    assert LetterCounts() == store.count_dead_letters("s")
    store.close()


# --- MySQL


@pytest.mark.parametrize("table", schema.metadata.sorted_tables, ids=str)
def test_mysql_takes_the_keys(table: Table) -> None:
    """Every column in a key has a bound, and the key fits 3,072 bytes at four bytes a character."""
    assert table.name in str(CreateTable(table).compile(dialect=mysql.dialect()))
    keys = [key for key in table.constraints if isinstance(key, (PrimaryKeyConstraint, UniqueConstraint))]
    for key in keys:
        widths = [column.type.length if isinstance(column.type, String) else 8 for column in key.columns]
        assert sum(width or 4_000 for width in widths) * 4 <= 3_072


# --- PostgreSQL


def test_a_user_without_rights_is_not_waited_for(stack: DevStack) -> None:
    """The tables belong to another role: an operator has to grant rights."""
    url = make_url(make_postgres_database(stack).url)
    store = SqlCheckpointStore(url.render_as_string(hide_password=False))
    store.create()
    store.close()
    name = str(url.query["options"]).partition("=")[2]
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger'")
        connection.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO stranger").format(sql.Identifier(name)))
    login = url.set(username="stranger", password="stranger")  # noqa: S106  the test's own role
    stranger = SqlCheckpointStore(login.render_as_string(hide_password=False))
    with pytest.raises(CheckpointUnusable, match="permission denied"):
        stranger.load("s")
    stranger.close()


def test_a_password_is_never_shown(stack: DevStack) -> None:
    """A refused login names user and server only."""
    url = make_url(stack.postgres.dsn).set(password="hunter2")  # noqa: S106  the wrong one
    store = SqlCheckpointStore(url.render_as_string(hide_password=False))
    with pytest.raises(CheckpointUnavailable, match="authentication failed") as caught:
        store.load("s")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    store.close()


def test_a_server_that_is_away_is_one_clear_error(stack: DevStack) -> None:
    """While it is down each call fails; when it is back the same store goes on, its old connection forgotten."""
    store = SqlCheckpointStore(make_postgres_database(stack).url)
    store.create()
    store.save(at(1000))
    stack.postgres.stop()
    with pytest.raises(CheckpointUnavailable, match="Connection refused"):
        store.save(at(2000))
    stack.postgres.start()
    store.save(at(3000))
    assert at(3000) == loaded(store)
    store.close()


def test_a_restart_between_two_calls_is_not_noticed(stack: DevStack) -> None:
    """The connection is looked at before it is used."""
    store = SqlCheckpointStore(make_postgres_database(stack).url)
    store.create()
    store.save(at(1000))
    stack.postgres.stop()
    stack.postgres.start()
    store.save(at(2000))
    assert at(2000) == loaded(store)
    store.close()


def test_a_locked_table_is_an_error_and_not_a_hang(stack: DevStack) -> None:
    """A thread that waits for a lock would keep the program from ending."""
    url = make_postgres_database(stack).url
    store = SqlCheckpointStore(url)
    store.create()
    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql")) as other:
        other.execute("LOCK TABLE replicator_checkpoints")
        with pytest.raises(CheckpointUnavailable, match="LockNotAvailable"):
            store.save(at(1000))
    store.save(at(1000))
    assert at(1000) == loaded(store)
    store.close()
