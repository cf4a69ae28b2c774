"""Every type that PostgreSQL has, through wal2json and the decoder, compared with what PostgreSQL says of the value.

    .venv/bin/python -m tests.replicator.source.test_wal2json_types > tests/replicator/source/wal2json_seeds.jsonl

prints the messages as wal2json made them, those of a size to mutate: seeds of test_wal2json_fuzz.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import NamedTuple, TypeAlias

import psycopg

from devstack import DevStack
from replicator.contracts.events import Row
from replicator.source.stream import Source
from replicator.source.wal2json import OPTIONS
from tests.support import environment as ground

Value: TypeAlias = int | Decimal | str | bool | None
SESSION = "-c DateStyle=ISO -c TimeZone=UTC"
SEED_BYTES = 1_500
"""Larger messages are for the real server alone."""
FEW = 3  # of those that are alike: transactions' begins and ends, NULLs

TEXTS = [
    "''", "'plain'", "'quo\"te'", r"'back\slash \u0041 \ud800 \'", "'line' || chr(10) || chr(13) || chr(9) || chr(8)",
    "(SELECT string_agg(chr(n), '') FROM generate_series(1, 700) n)", "'vidéo 映像 📱' || chr(8232) || chr(1114109)",
    "'{\"action\":\"C\"}'", "repeat('x', 3000)",
]  # fmt: skip
INTEGERS = ["0", "-1", "1"]
FLOATS = ["0", "'-0'", "1.5", "-1e-30", "'NaN'", "'Infinity'", "'-Infinity'", "1e30", "0.1", "123456789"]
JSONS = [
    """'{}'""", """'[]'""", """'null'""", """'"text"'""", """'{"n": 9223372036854775808}'""", r"""'"\u00e9\"\\\n"'""",
    """'{"a": {"b": [1, 2.50, {"c": null}]}, "ü": 1e3}'""",
    "(SELECT (repeat('[', 500) || '1' || repeat(']', 500)))", "('[' || repeat('9', 400) || ']')",
]  # fmt: skip
TIMES = ["'infinity'", "'-infinity'", "'2026-01-08 14:21:52.123456'", "'1970-01-01'", "'0044-03-15 BC'"]

SAMPLES = {
    "bool": ["true", "false"],
    "int2": [*INTEGERS, "'-32768'", "32767"],
    "int4": [*INTEGERS, "'-2147483648'", "2147483647"],
    "int8": [*INTEGERS, "'-9223372036854775808'", "9223372036854775807", "9007199254740993"],
    "float4": [*FLOATS, "3.4e38", "1e-45"],
    "float8": [*FLOATS, "1.7976931348623157e308", "5e-324", "9007199254740993"],
    "numeric": [
        "0",
        "'-0.00'",
        "1.10",
        "'NaN'",
        "'Infinity'",
        "'-Infinity'",
        "9223372036854775808",
        "-1e-40",
        "1e40",
        "123456789012345678901234567890.123456789",
        "repeat('9', 4300)",
        "repeat('9', 4301)",
        "'-' || repeat('9', 5000)",
        "repeat('9', 131072)",
        "'0.' || repeat('1', 16383)",
        "repeat('7', 5000) || '.5'",
        "'1e-16383'",
    ],
    "money": ["1.5", "-92233720368547758.08"],
    "text": TEXTS,
    "varchar": TEXTS,
    "bpchar": TEXTS,
    "name": ["'plain'", "'quo\"te é'"],
    "char": ["'x'", "''", r"'\200'"],
    "bytea": [r"'\x'", r"'\x00ff5c22'", r"decode(repeat('00ff', 1000), 'hex')"],
    "json": [*JSONS, r"""'"\ud800 \u0000"'""", """' {"a" : 1, "a":2 } '"""],
    "jsonb": JSONS,
    "jsonpath": ["""'$.a[*] ? (@ > 1)'"""],
    "xml": ["""'<a b="c">&amp; é</a>'"""],
    "uuid": ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"],
    "date": [*TIMES, "'4714-11-24 BC'", "'5874897-12-31'"],
    "timestamp": [*TIMES, "'4714-11-24 BC'", "'294276-12-31 23:59:59.999999'"],
    "timestamptz": [*TIMES, "'2026-01-08 14:21:52+05:30'", "'4714-11-24 BC'", "'294276-12-31 23:59:59.999999'"],
    "time": ["'00:00'", "'24:00'", "'14:21:52.123456'"],
    "timetz": ["'00:00+00'", "'14:21:52.5-15:59'"],
    "interval": ["'0'", "'-1 year 2 mons -3 days 04:05:06.000007'", "'178000000 years'"],
    "bit": ["B'1'", "B'0'"],
    "varbit": ["B''", "B'10110'"],
    "inet": ["'192.168.0.1/24'", "'::1'"],
    "cidr": ["'10.0.0.0/8'", "'2001:db8::/32'"],
    "macaddr": ["'08:00:2b:01:02:03'"],
    "macaddr8": ["'08:00:2b:01:02:03:04:05'"],
    "point": ["'(1,-2.5)'", "'(NaN,Infinity)'"],
    "line": ["'{1,2,3}'"],
    "lseg": ["'[(0,0),(1,1)]'"],
    "box": ["'(1,1),(0,0)'"],
    "path": ["'[(0,0),(1,1)]'", "'((0,0),(1,1))'"],
    "polygon": ["'((0,0),(1,1),(1,0))'"],
    "circle": ["'<(0,0),1>'"],
    "tsvector": ["""'a:1A "quo te":2 ''it''''s'':3'"""],
    "tsquery": ["""'fat & (rat | !cat)'"""],
    "int4range": ["'empty'", "'[1,5)'", "'(,)'"],
    "int8range": ["'[1,9223372036854775807)'"],
    "numrange": ["'[1.5,2.50]'", "'(,NaN]'"],
    "tsrange": ["'[2026-01-08 00:00, infinity)'"],
    "tstzrange": ["'[2026-01-08 00:00+01, 2026-01-09 00:00+01)'"],
    "daterange": ["'[2026-01-08, 2026-01-09)'"],
    "int4multirange": ["'{}'", "'{[1,3),[5,7)}'"],
    "tstzmultirange": ["'{[2026-01-08 00:00+00, 2026-01-09 00:00+00)}'"],
    "oid": ["0", "4294967295"],
    "xid": ["'4294967295'"],
    "xid8": ["'18446744073709551615'"],
    "tid": ["'(1,2)'"],
    "pg_lsn": ["'16/B374D848'"],
    "pg_snapshot": ["'10:20:10,14'"],
    "regclass": ["'pg_class'"],
    "regtype": ["'int4'"],
    "refcursor": ["'cursor'"],
    "int2vector": ["'1 2 3'"],
    "oidvector": ["'1 2 3'"],
    "aclitem": ["'=r/app'"],
    "mood": ["'sad \"quoted\"'", "'ok'"],
    "pair": ["ROW(1, 'a,\"b\\')", "ROW(NULL, '')"],
    "positive": ["1"],
}
"""Expressions by type."""

OWN_TYPES = """
CREATE TYPE mood AS ENUM ('sad "quoted"', 'ok');
CREATE TYPE pair AS (a int, "B b" text);
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
"""
TYPES = """
SELECT oid::regtype::text, typname::text
FROM pg_type AS t WHERE typnamespace IN ('pg_catalog'::regnamespace, 'public'::regnamespace)
  AND (typtype IN ('b', 'r', 'm', 'e', 'd') OR typname = 'pair')
  AND NOT EXISTS (  -- arrays of what can't be a column, and of the tables' rows
      SELECT FROM pg_type AS e WHERE e.oid = t.typelem AND (e.typtype = 'p' OR e.typtype = 'c' AND e.typname <> 'pair'))
ORDER BY oid
"""
SHOWN = "CASE WHEN num_nulls(v) = 0 THEN format('%s', v) END"
"""As the type prints it; its cast to text may be something else."""
BARE = {"int2", "int4", "int8", "float4", "float8", "numeric", "oid"}
"""Types that wal2json prints without quotes. A domain has its own name, hence quotes."""
NO_NUMBERS = {"NaN", "Infinity", "-Infinity"}

OTHERS = """
CREATE TABLE "We""ird.täble \\ name" ("quo""te" int PRIMARY KEY, "com,ma" text, "back\\slash" text, "{" text);
CREATE TABLE toasted (id int PRIMARY KEY, small int, large text);
ALTER TABLE toasted ALTER large SET STORAGE EXTERNAL;
CREATE TABLE whole (a int, b text, c numeric);
ALTER TABLE whole REPLICA IDENTITY FULL;
"""


class Written(NamedTuple):
    """A value that was inserted: where, and what PostgreSQL says of it."""

    table: str
    kind: str
    text: str | None

    @property
    def value(self) -> Value:
        """What the decoder has to make of it."""
        if self.text is None or (self.kind in BARE and self.text in NO_NUMBERS):
            return None
        if self.kind in BARE:
            return _number(self.text)
        if self.kind == "bool":
            return self.text == "t"
        return self.text[2:] if self.kind == "bytea" else self.text


def _number(text: str) -> Value:
    exact = Decimal(text)
    whole = text.removeprefix("-").isdigit() and len(text.removeprefix("-")) <= 4300
    return int(text) if whole else exact


def create(connection: psycopg.Connection) -> list[tuple[str, str, str]]:
    """A table for each type: table, type, name of the type."""
    connection.execute(OWN_TYPES)
    made = []
    for number, (shown, name) in enumerate(connection.execute(TYPES).fetchall()):
        table = f"t{number}"
        connection.execute(f"CREATE TABLE {table} (id serial PRIMARY KEY, v {shown})".encode())
        made.append((table, shown, name))
    connection.execute(OTHERS)
    return made


def write(connection: psycopg.Connection, tables: list[tuple[str, str, str]]) -> Iterator[Written]:
    """Insert the samples of each type, their array, and NULL, each in a transaction of its own."""
    for table, shown, name in tables:
        element = name.removeprefix("_")
        for sample in _samples(shown, SAMPLES.get(element, []), is_array=name != element):
            insert = f"INSERT INTO {table} (v) VALUES ({sample}) RETURNING {SHOWN}"  # noqa: S608  ours
            [(text,)] = connection.execute(insert.encode()).fetchall()
            yield Written(table, name, text)


def _samples(shown: str, samples: list[str], *, is_array: bool) -> list[str]:
    if not is_array:
        return ["NULL", *(f"({sample})::text::{shown}" for sample in samples)]
    one = shown.removesuffix("[]")
    listed = ", ".join(f"({sample})::text::{one}" for sample in samples if "131072" not in sample)
    return ["NULL", "'{}'", *([f"ARRAY[NULL, {listed}]::{shown}"] if listed else [])]


async def read(source: Source, count: int) -> list[Row]:
    """So many rows."""
    rows: list[Row] = []
    async with asyncio.timeout(60):
        while len(rows) < count:
            rows += (await source.read()).rows
    return rows


@contextlib.asynccontextmanager
async def reading(dsn: str) -> AsyncIterator[Source]:
    """A source that reads every table of the database, as they are now, from now on."""
    with psycopg.connect(dsn) as connection:
        tables = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname = 'public'"
        ).fetchall()
    source = Source(dsn, dsn.rpartition("/")[2])
    try:
        await source.connect()
        state = await source.create_slot()
        assert state is not None
        assert state.confirmed_lsn is not None
        await source.start(state.confirmed_lsn, tables)
        yield source
    finally:
        source.close()


def told(row: Row) -> dict[str, Value]:
    """The row's columns; each name once."""
    columns = {column.name: column.value for column in row.columns}
    assert len(columns) == len(row.columns)
    return columns


async def test_every_type(database: str) -> None:
    """NULL, the samples of each, an empty array and one of the samples: what is decoded is what PostgreSQL prints."""
    with psycopg.connect(database, autocommit=True, options=SESSION) as connection:
        tables = create(connection)
        async with reading(database) as source:
            written = list(write(connection, tables))
            rows = await read(source, len(written))
    assert len(written) > 500
    wrong = [
        (of.kind, of.text[:50] if of.text else of.text, repr(row.columns[1].value)[:50])
        for of, row in zip(written, rows, strict=True)
        if (row.action, row.table) != ("I", of.table) or not same(row.columns[1].value, of.value)
    ]
    assert [] == wrong


def same(left: Value, right: Value) -> bool:
    """Equal, of the same type: 1 is not true, and 1 is not 1.0."""
    return type(left) is type(right) and left == right


async def test_quoted_identifiers(database: str) -> None:
    """Quotes, commas, backslashes, spaces and letters beyond ASCII in names arrive as they are."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(OTHERS)
        async with reading(database) as source:
            connection.execute("""INSERT INTO "We""ird.täble \\ name" VALUES (1, 'a', 'b', 'c')""")
            [row] = await read(source, 1)
    assert ("public", 'We"ird.täble \\ name') == (row.schema, row.table)
    assert {'quo"te': 1, "com,ma": "a", "back\\slash": "b", "{": "c"} == told(row)


async def test_unchanged_toast_is_absent_and_identities_are_old_rows(database: str) -> None:
    """An update that leaves a large value alone; updates and deletes with the key alone and with the whole row."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(OTHERS)
        async with reading(database) as source:
            for statement in CHANGES:
                connection.execute(statement.encode())
            rows = await read(source, len(CHANGES))
    assert list("IUUDIUDT") == [row.action for row in rows]
    large = "x" * 10_000
    assert [{"id": 1, "small": 1, "large": large}, {"id": 1, "small": 2}] == [told(row) for row in rows[:2]]
    assert {"id": 2, "small": 2} == told(rows[2])
    identities = [{column.name: column.value for column in row.identity} for row in rows[1:]]
    old = {"a": 1, "b": "b", "c": Decimal("1.50")}
    assert [{"id": 1}, {"id": 1}, {"id": 2}, {}, old, old | {"b": None}, {}] == identities


CHANGES = (
    "INSERT INTO toasted VALUES (1, 1, repeat('x', 10000))",
    "UPDATE toasted SET small = 2",
    "UPDATE toasted SET id = 2",
    "DELETE FROM toasted",
    "INSERT INTO whole VALUES (1, 'b', 1.50)",
    "UPDATE whole SET b = NULL",
    "DELETE FROM whole",
    "TRUNCATE whole",
)


async def test_somebody_elses_messages_need_not_be_text(database: str) -> None:
    """Logical messages of any bytes, in a transaction and outside, between rows: passed over."""
    with psycopg.connect(database, autocommit=True) as connection:
        async with reading(database) as source:
            for statement in MESSAGES:
                connection.execute(statement.encode())
            rows = await read(source, 2)
    assert [1, 2] == [told(row)["user_id"] for row in rows]


MESSAGES = (
    "SELECT pg_logical_emit_message(false, 'pre\"fix', '\\xfffe0022'::bytea)",
    "SELECT pg_logical_emit_message(true, 'prefix', '\\xc3'::bytea), pg_logical_emit_message(true, '', 'te\"xt')",
    "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')",
    "SELECT pg_logical_emit_message(false, 'prefix', decode(repeat('ff', 1000), 'hex'))",
    "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 2, 'play')",
)


def main() -> None:
    """Print the seeds, a message a line."""
    options = {**OPTIONS, "add-tables": "public.*"}
    listed = ", ".join(f"'{name}', '{value}'" for name, value in options.items())
    changes = f"SELECT data FROM pg_logical_slot_get_changes('seeds', NULL, NULL, {listed})"  # noqa: S608  ours
    with (
        DevStack("postgres") as stack,
        ground.fresh_database(stack) as dsn,
        psycopg.connect(dsn, autocommit=True, options=SESSION) as connection,
    ):
        tables = create(connection)
        connection.execute("SELECT pg_create_logical_replication_slot('seeds', 'wal2json')")
        for _ in write(connection, tables):
            pass
        for statement in (*CHANGES, MESSAGES[2], "SELECT pg_logical_emit_message(true, 'prefix', 'te\"xt')"):
            connection.execute(statement.encode())
        messages = [data for (data,) in connection.execute(changes.encode())]
    seen: Counter[str] = Counter()
    for message in messages:
        kind = message[:13] + ("NULL" if '"v","value":null' in message else "")
        seen[kind] += 1
        if len(message.encode()) <= SEED_BYTES and (seen[kind] <= FEW or kind == '{"action":"I"'):
            print(message)  # noqa: T201  what this program is for


if __name__ == "__main__":
    main()
