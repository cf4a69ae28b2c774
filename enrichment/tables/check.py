"""The enrichment's part of `check`: are the tables what the stream needs?

Everything is read from the catalog, so that a role without rights on the tables learns which ones it lacks. Whether the
tables fit is `fit.py`'s answer, the same as for `run`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from enrichment.database import Database
from enrichment.events.codec import codec_of
from enrichment.history.pages import BEGINNING, END, PAGE_BYTES, between, make_page
from enrichment.history.queries import queries_of
from enrichment.ledger import TableLedger
from enrichment.tables import fit
from enrichment.tables.catalog import ENCODING, SHAPE, UNIQUE, Shape, parameters
from enrichment.tables.declared import Tables
from enrichment.tables.fit import Problem
from replicator.contracts.errors import SourceError, SourceUnusable
from replicator.contracts.events import Finding, Position, counted, format_lsn
from replicator.contracts.fields import INT64_MAX, INT64_MIN
from replicator.contracts.settings import variable
from replicator.source.connection import Dsn

SAMPLE_ROWS = 100

NULLABLE = """
-- Which of these columns may be NULL.
SELECT a.attname
FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace JOIN pg_attribute a ON a.attrelid = t.oid
WHERE n.nspname = %(schema)s AND t.relname = %(table)s AND a.attname = ANY(%(columns)s::name[]) AND NOT a.attnotnull
ORDER BY a.attnum
"""

RIGHTS = """
-- Our role, whether a policy hides rows of a table from us, and whether we may read these columns of it.
SELECT quote_ident(current_user),
       row_security_active(t.oid) AND NOT current_setting('row_security')::bool,
       has_schema_privilege(t.relnamespace, 'USAGE') AND bool_and(has_column_privilege(t.oid, a.attnum, 'SELECT'))
FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace JOIN pg_attribute a ON a.attrelid = t.oid
WHERE n.nspname = %(schema)s AND t.relname = %(table)s AND a.attname = ANY(%(columns)s::name[])
GROUP BY t.oid, t.relnamespace
"""

CONTENT_PURPOSE = "events are joined with it"
EVENTS_PURPOSE = "backfill reads it, and `run` when it has changed"


async def check(dsn: Dsn, tables: Tables) -> list[Finding]:
    """Look at everything. A failure on the way is a finding too."""
    database = Database(dsn)
    found: list[Finding] = []
    try:
        async for finding in _findings(dsn, database, tables):
            found.append(finding)  # noqa: PERF401  what was found stays found when the next query fails
    except SourceError as exc:
        found.append(Finding(False, exc.problem, exc.cure))
    finally:
        await database.close()
    return found


async def _findings(dsn: Dsn, database: Database, tables: Tables) -> AsyncIterator[Finding]:
    [(encoding,)] = await database.rows(ENCODING)
    foreign = fit.encoding(encoding)
    yield Finding(not foreign, f"server_encoding = {encoding}", foreign.cure if foreign else "")
    [(text,)] = await database.rows(SHAPE, parameters(tables))
    shape = Shape.parse(text)
    of_tables = [finding for table in tables.needed async for finding in _of_table(database, tables, shape, table)]
    for finding in of_tables:
        yield finding
    if not tables.are_engagement:
        async for finding in _of_rows(database, tables, shape):
            yield finding
        if all(finding.ok for finding in of_tables):  # else PostgreSQL can't be asked for rows
            yield await _sample(database, tables)
            yield await _comparable(dsn, tables)
    for join in {join.table: join for join in tables.joins}.values():
        if hidden := fit.hidden(tables, shape, join.table):
            yield Finding(True, f"table {join.name}: {hidden.what}; it is looked up again for every event", hidden.cure)
        elif shape.table(join.table):
            yield _finding(join.name, None, "the stream tells which of its rows changed")


async def _of_table(database: Database, tables: Tables, shape: Shape, table: str) -> AsyncIterator[Finding]:
    of_events = table == tables.events
    name, purpose = tables.named_in_schema(table), EVENTS_PURPOSE if of_events else CONTENT_PURPOSE
    yield _finding(name, fit.storage(tables, shape, table), "there, and in the WAL" if of_events else "there")
    if shape.table(table) is None:
        return
    yield _finding(name, fit.misfits(tables, shape, table), "has the columns it needs")
    columns = [tables.named(table, column) for column in tables.needed[table]]
    columns += ["xmin"] if of_events else []  # what was written since is found by it; rights on columns are not enough
    names = {"schema": name.partition(".")[0], "table": table, "columns": columns}
    yield _finding(name, _rights(name, purpose, await database.rows(RIGHTS, names)), f"may be read ({purpose})")


async def _of_rows(database: Database, tables: Tables, shape: Shape) -> AsyncIterator[Finding]:
    """What the rows have to be like."""
    name = tables.stream.table
    for wanted in fit.wanted_unique(tables, shape):
        [(unique,)] = await database.rows(UNIQUE, wanted.parameters)
        yield _finding(wanted.name, None if unique else wanted.problem, f"its {wanted.what} {wanted.column} is unique")
    needed = {tables.named(tables.events, field.column): field.role for field in tables.own if not field.type.optional}
    if null := await database.rows(NULLABLE, {"schema": tables.schema, "table": tables.events, "columns": [*needed]}):
        names = [column for (column,) in null]
        what = f"{', '.join(names)} may be NULL, which the declaration does not expect"
        cures = [f"ALTER TABLE {name} ALTER COLUMN {fit.as_sql(one, one)} SET NOT NULL" for one in names if needed[one]]
        cures += ["declare .nullable()"] * any(needed[one] is None for one in names)
        yield Finding(
            True, f"table {name}: {what}", f"A row with NULL there becomes a dead letter; or {', and '.join(cures)}"
        )


async def _comparable(dsn: Dsn, tables: Tables) -> Finding:
    """Whether PostgreSQL computes what the functions of the declaration compute in SQL, too."""
    ledger, problem = TableLedger(dsn, tables=tables, with_content=True), None
    try:
        await ledger.open()
    except SourceUnusable as exc:
        problem = Problem(f"`reconcile` can't compare it: {exc.detail}", "Correct the SQL in the declaration")
    finally:
        await ledger.close()
    return _finding(tables.stream.table, problem, "can be compared by `reconcile`")


async def _sample(database: Database, tables: Tables) -> Finding:
    """Make events of some rows: functions of the declaration have never run before."""
    ends = {**between(BEGINNING, END), "id": INT64_MIN, "last_id": INT64_MAX, "as_of": format_lsn(0)}
    ends |= {"rows": SAMPLE_ROWS, "bytes": PAGE_BYTES}
    found = await database.rows(queries_of(tables).page("id", begun=False), ends)
    if not found:
        return _finding(tables.stream.table, None, "is empty, so no event was made of it")
    [*refused] = make_page(codec_of(tables), found, Position(0, 0), "").enriched.refused
    what = f"no event can be made of {len(refused)} of {len(found)} rows: {refused[0].reason}" if refused else ""
    problem = Problem(what, f"Correct the declaration ({variable('stream')}), or the rows") if refused else None
    return _finding(tables.stream.table, problem, f"events can be made of its first {counted(len(found), 'row')}")


def _finding(name: str, problem: Problem | None, fine: str) -> Finding:
    what, cure = problem or (fine, "")
    return Finding(problem is None, f"table {name}: {what}", cure)


def _rights(name: str, purpose: str, rows: list[tuple[str, bool, bool]]) -> Problem | None:
    [(role, hides_rows, readable)] = rows or [("", False, True)]  # without any of the columns there is nothing to read
    if hides_rows:
        cure = "if no policy hides rows from us, `-c row_security=on` in the DSN's options"
        what = f"row-level security applies to us ({purpose})"
        return Problem(what, f"ALTER ROLE {role} BYPASSRLS; {cure}")
    if readable:
        return None
    cure = f"GRANT USAGE ON SCHEMA {name.partition('.')[0]} TO {role}; GRANT SELECT ON {name} TO {role}"
    return Problem(f"may not be read ({purpose})", cure)
