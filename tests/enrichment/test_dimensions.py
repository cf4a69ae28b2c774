"""Several dimensions of a stream: each is current as of the commit, whatever happens to the others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from checkpoint_store import SqlCheckpointStore
from enrichment import SeveralStreams, StreamEnricher, Tables
from enrichment.ledger import TableLedger
from enrichment.streams.content import look_up, preload
from enrichment.tables.catalog import Relation, Shape
from enrichment.tables.guard import Record
from replicator import BIGINT, TEXT, TIMESTAMPTZ, UUID, Derived, Dimension, Field, Role, Stream, numeric
from replicator.contracts.events import Checkpoint, ContentChange, Event, Id, Lsn, Position, Row
from tests.support.rows import EVENT_TABLES, columns_of

BUYERS = Dimension("shop.customers", key="customer_id", on="buyer_id")
PAYERS = Dimension("shop.customers", key="customer_id", on="payer_id")
PRODUCTS = Dimension("shop.products", key="product_id")
SALES = Tables(
    Stream(
        "sales",
        table="shop.sales",
        dimensions=(BUYERS, PRODUCTS, PAYERS),
        fields=(
            Field("sale_id", BIGINT, role=Role.IDENTITY),
            Field("buyer", TEXT.nullable(), joined="name", of=BUYERS),
            Field("buyer_id", BIGINT, role=Role.KEY),
            Field("payer_id", BIGINT.nullable()),
            Field("product_id", UUID.nullable()),
            Field("price", numeric(9, 2).nullable(), joined="price", of=PRODUCTS),
            Field("product", TEXT.nullable(), joined="name", of=PRODUCTS),
            Field("at", TIMESTAMPTZ, role=Role.TIME),
            Field("country", TEXT.nullable(), joined="country", of=PAYERS),
            Field("payer", TEXT.nullable(), joined="name", of=PAYERS),
            Field("twice", numeric(9, 2).nullable(), derived=Derived(lambda price: 2 * price, of=("price",))),
        ),
    )
)
FIRST: Lsn = 1_000
NAMES: Mapping[str, tuple[str, ...]] = {
    "customers": ("customer_id", "name", "country"),
    "products": ("product_id", "name", "price"),
}
PRODUCT_IDS = [f"00000000-0000-0000-0000-00000000000{n}" for n in range(1, 7)]
IDS: Mapping[str, Sequence[Id]] = {"customers": range(1, 7), "products": PRODUCT_IDS}
OF_QUERY = {
    query: (join.table, tuple(NAMES[join.table].index(field.joined) - 1 for field in join.fields))
    for join in SALES.joins
    for query in (preload(SALES, join), look_up(SALES, join))
}
"""Which table, and which of its columns."""

Values = tuple[Any, ...]

_decode = msgspec.json.Decoder(float_hook=Decimal).decode


class Source:
    """Has the tables of today only, and counts who asks for some of their rows."""

    def __init__(self, customers: dict[Id, Values], products: dict[Id, Values]) -> None:
        self.tables: dict[str, dict[Id, Values]] = {"customers": customers, "products": products}
        self.looked_up: list[tuple[str, list[Id]]] = []
        self.copied: list[str] = []

    async def rows(self, query: str, parameters: Mapping[str, Any]) -> list[Values]:
        """As `enrichment.database.Database`."""
        name, places = OF_QUERY[query]
        table = self.tables[name]
        if "ids" in parameters:
            self.looked_up.append((name, sorted(parameters["ids"])))
            ids = [one for one in parameters["ids"] if one in table]
        else:
            self.copied.append(name)
            ids = sorted((one for one in table if one <= parameters["highest"]), reverse=True)[: parameters["count"]]
        return [(one, *(table[one][place] for place in places)) for one in ids]


def shop() -> Source:
    """A few of each."""
    return Source(
        {1: ("Ada", "GB"), 2: ("Bo", None)},
        {PRODUCT_IDS[0]: ("pen", Decimal("1.50")), PRODUCT_IDS[1]: ("ink", Decimal(7))},
    )


def enricher(source: Source, size: int = 100, tables: Tables = SALES) -> StreamEnricher:
    """A new process on that database."""
    made = StreamEnricher("", tables, size)
    made._database = source  # type: ignore[assignment]  # noqa: SLF001  no server needed
    for contents in made._contents:  # noqa: SLF001
        contents._database = source  # type: ignore[assignment]  # noqa: SLF001
    return made


def sale(number: int, buyer: int, payer: int | None, product: Id | None) -> Row:
    """A row of the events' table."""
    values = {"sale_id": number, "buyer_id": buyer, "payer_id": payer, "product_id": product}
    return Row("I", "shop", "sales", columns_of([*values.items(), ("at", "2026-01-08 14:21:52+00")]), [])


