"""The table in ClickHouse: `table.sql` with the stream's columns in it, and what an insert needs of a table.

`sink.py` writes to it. The functions raise what a `Client` raises.
"""

from __future__ import annotations

import re
from importlib.resources import files
from string import Template
from typing import NamedTuple

from replicator.contracts.errors import SinkMisconfigured, SinkUnusable, cited, command
from replicator.contracts.events import Finding
from replicator.contracts.fields import Stream
from sinks.clickhouse.client import Client

FSYNC = "fsync_after_insert = 1, fsync_part_directory = 1"

_WHOLE_INSERT_ROWS = 1_048_576  # above any clickhouse_max_events: an insert is parsed into one block

INSERT_SETTINGS = {
    # One insert is one block, and one part a month: atomic, and what the token stands for.
    "input_format_parallel_parsing": 0,
    "max_insert_block_size": _WHOLE_INSERT_ROWS,
    "min_insert_block_size_rows": _WHOLE_INSERT_ROWS,
    "min_insert_block_size_bytes": 0,
    # A catch-up or a backfill may span more months than the default of 100.
    "max_partitions_per_insert_block": 0,
    # The lane gathers the batch. ClickHouse's own gathering (on by default since 26) would add its wait and ignore the
    # token. Where a profile insists on it, at least the answer has to mean that the rows are there.
    "async_insert": 0,
    "wait_for_async_insert": 1,
    "date_time_input_format": "best_effort",  # RFC 3339
    # Whatever does not fit is an error: an unknown field, a null where none may be, a bad row.
    "input_format_skip_unknown_fields": 0,
    "input_format_null_as_default": 0,
    "input_format_allow_errors_num": 0,
    "input_format_allow_errors_ratio": 0,
}
"""Sent with every insert, and read back along the same way: front ends drop parameters, and profiles pin settings."""

_DIFFERENT = ", ".join(
    f"if(toString(getSetting('{name}')) IN ('{value}', '{str(bool(value)).lower()}'), '',"
    f" concat('{name} = ', toString(getSetting('{name}'))))"
    for name, value in INSERT_SETTINGS.items()
)

_TABLE_SQL = f"""
    SELECT engine, engine_full, sorting_key, total_rows,
        (SELECT [groupArray(name),
                 groupArray(if(default_kind IN ('', 'DEFAULT'), type, concat(type, ' ', default_kind)))]
         FROM system.columns WHERE database = %(database)s AND table = %(table)s) AS columns,
        arrayMap((place, name) -> concat(place, '.', name), dependencies_database, dependencies_table) AS views,
        arrayFilter(text -> text != '', [{_DIFFERENT}]) AS different,
        position(create_table_query, ' TTL ') > 0 AS expires, toString(uuid) AS uuid
    FROM system.tables WHERE database = %(database)s AND name = %(table)s"""  # noqa: S608  our own names


class Look(NamedTuple):
    """What an insert needs to know of the table."""

    rows: int
    """As its parts say: no data is read, and repeats count until they are merged."""
    views: list[str]
    """The materialized views that get each insert, too."""
    durable: bool
    """An insert is on disk when it is answered, or on other replicas as well."""
    expires: bool
    """A TTL deletes rows, or values of a column, perhaps as they are inserted."""
    table: str = ""
    """Which one it is: another one may take its name."""


class _Row(NamedTuple):
    engine: str
    definition: str
    order: str
    rows: int | None
    columns: tuple[list[str], list[str]]
    views: list[str]
    different: list[str]
    expires: int
    uuid: str


_INIT = f"{command('init')}, which makes it and prints the backfill command that brings what it should hold"
INIT = f"Run {_INIT}"
_SETTINGS_CURE = (
    "Let the front end before ClickHouse (chproxy, for one) pass on these URL parameters, or set them in the user's"
    " profile in ClickHouse"
)
_ALTER = f"ALTER it to match what {command('sql clickhouse')} prints, or rename it away and run {_INIT}"


def table_of(stream: Stream) -> str:
    """The table's name."""
    return stream.clickhouse_table or stream.name


def qualified(database: str, stream: Stream) -> str:
    """The same in SQL."""
    return f"`{database}`.{table_of(stream)}"


def columns(stream: Stream) -> dict[str, str]:
    """Name and type of what an insert fills. A table may have more columns if they have defaults."""
    versions = {"_version": "UInt128", "_deleted": "UInt8"} if stream.follows else {"_lsn": "UInt64"}
    return {field.name: field.type.clickhouse for field in stream.fields} | versions


def version(stream: Stream) -> str:
    """What decides between versions of an event: a row that changes may do so several times in one commit."""
    return "_version, _deleted" if stream.follows else "_lsn"


