"""A stream with several dimensions: sales with their products, and with two customers each, the buyer and the payer."""

from __future__ import annotations

import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from devstack import DevStack
from devstack.control import fetch
from tests.support.destinations import Destinations
from tests.support.program import Program, succeed

SCHEMA = """
CREATE TABLE customers (customer_id bigint PRIMARY KEY, name text, country text);
CREATE TABLE products (product_id uuid PRIMARY KEY, name text, price numeric(9, 2));
CREATE TABLE sales (sale_id bigserial PRIMARY KEY, buyer_id bigint NOT NULL, payer_id bigint, product_id uuid,
                    quantity int NOT NULL, at timestamptz NOT NULL DEFAULT now(), was jsonb);
CREATE FUNCTION as_of_now(s sales) RETURNS jsonb LANGUAGE sql AS $$
    SELECT jsonb_build_object('buyer', b.name, 'payer', p.name, 'country', p.country, 'product', q.name,
                              'price', q.price, 'total', round(s.quantity * q.price, 2))
    FROM (SELECT s.*) AS t LEFT JOIN customers b ON b.customer_id = t.buyer_id
         LEFT JOIN customers p ON p.customer_id = t.payer_id LEFT JOIN products q ON q.product_id = t.product_id
$$;
CREATE FUNCTION was() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.was := as_of_now(NEW);
    RETURN NEW;
END $$;
CREATE TRIGGER was BEFORE INSERT OR UPDATE ON sales FOR EACH ROW EXECUTE FUNCTION was();
INSERT INTO customers SELECT n, 'customer ' || n, nullif(n % 3, 0) FROM generate_series(1, 20) n;
INSERT INTO products SELECT md5(n::text)::uuid, 'product ' || n, nullif(n % 4, 0) + 0.05 FROM generate_series(1, 20) n;
GRANT SELECT ON sales, customers, products TO replicator;
"""
DECLARED = """
from replicator import *
BUYERS = Dimension("public.customers", key="customer_id", on="buyer_id")
PAYERS = Dimension("public.customers", key="customer_id", on="payer_id")
PRODUCTS = Dimension("public.products", key="product_id")
STREAM = Stream(
    "sales", "public.sales", dimensions=(BUYERS, PAYERS, PRODUCTS), updates="upsert", deletes="delete", fields=(
    Field("sale_id", BIGINT, role=Role.IDENTITY),
    Field("buyer_id", BIGINT, role=Role.KEY),
    Field("payer_id", BIGINT.nullable()),
    Field("product_id", UUID.nullable()),
    Field("quantity", BIGINT),
    Field("at", TIMESTAMPTZ, role=Role.TIME),
    Field("buyer", TEXT.nullable(), joined="name", of=BUYERS),
    Field("payer", TEXT.nullable(), joined="name", of=PAYERS),
    Field("country", TEXT.nullable(), joined="country", of=PAYERS),
    Field("product", TEXT.nullable(), joined="name", of=PRODUCTS),
    Field("price", numeric(9, 2).nullable(), joined="price", of=PRODUCTS),
    Field("total", numeric(12, 2).nullable(), derived=Derived(
        lambda quantity, price: quantity * price, of=("quantity", "price"), postgres="{quantity} * {price}"))))
"""
TRADES = (
    """INSERT INTO sales (buyer_id, payer_id, product_id, quantity)
       SELECT 1 + n * 7 %% 23, nullif(n * 5 %% 23, 0), md5((1 + n * 3 %% 23)::text)::uuid, n %% 9
       FROM generate_series(%(n)s::int, %(n)s + 5) n""",
    "UPDATE sales SET quantity = quantity + 1 WHERE sale_id %% 13 = %(n)s %% 13",
    "UPDATE sales SET payer_id = buyer_id WHERE sale_id %% 17 = %(n)s %% 17",
    "DELETE FROM sales WHERE sale_id %% 37 = %(n)s %% 37",
    "UPDATE customers SET name = name || '+' WHERE customer_id %% 5 = %(n)s %% 5",
    "UPDATE customers SET country = nullif(%(n)s %% 4, 0) WHERE customer_id %% 4 = %(n)s %% 4",
    "UPDATE products SET name = name || '*', price = %(n)s %% 100 + 0.25 WHERE hashtext(name) %% 3 = 0",
    "DELETE FROM customers WHERE customer_id %% 31 = %(n)s %% 31",
    "DELETE FROM products WHERE product_id = md5((1 + %(n)s %% 20)::text)::uuid",
    """INSERT INTO products VALUES (md5((1 + %(n)s %% 23)::text)::uuid, 'new ' || %(n)s, %(n)s %% 7)
       ON CONFLICT DO NOTHING""",
    "UPDATE customers SET customer_id = 24 WHERE customer_id = 1 + %(n)s %% 24 AND NOT EXISTS (TABLE only24)",
)
JOINED = ("buyer", "payer", "country", "product", "price", "total")
WAS = "SELECT sale_id, was::text FROM sales ORDER BY 1"
TODAY = "SELECT sale_id, as_of_now(sales)::text FROM sales ORDER BY 1"
CLICKHOUSE = """
SELECT * FROM sales FINAL ORDER BY sale_id
SETTINGS output_format_json_quote_64bit_integers = 0, output_format_json_quote_decimals = 0 FORMAT JSONEachRow
"""
EVERYTHING = ("--start", "2020-01-01", "--end", "2100-01-01")

