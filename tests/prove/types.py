"""A stream of 40 columns, one of every type, with random rows: each sink must have PostgreSQL's own text of each value.

    python -m tests.prove.types --rows 100000 --seed 7

Half of the rows come through the slot, half from a backfill; then `reconcile` must find them equal, too.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg
from psycopg import sql

from devstack import DevStack
from devstack.control import fetch
from devstack.process import DevStackError
from tests.support import environment as ground
from tests.support.destinations import Destinations
from tests.support.program import Program, succeed
from tests.support.values import DRAWS, text

BATCH_ROWS = 10_000
"""Of which the text is in memory, three times; a day has so many."""
COUNT = "typed:count:"
NEWEST = """
SELECT DISTINCT ON (subject) name FROM typed ORDER BY subject, at DESC, name COLLATE "C" DESC
"""
SUBJECTS = 20
SETTINGS = {"REPLICATOR_STREAM": "typed_stream:STREAM", "REPLICATOR_HTTP_BATCH_SIZE": "500"}

WHEN = """to_char({0}{1}, 'YYYY-MM-DD"T"HH24:MI:SS.US"{2}"')"""
UTC = " AT TIME ZONE 'UTC'"
SHOWN: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("smallint", "integer", "bigint"), ("BIGINT", "{}")),
    "numeric(12,2)": ("numeric(12, 2)", "{}"),
    "numeric(38,0)": ("numeric(38, 0)", "{}"),
    "numeric(20,20)": ("numeric(20, 20)", "{}"),
    "numeric(76,38)": ("numeric(76, 38)", "{}"),
    "real": ("REAL", "{}"),
    "double precision": ("DOUBLE", "{}"),
    "boolean": ("BOOLEAN", "{}"),
    "text": ("TEXT", "{}"),
    "varchar(40)": ("TEXT", "{}"),
    "mood": ("TEXT.low_cardinality()", "{}"),
    "uuid": ("UUID", "{}"),
    "date": ("DATE", "{}::text"),
    "timestamptz": ("TIMESTAMPTZ", WHEN.format("{}", UTC, "Z")),
    "timestamp": ("TIMESTAMP", WHEN.format("{}", "", "")),
    "jsonb": ("JSONB", "{}::text"),
    "json": ("JSON", "{}::text"),
    "bytea": ("BYTEA", "encode({}, 'hex')"),
    "inet": ('as_text("inet")', "CASE WHEN {0} IS NOT NULL THEN concat({0}) END"),
}
"""How a column is declared, and what PostgreSQL shows; all other types are declared as text."""
COLUMNS = {f"c{number}": kind for number, kind in enumerate(DRAWS)}
FLOATS = {name for name, kind in COLUMNS.items() if kind in {"real", "double precision"}}
decode = msgspec.json.Decoder(float_hook=Decimal).decode

Row = dict[str, Any]


class Batch(NamedTuple):
    """Rows of one day."""

    day: date
    names: list[str]
    subjects: list[str]


class WrongError(Exception):
    """What differs."""


def declaration(connection: psycopg.Connection) -> str:
    """The module."""
    names: dict[str, str] = dict(
        connection.execute("""
            SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
            WHERE attrelid = 'typed'::regclass AND attnum > 0""").fetchall()
    )
    fields = "".join(f"    Field({name!r}, {_declared(name, names[name])}.nullable()),\n" for name in COLUMNS)
    return f"""from replicator import *
