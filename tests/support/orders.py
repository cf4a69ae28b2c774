"""The example's orders: random changes of them, and what every sink must have by PostgreSQL (`orders.sql`).

A `Shop` is one writer. Several may work at once: PostgreSQL notes in which order they have committed.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import psycopg
from psycopg import sql

from devstack import DevStack
from devstack.control import fetch
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.environment import ROLE

STREAM = "examples.orders.orders_stream:STREAM"
SCHEMA = Path(__file__).parents[2] / "examples/orders/schema.sql"
LOG = Path(__file__).parent / "orders.sql"
FIELDS = (
    "order_id", "customer_id", "ordered_at", "status", "total", "lines", "note", "shipped_at", "customer", "country",
    "vat_percent", "vat",
)  # fmt: skip
OF_A_WRITE = ("customer_id", "status", "total", "customer", "country", "vat_percent")
"""What is noted of each write."""
OF_CUSTOMER = ("customer", "country", "vat_percent", "vat")
CUSTOMERS = 5
PARTS = ("orders_2026_01", "orders_2026_02", "orders_later")
IDENTITY_LOCK = 4713

CLICKHOUSE = f"""
SELECT {", ".join(FIELDS)} FROM orders FINAL ORDER BY toString(order_id)
SETTINGS date_time_output_format = 'iso', output_format_json_quote_64bit_integers = 0,
         output_format_json_quote_decimals = 0
FORMAT JSONEachRow
"""  # noqa: S608  our own constants
EXPECTED = "SELECT row_to_json(e)::text FROM shop.expected e"
CUSTOMER_WAS = """
SELECT json_build_array(customer_id, at, customer, country, vat_percent)::text
FROM shop.history WHERE order_id IS NULL ORDER BY at
"""
LASTS = "SELECT customer_id, order_id::text, stays, long FROM shop.lasts ORDER BY at DESC"
WRITTEN = "SELECT order_id::text, max(at) FROM shop.writes GROUP BY 1"
WRITES = "SELECT json_build_array(order_id, deleted, long, row_to_json(w))::text FROM shop.writes w ORDER BY at"
TOP = """
SELECT customer_id, count(*) FROM shop.orders WHERE ordered_at > now() - interval '10 minutes' GROUP BY 1
"""
MANY = """
INSERT INTO shop.orders (customer_id, ordered_at, status, total, lines, note)
SELECT 1 + n %% %(customers)s, (ARRAY['2026-01-20Z', '2026-02-20Z', 'now'])[1 + n %% 3]::timestamptz, 'paid',
       n / 100.0, jsonb_build_array(n, repeat('é', n %% 50)), nullif(n %% 3, 0)::text
FROM generate_series(1, %(rows)s) n
"""
CHANGE_MANY = "UPDATE shop.orders SET total = total + 1, status = 'shipped' WHERE order_id BETWEEN %s AND %s"
MOVE_MANY = "UPDATE shop.orders SET ordered_at = 'now' WHERE order_id BETWEEN %s AND %s"
REMOVE_MANY = "DELETE FROM shop.orders WHERE order_id BETWEEN %s AND %s"

Order: TypeAlias = dict[str, Any]
Write: TypeAlias = tuple[Any, ...]
"""Of an order, the values of OF_A_WRITE; empty: it is gone."""
decode = msgspec.json.Decoder(float_hook=Decimal).decode


def create(connection: psycopg.Connection) -> None:
    """The example's tables, their log, and some customers."""
    for file in (SCHEMA, LOG):
        connection.execute(file.read_bytes())
    role = sql.Identifier(ROLE)
    connection.execute(sql.SQL("GRANT USAGE ON SCHEMA shop TO {}").format(role))
    connection.execute(sql.SQL("GRANT SELECT ON shop.orders, shop.customers TO {}").format(role))
    for number in range(1, CUSTOMERS + 1):
        connection.execute("INSERT INTO shop.customers VALUES (%s, %s, 'DE', 19)", [number, f"customer {number}"])


def replica_identity(connection: psycopg.Connection, what: str) -> None:
    """FULL or DEFAULT, of all tables."""
    for table in ("orders", *PARTS, "customers"):
        connection.execute(f"ALTER TABLE shop.{table} REPLICA IDENTITY {what}".encode())


