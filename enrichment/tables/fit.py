"""Can events be made of these tables? One answer for `run`, which reads nothing while they can't, and for `check`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from typing import NamedTuple

from enrichment.tables.catalog import KINDS, Column, Relation, Shape
from enrichment.tables.declared import Tables
from replicator.contracts import fields
from replicator.contracts.errors import TablesUnfit
from replicator.contracts.settings import variable

_PLAIN = re.compile(r"[a-z_][a-z0-9_]*")
_DIGITS = re.compile(r"numeric\((\d+),(-?\d+)\)")

DECLARED_AS = {kind.postgres: name for name, kind in vars(fields).items() if isinstance(kind, fields.Type)}
"""By PostgreSQL's type."""

PRINTED = {"bool": "boolean", "float4": "real", "float8": "double precision", "bytea": "bytea", "numeric": "numeric"}
"""By type: what a column is declared as that is none of a domain."""

TABLE_KINDS = {"r", "p", *KINDS}
"""By pg_class.relkind: what can be read as a table."""


class Problem(NamedTuple):
    """What is wrong with a table, and the cure."""

    what: str
    cure: str


def require(tables: Tables, shape: Shape, repeated: Iterable[Unique], *, untold: bool = False) -> None:
    """Raise TablesUnfit for all that is wrong; `repeated` are the columns that should be unique, and are not.

    `untold`: meanwhile the WAL does not tell which rows are deleted.
    """
    found = [
        Problem(f"table {tables.named_in_schema(table)} {problem.what}", problem.cure)
        for table in tables.needed
        for problem in problems(tables, shape, table)
    ]
    found += [Problem(f"table {one.name}: {one.problem.what}", one.problem.cure) for one in repeated]
    if found:
        what = ", and ".join(problem.what for problem in found)
        cure = "; ".join(dict.fromkeys(problem.cure for problem in found))
        raise TablesUnfit(problem=what, cure=cure, untold=untold)


def encoding(name: str) -> Problem | None:
    """Why no text of this database can be relied on: wal2json sends it as it is stored, in whatever encoding."""
    if name == "UTF8":
        return None
    return Problem(f"server_encoding = {name}", "Move the tables to a database made with ENCODING 'UTF8'")


def problems(tables: Tables, shape: Shape, table: str) -> Iterator[Problem]:
    """Why no event can be made with this table."""
    return (problem for problem in (storage(tables, shape, table), misfits(tables, shape, table)) if problem)


def storage(tables: Tables, shape: Shape, table: str) -> Problem | None:
    """That a table is not there, or that rows of it never come through the stream."""
    name, found = tables.named_in_schema(table), shape.table(table)
    if found is None or found.kind not in TABLE_KINDS:
        back = f"ename it back, or move it back to schema {name.partition('.')[0]}"
        ours = f"R{back}; in a new database, psql -f sql/source_schema.sql"
        return Problem("does not exist", ours if tables.are_engagement else f"Correct the declaration, or r{back}")
    if table != tables.events:  # `hidden` says what it lacks
        return None
    if found.kind in KINDS:
        what = f"is {KINDS[found.kind]}, whose rows are not in the WAL"
        back = f"ive the name {name} back to the table that holds the rows"
        return Problem(what, f"G{back}" if tables.are_engagement else f"Declare another table, or g{back}")
    for part in shape.of(table):
        if not part.streamed:
            return _not_in_the_wal(name, part)
        if part in untold(tables, shape):
            what = f"has a replica identity that does not identify changed and deleted rows ({part})"
            return Problem(what, f"ALTER TABLE {part} REPLICA IDENTITY FULL")
    return None


class Unique(NamedTuple):
    """A column whose values have to be unique, and what it is to its table."""

    name: str
    column: str
    what: str
    parted: bool
    """Then an index has to have the columns that the table is partitioned by, too."""

    @property
    def parameters(self) -> dict[str, object]:
        """Of `catalog.UNIQUE`."""
        schema, _, table = self.name.partition(".")
        return {"schema": schema, "table": table, "column": self.column}

    @property
    def problem(self) -> Problem:
        """If they are not."""
        column = as_sql(self.column, self.column)
        cure = f"CREATE UNIQUE INDEX CONCURRENTLY ON {self.name} ({column})"
        if self.parted:
            cure = f"A unique index of {self.name} on {column} and the columns that it is partitioned by"
        return Problem(f"its {self.what} {self.column} is not unique", cure)


def wanted_unique(tables: Tables, shape: Shape) -> Iterator[Unique]:
    """Of declared tables: of two rows with one identity the sinks would keep one. Engagement's ids are a sequence's."""
    if tables.are_engagement:
        return
    wanted = [(tables.events, tables.stream.table, tables.identity_name, "identity")]
    wanted += [(join.table, join.name, tables.named(join.table, join.key), "key") for join in tables.joins]
    for table, name, column, what in wanted:
        found = shape.table(table)
        if found and found.kind in {"r", "p"} and column in (known.name for known in found.columns):
            yield Unique(name, column, what, found.kind == "p")


def untold(tables: Tables, shape: Shape) -> list[Relation]:
    """The parts whose rows change, and the WAL does not tell which."""
    parts = shape.of(tables.events) if tables.stream.follows else ()
    return [part for part in parts if part.kind == "r" and part.streamed and not _tells(tables.identity_name, part)]


def _not_in_the_wal(name: str, part: Relation) -> Problem:
    of = "" if part.top else f" in {part}"
    if part.kind == "f":
        return Problem(f"has rows{of}, a foreign table, which are not in the WAL", f"Detach {part} from {name}")
    return Problem(f"has rows{of} that are not in the WAL (UNLOGGED)", f"ALTER TABLE {part} SET LOGGED")