STREAM = Stream("typed", table="public.typed", fields=(
    Field("name", TEXT, role=Role.IDENTITY),
    Field("subject", TEXT, role=Role.KEY),
    Field("at", TIMESTAMPTZ, role=Role.TIME),
{fields}))
"""


def _declared(name: str, postgres: str) -> str:
    return SHOWN.get(COLUMNS[name], (f'as_text("{postgres}")', ""))[0]


def create(connection: psycopg.Connection) -> None:
    """The table."""
    columns = "".join(f", {name} {kind}" for name, kind in COLUMNS.items())
    connection.execute("CREATE TYPE mood AS ENUM ('sad', 'so happy')")
    roles = "name text PRIMARY KEY, subject text NOT NULL, at timestamptz NOT NULL"
    connection.execute(f"CREATE TABLE typed ({roles}{columns})".encode())
    connection.execute(sql.SQL("GRANT SELECT ON typed TO {}").format(sql.Identifier(ground.ROLE)))


def fill(connection: psycopg.Connection, chance: random.Random, batch: Batch) -> None:
    """A row for each name, of random values."""
    draws = [DRAWS[kind] for kind in COLUMNS.values()]
    with connection.cursor() as cursor, cursor.copy("COPY typed FROM STDIN") as copy:
        for name in batch.names:
            at = f"{batch.day} {chance.randrange(24):02}:00:00.{chance.randrange(10**6):06}+00"
            values = [None if chance.random() < 0.1 else draw(chance) for draw in draws]
            copy.write_row([name, chance.choice(batch.subjects), at, *values])


def expected(connection: psycopg.Connection, names: list[str]) -> list[Row]:
    """These rows as PostgreSQL shows them."""
    shown = ", ".join(
        f"{SHOWN.get(kind, ('', '{}::text'))[1].format(name)} AS {name}" for name, kind in COLUMNS.items()
    )
    at = WHEN.format("at", UTC, "Z")
    query = f"SELECT row_to_json(x)::text FROM (SELECT name, subject, {at} AS at, {shown} FROM typed"  # noqa: S608
    with connection.transaction():
        connection.execute("SET LOCAL extra_float_digits = 1; SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'")
        found = connection.execute(f"{query} WHERE name = ANY(%s)) x".encode(), [names])
        return plain([decode(line) for (line,) in found])


def plain(rows: list[Row]) -> list[Row]:
    """In one order, and floats as such: they have several texts."""
    for row in rows:
        for name in FLOATS:
            if row[name] is not None:
                size = "f" if COLUMNS[name] == "real" else "d"
                [row[name]] = struct.unpack(size, struct.pack(size, float(row[name])))
    return sorted(rows, key=lambda row: str(row["name"]))


def in_clickhouse(stack: DevStack, names: list[str]) -> list[Row]:
    """Those that are there, under FINAL."""
    listed = ", ".join(f"unhex('{name.encode().hex()}')" for name in names)
    clocks = [name for name, kind in COLUMNS.items() if kind == "timestamp"]
    rows = [
        decode(line)
        for line in stack.clickhouse.query(
            f"SELECT name, subject, at, {', '.join(COLUMNS)} FROM typed FINAL WHERE name IN ({listed})"  # noqa: S608
            " SETTINGS date_time_output_format = 'iso', max_query_size = 10000000,"
            " output_format_json_quote_64bit_integers = 0, output_format_json_quote_decimals = 0 FORMAT JSONEachRow"
        ).split("\n")
        if line
    ]
    for row in rows:
        for name in clocks:
            row[name] = row[name] and row[name].removesuffix("Z")
    return plain(rows)


def compare(wanted: list[Row], found: list[Row], where: str) -> None:
    """Raises WrongError with the first differences."""
    if [row["name"] for row in wanted] != [row["name"] for row in found]:
        raise WrongError(f"{where} has {len(found)} rows of {len(wanted)}")
    wrong = [
        f"{COLUMNS.get(name, name)} is {other[name]!r}, not {row[name]!r}"
        for row, other in zip(wanted, found, strict=True)
        for name in row
        if row[name] != other[name]
    ]
    if wrong:
        raise WrongError(f"{where}: {len(wrong)} values differ: {[one[:200] for one in wrong[:5]]}")


def play(stack: DevStack, seed: int, rows: int) -> None:
    """Raises WrongError, AssertionError, DevStackError."""
    chance = random.Random(seed)  # noqa: S311  not a secret
    with ExitStack() as cleanup:
        dsn = cleanup.enter_context(ground.fresh_database(stack))
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="types-")))
        urls = ground.empty_clickhouse(stack), ground.empty_redis(stack), ground.empty_api(stack)
        settings = ground.environment(ground.plain_role(stack, dsn), *urls, folder=folder)
        program = Program(settings | SETTINGS, dsn, folder / "log")
        cleanup.callback(program.end)
        connection = cleanup.enter_context(psycopg.connect(dsn, autocommit=True))
        create(connection)
        (folder / "typed_stream.py").write_text(declaration(connection), encoding="utf-8")
        program.environment["PYTHONPATH"] = str(folder)
        _play(stack, program, connection, chance, rows)


def _play(stack: DevStack, program: Program, connection: psycopg.Connection, chance: random.Random, rows: int) -> None:
    subjects = [f"{text(chance, 10)} {number}" for number in range(SUBJECTS)]
    names = [f"{text(chance, 10)} {number}" for number in range(rows)]
    batches = [
        Batch(date(2026, 1, 1) + timedelta(days=number), names[at : at + BATCH_ROWS], subjects)
        for number, at in enumerate(range(0, rows, BATCH_ROWS))
    ]
    before = batches[: (len(batches) + 1) // 2]
    for batch in before:
        fill(connection, chance, batch)
    succeed(program.run("init"))
    succeed(program.run("check"))
    program.start()
    for batch in batches:
        if batch in before:
            when = ("--start", str(batch.day), "--end", str(batch.day + timedelta(days=1)))
            succeed(program.run("backfill", *when, "--sinks", "clickhouse,redis,http"))
        else:
            fill(connection, chance, batch)
            program.wait_until_caught_up()
        wanted = expected(connection, batch.names)
        compare(wanted, in_clickhouse(stack, batch.names), "ClickHouse")
        compare(wanted, plain(decode(fetch(stack.api.url))), "the API")
        stack.api.reset()
    _see_counted(stack, connection)
    found = program.run("reconcile", "--start", "2026-01-01", "--end", "2027-01-01")
    if "equal" not in found.stdout or "dead letter" in program.log:
        raise WrongError(f"{found.stdout}\n{program.log[-3000:]}")


def _see_counted(stack: DevStack, connection: psycopg.Connection) -> None:
    """Redis has each row counted, and each subject's newest row."""
    redis = Destinations(stack).redis
    with closing(redis):
        counts = {key.removeprefix(COUNT): int(redis.get(key) or 0) for key in redis.scan_iter(f"{COUNT}*")}
        lasts = plain([decode(str(redis.get(key))) for key in redis.scan_iter("typed:last:*")])
    if counts != dict(connection.execute("SELECT subject, count(*) FROM typed GROUP BY 1").fetchall()):
        raise WrongError(f"Redis counts {counts}")
    newest = [name for (name,) in connection.execute(NEWEST)]
    compare(expected(connection, newest), lasts, "Redis")


def run(seed: int, rows: int) -> str:
    """A line for a log. Raises WrongError with what was found."""
    began = time.monotonic()
    with DevStack(*DevStack.SERVICES) as stack:
        try:
            play(stack, seed, rows)
        except (WrongError, AssertionError, DevStackError) as exc:
            raise WrongError(f"python -m tests.prove.types --rows {rows} --seed {seed}: {exc}") from exc
    seconds = time.monotonic() - began
    values = f"{rows * len(COLUMNS):,} values of {len(COLUMNS)} types"
    return f"types: seed {seed}, {rows:,} rows, {values}, {seconds:.0f} s, 0 differ in any sink"


def main() -> int:
    """Returns 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove.types", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="(100000)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="(random)")  # noqa: S311  not a secret
    args = parser.parse_args()
    try:
        sys.stdout.write(f"{run(args.seed, args.rows)}\n")
    except WrongError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