class Shop:
    """Random orders, and changes of them; one writer."""

    def __init__(self, source: psycopg.Connection, chance: random.Random) -> None:
        self._source, self._chance = source, chance

    def trade(self, transactions: int) -> None:
        """So many, of a few statements each."""
        for _ in range(transactions):
            with self._source.transaction():
                self.steps()

    def steps(self) -> None:
        """A few statements."""
        orders = [self._order] * 4 + [self._change] * 4 + [self._rewrite, self._again]
        steps = [*orders, self._move, self._rename, self._remove, self._customer]
        for step in self._chance.choices(steps, k=self._chance.randint(1, 5)):
            step()

    def many(self, rows: int) -> None:
        """Orders in one statement, and changes of a share of all that there are, each in one statement."""
        self._source.execute(MANY, {"rows": rows, "customers": CUSTOMERS})
        for statement in self._chance.sample([CHANGE_MANY, MOVE_MANY, REMOVE_MANY], 2):
            first = self._chance.getrandbits(128)
            self._source.execute(statement, [_uuid(first), _uuid(min(first + 2**124, 2**128 - 1))])

    def customers(self, *, truncates: bool = False) -> None:
        """Some change; seldom one is gone or comes back, or all are gone. A TRUNCATE makes the table another one."""
        for _ in range(self._chance.randint(1, 3)):
            self._chance.choice([self._customer] * 6 + [self._customer_goes, self._customer_comes])()
        if self._chance.random() < 0.1:
            self._source.execute("TRUNCATE shop.customers" if truncates else "DELETE FROM shop.customers")

    def _some(self) -> list[Any]:
        """A few orders that are there."""
        query = "SELECT order_id FROM shop.orders WHERE order_id >= %s ORDER BY 1 LIMIT %s"
        found = self._source.execute(query, [_uuid(self._chance.getrandbits(128)), self._chance.randint(1, 3)])
        return [order_id for (order_id,) in found]

    def _order(self) -> None:
        self._insert(_uuid(self._chance.getrandbits(128)))

    def _insert(self, order_id: object) -> None:
        query = """INSERT INTO shop.orders (order_id, customer_id, ordered_at, total, lines, note)
                   VALUES (%s, %s, %s, %s, %s, %s)"""
        total = Decimal(self._chance.randint(-(10**6), 10**12)) / 100
        at, customer = self._chance.choice(["2026-01-15Z", "now"]), self._customer_id()
        self._source.execute(query, [order_id, customer, at, total, self._lines(), self._note()])

    def _lines(self) -> str:
        sku = f"ü{self._chance.getrandbits(self._chance.choice([4, 40, 40_000])):x}"  # PostgreSQL keeps long ones apart
        return msgspec.json.encode([{"sku": sku, "n": self._chance.randint(1, 9)}]).decode()

    def _note(self) -> str | None:
        return self._chance.choice([None, "", "a|b~", "日本 \\ \"'"])

    def _customer_id(self) -> int:
        return self._chance.randint(1, CUSTOMERS)

    def _change(self) -> None:
        query = "UPDATE shop.orders SET status = %s, total = total + 0.01, shipped_at = %s WHERE order_id = ANY(%s)"
        shipped = self._chance.choice([None, "2026-02-03 04:05:06.5+02"])
        self._source.execute(query, [self._chance.choice(["paid", "shipped"]), shipped, self._some()])

    def _rewrite(self) -> None:
        query = "UPDATE shop.orders SET lines = %s, note = %s WHERE order_id = ANY(%s)"
        self._source.execute(query, [self._lines(), self._note(), self._some()])

    def _move(self) -> None:
        """To another customer and another month."""
        query = "UPDATE shop.orders SET customer_id = %s, ordered_at = %s WHERE order_id = ANY(%s)"
        at = self._chance.choice(["2026-02-10Z", "now"])
        self._source.execute(query, [self._customer_id(), at, self._some()])

    def _rename(self) -> None:
        new: object = _uuid(self._chance.getrandbits(128))
        if self._chance.random() < 0.3:
            new = self._former() or new
        for old in self._some()[:1]:
            self._source.execute("UPDATE shop.orders SET order_id = %s WHERE order_id = %s", [new, old])

    def _again(self) -> None:
        """An order that was deleted comes back as another one."""
        if former := self._former():
            self._insert(former)

    def _former(self) -> object:
        """An identity that was there, and is not. Nobody else takes it: it is no key of the partitioned table."""
        query = "SELECT order_id FROM shop.log WHERE deleted AND order_id >= %s ORDER BY 1 LIMIT 1"
        found = self._source.execute(query, [_uuid(self._chance.getrandbits(128))]).fetchone()
        if not found:
            return None
        self._source.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s::text))", [IDENTITY_LOCK, found[0]])
        there = self._source.execute("SELECT FROM shop.orders WHERE order_id = %s", found).fetchone()
        return None if there is not None else found[0]

    def _remove(self) -> None:
        self._source.execute("DELETE FROM shop.orders WHERE order_id = ANY(%s)", [self._some()])

    def _customer(self) -> None:
        values = [f"name {self._chance.random()}", self._chance.choice([None, 7, 19, Decimal("7.77")])]
        query = "UPDATE shop.customers SET name = %s, vat_percent = %s WHERE customer_id = %s"
        self._source.execute(query, [*values, self._customer_id()])

    def _customer_goes(self) -> None:
        self._source.execute("DELETE FROM shop.customers WHERE customer_id = %s", [self._customer_id()])

    def _customer_comes(self) -> None:
        query = "INSERT INTO shop.customers VALUES (%s, 'back', 'FR', 20) ON CONFLICT DO NOTHING"
        self._source.execute(query, [self._customer_id()])


