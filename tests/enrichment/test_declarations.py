"""Wrong declarations: each is one line that names the thing, what was expected and the cure."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from pathlib import Path

import psycopg
import pytest

from enrichment import Tables
from enrichment.database import Database
from enrichment.events.codec import codec_of
from enrichment.tables import fit
from enrichment.tables.catalog import Column
from enrichment.tables.check import check
from enrichment.tables.declared import declaration
from enrichment.tables.guard import Guard
from replicator.contracts.errors import SourceError, TablesUnfit
from replicator.contracts.events import Finding
from replicator.contracts.fields import Stream, numeric

HEAD = """
from replicator import *
ID, KEY = Field("id", BIGINT, role=Role.IDENTITY), Field("k", BIGINT, role=Role.KEY)
AT = Field("at", TIMESTAMPTZ, role=Role.TIME)
TOTAL, NOTE = Field("total", numeric(12, 2)), Field("note", TEXT.nullable())
def with_(*more, **other):
    return Stream("orders", "shop.orders", (ID, KEY, AT, *more), **other)
def kinds(*them):
    return {"int Decimal datetime": "as documented"}[" ".join(type(it).__name__ for it in them)]
def made(function, *of, **other):
    return with_(TOTAL, NOTE, Field("x", BIGINT, derived=Derived(function, of, **other)))
def derived(kind, function):
    return with_(TOTAL, Field("x", kind, derived=Derived(function, ("total",))))
def raised(error):
    raise error
def again(total):
    return again(total)
"""
LINES = HEAD.count("\n") + 1

MODULES = {
    "STREAM = Stream(": "can't be imported: SyntaxError: '(' was never closed",
    "1 / 0": f"can't be imported: ZeroDivisionError (MODULE.py, line {LINES})",
    "raise SystemExit(3)": f"can't be imported: SystemExit (MODULE.py, line {LINES})",
    "import sys; sys.exit()": f"can't be imported: SystemExit (MODULE.py, line {LINES})",
    "import nothing_of_that_name": "can't be imported: ModuleNotFoundError: No module named 'nothing_of_that_name' (",
    "STREAM = Stream('orders', tabel='shop.orders')": "unexpected keyword argument 'tabel'",
    "STREAM = with_": "MODULE has no Stream that is called STREAM; it has none",
    "ORDERS = with_()": "MODULE has no Stream that is called STREAM; its streams are ORDERS",
}
DECLARED = {
    "with_(where=Where('k', 7))": "values of Where is 7; it takes a tuple of values, with a comma behind the only one",
    "with_(NOTE, where=Where('note', 'paid'))": "values of Where is 'paid'; it takes a tuple of values",
    "with_(NOTE, where=Where('note', (None,)))": "its condition on note has values that are not text or NULL, or none",
    "with_(where=('k', (7,)))": "where is a tuple; it takes Where(field, values)",
    "with_(updates='update')": 'updates is \'update\'; it takes "ignore" or "upsert"',
    "with_(deletes=True)": 'deletes is True; it takes "ignore" or "delete"',
    "Stream('orders', 'shop.orders', [ID, KEY, AT])": "fields is a list; it takes a tuple of Field(…)",
    "Stream('orders', 'shop.orders', ('id', 'k', 'at'))": "fields is a tuple; it takes a tuple of Field(…)",
    "Stream('orders', 'shop.Orders', (ID, KEY, AT))": "'shop.Orders' is no table; it takes schema.table, in lower case",
    "with_(dimensions=Dimension('shop.customers', 'k'))": "dimensions is a Dimension; it takes a tuple of Dimension(…)",
    "with_(dimensions=(Dimension('shop.customers', 7),))": "key of the dimension shop.customers is 7; it takes a text",
    "with_(Field('note', TEXT.nullable))": "type of the field note is a method; it takes a type, such as TEXT, ",
    "with_(Field('total', numeric))": "type of the field total is a function; it takes a type",
    "with_(Field('total', 'numeric(12, 2)'))": "type of the field total is 'numeric(12, 2)'; it takes a type",
    "with_(Field('total', numeric(2, 12)))": "numeric(2, 12): 1 to 76 digits, 0 to all of them a fraction",
    "with_(Field('total', as_text('numeric')))": "as_text('numeric'): such a column is declared as numeric(38, 10)",
    "with_(Field('n', as_text('int')))": "as_text('int'): such a column is declared as BIGINT",
    "with_(Field('u', UUID.low_cardinality()))": "low_cardinality() is for text, and this is a uuid",
    "with_(Field('total', BIGINT, role='key'))": "role of the field total is 'key'; it takes Role.IDENTITY, ",
    "with_(Field('x', BIGINT, derived=len))": "derived of the field x is a builtin_function_or_method; it takes ",
    "with_(NOTE, Field('x', BIGINT, derived=Derived(len, 'note')))": "of of Derived of the field x is 'note'; it ",
    "made('total * 2', 'total')": "function of Derived of the field x is 'total * 2'; it takes a plain function",
    "made(lambda: 1)": "the field x is derived from nothing; it takes the names of fields",
    "made(lambda a: 1, 'id', 'total')": "the function of the field x can't be called with id, total",
    "made(lambda a: 1, 'x')": "the field x is derived from x, which is no column's field",
    "made(lambda a: 1, 'note')": "the field x is derived from note, which may be NULL, so it has to be nullable, too",
    "made(lambda a: 1, 'total', postgres='{vat}')": "the SQL of the field x has {vat}, which is none of its arguments",
    "made(lambda a: 1, 'total', postgres='{total')": "the SQL of the field x has a brace too many",
}
TABLE = """
CREATE SCHEMA shop;
CREATE TABLE shop.orders (id bigint PRIMARY KEY, k bigint NOT NULL, at timestamptz NOT NULL,
                          total numeric(12, 2) NOT NULL, note text, tags text[], free numeric);