def sort_key(stream: Stream) -> str:
    """The identity of an event, led by time where that never changes."""
    order = (stream.identity,) if stream.follows else (stream.time, stream.key, stream.identity)
    return ", ".join(field.name for field in order)


def quoted(name: str) -> str:
    """A column in SQL: ClickHouse takes `index` or `nan` for something else."""
    return f"`{name}`"


def ddl(stream: Stream, database: str = "engagement") -> str:
    """The statements that create the database and the table, each with a semicolon at its end."""
    template = Template(files("sinks.clickhouse").joinpath("table.sql").read_text(encoding="utf-8"))
    return template.substitute(
        database=database,
        table=table_of(stream),
        columns="\n".join(f"    {quoted(name)} {type_}," for name, type_ in columns(stream).items()),
        version=version(stream),
        partition="" if stream.follows else f"PARTITION BY toYYYYMM({quoted(stream.time.name)})\n",
        sort_key=", ".join(map(quoted, sort_key(stream).split(", "))),
    )


async def create(client: Client, database: str, stream: Stream) -> list[str]:
    """Create the database and the table, each only if it is missing: a plain user may not create databases.

    Returns a line for each thing created.
    """
    database_sql, table_sql, _ = ddl(stream, database).split(";")
    made = []
    for sql, what, name in (
        (database_sql, "database", f"`{database}`"),
        (table_sql, "table", qualified(database, stream)),
    ):
        if not await _exists(client, what, name):
            await client.command(sql)
            if not await _exists(client, what, name):
                raise client.errors.not_clickhouse(f"{what} {name} is not there after it was created")
            made.append(f"ClickHouse: made {what} {name.replace('`', '')}")
    return made


async def to_be_made(client: Client, database: str, stream: Stream) -> Finding | None:
    """What `check` says of a table that is not there, by whether this user may make it. Raises SinkError."""
    if await _exists(client, "table", qualified(database, stream)):
        return None
    what = f"ClickHouse: table {database}.{table_of(stream)} does not exist"
    there = await _exists(client, "database", f"`{database}`")
    rights = f"CREATE TABLE ON `{database}`.*" if there else f"CREATE DATABASE, CREATE TABLE ON `{database}`.*"
    if await _may(client, rights):
        return Finding(False, what, INIT, made_by_init=True)
    cure = f"GRANT {rights} to this user, or let another one run what {command('sql clickhouse')} prints"
    return Finding(False, f"{what}, or this user may not see it, and it may not make it", cure)


async def _may(client: Client, rights: str) -> bool:
    [readonly] = await client.one("SELECT toUInt8(getSetting('readonly'))", tuple[int])
    if readonly:
        return False
    try:
        return await client.says(f"CHECK GRANT {rights}") != "0"
    except SinkMisconfigured:  # a server from before 2024 does not know the statement: `init` shows it
        return True


async def _exists(client: Client, what: str, name: str) -> bool:
    [exists] = await client.one(f"EXISTS {what} {name}", tuple[int])
    return bool(exists)


async def look(client: Client, database: str, stream: Stream) -> Look:
    """Raises SinkUnusable if the table would lose, change or multiply events, SinkMisconfigured if inserts would."""
    names = {"database": database, "table": (name := table_of(stream))}
    found = await client.query(_TABLE_SQL, _Row, names, settings=INSERT_SETTINGS)
    if not found:
        raise SinkUnusable(sink=client.errors.sink, detail=f"table {database}.{name} does not exist", cure=INIT)
    [row] = found
    types = dict(zip(*row.columns, strict=False))
    wrong = [
        f"column {column} as {types[column]} and not {type_}" if column in types else f"no column {column} {type_}"
        for column, type_ in columns(stream).items()
        if types.get(column) != type_
    ]
    # Replicated... and Shared... variants are as good.
    if not row.engine.endswith("ReplacingMergeTree") or not re.search(rf"\b{version(stream)}\)", row.definition):
        wrong.append(f"the engine {row.engine} and not ReplacingMergeTree({version(stream)})")
    order = row.order.removeprefix("(").removesuffix(")").replace("`", "")  # of one column it has brackets
    if order != sort_key(stream):
        wrong.append(f"the sort key ({row.order}) and not ({sort_key(stream)})")
    if wrong:
        detail = cited(f"table {database}.{name} has {', '.join(wrong)}", most=2_000)
        raise SinkUnusable(sink=client.errors.sink, detail=detail, cure=_ALTER)
    if row.different:
        sent = ", ".join(row.different)
        detail = f"settings that are sent with each insert do not arrive at {client.errors.server}: {sent}"
        raise SinkMisconfigured(sink=client.errors.sink, detail=cited(detail), cure=_SETTINGS_CURE)
    durable = row.engine != "ReplacingMergeTree" or "fsync_after_insert = 1" in row.definition
    return Look(row.rows or 0, row.views, durable, bool(row.expires), row.uuid)