Sale = dict[str, Any]

_decode = msgspec.json.Decoder(float_hook=Decimal).decode


def trade(source: psycopg.Connection, chance: random.Random, transactions: int) -> None:
    """Sales, and changes of customers and of products between them, in one transaction and in several."""
    for _ in range(transactions):
        with source.transaction():
            for statement in chance.choices(TRADES, weights=[9, 2, 2, 2, 2, 2, 2, 1, 1, 2, 1], k=chance.randint(1, 6)):
                source.execute(statement.encode(), {"n": chance.randrange(10_000)})


def wanted(source: psycopg.Connection, query: str) -> list[Sale]:
    """What the query says that each sale is joined with."""
    sales = [{"sale_id": number, **_decode(text)} for number, text in source.execute(query.encode())]
    assert any(sale["product"] for sale in sales)
    assert any(sale["payer"] is None for sale in sales)
    return sales


def assert_in_stores(sales: list[Sale], stack: DevStack, destinations: Destinations) -> None:
    """ClickHouse has every sale like this, and nothing else; Redis the last one of each buyer."""
    assert sales == [_shown(_decode(row)) for row in stack.clickhouse.query(CLICKHOUSE).splitlines()]
    by_id = {sale["sale_id"]: sale for sale in sales}
    redis = destinations.redis
    last = [_shown(_decode(str(redis.get(key)))) for key in redis.scan_iter("sales:last:*")]
    assert last
    assert [by_id[sale["sale_id"]] for sale in last] == last


def assert_sent(sales: list[Sale], stack: DevStack) -> None:
    """The latest of what the HTTP API was sent of each sale is like this."""
    latest: dict[int, Sale] = {}
    for change in _decode(fetch(stack.api.url)):
        if "sale_id" in change and latest.get(change["sale_id"], change)["_version"] <= change["_version"]:
            latest[change["sale_id"]] = change
    assert sales == [_shown(latest[one]) for one in sorted(latest) if latest[one]["_operation"] == "upsert"]


def _shown(sale: Sale) -> Sale:
    return {name: sale[name] for name in ("sale_id", *JOINED)}


@pytest.fixture
def sales(quick: Program, source: psycopg.Connection, tmp_path: Path) -> Program:
    """A replicator of these tables."""
    source.execute(SCHEMA.encode())
    source.execute("CREATE VIEW only24 AS SELECT FROM customers WHERE customer_id = 24")
    (tmp_path / "sales_stream.py").write_text(DECLARED, encoding="utf-8")
    quick.environment |= {
        "REPLICATOR_STREAM": "sales_stream:STREAM",
        "REPLICATOR_CONTENT_CACHE_SIZE": "5",
        "PYTHONPATH": str(tmp_path),
    }
    return quick


@pytest.mark.parametrize("others", ["", ",enrichment.contract:EVENT"])
def test_several_dimensions(
    sales: Program, source: psycopg.Connection, stack: DevStack, destinations: Destinations, *, others: str
) -> None:
    """Killed in between, one of them altered and one emptied; then backfilled: equal in all sinks, each time."""
    seed = random.randrange(2**32)  # noqa: S311  test data
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test fails
    chance = random.Random(seed)  # noqa: S311  test data
    alone = sales.environment["REPLICATOR_STREAM"]
    sales.environment["REPLICATOR_STREAM"] += others
    succeed(sales.run("init"))
    assert "public.products: there" in succeed(sales.run("check"))
    sales.start()
    trade(source, chance, 30)
    source.execute("TRUNCATE products")
    trade(source, chance, 30)
    sales.wait_until_caught_up()
    trade(source, chance, 30)
    sales.kill()
    trade(source, chance, 60)
    sales.start()
    sales.wait_until_caught_up()
    source.execute("ALTER TABLE products ADD COLUMN weight int")
    sales.wait_for_log("products")
    sales.wait_until_caught_up()
    trade(source, chance, 40)
    sales.wait_until_caught_up()
    assert_in_stores(wanted(source, WAS), stack, destinations)
    assert_sent(wanted(source, WAS), stack)
    assert 0 == sales.stop()

    sales.environment["REPLICATOR_STREAM"] = alone
    succeed(sales.run("backfill", *EVERYTHING))
    assert_in_stores(wanted(source, TODAY), stack, destinations)
    assert "equal" in succeed(sales.run("reconcile", *EVERYTHING, "--with-content"))
    source.execute("UPDATE products SET price = 77")
    found = sales.run("reconcile", *EVERYTHING, "--with-content")
    assert 3 == found.code
    [(number,)] = source.execute("SELECT max(sale_id) FROM sales").fetchall()
    assert re.search(r"^redis\S* +written", succeed(sales.run("trace", str(number))), re.MULTILINE)


