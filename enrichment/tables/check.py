"""The enrichment's part of `check`: are the tables what the contract needs?

Everything is read from the catalog, so that a role without rights on the tables learns which ones it lacks. Whether the
tables fit is `fit.py`'s answer, the same as for `run`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from enrichment.contract import CONTENT_TABLE, EVENTS_TABLE, NEEDED, SCHEMA, named
from enrichment.database import Database
from enrichment.tables import fit
from enrichment.tables.catalog import PARAMETERS, SHAPE, Shape
from enrichment.tables.fit import Problem
from replicator.contracts.errors import SourceError
from replicator.contracts.events import Finding
from replicator.source.connection import Dsn

ENCODING = "SELECT current_setting('server_encoding')"

RIGHTS = """
-- Our role, whether a policy hides rows of a table from us, and whether we may read these columns of it.
SELECT quote_ident(current_user),
       row_security_active(t.oid) AND NOT current_setting('row_security')::bool,
       has_schema_privilege(t.relnamespace, 'USAGE') AND bool_and(has_column_privilege(t.oid, a.attnum, 'SELECT'))
FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace JOIN pg_attribute a ON a.attrelid = t.oid
WHERE n.nspname = %(schema)s AND t.relname = %(table)s AND a.attname = ANY(%(columns)s::name[])
GROUP BY t.oid, t.relnamespace
"""

PURPOSE = {
    CONTENT_TABLE: "content is looked up in it",
    EVENTS_TABLE: "backfill reads it, and `run` when it has changed",
}


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
    [(text,)] = await database.rows(SHAPE, PARAMETERS)
    shape = Shape.parse(text)
    for table in NEEDED:
        missing = fit.storage(shape, table)
        yield _finding(table, missing, "there" if table == CONTENT_TABLE else "there, and in the WAL")
        if shape.table(table) is None:
            continue
        yield _finding(table, fit.misfits(shape, table), "has the columns it needs")
        names = {"schema": SCHEMA, "table": table, "columns": [named(table, column) for column in NEEDED[table]]}
        yield _finding(table, _rights(table, await database.rows(RIGHTS, names)), f"may be read ({PURPOSE[table]})")
    if hidden := fit.hidden(shape):
        what = f"table {SCHEMA}.{CONTENT_TABLE}: {hidden.what}; it is looked up again for every event"
        yield Finding(True, what, hidden.cure)
    elif shape.table(CONTENT_TABLE):
        yield _finding(CONTENT_TABLE, None, "the stream tells which content changed")


def _finding(table: str, problem: Problem | None, fine: str) -> Finding:
    what, cure = problem or (fine, "")
    return Finding(problem is None, f"table {SCHEMA}.{table}: {what}", cure)


def _rights(table: str, rows: list[tuple[str, bool, bool]]) -> Problem | None:
    [(role, hides_rows, readable)] = rows or [("", False, True)]  # without any of the columns there is nothing to read
    if hides_rows:
        cure = "if no policy hides rows from us, `-c row_security=on` in the DSN's options"
        what = f"row-level security applies to us ({PURPOSE[table]})"
        return Problem(what, f"ALTER ROLE {role} BYPASSRLS; {cure}")
    if readable:
        return None
    cure = f"GRANT USAGE ON SCHEMA {SCHEMA} TO {role}; GRANT SELECT ON {SCHEMA}.{table} TO {role}"
    return Problem(f"may not be read ({PURPOSE[table]})", cure)
