"""Rows that change, where it is easy to be wrong: a backfill beside the stream, replays, values with a second form."""

from __future__ import annotations

import os
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg import sql

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.environment import ROLE
from tests.support.program import Program, succeed

MADE = """
CREATE TABLE parcels (
    id bigint PRIMARY KEY, depot text NOT NULL DEFAULT 'north', at timestamptz NOT NULL DEFAULT now(),
    status char(9) NOT NULL DEFAULT 'new', weight double precision, price numeric(9, 2), note text
);
"""
DECLARED = """
from replicator import *

STREAM = Stream("parcels", table="public.parcels", updates="upsert", deletes="delete", fields=(
    Field("event_id", BIGINT, column="id", role=Role.IDENTITY),
    Field("depot", TEXT, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME),
    Field("status", TEXT),
    Field("weight", DOUBLE.nullable()),
    Field("price", numeric(9, 2).nullable()),
    Field("note", TEXT.nullable()),
))
"""
ALWAYS = ("--start", "2000-01-01", "--end", "2100-01-01")
_decode = msgspec.json.Decoder(float_hook=Decimal).decode


@pytest.fixture
def parcels(quick: Program, source: psycopg.Connection, tmp_path: Path) -> Program:
    """A replicator of parcels."""
    source.execute(MADE.encode())
    source.execute(sql.SQL("GRANT SELECT ON parcels TO {}").format(sql.Identifier(ROLE)))
    quick.environment |= {"REPLICATOR_STREAM": "parcels_stream:STREAM", "PYTHONPATH": str(tmp_path)}
    declare(tmp_path)
    return quick


def declare(folder: Path, before: str = "", after: str = "") -> None:
    """The declaration, perhaps with something else in it."""
    (folder / "parcels_stream.py").write_text(DECLARED.replace(before, after) if before else DECLARED, encoding="utf-8")


def in_clickhouse(stack: DevStack, columns: str = "event_id, weight") -> dict[int, Any]:
    """By id."""
    settings = "output_format_json_quote_64bit_integers = 0, output_format_json_quote_decimals = 0"
    query = f"SELECT {columns} FROM parcels FINAL ORDER BY 1 SETTINGS {settings} FORMAT JSONCompactEachRow"  # noqa: S608
    rows = (_decode(line) for line in stack.clickhouse.query(query).splitlines())
    return {row[0]: row[1] if len(row) == 2 else row[1:] for row in rows}


def test_a_backfill_beside_changes(
    parcels: Program, source: psycopg.Connection, stack: DevStack, *, database: str, destinations: Destinations
) -> None:
    """A page shows rows as they were; what has been committed since, deletes too, is newer in every sink."""
    source.execute(
        "INSERT INTO parcels (id, weight, note) SELECT n, 0, repeat('x', 300) FROM generate_series(1, 8000) n"
    )
    succeed(parcels.run("init"))
    parcels.start()
    over = threading.Event()

    def change() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            for turn in range(10**6):
                if over.is_set():
                    return
                connection.execute("UPDATE parcels SET weight = weight + 1 WHERE id %% 400 = %s", [turn % 400])
                connection.execute("DELETE FROM parcels WHERE id = %s", [turn * 7 % 8000])

    changing = threading.Thread(target=change)
    changing.start()
    try:
        succeed(parcels.run("backfill", *ALWAYS, "--batch-size", "8000", "--sinks", "clickhouse,redis,http"))
    finally:
        over.set()
        changing.join()
    parcels.wait_until_caught_up()
    wanted: dict[int, float] = dict(source.execute("SELECT id, weight FROM parcels").fetchall())
    assert len(wanted) < 8_000
    assert [] == [*(wanted.items() ^ {one: float(weight) for one, weight in in_clickhouse(stack).items()}.items())][:5]
    assert str(len(wanted)) == destinations.redis.get("parcels:count:north")