def change(action: str, table: str, one: Id | None = None, values: Values = (), was: Id | None = None) -> Row:
    """A row of a dimension."""
    names = NAMES[table]
    columns = [*zip(names, (one, *values), strict=True)] if values else []
    return Row(action, "shop", table, columns_of(columns), columns_of([] if was is None else [(names[0], was)]))


def found(event: Event) -> Values:
    """What an event has of its dimensions."""
    fields = _decode(event.json)
    return tuple(fields[name] for name in ("buyer", "payer", "country", "product", "price", "twice"))


def wanted(source: Source, row: Row) -> Values:
    """What it has to have at this moment."""
    cells = {column.name: column.value for column in row.columns}
    customers, products = source.tables.values()
    buyer, payer = (customers.get(cells[name], (None, None)) for name in ("buyer_id", "payer_id"))
    product, price = products.get(cells["product_id"], (None, None))
    return buyer[0], *payer, product, price, None if price is None else 2 * price


class History:
    """Transactions at random, with sales and changes of both tables between each other."""

    def __init__(self, source: Source, chance: random.Random, transactions: int) -> None:
        self.wanted: dict[Position, Values] = {}
        self._source, self._chance, self._number = source, chance, 0
        self.transactions = [self._transaction(FIRST + 10 * number) for number in range(transactions)]

    def _transaction(self, commit_lsn: Lsn) -> list[Row]:
        rows = []
        for ordinal in range(1, self._chance.randrange(2, 9)):
            row = self._sale() if self._chance.random() < 0.6 else self._change()
            row.commit_lsn, row.ordinal = commit_lsn, ordinal
            if row.table == "sales":
                self.wanted[Position(commit_lsn, ordinal)] = wanted(self._source, row)
            rows.append(row)
        return rows

    def _sale(self) -> Row:
        self._number += 1
        customer = self._chance.choice(IDS["customers"]), self._chance.choice([None, *IDS["customers"]])
        return sale(self._number, *customer, self._chance.choice([None, *PRODUCT_IDS]))

    def _change(self) -> Row:
        name = self._chance.choice([*IDS])
        table, one, other = self._source.tables[name], *self._chance.choices(IDS[name], k=2)
        action = self._chance.choice("UUUUUDDT")
        if action == "T" and self._chance.random() < 0.3:
            table.clear()
            return change("T", name)
        second = self._chance.choice([None, "FR", "DE"]) if name == "customers" else Decimal(self._chance.randrange(99))
        values = (f"name {self._chance.random()}", second)
        if one not in table:
            table[one] = values
            return change("I", name, one, values)
        del table[one]
        if action == "D":
            return change("D", name, was=one)
        renumbered = other if other not in table and self._chance.random() < 0.3 else one
        table[renumbered] = values
        return change("U", name, renumbered, values, was=one)


@pytest.fixture
def store(tmp_path: Path) -> SqlCheckpointStore:
    """With a first checkpoint, as the slot is made."""
    store = SqlCheckpointStore(f"sqlite:///{tmp_path}/checkpoint.db")
    store.create()
    store.save(Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=FIRST, sinks={}))
    return store


def stored(store: SqlCheckpointStore) -> Checkpoint:
    """What is on disk."""
    checkpoint = store.load("s")
    assert checkpoint is not None
    return checkpoint


