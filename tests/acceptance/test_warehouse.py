"""The program with `examples/sinks/postgres_sink` as its sink: exactly once, whenever it is killed."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import psycopg
import pytest

from devstack.process import wait_until
from tests.support.destinations import expected
from tests.support.load import insert_many
from tests.support.plugin import WAREHOUSE, install
from tests.support.program import Program, succeed
from tests.support.warehouse import Warehouse

ROUNDS = 4
TRANSACTIONS, MOST_ROWS = 10, 600


def has_more(warehouse: Warehouse, events: int) -> bool:
    """Whether it has more events than these."""
    return warehouse.count() > events


@pytest.fixture
def writing(quick: Program, warehouse: Warehouse, tmp_path: Path) -> Program:
    """The program, with the example installed."""
    install(tmp_path, "replicator-warehouse", example=WAREHOUSE)
    quick.environment |= {
        "PYTHONPATH": str(tmp_path),
        "REPLICATOR_SINKS": "warehouse",
        "REPLICATOR_WAREHOUSE_DSN": warehouse.plain_dsn,
    }
    return quick


def test_it_is_exact_whenever_it_is_killed(
    writing: Program, source: psycopg.Connection, database: str, warehouse: Warehouse, chance: random.Random
) -> None:
    """SIGKILL amid its writes. At any moment events and position are one; in the end every field is PostgreSQL's."""
    succeed(writing.run("init"))
    assert "ok    sink warehouse: PostgreSQL takes events" in succeed(writing.run("check"))
    for _ in range(ROUNDS):
        before = len(warehouse.read())
        for _ in range(TRANSACTIONS):
            insert_many(source, chance.randrange(1, MOST_ROWS))
        enough = chance.choice([before - 1, before, chance.randrange(before, len(expected(database)))])
        writing.start()
        wait_until(partial(has_more, warehouse, enough), "some of the events")
        writing.kill()
        newest, position = warehouse.ends()
        assert newest == position
    writing.start()
    writing.wait_until_caught_up()
    assert expected(database) == warehouse.read()
    there = warehouse.ends()
    succeed(writing.run("backfill", "--last", "1h", "--sinks", "warehouse"))
    assert expected(database) == warehouse.read()
    assert there[1] == warehouse.ends()[1]
