"""The enrichment's part of `python -m replicator check`: are the tables what the contract needs?

Everything is read from the catalog, so that a role without rights on the tables learns which ones it lacks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator
from typing import NamedTuple

from enrichment.contract import CONTENT_TABLE, EVENTS_TABLE, JOINED, KEY, OWN, SCHEMA
from enrichment.database import Database
from replicator.contracts.errors import SourceError
from replicator.contracts.events import Finding

ENCODING = """
-- The encoding that the database stores text in.
SELECT current_setting('server_encoding')
"""

TABLE = """
-- A table: its kind, how it is stored, whether a policy hides rows of it from us, and which columns tell the stream
-- what row an update or delete is about.
SELECT t.relkind::text, t.relpersistence::text, t.relreplident::text,
       row_security_active(t.oid) AND NOT current_setting('row_security')::bool,
       ARRAY(SELECT a.attname::text FROM pg_index i
             JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = ANY(i.indkey)
             WHERE i.indrelid = t.oid AND i.indisprimary),
       ARRAY(SELECT a.attname::text FROM pg_index i
             JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = ANY(i.indkey)
             WHERE i.indrelid = t.oid AND i.indisreplident)
FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE n.nspname = %(schema)s AND t.relname = %(table)s
"""

COLUMNS = """
-- The columns of a table: name, type as declared, the type under its domains, and whether we may read it.
WITH RECURSIVE declared AS (
    SELECT a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, n.oid AS schema
    FROM pg_attribute a JOIN pg_class t ON t.oid = a.attrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE n.nspname = %(schema)s AND t.relname = %(table)s AND a.attnum > 0 AND NOT a.attisdropped
), under AS (
    SELECT attnum, atttypid AS type FROM declared
    UNION ALL
    SELECT under.attnum, t.typbasetype FROM under JOIN pg_type t ON t.oid = under.type WHERE t.typtype = 'd'
)
SELECT d.attname::text, format_type(d.atttypid, d.atttypmod), t.typname::text, t.typcategory::text,
       has_schema_privilege(d.schema, 'USAGE') AND has_column_privilege(d.attrelid, d.attnum, 'SELECT')
FROM declared d JOIN under USING (attnum) JOIN pg_type t ON t.oid = under.type AND t.typtype <> 'd'
ORDER BY d.attnum
"""


class _Column(NamedTuple):
    name: str
    declared: str
    base: str
    category: str
    readable: bool

    @property
    def kind(self) -> str:
        """The type in the contract's words: narrower integers and other kinds of text do as well."""
        if self.base in ("int2", "int4", "int8"):
            return "bigint"
        return "text" if self.category in "SE" else self.base  # a reader sees enums as text


class _Table(NamedTuple):
    name: str
    needed: dict[str, str]
    """Column to type."""
    purpose: str

    def __str__(self) -> str:
        return f"{SCHEMA}.{self.name}"


TABLES = (
    _Table(
        CONTENT_TABLE,
        {KEY.column: KEY.type.postgres, **{field.joined: field.type.postgres for field in JOINED}},
        "content is looked up in it",
    ),
    _Table(EVENTS_TABLE, {field.column: field.type.postgres for field in OWN}, "backfill reads it"),
)


async def check(dsn: str) -> list[Finding]:
    """Look at everything. A failure on the way is a finding too."""
    database = Database(dsn)
    found: list[Finding] = []
    try:
        async for finding in _findings(database):
            found.append(finding)  # noqa: PERF401  what was found stays found when the next query fails
    except SourceError as exc:
        found.append(Finding.from_error(exc))
    finally:
        await database.close()
    return found


async def _findings(database: Database) -> AsyncIterator[Finding]:
    [(encoding,)] = await database.rows(ENCODING)
    yield _encoding(encoding)
    for table in TABLES:
        names = {"schema": SCHEMA, "table": table.name}
        rows = await database.rows(TABLE, names)
        if not rows:
            yield Finding(False, f"table {table}: does not exist", "psql -f sql/source_schema.sql")
            continue
        kind, persistence, identity, hides_rows, primary_key, identity_index = rows[0]
        columns = {column.name: column for column in map(_Column._make, await database.rows(COLUMNS, names))}
        yield _storage(table, kind, persistence)
        yield _columns(table, columns)
        yield _rights(table, columns, hides_rows=hides_rows)
        if table.name == CONTENT_TABLE:
            yield _identity(table, identity, primary_key, identity_index)


def _encoding(encoding: str) -> Finding:
    cure = "" if encoding == "UTF8" else "Move the tables to a database made with ENCODING 'UTF8'"
    return Finding(not cure, f"server_encoding = {encoding}", cure)


def _storage(table: _Table, kind: str, persistence: str) -> Finding:
    if kind != "r":
        what = "is partitioned" if kind == "p" else "is not an ordinary table"
        return Finding(
            False, f"table {table}: {what}, and wal2json knows only its parts", f"Make {table} an ordinary table"
        )
    if persistence != "p":
        return Finding(False, f"table {table}: is not in the WAL", f"ALTER TABLE {table} SET LOGGED")
    return Finding(True, f"table {table}: there, and in the WAL")


def _columns(table: _Table, columns: dict[str, _Column]) -> Finding:
    wrong = list(_wrong_columns(table, columns))
    if not wrong:
        return Finding(True, f"table {table}: has the columns it needs")
    problems = ", ".join(problem for problem, _ in wrong)
    return Finding(False, f"table {table}: {problems}", "; ".join(cure for _, cure in wrong))


def _wrong_columns(table: _Table, columns: dict[str, _Column]) -> Iterator[tuple[str, str]]:
    for name, needed in table.needed.items():
        if name not in columns:
            yield f"{name} is missing", f"ALTER TABLE {table} ADD COLUMN {name} {needed}"
        elif columns[name].kind != needed:
            yield (
                f"{name} is {columns[name].declared} instead of {needed}",
                f"ALTER TABLE {table} ALTER COLUMN {name} TYPE {needed} USING {name}::{needed}",
            )


def _rights(table: _Table, columns: dict[str, _Column], *, hides_rows: bool) -> Finding:
    if hides_rows:
        what = f"table {table}: row-level security applies to us ({table.purpose})"
        cure = (
            "ALTER ROLE our role BYPASSRLS; if no policy hides rows from us, `-c row_security=on` in the DSN's options"
        )
        return Finding(False, what, cure)
    hidden = [name for name in table.needed if name in columns and not columns[name].readable]
    if not hidden:
        return Finding(True, f"table {table}: may be read ({table.purpose})")
    cure = f"GRANT USAGE ON SCHEMA {SCHEMA} TO our role; GRANT SELECT ON {table} TO our role (sql/roles.sql)"
    return Finding(False, f"table {table}: may not be read ({table.purpose})", cure)


def _identity(table: _Table, identity: str, primary_key: Collection[str], identity_index: Collection[str]) -> Finding:
    """Without content_id in the replica identity nobody hears which content was deleted or renamed."""
    told = {"f": ("content_id",), "d": primary_key, "i": identity_index}.get(identity, ())
    name = {"f": "FULL", "d": "DEFAULT", "i": "USING INDEX"}.get(identity, "NOTHING")
    if "content_id" in told:
        return Finding(True, f"table {table}: replica identity {name} tells which content changed")
    cure = f"ALTER TABLE {table} REPLICA IDENTITY {'DEFAULT' if 'content_id' in primary_key else 'FULL'}"
    what = f"table {table}: replica identity {name} does not tell which content was changed or deleted"
    return Finding(False, what, cure)
