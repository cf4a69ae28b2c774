"""A stream of its own tables, declared in a file: the example of orders, in all sinks as PostgreSQL has it."""

from __future__ import annotations

import json
import random
import re
import signal
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from tests.prove.failpoints import PLACES
from tests.support.destinations import Destinations
from tests.support.orders import CLICKHOUSE, STREAM, Shop, assert_every_write, assert_exact, create, decode, expected
from tests.support.program import Program, succeed
from tests.support.progress import events_before

PLAYED = """INSERT INTO engagement_events (id, content_id, user_id, event_type)
            SELECT n, 1 + n %% 3, n, 'play' FROM generate_series(%s::int, %s) n"""


@pytest.fixture
def orders(quick: Program, source: psycopg.Connection) -> Program:
    """A replicator of the example's tables."""
    create(source)
    quick.environment["REPLICATOR_STREAM"] = STREAM
    return quick


def test_orders(
    orders: Program,
    source: psycopg.Connection,
    stack: DevStack,
    destinations: Destinations,
    chance: random.Random,
) -> None:
    """Inserts, updates and deletes, moves to other months, other identities, changes of customers; and a kill."""
    shop = Shop(source, chance)
    succeed(orders.run("init"))
    succeed(orders.run("check"))
    orders.start()
    shop.trade(60)
    orders.kill()
    shop.trade(60)
    orders.start()
    shop.trade(30)
    orders.wait_until_caught_up()
    assert_exact(source, stack, destinations)
    assert_every_write(source, stack)
    assert "0 dead letters" not in orders.log
    assert 0 == orders.stop()


def test_backfill_and_reconcile(
    orders: Program,
    source: psycopg.Connection,
    stack: DevStack,
    chance: random.Random,
) -> None:
    """What stood in the table before, and what was lost in a sink."""
    shop = Shop(source, chance)
    shop.trade(40)
    succeed(orders.run("init"))
    orders.start()
    shop.trade(20)
    orders.wait_until_caught_up()
    when = ("--start", "2025-01-01", "--end", "2100-01-01")
    succeed(orders.run("backfill", *when))
    shop.trade(20)
    orders.wait_until_caught_up()
    ids = [row[0] for row in source.execute("SELECT order_id::text FROM shop.orders ORDER BY 1")]
    stack.clickhouse.query(f"DELETE FROM orders WHERE order_id = '{ids[0]}' SETTINGS mutations_sync = 2")  # noqa: S608
    extra = f"INSERT INTO orders (order_id, ordered_at, _version) VALUES ('{'0' * 8}{ids[0][8:]}', '2026-01-01', 1)"  # noqa: S608
    stack.clickhouse.query(extra)
    found = orders.run("reconcile", *when)
    assert 3 == found.code
    assert "missing 1" in found.stdout
    assert "extra 1" in found.stdout
    succeed(orders.run("reconcile", *when, "--repair", "--delete-extra", "--with-content"))
    assert "equal" in succeed(orders.run("reconcile", *when))
    # Rows are sent again with today's customer.
    succeed(orders.run("backfill", *when))
    assert "equal" in succeed(orders.run("reconcile", *when, "--with-content"))
    for order_id in ids[:3]:
        assert "redis        written" in succeed(orders.run("trace", order_id))


def test_a_version_from_another_time(
    orders: Program, source: psycopg.Connection, stack: DevStack, chance: random.Random
) -> None:
    """After a failover a sink may have versions that the source has not come to: a repair takes them out."""
    succeed(orders.run("init"))
    orders.start()
    Shop(source, chance).trade(20)
    orders.wait_until_caught_up()
    later = "total + 1 AS total, _version + bitShiftLeft(toUInt128(1), 100) AS _version"
    stack.clickhouse.query(f"INSERT INTO orders SELECT * REPLACE ({later}) FROM orders FINAL LIMIT 3")  # noqa: S608
    when = ("--start", "2025-01-01", "--end", "2100-01-01")
    assert "different 3" in orders.run("reconcile", *when).stdout
    assert "repaired" in succeed(orders.run("reconcile", *when, "--repair", "--delete-extra"))
    assert "equal" in succeed(orders.run("reconcile", *when))


