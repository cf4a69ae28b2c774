"""The table in ClickHouse: made from `sql/clickhouse.sql`, and compared with what an insert needs.

`sink.py` writes to it. The functions raise what a `Client` raises.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sinks.clickhouse.client import Client

TABLE = "events_enriched"

COLUMNS = {
    "event_id": "Int64",
    "content_id": "Int64",
    "user_id": "Int64",
    "event_type": "LowCardinality(String)",
    "event_ts": "DateTime64(6, 'UTC')",
    "duration_ms": "Nullable(Int64)",
    "device": "LowCardinality(Nullable(String))",
    "content_type": "LowCardinality(Nullable(String))",
    "length_seconds": "Nullable(Int64)",
    "engagement_seconds": "Nullable(Decimal(18, 3))",
    "engagement_pct": "Nullable(Decimal(18, 2))",
    "_lsn": "UInt64",
}
"""What an insert fills, as in the SQL file (a test compares the two). More columns are fine if they have defaults."""

SORT_KEY = "event_ts, content_id, event_id"

_SCHEMA_FILE = Path(__file__).parents[2] / "sql" / "clickhouse.sql"

_DATABASE_SQL = "SELECT name FROM system.databases WHERE name = %(database)s"
_TABLE_SQL = "SELECT name FROM system.tables WHERE database = %(database)s AND name = %(table)s"
_ROWS_SQL = "SELECT total_rows FROM system.tables WHERE database = %(database)s AND name = %(table)s"
_SHAPE_SQL = """
    SELECT engine, engine_full, sorting_key,
        (SELECT [groupArray(name), groupArray(type)] FROM system.columns
         WHERE database = %(database)s AND table = %(table)s) AS columns
    FROM system.tables WHERE database = %(database)s AND name = %(table)s"""

_BACKFILL = "which makes it and prints the `python backfill.py` command that brings what it should hold"
INIT = f"Run `python -m replicator init`, {_BACKFILL}"
_ALTER = f"ALTER it to match sql/clickhouse.sql, or rename it away and run `python -m replicator init`, {_BACKFILL}"


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


async def create(client: Client, database: str) -> list[str]:
    """Make the database and the table, each only if it is missing: a plain user may not make databases.

    Returns a line for each thing made.
    """
    names = {"database": database, "table": TABLE}
    schema = _SCHEMA_FILE.read_text(encoding="utf-8").replace("`engagement`", f"`{database}`")
    database_sql, table_sql, _ = schema.split(";")
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


def find_problem(shape: Shape | None, database: str) -> Problem | None:
    """What about the table would lose, change or multiply events; None when nothing."""
    if shape is None:
        return Problem(f"table {database}.{TABLE} does not exist", INIT)
    types = shape.columns
    wrong = [_wrong_type(name, types.get(name)) for name, type_ in COLUMNS.items() if types.get(name) != type_]
    wrong += _wrong_engine(shape.engine, shape.definition, shape.sort_key)
    return Problem(f"table {database}.{TABLE} has {', '.join(wrong)}", _ALTER) if wrong else None


def _wrong_type(name: str, found: str | None) -> str:
    return f"no column {name} {COLUMNS[name]}" if found is None else f"column {name} as {found} and not {COLUMNS[name]}"


def _wrong_engine(engine: str, definition: str, sort_key: str) -> list[str]:
    """Replicated... and Shared... variants are as good."""
    wrong = []
    if not engine.endswith("ReplacingMergeTree") or not re.search(r"\b_lsn\)", definition):
        wrong.append(f"the engine {engine} and not ReplacingMergeTree(_lsn)")
    if sort_key != SORT_KEY:
        wrong.append(f"the sort key ({sort_key}) and not ({SORT_KEY})")
    return wrong