FEES = """
CREATE TABLE rates (rate_id bigint PRIMARY KEY, fee numeric);
CREATE TABLE charges (id bigint PRIMARY KEY, rate_id bigint NOT NULL, at timestamptz NOT NULL DEFAULT now(),
                      amount numeric, note text);
INSERT INTO rates VALUES (1, 1.5), (2, 1.23456), (3, 1e30), (4, 2.50000), (5, 'NaN');
GRANT SELECT ON rates, charges TO replicator;
"""
CHARGES = """
from replicator import *
STREAM = Stream("charges", "public.charges", dimensions=(Dimension("public.rates", key="rate_id"),), fields=(
    Field("id", BIGINT, role=Role.IDENTITY),
    Field("rate_id", BIGINT, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME),
    Field("amount", numeric(6, 2).nullable()),
    Field("fee", numeric(6, 2).nullable(), joined="fee")))
"""


def test_numbers_with_more_digits(
    quick: Program, source: psycopg.Connection, stack: DevStack, tmp_path: Path, destinations: Destinations
) -> None:
    """Columns are numeric, without digits. What has too many is a dead letter, and neither cut nor rounded in any sink.

    From the slot, whether the rate is in memory, in its copy or in the WAL, and from a backfill.
    """
    source.execute(FEES.encode())
    (tmp_path / "charges_stream.py").write_text(CHARGES, encoding="utf-8")
    quick.environment |= {
        "REPLICATOR_STREAM": "charges_stream:STREAM",
        "PYTHONPATH": str(tmp_path),
        "REPLICATOR_CONTENT_CACHE_SIZE": "1",
    }
    succeed(quick.run("init"))
    quick.start()
    charge = "INSERT INTO charges SELECT %s::int + n, 1 + n %% 5, now(), 1 FROM generate_series(0, 4) n"
    source.execute(charge, [0])
    quick.wait_until_caught_up()
    quick.kill()
    source.execute(charge, [5])
    source.execute("INSERT INTO rates VALUES (6, 9.999), (7, 9.99)")
    source.execute("INSERT INTO charges SELECT n, n - 4, now(), 1 FROM generate_series(10, 11) n")
    odd = ["1.234", "10000", "1e40", "9999.99", "1.500000", "-9999.990"]
    for number, amount in enumerate(odd, 12):
        source.execute("INSERT INTO charges VALUES (%s, 1, now(), %s)", [number, amount])
    quick.start()
    quick.wait_until_caught_up()
    fits = {0: 1.5, 3: 2.5, 4: None, 5: 1.5, 8: 2.5, 9: None, 11: 9.99} | dict.fromkeys((15, 16, 17), 1.5)

    def there() -> list[dict[int, float | None]]:
        query = "SELECT id, toFloat64(fee) FROM charges FINAL ORDER BY id FORMAT JSONCompactEachRow"
        rows = [msgspec.json.decode(line) for line in stack.clickhouse.query(query).splitlines()]
        sent = [event for event in msgspec.json.decode(fetch(stack.api.url)) if "fee" in event]
        return [
            {number: None if fee is None else float(fee) for number, fee in rows},
            {event["id"]: event["fee"] for event in sent},
        ]

    assert [fits, fits] == there()
    letters = succeed(quick.run("dead-letters", "list")).splitlines()[::2]
    assert 8 == len(letters)
    assert 5 == sum(
        "public.rates.fee is not a number of 6 digits, 2 of them a fraction" in letter for letter in letters
    )
    redis = destinations.redis
    assert 10 == sum(int(redis.get(key) or 0) for key in redis.scan_iter("charges:count:*"))
    assert 0 == quick.stop()
    succeed(quick.run("backfill", *EVERYTHING, "--sinks", "clickhouse,redis,http"))
    assert [fits, fits] == there()
    assert 8 == len(succeed(quick.run("dead-letters", "list")).splitlines()[::2]), "the same ones"
    source.execute("UPDATE rates SET fee = round(fee, 2) WHERE fee < 100")
    source.execute("DELETE FROM charges WHERE amount > 9 OR scale(amount) = 3 OR rate_id = 3")
    assert "missing 3" in quick.run("reconcile", *EVERYTHING).stdout, "those with rates that have been mended"