def test_values_with_a_second_form(parcels: Program, source: psycopg.Connection, stack: DevStack) -> None:
    """They are the same from the slot, from a backfill, and for `reconcile`."""
    succeed(parcels.run("init"))
    parcels.start()
    values = ("NaN", "Infinity", "-Infinity", "-0", "1e-300", "7")
    for number, value in enumerate(values):
        price = "NaN" if value == "NaN" else "1.5"
        row = [number, value, price, "ab "]
        source.execute("INSERT INTO parcels (id, weight, price, status) VALUES (%s, %s, %s, %s)", row)
    parcels.wait_until_caught_up()
    shown = in_clickhouse(stack, "event_id, status, weight, price")
    wanted = [None, None, None, 0, Decimal("1e-300"), 7]
    assert [["ab       ", weight, Decimal("1.5") if number else None] for number, weight in enumerate(wanted)] == [
        *shown.values()
    ]
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))
    succeed(parcels.run("backfill", *ALWAYS, "--sinks", "clickhouse,redis,http"))
    assert shown == in_clickhouse(stack, "event_id, status, weight, price")
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))
    assert "dead letter" not in parcels.log


def test_times_that_no_destination_holds(
    parcels: Program, source: psycopg.Connection, stack: DevStack, *, destinations: Destinations
) -> None:
    """Such a row is a dead letter, and counted nowhere; also one that had another time before, or gets one."""
    source.execute("ALTER TABLE parcels ALTER at DROP NOT NULL")
    succeed(parcels.run("init"))
    parcels.start()
    for number, at in enumerate(("infinity", "-infinity", "20000-01-01", "0044-03-15 BC", "now", None)):
        source.execute("INSERT INTO parcels (id, weight, at) VALUES (%s, 0, %s)", [number, at])
    parcels.wait_until_caught_up()

    def assert_there(*ids: int) -> None:
        parcels.wait_until_caught_up()
        assert {*ids} == {*in_clickhouse(stack)}
        assert str(len(ids)) == destinations.redis.get("parcels:count:north")
        assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))

    assert_there(4)
    for sink in ("clickhouse", "redis", "http"):
        listed = succeed(parcels.run("dead-letters", "list", "--sink", sink, "--json"))
        assert [0, 1, 2, 3] == sorted(letter["event_id"] for letter in _decode(listed)["dead_letters"])
    assert "public.parcels.at is NULL" in succeed(parcels.run("dead-letters", "list", "--stage", "row"))
    source.execute("UPDATE parcels SET at = 'infinity' WHERE id = 4")
    parcels.wait_until_caught_up()
    found = parcels.run("reconcile", *ALWAYS, "--repair", "--delete-extra")
    assert (0, True, True) == (found.code, "extra 1: 4" in found.stdout, "counts too high 0" in found.stdout)
    assert_there()
    source.execute("UPDATE parcels SET at = 'now' WHERE id IN (0, 4)")
    assert_there(0, 4)
    succeed(parcels.run("rebuild-redis", "--from-empty", "--yes"))
    assert_there(0, 4)


def test_counts_of_keys_that_have_no_row(
    parcels: Program, source: psycopg.Connection, *, destinations: Destinations
) -> None:
    """They are differences where deletes reach the sinks. A Redis that does not show its keys is told."""
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, depot) VALUES (1, 'north'), (2, 'north'), (3, 'a*?[b]'), (4, 'gone')")
    source.execute("DELETE FROM parcels WHERE id = 4")
    parcels.wait_until_caught_up()
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))
    source.execute("TRUNCATE parcels")
    parcels.wait_until_caught_up()
    alone = (*ALWAYS, "--sinks", "redis")
    for _ in range(2):
        found = parcels.run("reconcile", *alone)
        assert 3 == found.code
        [line] = [line for line in found.stdout.splitlines() if "too high" in line]
        assert line.startswith("redis       counts too high 2: ")
        assert {"north has 2 instead of 0", "a*?[b] has 1 instead of 0"} == {*line.partition(": ")[2].split(", ")}
        assert "`python -m replicator rebuild-redis --from-empty` corrects the counts" in found.stdout
    destinations.redis.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@all", "-scan")  # type: ignore[no-untyped-call]
    url = parcels.environment["REPLICATOR_REDIS_URL"].replace("://", "://reader:secret@")
    found = parcels.run("reconcile", *alone, redis_url=url)
    destinations.redis.execute_command("ACL", "DELUSER", "reader")  # type: ignore[no-untyped-call]
    assert "counts of keys that have no row in PostgreSQL were not compared: NOPERM" in succeed(found)
    succeed(parcels.run("rebuild-redis", "--from-empty", "--yes"))
    assert "equal" in succeed(parcels.run("reconcile", *alone))