async def save(store: SqlCheckpointStore, made: StreamEnricher, end_lsn: Lsn, *, heard: bool = True) -> None:
    """A checkpoint; not `heard`: the answer is lost."""
    contents, changes = made.changed(end_lsn)
    await asyncio.to_thread(store.save, structs.replace(stored(store), end_lsn=end_lsn, contents=contents), changes)
    if heard:
        made.saved(end_lsn)


async def enriched(made: StreamEnricher, *rows: Row, lsn: Lsn = FIRST) -> list[Values]:
    """What the events of one transaction have."""
    rows = tuple(structs.replace(row, commit_lsn=lsn, ordinal=n) for n, row in enumerate(rows, 1))
    return [found(event) for event in (await made.enrich(rows)).events]


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_each_is_as_of_the_commit(store: SqlCheckpointStore, size: int) -> None:
    """Killed anywhere, the answer of a save lost: with memory for one row of each, or for all; nobody asks for today's.

    One of the tables is joined twice.
    """
    seed = random.randrange(2**32)  # noqa: S311  test data
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test fails
    chance = random.Random(seed)  # noqa: S311  test data
    source = shop()
    first = enricher(source, size)
    await first.open(store, stored(store))
    await save(store, first, FIRST)
    source.looked_up.clear()
    history = History(source, chance, 100)  # all of it was committed before the first of it is read
    while (begin := stored(store).end_lsn) <= history.transactions[-1][0].commit_lsn:
        made = enricher(source, size)
        await made.open(store, stored(store))
        left = [rows for rows in history.transactions if rows[0].commit_lsn >= begin][: chance.randrange(1, 30)]
        rows = [structs.replace(row) for transaction in left for row in transaction]
        while rows:
            count = chance.randrange(1, 7)
            for event in (await made.enrich(rows[:count])).events:
                assert history.wanted[Position(event.commit_lsn, event.ordinal)] == found(event)
            del rows[:count]
        await save(store, made, chance.choice(left)[0].commit_lsn + 10, heard=chance.random() < 0.8)
    assert [] == source.looked_up


async def test_a_shortcut_takes_over_from_each(store: SqlCheckpointStore) -> None:
    """The same event as the general way makes; none where one of the rows is not known."""
    made = enricher(shop())
    await made.open(store, stored(store))
    rows = [sale(number, 1, payer, PRODUCT_IDS[0]) for number, payer in enumerate([2, None, 99], 1)]
    [known, unpaid, unknown] = [msgspec.json.encode(row) for row in rows]
    placed = [structs.replace(row, commit_lsn=FIRST, ordinal=number) for number, row in enumerate(rows[:2], 1)]
    events = (await made.enrich(placed)).events
    shortcut = made.shortcut()
    assert shortcut is not None
    assert events == [shortcut(known, FIRST, 1), shortcut(unpaid, FIRST, 2)]
    assert shortcut(unknown, FIRST, 3) is None


async def test_what_is_not_known_is_asked_of_its_own_table() -> None:
    """Once for all rows."""
    source = shop()
    made = enricher(source)
    rows = [sale(1, 1, 2, PRODUCT_IDS[0]), sale(2, 2, None, PRODUCT_IDS[0]), sale(3, 9, 2, None)]
    assert [values[:4] for values in await enriched(made, *rows)] == [
        ("Ada", "Bo", None, "pen"),
        ("Bo", None, None, "pen"),
        (None, "Bo", None, None),
    ]
    assert [("customers", [1, 2, 9]), ("products", PRODUCT_IDS[:1]), ("customers", [2])] == source.looked_up


def altered(name: str) -> Shape:
    """The catalog after that table has become another one."""
    table: dict[str, Any] = dict.fromkeys(Relation.__struct_fields__, "")
    table |= {"root": name, "name": name, "schema": "shop", "top": True, "oid": 7, "file": 7, "kind": "r"}
    return Shape((msgspec.convert(table | {"columns": [], "keys": []}, Relation),))