WRONG = {
    "nowhere:STREAM": (2, "REPLICATOR_STREAM is unusable: there is no module nowhere in"),
    "examples.orders.orders_stream:vat": (2, "has no Stream that is called vat; its streams are STREAM"),
    "Stream('orders', 'orders', ())": (2, "'orders' is no table; it takes schema.table, in lower case"),
    "replace(STREAM, table='shop.refunds')": (1, "table shop.refunds: does not exist"),
    "plus(Field('weight', BIGINT))": (1, "table shop.orders: has no column weight (bigint)"),
    "plus(Field('again', numeric(9, 1), column='number'))": (1, "has a column number of type numeric(9,2) instead of"),
    "plus(Field('fails', BIGINT.nullable(), derived=Derived(lambda total: 1 // 0, of=('total',))))": (
        1,
        "table shop.orders: no event can be made of 1 of 1 rows: fails can't be derived: ZeroDivisionError",
    ),
    "plus(Field('wide', numeric(3, 2).nullable(), derived=Derived(lambda total: total, of=('total',))))": (
        1,
        "no event can be made of 1 of 1 rows: wide is derived, and is not a number of 3 digits, 2 of them a fraction",
    ),
    "replace(STREAM, fields=(Field('order_id', TEXT, role=Role.IDENTITY, column='note'), *STREAM.fields[1:6]))": (
        1,
        "table shop.orders: its identity note is not unique",
    ),
}


@pytest.mark.parametrize("declared", WRONG)
def test_a_wrong_declaration_is_one_line(
    orders: Program, source: psycopg.Connection, stack: DevStack, tmp_path: Path, declared: str
) -> None:
    """Of `check`, and of `init`, which makes nothing; the exit code says whether it is a setting."""
    code, problem = WRONG[declared]
    source.execute("ALTER TABLE shop.orders ADD number numeric(9, 2), REPLICA IDENTITY FULL")
    for part in ("2026_01", "2026_02", "later"):
        source.execute(f"ALTER TABLE shop.orders_{part} REPLICA IDENTITY FULL".encode())
    source.execute("INSERT INTO shop.orders (customer_id, total, lines, note) VALUES (1, 12.50, '[]', 'one')")
    if "(" in declared:
        text = "from dataclasses import replace\nfrom replicator import *\n"
        text += "from examples.orders.orders_stream import STREAM\n"
        text += "def plus(*more): return replace(STREAM, fields=(*STREAM.fields, *more))\n"
        (tmp_path / "declared.py").write_text(f"{text}MINE = {declared}\n", encoding="utf-8")
        orders.environment["PYTHONPATH"] = str(tmp_path)
        declared = "declared:MINE"
    orders.environment["REPLICATOR_STREAM"] = declared
    found = orders.run("check")
    assert code == found.code
    [line] = [line for line in (found.stdout + found.stderr).splitlines() if problem in line]
    assert "Traceback" not in line
    made = orders.run("init")
    assert (code, "") == (made.code, made.stdout)
    assert line.removeprefix("FAIL  ") in made.stderr
    assert [] == source.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", [orders.slot]).fetchall()
    assert "" == stack.clickhouse.query("SHOW TABLES LIKE 'orders'").strip()
    assert not (tmp_path / "checkpoint.db").exists()


def test_an_update_whose_long_value_and_order_are_gone(
    orders: Program, source: psycopg.Connection, stack: DevStack, destinations: Destinations
) -> None:
    """It can't be shown as it was. The order is gone everywhere, and the customer's other order stays the last one."""
    succeed(orders.run("init"))
    orders.start()
    sku = "".join(map(chr, range(0x4E00, 0x4E00 + 5_000)))  # does not compress
    for number, lines in ((1, f'["{sku}"]'), (2, "[]")):
        query = "INSERT INTO shop.orders (order_id, customer_id, total, lines) VALUES (%s, 1, 1, %s)"
        source.execute(query, [f"{number:032}", lines])
    orders.wait_until_caught_up()
    orders.kill()
    source.execute("UPDATE shop.orders SET status = 'paid' WHERE order_id = %s", [f"{1:032}"])
    source.execute("DELETE FROM shop.orders WHERE order_id = %s", [f"{1:032}"])
    orders.start()
    orders.wait_until_caught_up()
    assert_exact(source, stack, destinations)
    assert decode(str(destinations.redis.get("orders:last:1")))["order_id"].endswith("2")