def test_a_condition_on_a_padded_column(
    parcels: Program, source: psycopg.Connection, stack: DevStack, tmp_path: Path
) -> None:
    """PostgreSQL fills it with spaces, which do not count, whichever way a row comes."""
    declare(tmp_path, "fields=(", 'where=Where("status", ("paid", "sent")), fields=(')
    source.execute("INSERT INTO parcels (id, weight, status) VALUES (1, 1, 'paid'), (2, 2, 'new')")
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, weight, status) VALUES (3, 3, 'sent'), (4, 4, 'new'), (5, 5, 'paid')")
    source.execute("UPDATE parcels SET status = 'new' WHERE id = 5")
    parcels.wait_until_caught_up()
    assert {3: 3} == in_clickhouse(stack)
    succeed(parcels.run("backfill", *ALWAYS))
    assert {1: 1, 3: 3} == in_clickhouse(stack)
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))


def test_a_refused_delete_stays_a_delete(parcels: Program, source: psycopg.Connection, api: Api) -> None:
    """Its dead letter has all columns of the row, and a replay must not bring the row back."""
    source.execute("ALTER TABLE parcels REPLICA IDENTITY FULL")
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id) VALUES (1), (2), (3)")
    wait_until(lambda: len(api.events()) == 3, "them to arrive")
    api.behave(refuse_event_ids=[1, 20])
    source.execute("DELETE FROM parcels WHERE id = 1")
    source.execute("UPDATE parcels SET id = id * 10 WHERE id = 2")
    source.execute("UPDATE parcels SET weight = 1 WHERE id = 3")
    parcels.wait_until_caught_up()
    api.behave()
    succeed(parcels.run("dead-letters", "replay"))
    sent = api.events()[-2:]
    assert [(1, "delete", None), (20, "upsert", 2)] == [
        (event["event_id"], event["_operation"], event.get("_was")) for event in sent
    ]


def test_an_update_of_a_row_that_is_gone(
    parcels: Program, source: psycopg.Connection, tmp_path: Path, *, stack: DevStack
) -> None:
    """Where deletes are ignored, what can't be completed any more is a dead letter: a sink keeps an earlier version."""
    declare(tmp_path, 'deletes="delete"', 'deletes="ignore"')
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, weight, note) VALUES (1, 1, %s)", [os.urandom(20_000).hex()])
    parcels.wait_until_caught_up()
    parcels.kill()
    source.execute("UPDATE parcels SET weight = 2")
    source.execute("DELETE FROM parcels")
    parcels.start()
    parcels.wait_until_caught_up()
    assert {1: 1} == in_clickhouse(stack)
    found = succeed(parcels.run("dead-letters", "list", "--stage", "row"))
    assert "the row is no longer in the table: sinks keep an earlier version" in found


def test_another_identity_where_updates_are_ignored(
    parcels: Program, source: psycopg.Connection, tmp_path: Path, *, stack: DevStack, destinations: Destinations
) -> None:
    """Else its delete would not be understood. It comes whole, though a long value of it is not in the WAL."""
    declare(tmp_path, 'updates="upsert", ', "")
    source.execute("CREATE DOMAIN number AS bigint; ALTER TABLE parcels ALTER id TYPE number")  # wal2json quotes it
    succeed(parcels.run("init"))
    parcels.start()
    note = os.urandom(20_000).hex()
    source.execute("INSERT INTO parcels (id, weight, note) SELECT n, n, %s FROM generate_series(1, 6) n", [note])
    source.execute("UPDATE parcels SET weight = 7 WHERE id = 1")
    source.execute("UPDATE parcels SET id = id * 10, weight = 8 WHERE id IN (2, 3)")
    source.execute("DELETE FROM parcels WHERE id IN (30, 6)")
    parcels.wait_until_caught_up()
    parcels.kill()
    source.execute("UPDATE parcels SET id = id * 10 WHERE id IN (4, 5)")
    source.execute("UPDATE parcels SET id = id * 10 WHERE id = 40")
    source.execute("DELETE FROM parcels WHERE id = 50")
    parcels.start()
    parcels.wait_until_caught_up()
    there = {1: 1, 20: 8, 400: 4}
    assert {one: [weight, note] for one, weight in there.items()} == in_clickhouse(stack, "event_id, weight, note")
    assert "3" == destinations.redis.get("parcels:count:north")
    assert "dead letter" not in parcels.log