async def test_another_table_leaves_the_copies_of_the_others(store: SqlCheckpointStore) -> None:
    """Products were altered: they are copied as they are now, the customers go on as of the commit."""
    source = shop()
    first = enricher(source)
    await first.open(store, stored(store))
    await save(store, first, FIRST)
    source.tables["customers"] = {1: ("today", None)}
    source.tables["products"] = {PRODUCT_IDS[0]: ("today", None)}
    source.copied.clear()
    made = enricher(source)
    made._guard.shape = altered("products")  # noqa: SLF001
    made._guard.content_untils = {"customers": 0, "products": FIRST + 5}  # noqa: SLF001
    await made.open(store, stored(store))
    assert ["products"] == source.copied
    rows = [
        change("U", "products", PRODUCT_IDS[0], ("former", None), was=PRODUCT_IDS[0]),
        sale(1, 1, 2, PRODUCT_IDS[0]),
    ]
    assert [("Ada", "Bo", None, "today", None, None)] == await enriched(made, *rows)


async def test_a_change_that_can_not_be_read_gives_up_its_own_copy(store: SqlCheckpointStore) -> None:
    """The checkpoint says which copies there are; the lost one is made anew."""
    source = shop()
    made = enricher(source)
    await made.open(store, stored(store))
    await save(store, made, FIRST)
    await enriched(made, change("D", "products"), change("U", "customers", 1, ("Eve", "GB"), was=1))
    await save(store, made, FIRST + 10)
    source.tables["customers"] = {1: ("today", None)}
    source.tables["products"] = {PRODUCT_IDS[0]: ("today", None)}
    source.copied.clear()
    again = enricher(source)
    await again.open(store, stored(store))
    assert ["products"] == source.copied
    [values] = await enriched(again, sale(1, 1, 1, PRODUCT_IDS[0]), lsn=FIRST + 10)
    assert ("Eve", "Eve", "GB", "today") == values[:4]


async def test_the_lost_copy_comes_back_behind_the_checkpoint(store: SqlCheckpointStore) -> None:
    """While it runs: then the checkpoint names all of them again."""
    source = shop()
    made = enricher(source)
    await made.open(store, stored(store))
    whole = made.changed(FIRST).contents
    await enriched(made, change("D", "products"))
    partly = made.changed(FIRST + 10).contents
    await save(store, made, FIRST + 10)
    await enriched(made, sale(1, 1, 1, PRODUCT_IDS[0]), lsn=FIRST + 10)
    await save(store, made, FIRST + 20)
    names = [str(text).split()[0] for text in (whole, partly, stored(store).contents)]
    assert names[0] == names[2] != names[1]
    assert [24] * 3 == [*map(len, names)]


async def test_a_truncate_is_of_one_table(store: SqlCheckpointStore) -> None:
    """Joined twice, it is empty for both; the other one stays."""
    made = enricher(shop())
    await made.open(store, stored(store))
    assert [(None, None, None, "pen")] == [
        values[:4] for values in await enriched(made, change("T", "customers"), sale(1, 1, 2, PRODUCT_IDS[0]))
    ]
    assert [ContentChange(FIRST, None, None, f"customers.{on}") for on in ("buyer_id", "payer_id")] == list(
        made.changed(FIRST + 1).changes
    )


async def test_a_letter_of_a_dimension_names_no_event() -> None:
    """Even if it has a column that is called as the event's identity."""
    row = Row("U", "shop", "customers", columns_of([("sale_id", 5), ("name", "Ada")]), [], commit_lsn=FIRST, ordinal=1)
    [letter] = (await enricher(shop()).enrich([row])).refused
    assert letter.reason == "shop.customers has no customer_id, a 64-bit integer, in the row's columns"
    assert letter.event_id is None


async def test_what_the_stream_does_not_show_is_looked_up(store: SqlCheckpointStore) -> None:
    """Products are a view: every event asks for them. The copies of the others serve on, beside other streams too."""
    source = shop()
    for copied in (True, False):
        source.copied.clear()
        sales = enricher(source)
        sales._contents[1].shown = False  # noqa: SLF001
        streams = SeveralStreams([sales, enricher(source, tables=Tables(replace(alone(), name="trades")))])
        await streams.open(store, stored(store))
        assert copied == bool(source.copied)
        assert "products" not in source.copied
        contents, changes = streams.changed(FIRST)
        await asyncio.to_thread(store.save, structs.replace(stored(store), contents=contents), changes)
    for name in ("today", "later"):
        source.looked_up.clear()
        source.tables["products"][PRODUCT_IDS[0]] = (name, None)
        [values] = await enriched(sales, sale(1, 1, 2, PRODUCT_IDS[0]))
        assert ("Ada", name) == (values[0], values[3])
        assert [("products", PRODUCT_IDS[:1])] == source.looked_up
    assert sales.shortcut() is None