def _uuid(number: int) -> str:
    return f"{number:032x}"


def expected(source: psycopg.Connection, only: Sequence[str] = ()) -> list[Order]:
    """Every order that is there, by identity; `only` with such a status."""
    with source.transaction():
        source.execute("SET LOCAL TimeZone = 'UTC'")
        orders: list[Order] = [decode(text) for (text,) in source.execute(EXPECTED)]
    chosen = [order for order in orders if order["status"] in only or not only]
    return sorted(chosen, key=lambda order: str(order["order_id"]))


def assert_exact(
    source: psycopg.Connection, stack: DevStack, destinations: Destinations, *, exactly_as_of: bool = True
) -> None:
    """Every field of every order, and nothing else, in every sink.

    Where the tables were altered, rows were read from them again: then the customer may be as of later, and which order
    was changed last is not known.
    """
    wanted = expected(source)
    assert wanted, "a test without orders can't fail"
    later = _Later(source, [] if exactly_as_of else wanted)

    def assert_same(orders: list[Order], found: list[Order], where: str) -> None:
        _assert_same(orders, list(map(later.excused, found)), where)

    by_id = {order["order_id"]: order for order in wanted}
    assert_same(wanted, [decode(line) for line in stack.clickhouse.query(CLICKHOUSE).splitlines()], "ClickHouse")
    there = [change for change in _newest(taken(stack)) if change["_operation"] == "upsert"]
    assert_same(wanted, [{name: order[name] for name in FIELDS} for order in there], "the API")
    redis = destinations.redis
    counts = {int(key.rpartition(":")[2]): int(redis.get(key) or 0) for key in redis.scan_iter("orders:count:*")}
    assert Counter(order["customer_id"] for order in wanted) == {key: count for key, count in counts.items() if count}
    found = {int(key.rpartition(":")[2]): decode(str(redis.get(key))) for key in redis.scan_iter("orders:last:*")}
    if exactly_as_of:
        allowed = last_orders(source)
        last = {customer: found.get(customer, {}).get("order_id") for customer in allowed.keys() | found.keys()}
        assert {} == {one: order for one, order in last.items() if order not in allowed.get(one, {None})}
    lasts = [by_id[found[customer]["order_id"]] for customer in sorted(found)]
    assert [order["customer_id"] for order in lasts] == sorted(found)
    assert_same(lasts, [found[customer] for customer in sorted(found)], "last orders in Redis")


def last_orders(source: psycopg.Connection) -> dict[int, set[str | None]]:
    """By customer, the order that may be the last in Redis; None: there is none, as the last one has gone.

    An update that lacks a long value comes as a delete if the order is gone by then: then the one before may be it.
    """
    allowed: dict[int, set[str | None]] = defaultdict(set)
    found: set[int] = set()
    for customer, order_id, stays, long in source.execute(LASTS):
        if customer not in found:
            allowed[customer].add(order_id if stays else None)
            found |= {customer} if stays or not long else set()
    return allowed


class _Later:
    """What the customers of some orders have become since these were written."""

    def __init__(self, source: psycopg.Connection, wanted: list[Order]) -> None:
        self._wanted = {order["order_id"]: order for order in wanted}
        self._written: dict[str, int] = dict(source.execute(WRITTEN).fetchall())
        self._was: dict[int, dict[tuple[Any, ...], int]] = defaultdict(dict)
        """Customer, as it was, and when it was so last."""
        for (text,) in source.execute(CUSTOMER_WAS):
            customer_id, at, *customer = decode(text)
            self._was[customer_id][tuple(customer)] = at

    def excused(self, order: Order) -> Order:
        """As it should be, where it differs in nothing but a customer as of later."""
        wanted = self._wanted.get(order["order_id"])
        if wanted is None or any(order[name] != wanted[name] for name in FIELDS if name not in OF_CUSTOMER):
            return order
        later = self._was[order["customer_id"]].get(tuple(order[name] for name in OF_CUSTOMER[:3]), 0)
        percent = order["vat_percent"]
        vat = None if percent is None else _vat(order["total"], Decimal(percent))
        return wanted if later > self._written[order["order_id"]] and vat == order["vat"] else order


