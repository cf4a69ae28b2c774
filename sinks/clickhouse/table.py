"""The table in ClickHouse: `table.sql` with the contract's columns in it, and what an insert needs of a table.

`sink.py` writes to it. The functions raise what a `Client` raises.
"""

from __future__ import annotations

import re
from importlib.resources import files
from string import Template
from typing import NamedTuple

from replicator.contracts.errors import command
from replicator.contracts.fields import Contract, Role
from sinks.clickhouse.client import Client

TABLE = "events_enriched"

_DATABASE_SQL = "SELECT name FROM system.databases WHERE name = %(database)s"
_TABLE_SQL = "SELECT name FROM system.tables WHERE database = %(database)s AND name = %(table)s"
_ROWS_SQL = "SELECT total_rows FROM system.tables WHERE database = %(database)s AND name = %(table)s"
_SHAPE_SQL = """
    SELECT engine, engine_full, sorting_key,
        (SELECT [groupArray(name), groupArray(type)] FROM system.columns
         WHERE database = %(database)s AND table = %(table)s) AS columns
    FROM system.tables WHERE database = %(database)s AND name = %(table)s"""

_INIT = f"{command('init')}, which makes it and prints the backfill command that brings what it should hold"
INIT = f"Run {_INIT}"
_ALTER = f"ALTER it to match what {command('sql clickhouse')} prints, or rename it away and run {_INIT}"


class Problem(NamedTuple):
    """Why the table can't be written to, and the cure."""

    what: str
    cure: str


class Shape(NamedTuple):
    """What decides whether a table keeps values as they are."""

    engine: str
    definition: str
    sort_key: str
    columns: dict[str, str]


def qualified(database: str) -> str:
    """The table's name in SQL."""
    return f"`{database}`.{TABLE}"


def columns(contract: Contract) -> dict[str, str]:
    """Name and type of what an insert fills. A table may have more columns if they have defaults."""
    return {field.name: field.type.clickhouse for field in contract.fields} | {"_lsn": "UInt64"}


def sort_key(contract: Contract) -> str:
    """The identity of an event, led by time."""
    return ", ".join(contract.field(role).name for role in (Role.TIME, Role.KEY, Role.IDENTITY))


def ddl(contract: Contract, database: str = "engagement") -> str:
    """The statements that create the database and the table, each with a semicolon behind it."""
    template = Template(files("sinks.clickhouse").joinpath("table.sql").read_text(encoding="utf-8"))
    return template.substitute(
        database=database,
        table=TABLE,
        columns="\n".join(f"    {name} {type_}," for name, type_ in columns(contract).items()),
        time=contract.field(Role.TIME).name,
        sort_key=sort_key(contract),
    )


async def create(client: Client, database: str, contract: Contract) -> list[str]:
    """Create the database and the table, each only if it is missing: a plain user may not create databases.

    Returns a line for each thing created.
    """
    names = {"database": database, "table": TABLE}
    database_sql, table_sql, _ = ddl(contract, database).split(";")
    made = []
    if not await client.query(_DATABASE_SQL, names):
        await client.command(database_sql)
        made.append(f"ClickHouse: made database {database}")
    if not await client.query(_TABLE_SQL, names):
        await client.command(table_sql)
        made.append(f"ClickHouse: made table {database}.{TABLE}")
    return made


async def look(client: Client, database: str) -> Shape | None:
    """The table as it is now, in one query; None when there is none."""
    names = {"database": database, "table": TABLE}
    for engine, definition, sort_key, columns in await client.query(_SHAPE_SQL, names):
        return Shape(engine, definition, sort_key, dict(zip(*columns, strict=True)))
    return None


async def is_empty(client: Client, database: str) -> bool:
    """Whether it has no row, as its parts say: no data is read."""
    return await client.query(_ROWS_SQL, {"database": database, "table": TABLE}) == [[0]]


def find_problem(shape: Shape | None, database: str, contract: Contract) -> Problem | None:
    """What about the table would lose, change or multiply events; None when nothing."""
    if shape is None:
        return Problem(f"table {database}.{TABLE} does not exist", INIT)
    found = shape.columns
    wrong = [
        f"column {name} as {found[name]} and not {type_}" if name in found else f"no column {name} {type_}"
        for name, type_ in columns(contract).items()
        if found.get(name) != type_
    ]
    # Replicated... and Shared... variants are as good.
    if not shape.engine.endswith("ReplacingMergeTree") or not re.search(r"\b_lsn\)", shape.definition):
        wrong.append(f"the engine {shape.engine} and not ReplacingMergeTree(_lsn)")
    if shape.sort_key != sort_key(contract):
        wrong.append(f"the sort key ({shape.sort_key}) and not ({sort_key(contract)})")
    return Problem(f"table {database}.{TABLE} has {', '.join(wrong)}", _ALTER) if wrong else None
