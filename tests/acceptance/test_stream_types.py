"""A stream of every type: what arrives is what PostgreSQL has, from the slot, from a backfill, and for `reconcile`."""

from __future__ import annotations

import random
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest
from psycopg import sql

from devstack import DevStack
from devstack.control import fetch
from tests.prove.types import play
from tests.support.destinations import Destinations
from tests.support.environment import ROLE
from tests.support.program import Program, succeed

ROWS = 2_000
TEXTS = ["", "a|b~1:x", "ü\u2028日本 🎬", 'q"\\\n\t', "NULL", "\u007f"]
TIMES = [
    "2026-01-08 14:21:52.123456+00",
    "1999-12-31 23:59:59+00",
    "2026-06-30 12:00:00.5+02",
    "2026-01-08 14:21:52+00",
]
WRITTEN = "CASE WHEN {0} IS NOT NULL THEN concat({0}) END"
STAMP = """to_char({0}{1}, 'YYYY-MM-DD"T"HH24:MI:SS.US"{2}"')"""


class Kind(NamedTuple):
    """One type: in PostgreSQL, in the declaration, what PostgreSQL shows, and values as text."""

    postgres: str
    declared: str
    shown: str
    values: list[str | None]


KINDS = {
    "small": Kind("smallint", "BIGINT", "{}", ["-32768", "0", "32767"]),
    "whole": Kind("integer", "BIGINT", "{}", ["-2147483648", "7"]),
    "long": Kind("bigint", "BIGINT", "{}", [str(-(2**63)), str(2**63 - 1), str(2**53 + 1)]),
    "exact": Kind("numeric(12,2)", "numeric(12, 2)", "{}", ["-9999999999.99", "0.00", "0.01", "12", "1.5"]),
    "partly": Kind("numeric(9,3)", "numeric(9, 3)", "nullif({}, 'NaN')", ["NaN", "1.5"]),
    "tiny": Kind("numeric(20,20)", "numeric(20, 20)", "{}", ["0.00000000000000000001", "0", "-0.5"]),
    "huge": Kind("numeric(38,0)", "numeric(38, 0)", "{}", ["9" * 38, "-" + "1" * 30, "0"]),
    "real4": Kind("real", "REAL", "{}", ["0.1", "-1e-30", "3.4028235e38", "7"]),
    "real8": Kind("double precision", "DOUBLE", "{}", ["0.1", "1e-300", "-1.7976931348623157e308", "3"]),
    "real8_finite": Kind(
        "double precision",
        "DOUBLE",
        "CASE WHEN {0} < 'Infinity' AND {0} > '-Infinity' THEN {0} END",
        ["NaN", "Infinity", "-Infinity", "2.5"],
    ),
    "flag": Kind("boolean", "BOOLEAN", "{}", ["true", "false"]),
    "words": Kind("text", "TEXT", "{}", [*TEXTS]),
    "padded": Kind("char(4)", "TEXT", "{}", ["ab", "abcd", ""]),
    "short": Kind("varchar(40)", "TEXT", "{}", [*TEXTS]),
    "mood": Kind("mood", "TEXT.low_cardinality()", "{}", ["sad", "so happy"]),
    "unique_id": Kind(
        "uuid", "UUID", "{}", ["00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]
    ),
    "day": Kind("date", "DATE", "{}::text", ["1970-01-01", "2026-02-28", "1900-01-01", "2299-12-31"]),
    "moment": Kind("timestamptz", "TIMESTAMPTZ", STAMP.format("{}", " AT TIME ZONE 'UTC'", "Z"), [*TIMES]),
    "clock": Kind(
        "timestamp", "TIMESTAMP", STAMP.format("{}", "", ""), ["2026-01-08 14:21:52.5", "1999-01-01 00:00:00"]
    ),
    "hour": Kind("time", 'as_text("time without time zone")', "{}::text", ["14:21:52.5", "00:00:00"]),
    "span": Kind("interval", 'as_text("interval")', "{}::text", ["1 day 02:03:04.5", "-3 mons", "00:00:00"]),
    "doc": Kind(
        "jsonb", "JSONB", "{}::text", ['{"a": [1, 2.50, null, "ü"]}', '"x"', "null", "12345678901234567890123"]
    ),
    "raw": Kind("json", "JSON", "{}::text", ['{"a" :  1, "a": 2}', "[]"]),
    "blob": Kind("bytea", "BYTEA", "encode({}, 'hex')", ["\\x", "\\x00ff41"]),
    "many": Kind("integer[]", 'as_text("integer[]")', "{}::text", ["{}", "{1,NULL,3}", "{{1,2},{3,4}}"]),
    "tags": Kind("text[]", 'as_text("text[]")', "{}::text", ['{"a b","c\\"d",NULL}', "{}"]),
    "address": Kind("inet", 'as_text("inet")', WRITTEN, ["10.0.0.1", "10.0.0.0/8", "::1"]),
    "bits": Kind("bit varying", 'as_text("bit varying")', "{}::text", ["", "1011"]),
    "place": Kind("point", 'as_text("point")', "{}::text", ["(1,2)", "(-0.5,1e+20)"]),
    "within": Kind("int4range", 'as_text("int4range")', "{}::text", ["[1,5)", "empty"]),
    "type": Kind("text", "TEXT", "{}", ["a column that is called as Python's words are"]),
    "row": Kind("integer", "BIGINT", "{}", ["1"]),
    "index": Kind("integer", "BIGINT", "{}", ["2"]),
    "nan": Kind("numeric(3,1)", "numeric(3, 1)", "{}", ["3.5"]),
}
EVERY = [*KINDS, *(f"{name}_2" for name in KINDS)]
_decode = msgspec.json.Decoder(float_hook=Decimal).decode


def kind(name: str) -> Kind:
    """Of a column."""
    return KINDS[name.removesuffix("_2")]


def declaration(identity: str, key: str) -> str:
    """The module."""
    fields = "".join(f'    Field("{name}", {kind(name).declared}.nullable()),\n' for name in EVERY)
    return f"""from replicator import *
STREAM = Stream("typed", table="public.typed", fields=(
    Field("name", {identity}, role=Role.IDENTITY),
    Field("subject", {key}, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME),
{fields}))
"""


@pytest.fixture
def typed(quick: Program, source: psycopg.Connection, tmp_path: Path, request: pytest.FixtureRequest) -> Program:
    """A replicator of a table of all types."""
    identity, key = request.param
    columns = "".join(f', "{name}" {kind(name).postgres}' for name in EVERY)
    for setting in ("IntervalStyle = iso_8601", "bytea_output = escape", "extra_float_digits = -15"):
        ours = f"ALTER DATABASE {source.info.dbname} SET {setting}"  # for the sessions to come
        source.execute(ours.encode())
    source.execute("CREATE TYPE mood AS ENUM ('sad', 'so happy')")
    names = {"BIGINT": "bigint", "UUID": "uuid", "TEXT": "text"}
    roles = f"name {names[identity]} PRIMARY KEY, subject {names[key]} NOT NULL, at timestamptz NOT NULL"
    table = f"CREATE TABLE typed ({roles}{columns})"
    source.execute(table.encode())
    source.execute(sql.SQL("GRANT SELECT ON typed TO {}").format(sql.Identifier(ROLE)))
    (tmp_path / "typed_stream.py").write_text(declaration(identity, key), encoding="utf-8")
    quick.environment |= {"REPLICATOR_STREAM": "typed_stream:STREAM", "PYTHONPATH": str(tmp_path)}
    return quick


def fill(source: psycopg.Connection, chance: random.Random, names: list[str], subjects: list[str]) -> None:
    """A row for each name, of random values."""
    copied = ", ".join(f'"{column}"' for column in ("name", "subject", "at", *EVERY))
    with source.cursor() as cursor, cursor.copy(f"COPY typed ({copied}) FROM STDIN".encode()) as copy:
        for name in names:
            values = [chance.choice([None, *kind(column).values]) for column in EVERY]
            copy.write_row([name, chance.choice(subjects), chance.choice(TIMES), *values])


def expected(source: psycopg.Connection) -> list[dict[str, Any]]:
    """Every row as PostgreSQL shows it."""
    shown = ", ".join(f"""{kind(name).shown.format(f'"{name}"')} AS "{name}" """ for name in EVERY)
    at = STAMP.format("at", " AT TIME ZONE 'UTC'", "Z")
    query = f"SELECT row_to_json(x)::text FROM (SELECT name, subject, {at} AS at, {shown} FROM typed) x"  # noqa: S608
    with source.transaction():
        source.execute("SET LOCAL extra_float_digits = 1")
        return plain([_decode(text) for (text,) in source.execute(query.encode())])


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In one order, and floats as such: they have several texts."""
    for row in rows:
        for name, value in row.items():
            if value is not None and name.startswith("real"):
                row[name] = struct.unpack("f", struct.pack("f", value))[0] if "4" in name else float(value)
    return sorted(rows, key=lambda row: str(row["name"]))


def in_clickhouse(stack: DevStack) -> list[dict[str, Any]]:
    """What is there, under FINAL."""
    text = stack.clickhouse.query(
        f"SELECT name, subject, at, `{'`, `'.join(EVERY)}` FROM typed FINAL SETTINGS date_time_output_format = 'iso',"  # noqa: S608
        " output_format_json_quote_64bit_integers = 0, output_format_json_quote_decimals = 0 FORMAT JSONEachRow"
    )
    rows = [_decode(line) for line in text.splitlines()]
    for row in rows:
        for name in ("clock", "clock_2"):
            row[name] = row[name] and row[name].removesuffix("Z")
    return plain(rows)


def assert_same(wanted: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """In few words: pytest would print thousands of rows."""
    assert len(wanted) == len(found)
    pairs = ((row, other, name) for row, other in zip(wanted, found, strict=True) for name in row)
    assert not [(name, row[name], other[name]) for row, other, name in pairs if row[name] != other[name]][:5]


NAMES = {
    "TEXT": lambda number: f"{TEXTS[number % len(TEXTS)]} {number}",
    "UUID": lambda number: f"00000000-0000-4000-8000-{number * 7_919 % 10**12:012}",
    "BIGINT": lambda number: str(number - 1_000),
}


@pytest.mark.parametrize("typed", [("TEXT", "UUID"), ("UUID", "TEXT"), ("BIGINT", "BIGINT")], indirect=True, ids=str)
def test_every_type(
    typed: Program,
    source: psycopg.Connection,
    stack: DevStack,
    *,
    destinations: Destinations,
    chance: random.Random,
    request: pytest.FixtureRequest,
) -> None:
    """Half of the rows come through the slot, half from a backfill."""
    identity, key = request.node.callspec.params["typed"]
    names = [NAMES[identity](number) for number in range(ROWS)]
    subjects = [NAMES[key](number) for number in range(1, 20)]
    fill(source, chance, names[: ROWS // 2], subjects)
    succeed(typed.run("init"))
    succeed(typed.run("check"))
    typed.start()
    fill(source, chance, names[ROWS // 2 :], subjects)
    typed.wait_until_caught_up()
    streamed = {str(name) for name in names[ROWS // 2 :]}
    wanted = [row for row in expected(source) if str(row["name"]) in streamed]
    assert_same(wanted, in_clickhouse(stack))
    when = ("--start", "1990-01-01", "--end", "2100-01-01")
    succeed(typed.run("backfill", *when, "--batch-size", "300", "--sinks", "clickhouse,redis,http"))
    wanted = expected(source)
    assert ROWS == len(wanted)
    assert_same(wanted, in_clickhouse(stack))
    sent = {str(event["name"]): event for event in _decode(fetch(stack.api.url))}
    assert_same(wanted, plain([*sent.values()]))
    found = destinations.redis
    counts = {key.removeprefix("typed:count:"): int(found.get(key) or 0) for key in found.scan_iter("typed:count:*")}
    assert ROWS == sum(counts.values())
    assert {str(row["subject"]) for row in wanted} == counts.keys()
    assert "equal" in succeed(typed.run("reconcile", *when))
    assert "written" in succeed(typed.run("trace", "--", str(wanted[0]["name"])))
    assert "dead letter" not in typed.log


def test_random_values_of_every_type(stack: DevStack) -> None:
    """A short form of `python -m tests.prove.types`: 40 columns, equal to PostgreSQL's own text in every sink."""
    seed = random.randrange(10**6)  # noqa: S311  not a secret
    print(f"python -m tests.prove.types --rows {ROWS} --seed {seed}")  # noqa: T201  shown when the test has failed
    play(stack, seed, ROWS)