def _vat(total: Decimal | int, percent: Decimal) -> Decimal:
    """As PostgreSQL rounds."""
    return (total * percent / (100 + percent)).quantize(Decimal("0.01"), rounding="ROUND_HALF_UP")


def _assert_same(wanted: list[Order], found: list[Order], where: str) -> None:
    """In few words."""
    if wanted != found:
        ids = [Counter(order["order_id"] for order in orders) for orders in (wanted, found)]
        there = {order["order_id"]: order for order in found}
        pairs = [(order, there.get(order["order_id"])) for order in wanted]
        wrong = [(order, other) for order, other in pairs if other not in (None, order)]
        raise AssertionError(
            f"{where}: of {len(wanted)} orders lacks {_some(ids[0] - ids[1])}, has too much {_some(ids[1] - ids[0])},"
            f" has wrong {len(wrong)}: {wrong[:2]}"
        )


def _some(ids: Counter[str]) -> str:
    return f"{ids.total()}: {[*ids][:3]}"


def taken(stack: DevStack) -> list[Order]:
    """The changes that the API has taken, each of one identity, in their order, repeats included."""
    return list(_unfolded(decode(fetch(stack.api.url))))


def _unfolded(changes: list[Order]) -> Iterator[Order]:
    for change in changes:
        if "order_id" not in change:  # another stream's
            continue
        if "_was" in change:
            yield {"order_id": change["_was"], "_operation": "delete", "_version": change["_version"]}
        yield change


def _newest(changes: list[Order]) -> list[Order]:
    """What a receiver has to keep: the highest version of each identity."""
    versions: dict[str, Order] = {}
    for change in changes:
        before = versions.get(change["order_id"])
        if before is None or before["_version"] <= change["_version"]:
            versions[change["order_id"]] = change
    return [versions[order_id] for order_id in sorted(versions)]


def assert_every_write(source: psycopg.Connection, stack: DevStack) -> int:
    """The API got each write of each order, in the order of the commits, as it was then; how many it got again.

    An update that does not carry a long value comes as a delete where the row is gone by the time of the look-up.
    """
    writes: dict[str, list[Write]] = defaultdict(list)
    long = set[str]()
    for (text,) in source.execute(WRITES):
        order_id, deleted, is_long, row = decode(text)
        writes[order_id].append(() if deleted else tuple(row[name] for name in OF_A_WRITE))
        long |= {order_id} if is_long else set()
    arrived: dict[str, dict[str, Write]] = defaultdict(dict)
    changes = taken(stack)
    for change in changes:
        what = () if change["_operation"] == "delete" else tuple(change[name] for name in OF_A_WRITE)
        before = arrived[change["order_id"]].setdefault(change["_version"], what)
        if before != what and not (change["order_id"] in long and () in (before, what)):
            raise AssertionError(f"{change['order_id']} came again as {what}, not {before}")
    assert not arrived.keys() - writes.keys(), "orders that never were"
    for order_id, wanted in writes.items():
        found = [what for _, what in sorted(arrived[order_id].items())]
        right = _some_of(wanted, filter(None, found)) if order_id in long else found == wanted
        assert right, f"writes of {order_id} were {wanted}, and arrived as {found}"
    return len(changes) - sum(map(len, arrived.values()))


def _some_of(wanted: Iterable[Write], found: Iterable[Write]) -> bool:
    """Whether all of `found` is in `wanted`, in its order."""
    rest = iter(wanted)
    return all(any(one == other for other in rest) for one in found)


def wait_for_top(source: psycopg.Connection, destinations: Destinations, seconds: float) -> None:
    """Until the window has the orders that are there and of the last minutes."""

    def right() -> bool:
        pairs: list[tuple[str, float]] = destinations.redis.zrange("top:orders:10m", 0, -1, withscores=True)  # type: ignore[assignment]  # the stub has a wider type
        return dict(source.execute(TOP).fetchall()) == {int(key): int(score) for key, score in pairs}

    wait_until(right, "the top list to be right", seconds)