CREATE TABLE shop.customers (k bigint PRIMARY KEY, name text);
INSERT INTO shop.orders VALUES (1, 1, now(), 1.50, 'a', '{}', 1);
"""
CUSTOMERS = "Field('name', TEXT.nullable(), joined='name'), dimensions=(Dimension('shop.customers', 'k'),)"
TABLES = [
    ("Stream('orders', 'shop.order', (ID, KEY, AT))", "", "does not exist", "Correct the declaration, or rename it ba"),
    ("with_(Field('totals', numeric(12, 2)))", "", "has no column totals (numeric(12,2))", "(did you mean total?)"),
    ("with_(Field('note', BIGINT))", "", "a column note of type text instead of bigint", "Declare note as TEXT, or"),
    (
        "with_(Field('total', numeric(9, 2)))",
        "",
        "of type numeric(12,2) instead of",
        "Declare total as numeric(12, 2),",
    ),
    ("with_(Field('tags', TEXT))", "", "tags of type text[] instead of text", 'Declare tags as as_text("text[]"), or'),
    ("with_(Field('free', REAL))", "", "free of type numeric instead of float4", "Declare free as numeric(38, 10), or"),
    (
        "with_(Field('d', BOOLEAN))",
        "CREATE DOMAIN yes AS boolean; ALTER TABLE shop.orders ADD d yes",
        "has a column d of type yes instead of bool",
        'Declare d as as_text("yes")',
    ),
    (
        "with_()",
        "ALTER TABLE shop.orders ALTER at TYPE timestamp",
        "has a column at of type timestamp without time zone instead of timestamptz",
        "declare another column, or change this one to timestamptz",
    ),
    (
        "Stream('orders', 'shop.v', (ID, KEY, AT))",
        "CREATE VIEW shop.v AS TABLE shop.orders",
        "is a view, whose rows are not in the WAL",
        "Declare another table",
    ),
    ("with_()", "ALTER TABLE shop.orders SET UNLOGGED", "not in the WAL (UNLOGGED)", "SET LOGGED"),
    (
        "with_(updates='upsert')",
        "ALTER TABLE shop.orders REPLICA IDENTITY NOTHING",
        "has a replica identity that does not identify changed and deleted rows",
        "ALTER TABLE shop.orders REPLICA IDENTITY FULL",
    ),
    (
        "with_()",
        "ALTER TABLE shop.orders DROP CONSTRAINT orders_pkey; CREATE UNIQUE INDEX ON shop.orders (id, (k + 1))",
        "its identity id is not unique",
        "CREATE UNIQUE INDEX CONCURRENTLY ON shop.orders (id)",
    ),
    (
        f"with_({CUSTOMERS})",
        "ALTER TABLE shop.customers DROP CONSTRAINT customers_pkey",
        "its key k is not unique",
        "CREATE UNIQUE INDEX CONCURRENTLY ON shop.customers (k)",
    ),
    (
        "with_(Field('x', TEXT))",
        "ALTER TABLE shop.orders ADD x oid",
        "has a column x of type oid instead of text",
        "Declare x as BIGINT",
    ),
    (
        "with_(updates='upsert')",
        "ALTER TABLE shop.orders DROP CONSTRAINT orders_pkey, ADD UNIQUE (id), ADD PRIMARY KEY (k) INCLUDE (id)",
        "has a replica identity that does not identify changed and deleted rows",
        "ALTER TABLE shop.orders REPLICA IDENTITY FULL",
    ),
    ("made(lambda total: 1 // 0, 'total')", "", "x can't be derived: ZeroDivisionError", "Correct the declaration"),
    ("made(lambda total: 0.5, 'total')", "", "x is derived, and is not a 64-bit integer", "Correct the declaration"),
    *(
        (f"made(lambda total: raised({what}), 'total')", "", f"x can't be derived: {what}", "Correct the declaration")
        for what in ("SystemExit", "GeneratorExit", "MemoryError")
    ),
    ("made(again, 'total')", "", "x can't be derived: RecursionError", "Correct the declaration"),
    ("derived(TEXT, lambda total: chr(0xD800))", "", "x can't be derived: UnicodeEncodeError", "Correct the declara"),
    ("derived(DOUBLE, lambda total: 10**400)", "", "x can't be derived: OverflowError", "Correct the declaration"),
    ("derived(numeric(9, 0), lambda total: 10**5000)", "", "x can't be derived: ValueError", "Correct the declaration"),
    ("derived(DOUBLE, lambda total: float('nan'))", "", "x is derived, and is not a number", "Correct the declaration"),
    *(
        (f"derived({kind}, lambda total: {text!r})", "", f"x is derived, and is not {words}", "Correct the declaration")
        for kind, words, text in (
            ("DATE", "a date", "2026-02-30"),
            ("UUID", "a uuid", "no uuid"),
            ("TIMESTAMPTZ", "a timestamp with time zone, in UTC", "2026-01-08 14:21:52+02"),
        )
    ),
    (
        "made(lambda total: 1, 'total', postgres='{total} +')",
        "",
        '`reconcile` can\'t compare it: syntax error at or near ")"',
        "Correct the SQL in the declaration",
    ),
]
RIGHT = [
    ("made(lambda total: int(total % 2), 'total', postgres='trunc({total} % 2)')", ""),
    ("derived(DOUBLE.nullable(), lambda total: float('inf'))", ""),
    ("with_(Field('free', numeric(20, 4).nullable()))", ""),
    ("with_(Field('x', BIGINT))", "ALTER TABLE shop.orders ADD x oid NOT NULL DEFAULT 1259"),
    ("with_()", "ALTER TABLE shop.orders DROP CONSTRAINT orders_pkey, ADD PRIMARY KEY (id) INCLUDE (k)"),
    ("with_(TOTAL, NOTE, Field('x', TEXT, derived=Derived(kinds, ('id', 'total', 'at'))))", ""),
    ("with_(Field('a', as_text('numeric(10,2)[]').nullable()))", "ALTER TABLE shop.orders ADD a numeric(10, 2)[]"),
    (
        "Stream('o', 'shop.orders', (Field('c', TEXT, role=Role.IDENTITY), KEY, AT))",
        "ALTER TABLE shop.orders ADD c char(9) UNIQUE DEFAULT 'a'",
    ),
    ("with_(Field('x', TEXT.nullable().nullable().low_cardinality().low_cardinality(), column='note'))", ""),
    ("with_(Field('x', BIGINT, column='A b'))", 'ALTER TABLE shop.orders ADD "A b" int NOT NULL DEFAULT 1'),
    (f"with_({CUSTOMERS})", "DROP TABLE shop.customers; CREATE VIEW shop.customers AS SELECT 1::int8 k, 'x' AS name"),
]
_numbers = count(1)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module into the working directory; its name."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def write(text: str) -> str:
        made.append(f"declared_{next(_numbers)}")
        (tmp_path / f"{made[-1]}.py").write_text(f"{HEAD}{text}\n", encoding="utf-8")
        return made[-1]

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("text", MODULES)
def test_a_module_that_can_not_be_used(module: Callable[[str], str], text: str) -> None:
    """With the line in it, where it has come as far."""
    name = module(text)
    with pytest.raises(ValueError, match=name) as caught:
        declaration(f"{name}:STREAM")
    assert MODULES[text].replace("MODULE", name) in str(caught.value)


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("nowhere:STREAM", "there is no module nowhere in {here}, nor an installed one"),
        ("orders.py:STREAM", "there is no module orders.py in {here}"),
        (":STREAM", ":STREAM names no module"),
        ("json", "json has no Stream that is called STREAM; it has none"),
    ],
)
def test_a_name_that_leads_nowhere(module: Callable[[str], str], tmp_path: Path, named: str, problem: str) -> None:
    """It says where it has looked."""
    module("")
    with pytest.raises(ValueError, match=r".") as caught:
        declaration(named)
    assert problem.format(here=tmp_path) in str(caught.value)


def test_a_working_directory_that_was_removed(module: Callable[[str], str], tmp_path: Path) -> None:
    """An installed module is found all the same; of another one it says what is wrong."""
    module("")
    shutil.rmtree(tmp_path)
    assert "orders" == declaration("examples.orders.orders_stream").name
    with pytest.raises(ValueError, match="there is no module nowhere in the working directory, which was removed"):
        declaration("nowhere:STREAM")


def test_what_a_module_prints_is_none_of_our_output(
    module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs read that (`check --json`)."""
    declaration(module("print('hello'); STREAM = with_()"))
    assert ("", "hello\n") == capsys.readouterr()