def test_two_streams_in_one_slot(
    orders: Program,
    source: psycopg.Connection,
    stack: DevStack,
    *,
    destinations: Destinations,
    chance: random.Random,
) -> None:
    """Each has its own keys and tables; what one sink refuses of the one holds up nothing of the other."""
    orders.environment["REPLICATOR_STREAM"] = f"{orders.environment['REPLICATOR_STREAM']},enrichment.contract:EVENT"
    shop = Shop(source, chance)
    succeed(orders.run("init"))
    succeed(orders.run("check"))
    orders.start()
    source.execute(PLAYED, [1, 500])
    shop.trade(30)
    orders.kill()
    shop.trade(30)
    source.execute(PLAYED, [501, 1_000])
    orders.start()
    orders.wait_until_caught_up()
    assert_exact(source, stack, destinations)
    assert 1_000 == assert_engagement(destinations, source)

    stack.clickhouse.query("RENAME TABLE orders TO away")
    shop.trade(5)
    source.execute("INSERT INTO shop.orders (customer_id, total, lines) VALUES (1, 1, '[]')")
    source.execute(PLAYED, [1_001, 1_500])
    wait_until(lambda: 1_500 == len(destinations.clickhouse()), "the events to pass what waits for the orders' table")
    wait_until(lambda: ["clickhouse/orders"] == in_trouble(orders), "the sink of the orders, and no other, to say so")
    stack.clickhouse.query("RENAME TABLE away TO orders")
    orders.wait_until_caught_up()
    assert_exact(source, stack, destinations)


WHEN = ("--start", "2025-01-01", "--end", "2100-01-01")


@pytest.fixture
def two(orders: Program) -> Program:
    """A replicator of both streams: every command has the same settings."""
    orders.environment["REPLICATOR_STREAM"] = f"{STREAM},enrichment.contract:EVENT"
    return orders


@pytest.mark.parametrize("command", [["backfill", *WHEN], ["reconcile", *WHEN], ["rebuild-redis"], ["trace", "1"]])
def test_which_stream_has_to_be_said(two: Program, command: list[str]) -> None:
    """A command that works on one names those that there are; a wrong name is no other stream."""
    for option, problem in (
        ((), "this command works on one stream, and REPLICATOR_STREAM has 2"),
        (("--stream", "order"), "'order' is not the name of a stream"),
        (("--stream", ""), "'' is not the name of a stream"),
    ):
        refused = two.run(*command, *option)
        assert (2, "") == (refused.code, refused.stdout)
        assert f"--stream is unusable: {problem}. It takes one of orders, engagement.\n" in refused.stderr
    alone = two.run(*command, "--stream", "engagement", stream=STREAM)
    assert 2 == alone.code
    assert "'engagement' is not the name of a stream. It takes one of orders." in alone.stderr


