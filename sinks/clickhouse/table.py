"""The table in ClickHouse: `table.sql` with the contract's columns in it, and what an insert needs of a table.

`sink.py` writes to it. The functions raise what a `Client` raises.
"""

from __future__ import annotations

import re
from importlib.resources import files
from string import Template

from replicator.contracts.errors import SinkUnusable, command
from replicator.contracts.fields import Contract, Role
from sinks.clickhouse.client import Client
from sinks.clickhouse.errors import SINK

TABLE = "events_enriched"

_TABLE_SQL = """
    SELECT engine, engine_full, sorting_key, total_rows,
        (SELECT [groupArray(name), groupArray(type)] FROM system.columns
         WHERE database = %(database)s AND table = %(table)s) AS columns
    FROM system.tables WHERE database = %(database)s AND name = %(table)s"""

_INIT = f"{command('init')}, which makes it and prints the backfill command that brings what it should hold"
INIT = f"Run {_INIT}"
_ALTER = f"ALTER it to match what {command('sql clickhouse')} prints, or rename it away and run {_INIT}"


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
    """The statements that create the database and the table, each with a semicolon at its end."""
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
    database_sql, table_sql, _ = ddl(contract, database).split(";")
    made = []
    for sql, what, name in ((database_sql, "database", f"`{database}`"), (table_sql, "table", qualified(database))):
        [[exists]] = await client.query(f"EXISTS {what} {name}")
        if not exists:
            await client.command(sql)
            made.append(f"ClickHouse: made {what} {name.replace('`', '')}")
    return made


async def require_table(client: Client, database: str, contract: Contract) -> bool:
    """Raises SinkUnusable if the table would lose, change or multiply events.

    Returns whether it is empty, as its parts say: no data is read.
    """
    found = await client.query(_TABLE_SQL, {"database": database, "table": TABLE})
    if not found:
        raise SinkUnusable(sink=SINK, detail=f"table {database}.{TABLE} does not exist", cure=INIT)
    [(engine, definition, order, rows, names_and_types)] = found
    types = dict(zip(*names_and_types, strict=True))
    wrong = [
        f"column {name} as {types[name]} and not {type_}" if name in types else f"no column {name} {type_}"
        for name, type_ in columns(contract).items()
        if types.get(name) != type_
    ]
    # Replicated... and Shared... variants are as good.
    if not engine.endswith("ReplacingMergeTree") or not re.search(r"\b_lsn\)", definition):
        wrong.append(f"the engine {engine} and not ReplacingMergeTree(_lsn)")
    if order != sort_key(contract):
        wrong.append(f"the sort key ({order}) and not ({sort_key(contract)})")
    if wrong:
        raise SinkUnusable(sink=SINK, detail=f"table {database}.{TABLE} has {', '.join(wrong)}", cure=_ALTER)
    return bool(rows == 0)