async def test_a_function_that_was_interrupted(module: Callable[[str], str], database: str) -> None:
    """It may have been Ctrl-C: the row is not refused. It is told all the same."""
    stream = declared(module, "made(lambda total: raised(KeyboardInterrupt), 'total')")
    codec = codec_of(Tables(stream))
    with pytest.raises(SourceError, match=r"The function of the field x was interrupted \(KeyboardInterrupt\)"):
        codec.build([(1, 1, 1, 1, datetime.now(UTC), Decimal(1), "a")], [], [])
    assert any("x was interrupted" in found.cure + found.what for found in await findings(database, stream, ""))


def test_a_module_alone_is_its_stream(module: Callable[[str], str]) -> None:
    """As the setting's description says."""
    name = module("STREAM = with_()")
    assert declaration(name) is declaration(f"{name}:STREAM")


def declared(module: Callable[[str], str], text: str) -> Stream:
    """The stream of a module."""
    return declaration(f" {module(f'STREAM = {text}')} : STREAM ")


@pytest.mark.parametrize("text", DECLARED)
def test_a_declaration_that_can_not_be_used(module: Callable[[str], str], text: str) -> None:
    """It names the argument, and the line."""
    with pytest.raises(ValueError, match=rf"\(declared_\d+\.py, line {LINES}\)") as caught:
        declared(module, text)
    assert DECLARED[text] in str(caught.value)
    assert "\n" not in str(caught.value)