def test_rows_that_are_followed_from_now_on(
    parcels: Program, source: psycopg.Connection, tmp_path: Path, *, destinations: Destinations
) -> None:
    """Redis keeps other keys for them: it would count again what it has, until it is made anew."""
    once = DECLARED.replace('"depot", TEXT', '"region", BIGINT')
    (tmp_path / "parcels_stream.py").write_text(
        once.replace('updates="upsert", deletes="delete", ', ""), encoding="utf-8"
    )
    parcels.environment["REPLICATOR_SINKS"] = "redis"  # ClickHouse's table is another one then, which it says
    source.execute("ALTER TABLE parcels ADD COLUMN region bigint")
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, region) VALUES (1, 1), (2, 1), (3, 1)")
    parcels.wait_until_caught_up()
    assert "3" == destinations.redis.get("parcels:count:1")
    assert 0 == parcels.stop()
    (tmp_path / "parcels_stream.py").write_text(once, encoding="utf-8")
    parcels.start()
    told = "were made for inserted rows whose identity and key are numbers, and the stream is now declared with rows"
    parcels.wait_for_log(told)
    source.execute("UPDATE parcels SET weight = 1 WHERE id = 2")
    for words in (["check"], ["reconcile", *ALWAYS, "--sinks", "redis"], ["rebuild-redis"]):
        refused = parcels.run(*words)
        assert refused.code
        assert told in refused.stdout + refused.stderr
    assert 3 == parcels.run("status").code
    succeed(parcels.run("rebuild-redis", "--from-empty", "--yes"))
    parcels.wait_until_caught_up()
    assert "3" == destinations.redis.get("parcels:count:1")
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS, "--sinks", "redis"))


def test_an_identity_that_is_unique_at_the_commit_alone(parcels: Program, source: psycopg.Connection) -> None:
    """Of two rows that swap theirs, one would be lost."""
    source.execute(
        "ALTER TABLE parcels REPLICA IDENTITY FULL, DROP CONSTRAINT parcels_pkey, ADD UNIQUE (id) DEFERRABLE"
    )
    found = parcels.run("check")
    assert 1 == found.code
    assert "table public.parcels: its identity id is not unique" in found.stdout


def test_another_stream_in_the_slot(parcels: Program, source: psycopg.Connection, stack: DevStack) -> None:
    """What is known of the first one's table stays known: rows that the slot could not show come from the table."""
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, weight) VALUES (1, 1)")
    parcels.wait_until_caught_up()
    assert 0 == parcels.stop()
    source.execute("ALTER TABLE parcels RENAME TO away")
    source.execute("INSERT INTO away (id, weight) VALUES (2, 2)")
    source.execute("ALTER TABLE away RENAME TO parcels")
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')")
    parcels.environment["REPLICATOR_STREAM"] += ",enrichment.contract:EVENT"
    told = succeed(parcels.run("init"))
    assert "public.engagement_events holds 1 row; those from before the slot do not come through it" in told
    assert told.endswith(" --stream engagement\n")
    assert "public.parcels" not in told
    parcels.start()
    parcels.wait_for_log("1 row of the tables read again")
    source.execute("INSERT INTO parcels (id, weight) VALUES (3, 3)")
    parcels.wait_until_caught_up()
    assert {1: 1, 2: 2, 3: 3} == in_clickhouse(stack)
    traced = succeed(parcels.run("trace", "3", "--stream", "parcels"))
    assert 3 == traced.count(" written\n")


def test_gone_while_the_columns_were_others(parcels: Program, source: psycopg.Connection, stack: DevStack) -> None:
    """While it is down: deleted, and with another identity twice. The old row, of another type, says which it was."""
    source.execute("ALTER TABLE parcels REPLICA IDENTITY FULL")
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, weight) SELECT n, n FROM generate_series(1, 5) n")
    parcels.wait_until_caught_up()
    assert 0 == parcels.stop()
    source.execute("ALTER TABLE parcels ALTER weight TYPE text USING weight::text")
    source.execute("DELETE FROM parcels WHERE id = 1")
    for before, after in ((2, 12), (12, 22)):
        source.execute("UPDATE parcels SET id = %s WHERE id = %s", [after, before])
    source.execute("UPDATE parcels SET weight = 3.5 WHERE id = 3")
    source.execute("DELETE FROM parcels WHERE id = 3")
    source.execute("UPDATE parcels SET weight = 4.5 WHERE id = 4")
    source.execute("ALTER TABLE parcels ALTER weight TYPE double precision USING weight::double precision")
    parcels.start()
    wait_until(lambda: in_clickhouse(stack) == {4: 4.5, 5: 5, 22: 2}, "the changes to arrive")
    assert "" == succeed(parcels.run("dead-letters", "list"))
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))