def test_commands_work_on_one_of_two_streams(
    two: Program,
    source: psycopg.Connection,
    stack: DevStack,
    *,
    destinations: Destinations,
    chance: random.Random,
    database: str,
    tmp_path: Path,
) -> None:
    """With the settings of `run`, beside it; what they print can be pasted, and touches no other stream."""
    Shop(source, chance).trade(20)
    source.execute("INSERT INTO shop.orders (customer_id, total, lines) VALUES (1, 1, '[]')")
    source.execute(PLAYED, [1, 300])
    told = succeed(two.run("init"))
    commands = re.findall(r"^public\..*|^shop\..*", told, re.MULTILINE)
    assert ["orders", "engagement"] == [line.rpartition(" --stream ")[2] for line in commands]
    assert "leaves out" not in told
    two.start()
    for line in commands:
        succeed(two.follow(line[line.index("python ") :]))
    assert 300 == assert_engagement(destinations, source)
    for stream in ("orders", "engagement"):
        assert "equal" in succeed(two.run("reconcile", *WHEN, "--stream", stream, "--sinks", "clickhouse,redis"))

    [(gone,)] = source.execute("SELECT min(order_id::text) FROM shop.orders").fetchall()
    stack.clickhouse.query(f"DELETE FROM orders WHERE order_id = '{gone}' SETTINGS mutations_sync = 2")  # noqa: S608
    assert "equal" in succeed(two.run("reconcile", *WHEN, "--stream", "engagement"))
    found = two.run("reconcile", *WHEN, "--stream", "orders")
    assert 3 == found.code
    assert re.search(r"^clickhouse/orders missing 1", found.stdout, re.MULTILINE)
    assert "clickhouse/engagement" not in found.stdout
    of_one = ("--stream", "orders", "--sinks", "clickhouse/orders")
    succeed(two.run("reconcile", *WHEN, *of_one, "--repair"))
    assert "equal" in succeed(two.run("reconcile", *WHEN, *of_one))

    before = destinations.redis.get("orders:count:1")
    destinations.redis.incr("orders:count:1")
    destinations.redis.incr("content:count:1")
    found = two.run("reconcile", *WHEN, "--stream", "orders", "--sinks", "redis")
    assert 3 == found.code
    [command] = re.findall(r"`(python .* rebuild-redis --from-empty .*)` corrects the counts", found.stdout)
    succeed(two.follow(f"{command} --yes"))
    assert before == destinations.redis.get("orders:count:1")
    assert 301 == sum(destinations.counts().values()), "the other stream's keys stay as they are"
    succeed(two.run("rebuild-redis", "--stream", "engagement", "--from-empty", "--yes"))
    assert 300 == sum(destinations.counts().values())

    for event, stream in ((gone, "orders"), ("7", "engagement")):
        traced = json.loads(two.run("trace", event, "--stream", stream, "--json").stdout)
        assert [f"{sink}/{stream}" for sink in ("clickhouse", "redis", "http")] == [*traced["sinks"]]
        assert {"written"} == {traced["sinks"][f"{sink}/{stream}"]["state"] for sink in ("clickhouse", "redis")}

    slow = ("--sinks", "redis", "--batch-size", "50", "--rate", "50")
    process = Program(two.environment, database, tmp_path / "log").spawn(
        "backfill", *WHEN, "--stream", "engagement", *slow
    )
    wait_until(lambda: events_before(tmp_path / "checkpoint.db") > 0, "a page")
    process.terminate()
    assert 1 == process.wait(20)
    [again] = re.findall(r"to continue: `(python .*)`", (tmp_path / "log").read_text(encoding="utf-8"))
    assert re.search(r"read +\d+ events of 300, \d+ before", succeed(two.follow(again)))