async def findings(database: str, stream: Stream, statements: str) -> list[Finding]:
    """What `check` says of a stream of these tables."""
    with psycopg.connect(database) as source:
        source.execute(f"{TABLE}; {statements}".encode())
    return await check(database, Tables(stream))


@pytest.mark.parametrize(
    ("text", "statements", "what", "cure"), TABLES, ids=[f"{i}-{t[2]}" for i, t in enumerate(TABLES)]
)
async def test_tables_that_do_not_fit(
    module: Callable[[str], str], database: str, *, text: str, statements: str, what: str, cure: str
) -> None:
    """One finding, with a cure that changes nothing of a table whose declaration is wrong."""
    [wrong] = [found for found in await findings(database, declared(module, text), statements) if not found.ok]
    assert what in wrong.what
    assert cure in wrong.cure


@pytest.mark.parametrize(("text", "statements"), RIGHT)
async def test_tables_that_fit(module: Callable[[str], str], database: str, text: str, statements: str) -> None:
    """Nothing is wrong."""
    assert [] == [found for found in await findings(database, declared(module, text), statements) if not found.ok]


async def test_an_identity_that_is_not_unique(module: Callable[[str], str], database: str) -> None:
    """`run` reads nothing while of two rows the sinks would keep one, and goes on once there is an index."""
    tables = Tables(declared(module, "with_()"))
    await findings(database, tables.stream, "ALTER TABLE shop.orders DROP CONSTRAINT orders_pkey")
    source = Database(database)
    try:
        with pytest.raises(TablesUnfit, match=r"Table shop\.orders: its identity id is not unique"):
            await Guard(source, tables).look(None, 0)
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("CREATE UNIQUE INDEX CONCURRENTLY ON shop.orders (id)")
        await Guard(source, tables).look(None, 0)
    finally:
        await source.close()