def test_gone_while_the_identity_had_another_name(
    parcels: Program, source: psycopg.Connection, stack: DevStack
) -> None:
    """Nothing says which rows these were: somebody has to see that."""
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, weight) SELECT n, n FROM generate_series(1, 4) n")
    parcels.wait_until_caught_up()
    assert 0 == parcels.stop()
    source.execute("ALTER TABLE parcels RENAME id TO number")
    source.execute("DELETE FROM parcels WHERE number = 1")
    source.execute("UPDATE parcels SET number = 12 WHERE number = 2")
    source.execute("UPDATE parcels SET weight = 3.5 WHERE number = 3")
    source.execute("ALTER TABLE parcels RENAME number TO id")
    parcels.start()
    parcels.wait_until_caught_up()
    wait_until(lambda: in_clickhouse(stack) == {1: 1, 2: 2, 3: 3.5, 4: 4, 12: 2}, "what is there to arrive")
    found = succeed(parcels.run("dead-letters", "list"))
    assert 1 == found.count("another name or type, nothing told which rows were deleted, or got another identity")
    assert 3 == parcels.run("reconcile", *ALWAYS, "--repair", "--delete-extra").code, "Redis counts them still"
    assert {3: 3.5, 4: 4, 12: 2} == in_clickhouse(stack)
    succeed(parcels.run("rebuild-redis", "--from-empty", "--yes"))
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))


def test_a_row_that_became_fit(
    parcels: Program, source: psycopg.Connection, stack: DevStack, destinations: Destinations
) -> None:
    """That no event could be made of the old row, which FULL shows, holds up neither its update nor its delete."""
    source.execute("ALTER TABLE parcels REPLICA IDENTITY FULL, ALTER price TYPE numeric, ALTER depot DROP NOT NULL")
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, price) SELECT n, n FROM generate_series(1, 4) n")
    source.execute("UPDATE parcels SET price = 1.2345 WHERE id IN (1, 2)")
    source.execute("UPDATE parcels SET depot = NULL WHERE id IN (3, 4)")
    source.execute("UPDATE parcels SET price = 1.5 WHERE id = 1")
    source.execute("DELETE FROM parcels WHERE id = 2")
    source.execute("UPDATE parcels SET depot = 'south' WHERE id = 3")
    source.execute("DELETE FROM parcels WHERE id = 4")
    parcels.wait_until_caught_up()
    assert {1: ["north", Decimal("1.5")], 3: ["south", 3]} == in_clickhouse(stack, "event_id, depot, price")
    assert 4 == len(parcels.run("dead-letters", "list").stdout.splitlines()) / 2, "the four that did not fit"
    counts = [destinations.redis.get(f"parcels:count:{depot}") for depot in ("north", "south")]
    assert ["1", "1"] == counts


def test_a_replica_identity_that_told_nothing(parcels: Program, source: psycopg.Connection, stack: DevStack) -> None:
    """What was updated meanwhile comes from the table. What was deleted is nowhere: somebody has to see that."""
    succeed(parcels.run("init"))
    parcels.start()
    source.execute("INSERT INTO parcels (id, weight) VALUES (1, 1), (2, 2)")
    parcels.wait_until_caught_up()
    source.execute("ALTER TABLE parcels REPLICA IDENTITY NOTHING")
    source.execute("DELETE FROM parcels WHERE id = 1")
    source.execute("UPDATE parcels SET weight = 3 WHERE id = 2")
    parcels.wait_for_log("public.parcels has a replica identity that does not identify changed and deleted rows")
    source.execute("ALTER TABLE parcels REPLICA IDENTITY DEFAULT")
    wait_until(lambda: in_clickhouse(stack) == {1: 1, 2: 3}, "the update to arrive")
    found = succeed(parcels.run("dead-letters", "list", "--stage", "row"))
    assert (
        "for a while the WAL did not tell which rows of public.parcels were deleted, or got another identity" in found
    )
    assert 3 == parcels.run("reconcile", *ALWAYS, "--repair", "--delete-extra").code, "Redis counts it still"
    assert {2: 3} == in_clickhouse(stack)
    succeed(parcels.run("rebuild-redis", "--from-empty", "--yes"))
    assert "equal" in succeed(parcels.run("reconcile", *ALWAYS))