def misfits(tables: Tables, shape: Shape, table: str) -> Problem | None:
    """Columns that are missing or of another type."""
    if (found := shape.table(table)) is None or found.kind not in TABLE_KINDS:
        return None
    name, columns = tables.named_in_schema(table), {column.name: column for column in found.columns}
    whats, cures = [], []
    for ours, needed in tables.needed[table].items():
        column = tables.named(table, ours)
        if column not in columns:
            whats.append(f"has no column {column} ({needed})")
            cures.append(_absent(tables, table, ours, columns))
        elif not _is(columns[column], needed):
            whats.append(f"has a column {column} of type {columns[column].declared} instead of {needed}")
            cures.append(_retyped(tables, name, columns[column], ours, needed))
    return Problem(", ".join(whats), "; ".join(cures)) if whats else None


def _retyped(tables: Tables, name: str, column: Column, ours: str, needed: str) -> str:
    """The cure for a column of another type. Of a declaration nobody knows whether it or the table is right."""
    if not tables.are_engagement and needed == tables.time.type.postgres and ours == tables.time.column:
        return "A time has a time zone: declare another column, or change this one to timestamptz"
    if not tables.are_engagement:
        return f"Declare {column.name} as {declared_as(column)}, or change the column back"
    quoted = as_sql(column.name, ours)
    return f"ALTER TABLE {name} ALTER COLUMN {quoted} TYPE {needed} USING {quoted}::{needed}"


def declared_as(column: Column) -> str:
    """The type of `contracts/fields/types.py` for a column."""
    if digits := _DIGITS.fullmatch(column.declared):
        precision, scale = map(int, digits.groups())  # its scale may be negative, or more than its digits
        fraction = max(scale, 0)
        return f"numeric({max(precision - scale, 0) + fraction}, {fraction})"
    if column.declared == "numeric":
        return "numeric(38, 10), or with as many digits as it needs"
    known = DECLARED_AS.get(column.type) if _is(column, column.type) else None
    return known or f'as_text("{column.declared}")'


def _is(column: Column, needed: str) -> bool:
    """Whether all of its values are of this type; of a number without digits, those that fit become events."""
    if needed == column.declared or (needed.startswith("numeric(") and column.declared == "numeric"):
        return True
    if needed == column.type:  # wal2json prints those of a domain in another way
        return column.declared == PRINTED.get(column.type, column.declared)
    ours, theirs = _DIGITS.fullmatch(needed), _DIGITS.fullmatch(column.declared)
    if not (ours and theirs):
        return False
    (digits, scale), (its_digits, its_scale) = map(int, ours.groups()), map(int, theirs.groups())
    return its_scale <= scale and its_digits - its_scale <= digits - scale


def _absent(tables: Tables, table: str, ours: str, there: Collection[str]) -> str:
    """The cure for a column that is not among those that are there; the one that has our name may be."""
    column, needed = tables.named(table, ours), tables.needed[table][ours]
    name, quoted = tables.named_in_schema(table), as_sql(column, ours)
    setting = f"{'' if table == tables.events else f'{table}.'}{ours}"
    back = f"Rename it back (ALTER TABLE {name} RENAME COLUMN … TO {quoted})"
    if not tables.are_engagement and ours not in there:
        close = get_close_matches(ours, there, n=1)
        return f"Correct the declaration{f' (did you mean {close[0]}?)' if close else ''}, or r{back[1:]}"
    if ours in there and column != ours:
        return f"{back}, or take {setting}={column} out of {variable('columns')} and restart the replicator"
    added = f"if there never was such a column, ALTER TABLE {name} ADD COLUMN {quoted} {needed}"
    return f"{back}, or {added}, or name it in {variable('columns')}={setting}=… and restart the replicator"


def as_sql(column: str, ours: str) -> str:
    """As SQL has to write it: a name of the operator's may have capitals and spaces, or be a keyword."""
    return column if column == ours and _PLAIN.fullmatch(column) else '"' + column.replace('"', '""') + '"'


def replaced(tables: Tables, before: Shape, now: Shape) -> bool:
    """Whether the events are in another table than before: it has nothing of the former one, not even as a part."""
    old, new = ({part.oid for part in shape.of(tables.events)} for shape in (before, now))
    return bool(old and new) and old.isdisjoint(new)


def hidden(tables: Tables, shape: Shape, table: str) -> Problem | None:
    """Why the stream does not show every change of a dimension; then it is looked up again for every event."""
    if (found := shape.table(table)) is None:
        return None
    if found.kind in KINDS:
        return Problem(f"is {KINDS[found.kind]}, so its changes are not in the stream", "An ordinary table is faster")
    keys = {tables.named(table, join.key) for join in tables.joins_of(table)}
    for part in shape.of(table):
        if not part.streamed:
            return Problem(f"has rows in {part} that are not in the WAL", f"ALTER TABLE {part} SET LOGGED is faster")
        if part.kind == "r" and not all(_tells(key, part) for key in keys):
            what = f"has a replica identity that does not identify changed and deleted rows ({part})"
            primary = any(keys <= {*(index.columns or ())} for index in part.keys if index.primary)
            return Problem(what, f"ALTER TABLE {part} REPLICA IDENTITY {'DEFAULT' if primary else 'FULL'} is faster")
    return None


def _tells(key: str, part: Relation) -> bool:
    """Whether its replica identity has this column: (f)ull, (d)efault, or an (i)ndex."""
    chosen = [index for index in part.keys if (index.primary if part.identity == "d" else index.identity)]
    return part.identity == "f" or (part.identity in "di" and any(key in (index.columns or ()) for index in chosen))
