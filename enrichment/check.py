"""The enrichment's part of `check`: are the tables what the contract needs?

Everything is read from the catalog, so that a role without rights on the tables learns which ones it lacks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple, TypeAlias

from enrichment.contract import CONTENT, CONTENT_TABLE, EVENTS_TABLE, JOINED, KEY, OWN, SCHEMA
from enrichment.database import Database
from replicator.contracts.errors import SourceError
from replicator.contracts.events import Finding
from replicator.source.connection import Dsn

ENCODING = "SELECT current_setting('server_encoding')"

TABLE = """
-- A table: its kind, how it is stored, whether a policy hides rows of it from us, its replica identity, and which ones
-- would name content_id: (f)ull, (d)efault, an (i)ndex.
SELECT t.relkind::text, t.relpersistence::text,
       row_security_active(t.oid) AND NOT current_setting('row_security')::bool,
       t.relreplident::text,
       'f' || (SELECT coalesce(string_agg(CASE WHEN i.indisprimary THEN 'd' ELSE '' END
                                          || CASE WHEN i.indisreplident THEN 'i' ELSE '' END, ''), '')
               FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)
               WHERE i.indrelid = t.oid AND a.attname = 'content_id')
FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE n.nspname = %(schema)s AND t.relname = %(table)s
"""

COLUMNS = """
-- The columns of a table: name, type as declared, the type under its domains in the contract's words (narrower integers
-- and other kinds of text do as well, and a reader sees enums as text), and whether we may read it.
WITH RECURSIVE declared AS (
    SELECT a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, n.oid AS schema
    FROM pg_attribute a JOIN pg_class t ON t.oid = a.attrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE n.nspname = %(schema)s AND t.relname = %(table)s AND a.attnum > 0 AND NOT a.attisdropped
), under AS (
    SELECT attnum, atttypid AS type FROM declared
    UNION ALL
    SELECT under.attnum, t.typbasetype FROM under JOIN pg_type t ON t.oid = under.type WHERE t.typtype = 'd'
)
SELECT d.attname::text, format_type(d.atttypid, d.atttypmod),
       CASE WHEN t.typname IN ('int2', 'int4', 'int8') THEN 'bigint' WHEN t.typcategory IN ('S', 'E') THEN 'text'
            ELSE t.typname::text END,
       has_schema_privilege(d.schema, 'USAGE') AND has_column_privilege(d.attrelid, d.attnum, 'SELECT')
FROM declared d JOIN under USING (attnum) JOIN pg_type t ON t.oid = under.type AND t.typtype <> 'd'
ORDER BY d.attnum
"""


class _Column(NamedTuple):
    name: str
    declared: str
    type: str
    readable: bool


_Columns: TypeAlias = Mapping[str, _Column]

NEEDED: Mapping[str, Mapping[str, str]] = {
    CONTENT_TABLE: {KEY.column: KEY.type.postgres, **{field.joined: field.type.postgres for field in JOINED}},
    EVENTS_TABLE: {field.column: field.type.postgres for field in OWN},
}
"""Table to column to type."""

PURPOSE = {CONTENT_TABLE: "content is looked up in it", EVENTS_TABLE: "backfill reads it"}


async def check(dsn: Dsn) -> list[Finding]:
    """Look at everything. A failure on the way is a finding too."""
    database = Database(dsn)
    found: list[Finding] = []
    try:
        async for finding in _findings(database):
            found.append(finding)  # noqa: PERF401  what was found stays found when the next query fails
    except SourceError as exc:
        found.append(Finding(False, "source tables", str(exc)))
    finally:
        await database.close()
    return found


async def _findings(database: Database) -> AsyncIterator[Finding]:
    [(encoding,)] = await database.rows(ENCODING)
    cure = "" if encoding == "UTF8" else "Move the tables to a database made with ENCODING 'UTF8'"
    yield Finding(not cure, f"server_encoding = {encoding}", cure)
    for table in NEEDED:
        names = {"schema": SCHEMA, "table": table}
        rows = await database.rows(TABLE, names)
        if not rows:
            yield Finding(False, f"table {SCHEMA}.{table}: does not exist", "psql -f sql/source_schema.sql")
            continue
        kind, persistence, hides_rows, identity, telling = rows[0]
        columns = {column.name: column for column in map(_Column._make, await database.rows(COLUMNS, names))}
        yield _finding(table, _storage(table, kind, persistence), "there, and in the WAL")
        yield _finding(table, _misfits(table, columns), "has the columns it needs")
        yield _finding(table, _rights(table, columns, hides_rows=hides_rows), f"may be read ({PURPOSE[table]})")
        if table == CONTENT_TABLE:
            yield _identity(identity, telling)


_Problem: TypeAlias = tuple[str, str] | None
"""What is wrong, and the cure."""


def _finding(table: str, problem: _Problem, fine: str) -> Finding:
    what, cure = problem or (fine, "")
    return Finding(problem is None, f"table {SCHEMA}.{table}: {what}", cure)


def _storage(table: str, kind: str, persistence: str) -> _Problem:
    if kind != "r":
        what = "is partitioned" if kind == "p" else "is not an ordinary table"
        return f"{what}, and wal2json knows only its parts", f"Make {SCHEMA}.{table} an ordinary table"
    return None if persistence == "p" else ("is not in the WAL", f"ALTER TABLE {SCHEMA}.{table} SET LOGGED")


def _misfits(table: str, columns: _Columns) -> _Problem:
    problems, cures = [], []
    for name, needed in NEEDED[table].items():
        if name not in columns:
            problems.append(f"{name} is missing")
            cures.append(f"ALTER TABLE {SCHEMA}.{table} ADD COLUMN {name} {needed}")
        elif columns[name].type != needed:
            problems.append(f"{name} is {columns[name].declared} instead of {needed}")
            cures.append(f"ALTER TABLE {SCHEMA}.{table} ALTER COLUMN {name} TYPE {needed} USING {name}::{needed}")
    return (", ".join(problems), "; ".join(cures)) if problems else None


def _rights(table: str, columns: _Columns, *, hides_rows: bool) -> _Problem:
    if hides_rows:
        cure = "if no policy hides rows from us, `-c row_security=on` in the DSN's options"
        return f"row-level security applies to us ({PURPOSE[table]})", f"ALTER ROLE our role BYPASSRLS; {cure}"
    if all(columns[name].readable for name in NEEDED[table] if name in columns):
        return None
    cure = f"GRANT USAGE ON SCHEMA {SCHEMA} TO our role; GRANT SELECT ON {SCHEMA}.{table} TO our role (sql/roles.sql)"
    return f"may not be read ({PURPOSE[table]})", cure


def _identity(identity: str, telling: str) -> Finding:
    """Without content_id in the replica identity the stream does not say which content was deleted or renamed."""
    name = {"f": "FULL", "d": "DEFAULT", "i": "USING INDEX"}.get(identity, "NOTHING")
    if identity in telling:
        return _finding(CONTENT_TABLE, None, f"replica identity {name} tells which content changed")
    what = f"replica identity {name} does not tell which content was changed or deleted"
    cure = f"ALTER TABLE {CONTENT} REPLICA IDENTITY {'DEFAULT' if 'd' in telling else 'FULL'}"
    return _finding(CONTENT_TABLE, (what, cure), "")