async def test_all_that_is_wrong_is_said_at_once(module: Callable[[str], str], database: str) -> None:
    """Of the identity, too: what tells its rows apart, twice the same, none. And what changes by a restart alone."""
    tables = Tables(declared(module, "with_(updates='upsert')"))
    statements = "ALTER TABLE shop.orders DROP CONSTRAINT orders_pkey; ALTER TABLE shop.orders ALTER id DROP NOT NULL"
    told = {found.what: found.cure for found in await findings(database, tables.stream, statements) if found.cure}
    assert 3 == len(told)
    assert "ALTER TABLE shop.orders REPLICA IDENTITY FULL" in told.values()
    assert (
        "CREATE UNIQUE INDEX CONCURRENTLY ON shop.orders (id)"
        == told["table shop.orders: its identity id is not unique"]
    )
    null = told["table shop.orders: id may be NULL, which the declaration does not expect"]
    assert (
        "A row with NULL there becomes a dead letter; or ALTER TABLE shop.orders ALTER COLUMN id SET NOT NULL" == null
    )
    source = Database(database)
    try:
        with pytest.raises(
            TablesUnfit, match=r"replica identity .*, and table shop\.orders: its identity id is not uniq"
        ) as run:
            await Guard(source, tables).look(None, 0)
    finally:
        await source.close()
    assert str(run.value).endswith(
        "ALTER TABLE shop.orders REPLICA IDENTITY FULL; CREATE UNIQUE INDEX CONCURRENTLY ON shop.orders (id). Once the"
        " tables fit, the replicator continues by itself; a changed declaration or setting needs a restart."
    )


async def test_a_column_that_may_be_null(module: Callable[[str], str], database: str) -> None:
    """Said before there is such a row."""
    found = await findings(database, declared(module, "with_(Field('note', TEXT))"), "")
    [said] = [one for one in found if "may be NULL" in one.what]
    assert (True, "table shop.orders: note may be NULL, which the declaration does not expect") == (said.ok, said.what)


async def test_tables_that_may_not_be_read(module: Callable[[str], str], database: str, plain_dsn: str) -> None:
    """One finding a table: what would have to read it is not tried."""
    await findings(database, declared(module, "with_()"), "")
    tables = Tables(declared(module, "with_()"))
    grant = "GRANT USAGE ON SCHEMA shop TO replicator; GRANT SELECT (id, k, at) ON shop.orders TO replicator"
    for statements in ("", grant):  # its columns alone are not enough: after an ALTER TABLE it looks by xmin
        with psycopg.connect(database) as source:
            source.execute(statements.encode())
        [wrong] = [found for found in await check(plain_dsn, tables) if not found.ok]
        assert "table shop.orders: may not be read" in wrong.what
        assert "GRANT SELECT ON shop.orders TO replicator" in wrong.cure


@pytest.mark.parametrize(("column", "digits", "scale"), [("5,-2", 7, 0), ("3,5", 5, 5), ("12,2", 12, 2), ("4,4", 4, 4)])
def test_digits_of_any_column(column: str, digits: int, scale: int) -> None:
    """Since PostgreSQL 15 a scale may be negative, or more than the digits. What the cure says fits, no less does."""
    shape = Column("x", f"numeric({column})", "numeric", "")
    assert f"numeric({digits}, {scale})" == fit.declared_as(shape)
    assert fit._is(shape, numeric(digits, scale).declared)  # noqa: SLF001  pure
    assert not fit._is(shape, numeric(digits - 1, 0).declared)  # noqa: SLF001