def test_the_cure_of_an_emptied_redis_names_the_stream(
    two: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Typed as it is printed, for each of them, it makes all of it again."""
    succeed(two.run("init"))
    two.start()
    source.execute(PLAYED, [1, 9])
    source.execute("INSERT INTO shop.orders (customer_id, total, lines) VALUES (1, 1, '[]')")
    two.wait_until_caught_up()
    destinations.redis.flushall()
    told = set[str]()

    def are_told() -> bool:
        told.update(re.findall(r"`(python -m replicator rebuild-redis[^`]*)`", two.admin("/readyz")))
        return len(told) > 1

    wait_until(are_told, "both sinks to say so")
    assert {f"python -m replicator rebuild-redis --stream {name}" for name in ("orders", "engagement")} == told
    for command in told:
        succeed(two.follow(command))
    wait_until(lambda: "ready\n" == two.admin("/readyz"), "the replicator to be ready")
    assert 9 == assert_engagement(destinations, source)
    assert "1" == destinations.redis.get("orders:count:1")
    printed = succeed(two.run("sql", "clickhouse"))
    assert ["orders", "events_enriched"] == re.findall(r"CREATE TABLE IF NOT EXISTS `engagement`\.(\w+)", printed)


def test_dead_letters_of_a_backfill_of_one_of_two_streams(
    two: Program, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """They name the sink as the running replicator does, and are replayed with its settings."""
    source.execute(PLAYED, [1, 9])
    succeed(two.run("init"))
    two.start()
    api.behave(refuse_event_ids=[3, 12])
    succeed(two.run("backfill", *WHEN, "--stream", "engagement", "--sinks", "http"))
    source.execute(PLAYED, [10, 12])
    two.wait_until_caught_up()
    letters = json.loads(succeed(two.run("dead-letters", "list", "--json")))["dead_letters"]
    assert [("http/engagement", 3), ("http/engagement", 12)] == [(one["sink"], one["event_id"]) for one in letters]
    traced = two.run("trace", "3", "--stream", "engagement")
    assert 3 == traced.code
    assert "http/engagement dead letter 1 because" in traced.stdout
    api.behave()
    assert "2 taken, 0 left\n" == succeed(two.run("dead-letters", "replay"))
    assert {*range(1, 13)} == {event["event_id"] for event in destinations.api()}


PLAYS = """
from replicator import *
STREAM = Stream("plays", "public.plays", fields=(
    Field("event_id", BIGINT, role=Role.IDENTITY), Field("place", BIGINT, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME), Field("share", BIGINT, derived=Derived({}, of=("place",)))))
"""
PLAYS_MADE = """
CREATE TABLE plays (event_id bigint PRIMARY KEY, place bigint NOT NULL, at timestamptz NOT NULL DEFAULT now());
GRANT SELECT ON plays TO replicator;
"""


def test_letters_from_before_there_were_two_streams(
    quick: Program, source: psycopg.Connection, stack: DevStack, *, api: Api, tmp_path: Path
) -> None:
    """And back: they name a sink as it was called then, and go to it by its name of today, or stay with the reason."""
    file = tmp_path / "plays_stream.py"
    file.write_text(PLAYS.format("lambda place: 60 // place"), encoding="utf-8")
    source.execute(PLAYS_MADE.encode())
    quick.environment |= {"REPLICATOR_STREAM": "plays_stream:STREAM", "PYTHONPATH": str(tmp_path)}
    succeed(quick.run("init"))
    quick.start()
    api.behave(refuse_event_ids=[1, 5, 6])
    source.execute("INSERT INTO plays VALUES (1, 1), (2, 0), (3, 3)")
    quick.wait_until_caught_up()
    assert 0 == quick.stop()

    quick.environment["REPLICATOR_STREAM"] += ",enrichment.contract:EVENT"
    quick.start()
    source.execute(PLAYED, [1, 5])
    source.execute("INSERT INTO plays VALUES (6, 6), (7, 7), (8, 8)")
    quick.wait_until_caught_up()
    kept = [["http", 1], [None, 2], ["http/engagement", 1], ["http/engagement", 5], ["http/plays", 6]]
    letters = json.loads(succeed(quick.run("dead-letters", "list", "--json")))["dead_letters"]
    assert sorted(map(str, kept)) == sorted(str([one["sink"], one["event_id"]]) for one in letters)
    assert "http/plays   dead letter" in quick.run("trace", "1", "--stream", "plays").stdout
    assert "http/engagement dead letter" in quick.run("trace", "1", "--stream", "engagement").stdout
    assert "dead letter" in quick.run("trace", "2", "--stream", "plays").stdout
    assert "dead letter" not in quick.run("trace", "2", "--stream", "engagement").stdout, "it is the other stream's row"
    api.behave()
    before = len(api.events())
    assert "1 taken, 0 left\n" == succeed(quick.run("dead-letters", "replay", "--sink", "http"))
    file.write_text(PLAYS.format("lambda place: place"), encoding="utf-8")
    assert "1 taken, 0 left\n" == succeed(quick.run("dead-letters", "replay", "--stage", "row"))
    first, row = api.events()[before:]
    assert ({"event_id": 1, "place": 1}, {"event_id": 2, "place": 0}) == tuple(
        {name: one[name] for name in ("event_id", "place")} for one in (first, row)
    )
    ids = stack.clickhouse.query("SELECT event_id FROM plays ORDER BY event_id").split()
    assert ["1", "2", "3", "6", "7", "8"] == ids
    assert "5" == stack.clickhouse.query("SELECT count() FROM events_enriched FINAL").strip(), (
        "the row is none of theirs"
    )
    assert 0 == quick.stop()

    left = quick.run("dead-letters", "replay", stream="plays_stream:STREAM")
    assert 1 == left.code
    assert "1 taken, 2 left\n" in left.stdout
    assert (
        "of http/engagement stays: sink http/engagement is of a stream that REPLICATOR_STREAM does not" in left.stdout
    )
    assert 6 == api.events()[-1]["event_id"]


def in_trouble(program: Program) -> list[str]:
    """The sinks that say that something is wrong."""
    return [name for name, sink in program.status()["sinks"].items() if sink["trouble"]]


def assert_engagement(destinations: Destinations, source: psycopg.Connection) -> int:
    """The other stream is complete; how many events it has."""
    [(count,)] = source.execute("SELECT count(*) FROM engagement_events").fetchall()
    assert count == len(destinations.clickhouse()) == sum(destinations.counts().values())
    return int(count)


BY_UUID = """
CREATE TABLE places (place_id uuid PRIMARY KEY, name text);
CREATE TABLE visits (id bigserial PRIMARY KEY, place_id uuid, who text NOT NULL, at timestamptz NOT NULL DEFAULT now(),
                     was text);
CREATE FUNCTION was() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.was := (SELECT name FROM places WHERE place_id = NEW.place_id);
    RETURN NEW;
END $$;
CREATE TRIGGER was BEFORE INSERT ON visits FOR EACH ROW EXECUTE FUNCTION was();
INSERT INTO places SELECT gen_random_uuid(), 'place ' || n FROM generate_series(1, 50) n;
GRANT SELECT ON places, visits TO replicator;
"""
VISITS = """
from replicator import *
STREAM = Stream("visits", "public.visits", dimensions=(Dimension("public.places", key="place_id"),), fields=(
    Field("id", BIGINT, role=Role.IDENTITY), Field("who", TEXT, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME),
    Field("place_id", UUID.nullable()), Field("was", TEXT.nullable()), Field("name", TEXT.nullable(), joined="name")))
"""
VISITED = """
INSERT INTO visits (place_id, who)
SELECT (SELECT place_id FROM places WHERE n > 0 AND n % 9 > 0 ORDER BY random() LIMIT 1), 'who ' || n % 7
FROM generate_series(1, 100) n
"""


def test_joined_by_a_uuid(quick: Program, source: psycopg.Connection, stack: DevStack, tmp_path: Path) -> None:
    """Each event carries the place as of its commit, also what comes again after a kill, or what it has no place."""
    source.execute(BY_UUID.encode())
    (tmp_path / "visits_stream.py").write_text(VISITS, encoding="utf-8")
    quick.environment |= {"REPLICATOR_STREAM": "visits_stream:STREAM", "PYTHONPATH": str(tmp_path)}
    succeed(quick.run("init"))
    quick.start()
    for turn in range(6):
        if turn == 3:
            quick.kill()
        source.execute(VISITED.encode())
        source.execute("UPDATE places SET name = name || '+' WHERE random() < 0.5")
        source.execute("UPDATE places SET place_id = gen_random_uuid() WHERE random() < 0.1")
    quick.start()
    quick.wait_until_caught_up()
    rows = stack.clickhouse.query("SELECT id, who, place_id, name, was FROM visits FINAL FORMAT JSONEachRow")
    found = [decode(row) for row in rows.splitlines()]
    assert 600 == len(found)
    assert any(row["name"] for row in found)
    assert any(row["name"] is None for row in found)
    assert [] == [row for row in found if row["name"] != row["was"]]


def test_a_truncate_is_a_dead_letter(orders: Program, source: psycopg.Connection, chance: random.Random) -> None:
    """The sinks keep the rows: somebody has to see that."""
    succeed(orders.run("init"))
    orders.start()
    Shop(source, chance).trade(3)
    source.execute("TRUNCATE shop.orders")
    orders.wait_until_caught_up()
    found = succeed(orders.run("dead-letters", "list", "--stage", "row"))
    assert (
        "TRUNCATE: the WAL has no deletes for its rows, and the sinks keep them. `python -m replicator reconcile"
        in found
    )


def test_a_partition_is_dropped(orders: Program, source: psycopg.Connection) -> None:
    """PostgreSQL logs no deletes for it, so the sinks keep its rows; `reconcile` says so, of each."""
    succeed(orders.run("init"))
    orders.start()
    insert = "INSERT INTO shop.orders (customer_id, total, lines, ordered_at) VALUES (1, 1, '[]', %s)"
    for moment in ("2026-01-15Z", "2026-02-15Z"):
        source.execute(insert, [moment])
    orders.wait_until_caught_up()
    source.execute("DROP TABLE shop.orders_2026_01")
    source.execute(insert, ["2026-02-16Z"])
    orders.wait_until_caught_up()
    when = ("--start", "2025-01-01", "--end", "2100-01-01")
    repaired = orders.run("reconcile", *when, "--repair", "--delete-extra")
    assert 3 == repaired.code
    assert "extra 1: " in repaired.stdout
    assert "counts too high 1: 1 has 3 instead of 2" in repaired.stdout
    assert "rebuild-redis --from-empty` corrects the counts" in repaired.stdout
    succeed(orders.run("rebuild-redis", "--from-empty", "--yes"))
    assert "equal" in succeed(orders.run("reconcile", *when))


def test_only_some_rows(
    orders: Program, source: psycopg.Connection, stack: DevStack, tmp_path: Path, chance: random.Random
) -> None:
    """A row that no longer fits the condition is gone; one that does from now on is there."""
    text = "from dataclasses import replace\nfrom replicator import Where\n"
    text += "from examples.orders.orders_stream import STREAM\n"
    text += "MINE = replace(STREAM, where=Where('status', ('paid', 'new')))\n"
    (tmp_path / "some_orders.py").write_text(text, encoding="utf-8")
    orders.environment |= {"REPLICATOR_STREAM": "some_orders:MINE", "PYTHONPATH": str(tmp_path)}
    shop = Shop(source, chance)
    shop.trade(20)
    succeed(orders.run("init"))
    orders.start()
    when = ("--start", "2025-01-01", "--end", "2100-01-01")
    succeed(orders.run("backfill", *when))
    shop.trade(60)
    orders.wait_until_caught_up()
    # Orders from before carry today's customer.
    succeed(orders.run("backfill", *when))
    found = [decode(line) for line in stack.clickhouse.query(CLICKHOUSE).splitlines()]
    wanted = expected(source, ("paid", "new"))
    assert [order["order_id"] for order in wanted] == [order["order_id"] for order in found]
    assert [order["total"] for order in wanted] == [order["total"] for order in found]
    assert "equal" in succeed(orders.run("reconcile", *when, "--with-content"))


@pytest.mark.parametrize("place", PLACES)
def test_killed_at(
    orders: Program,
    source: psycopg.Connection,
    stack: DevStack,
    *,
    destinations: Destinations,
    chance: random.Random,
    place: str,
) -> None:
    """SIGKILL at a named place: after a restart every order is as it is in PostgreSQL."""
    shop = Shop(source, chance)
    shop.trade(5)
    succeed(orders.run("init"))
    succeed(orders.run("backfill", "--start", "2025-01-01", "--end", "2100-01-01", "--sinks", "clickhouse,redis,http"))
    source.execute("UPDATE shop.orders SET note = note")  # a backfill brings today's customers, in its own order
    orders.altered = ("--die", place, "--after", str(chance.randint(1, 60)))
    process = orders.spawn()
    shop.trade(40)
    assert -signal.SIGKILL == process.wait(60)
    orders.altered = ()
    orders.start()
    shop.trade(10)
    orders.wait_until_caught_up()
    assert_exact(source, stack, destinations)