def renamed() -> Stream:
    """The sales, whose buyers are joined on a field of another name."""
    buyers = replace(BUYERS, on="purchaser_id")
    fields = [replace(field, of=buyers) if field.of == BUYERS else field for field in SALES.stream.fields]
    [place] = [place for place, field in enumerate(fields) if field.name == "buyer_id"]
    fields[place] = replace(fields[place], name="purchaser_id", column="buyer_id")
    return replace(SALES.stream, dimensions=(buyers, PRODUCTS, PAYERS), fields=tuple(fields))


def alone() -> Stream:
    """The sales with their buyers alone."""
    fields = [field for field in SALES.stream.fields if field.of in {None, BUYERS} and not field.derived]
    return replace(SALES.stream, dimensions=(BUYERS,), fields=tuple(fields))


@pytest.mark.parametrize(
    ("before", "after"),
    [(alone(), SALES.stream), (SALES.stream, alone()), (SALES.stream, renamed())],
    ids=["more", "fewer", "renamed"],
)
async def test_a_copy_in_another_place_is_not_used(store: SqlCheckpointStore, before: Stream, after: Stream) -> None:
    """The declaration has changed: what was copied under another name would look like no rows at all."""
    source = shop()
    first = enricher(source, tables=Tables(before))
    await first.open(store, stored(store))
    await save(store, first, FIRST)
    source.copied.clear()
    made = enricher(source, tables=Tables(after))
    await made.open(store, stored(store))
    assert source.copied[0] == "customers"
    row = structs.replace(sale(1, 1, 2, PRODUCT_IDS[0]), commit_lsn=FIRST, ordinal=1)
    [event] = (await made.enrich([row])).events
    assert "Ada" == _decode(event.json)["buyer"]


async def test_nor_is_the_copy_of_a_stream_that_had_another_name(store: SqlCheckpointStore) -> None:
    """Of several in a slot each has its copies under its own name."""
    source = shop()
    for name, copied in (("trades", 4), ("trades", 0), ("deals", 4)):
        source.copied.clear()
        tables = [SALES, Tables(replace(alone(), name=name))]
        streams = SeveralStreams([enricher(source, tables=one) for one in tables])
        await streams.open(store, stored(store))
        assert copied == len(source.copied)
        contents, changes = streams.changed(FIRST)
        await asyncio.to_thread(store.save, structs.replace(stored(store), contents=contents), changes)


def test_one_dimension_is_stored_as_ever() -> None:
    """What an earlier release has written is read: its copy, and its record, which has no time of each dimension."""
    made = StreamEnricher("", EVENT_TABLES, 10)
    assert made.contents_name == "8894e82de23281d7195b3c57"
    assert [""] == [join.copy for join in EVENT_TABLES.joins]
    made._guard.content_untils = {"content": 5}  # noqa: SLF001
    record = msgspec.json.decode(msgspec.json.encode(made._guard.accept()))  # noqa: SLF001
    assert 5 == msgspec.convert(record, Record).until_of("content")
    assert {"content": 5} == record.pop("content_untils")
    assert 7 == msgspec.convert(record | {"until": 7, "content_until": 5}, Record).until_of("content")


def test_a_column_of_each_is_compared() -> None:
    """The ledger's SQL names the table that a column is of."""
    ledger = TableLedger("", with_content=True, tables=SALES)
    assert {"c", "c1", "c2"} == {ledger._sql[name].split(".")[0] for name in ("buyer", "product", "payer")}  # noqa: SLF001
    assert 3 == ledger._events.count("LEFT JOIN")  # noqa: SLF001
    assert EVENT_TABLES.joined("e") == ' LEFT JOIN "public"."content" AS c ON c."content_id" = e."content_id"'
