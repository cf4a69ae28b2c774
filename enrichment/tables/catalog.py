"""The tables as the catalog has them, with everything that holds their rows: a value that can be compared.

One statement reads it as JSON, so that looking once a second costs next to nothing. Row versions (xmin) are part of
it: a change that was taken back before the next look is a change, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import structs

from enrichment.tables.declared import Tables

ENCODING = "SELECT current_setting('server_encoding')"

NOW = """
-- Where the WAL ends, the server's clock, and the oldest transaction that was not over yet. The snapshot is older than
-- the position: what is committed after the position belongs to that transaction or to a later one. On a standby a
-- commit is visible before the replayed position passes it.
SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END - '0/0')::int8,
       extract(epoch FROM clock_timestamp())::float8, pg_snapshot_xmin(pg_current_snapshot())::text::int8
"""

LOCKS = """
-- Transactions that may have changed one of these tables, the names of schemas, or the values of an enum, and are not
-- over. One that has no transaction id (VACUUM, ANALYZE) has changed nothing yet. A weaker lock, or the one of CREATE
-- INDEX, changes nothing that we look at; nor do those of a row that several update, and of a table that grows.
WITH held AS MATERIALIZED (SELECT * FROM pg_locks WHERE granted)
SELECT DISTINCT ON (1) l.virtualtransaction,
       concat_ws(' ', coalesce('process ' || l.pid, 'a prepared transaction') || ', which holds', l.mode,
                 'on', coalesce(l.relation::regclass::text, 'a type'))
FROM held l
WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (l.mode IN ('ShareUpdateExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
       AND l.locktype = 'relation' AND l.relation = ANY(%(oids)s::oid[])
       OR l.mode = 'RowExclusiveLock' AND l.relation = 'pg_catalog.pg_namespace'::regclass
       OR l.mode = 'ExclusiveLock' AND l.locktype = 'object' AND l.classid = 'pg_catalog.pg_type'::regclass)
  AND EXISTS (SELECT FROM held x
              WHERE x.locktype = 'transactionid' AND x.mode = 'ExclusiveLock'
                AND x.virtualtransaction = l.virtualtransaction)
"""

SHAPE = """
-- The tables and all their descendants (partitions, inheritance children, a hypertable's chunks), as JSON. Temporary
-- ones are another session's own. `type` is the one under a column's domains in the contract's words: narrower integers
-- and other kinds of text do as well, and a reader sees enums as text. A value of an enum that gets another name is
-- another value in every row that has it, and no row is written.
WITH RECURSIVE family AS (
    SELECT t.relname AS root, t.oid, 0::oid AS parent, '' AS link
    FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE (n.nspname, t.relname) IN (SELECT * FROM unnest(%(schemas)s::name[], %(tables)s::name[]))
    UNION
    SELECT f.root, i.inhrelid, i.inhparent, i.xmin::text FROM family f JOIN pg_inherits i ON i.inhparent = f.oid
), members AS (
    SELECT root, oid, bool_or(parent = 0) AS top, string_agg(link, ' ' ORDER BY parent) AS links
    FROM family GROUP BY root, oid
)
SELECT coalesce(json_agg(json_build_object(
    'root', m.root, 'top', m.top, 'oid', m.oid::int8, 'schema', n.nspname, 'name', t.relname, 'kind', t.relkind,
    'persistence', t.relpersistence, 'file', t.relfilenode::int8, 'identity', t.relreplident,
    'row', t.xmin::text, 'version', concat_ws(' ', n.xmin, m.links),
    'columns', CASE WHEN m.top THEN (
        WITH RECURSIVE under AS (
            SELECT attnum, atttypid AS type FROM pg_attribute WHERE attrelid = m.oid AND attnum > 0
            UNION ALL
            SELECT under.attnum, d.typbasetype FROM under JOIN pg_type d ON d.oid = under.type WHERE d.typtype = 'd'
        )
        SELECT json_agg(json_build_object(
            'name', a.attname, 'declared', format_type(a.atttypid, a.atttypmod),
            'type', CASE WHEN b.typname IN ('int2', 'int4', 'int8', 'oid') THEN 'bigint'
                         WHEN b.typcategory IN ('S', 'E') THEN 'text' ELSE b.typname::text END,
            'version', concat_ws(' ', a.xmin, (
                SELECT string_agg(e.xmin::text, ' ' ORDER BY e.oid) FROM pg_enum e
                WHERE e.enumtypid = b.oid AND m.root = ANY(%(joined)s::name[])))) ORDER BY attnum)
        FROM pg_attribute a JOIN under USING (attnum) JOIN pg_type b ON b.oid = under.type AND b.typtype <> 'd'
        WHERE a.attrelid = m.oid AND NOT a.attisdropped
    ) ELSE '[]' END,
    'keys', CASE WHEN m.root = ANY(%(keyed)s::name[]) THEN coalesce((
        SELECT json_agg(json_build_object(
            'primary', i.indisprimary AND i.indimmediate, 'identity', i.indisreplident,
            'version', concat_ws(' ', i.indexrelid, i.xmin),
            'columns', (SELECT json_agg(a.attname) FROM pg_attribute a
                        WHERE a.attrelid = m.oid AND a.attnum = ANY((i.indkey::int2[])[:i.indnkeyatts - 1])))
                        ORDER BY i.indexrelid)
        FROM pg_index i WHERE i.indrelid = m.oid AND (i.indisprimary OR i.indisreplident)
    ), '[]') ELSE '[]' END
) ORDER BY m.root, m.oid), '[]')::text
FROM members m JOIN pg_class t ON t.oid = m.oid JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE t.relpersistence <> 't'
"""


UNIQUE = """
-- Whether the values of a column are unique at any moment, as far as PostgreSQL can say: a deferrable index may only be
-- at the commit, and one of a partitioned table has to have the columns that it is partitioned by, too. What an index
-- only includes is no key of it.
SELECT EXISTS (
    SELECT FROM pg_index i LEFT JOIN pg_partitioned_table p ON p.partrelid = i.indrelid
    JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE n.nspname = %(schema)s AND t.relname = %(table)s AND i.indisunique AND i.indimmediate AND i.indisvalid
      AND i.indpred IS NULL AND i.indexprs IS NULL
      AND (SELECT attnum FROM pg_attribute WHERE attrelid = i.indrelid AND attname = %(column)s)
          = ANY((i.indkey::int2[])[:i.indnkeyatts - 1])
      AND NOT EXISTS (SELECT FROM pg_attribute a
                      WHERE a.attrelid = i.indrelid AND a.attname <> %(column)s
                        AND a.attnum = ANY((i.indkey::int2[])[:i.indnkeyatts - 1])
                        AND a.attnum <> ALL(coalesce(p.partattrs::int2[], '{}'))))
"""


def parameters(tables: Tables) -> dict[str, object]:
    """Those of `SHAPE`."""
    names = {tables.events: tables.schema, **{join.table: join.schema for join in tables.joins}}
    joined = [join.table for join in tables.joins]
    keyed = [*joined, *([tables.events] if tables.stream.follows else [])]
    return {"schemas": [*names.values()], "tables": [*names], "joined": joined, "keyed": keyed}


KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
"""By pg_class.relkind: those that have no changes in the WAL."""


class Column(msgspec.Struct, frozen=True):
    """A column of one of the tables."""

    name: str
    declared: str
    type: str
    version: str


class Key(msgspec.Struct, frozen=True):
    """An index that can be a replica identity."""

    primary: bool
    """One that is not deferrable: PostgreSQL does not use the others."""
    identity: bool
    columns: tuple[str, ...] | None
    version: str


class Relation(msgspec.Struct, frozen=True):
    """One of the tables, or a descendant of it."""

    root: str
    """Which of them."""
    top: bool
    """It is the table itself."""
    oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    file: int
    identity: str
    row: str
    version: str
    columns: tuple[Column, ...]
    keys: tuple[Key, ...]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def streamed(self) -> bool:
        """Whether changes of its own rows, if it can have any, are in the WAL."""
        return self.kind == "p" or (self.kind == "r" and self.persistence == "p")


class Shape(msgspec.Struct, frozen=True):
    """Everything that was seen in one look."""

    relations: tuple[Relation, ...]

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From what `SHAPE` gives."""
        return cls(msgspec.json.decode(text, type=tuple[Relation, ...]))

    def table(self, root: str) -> Relation | None:
        """The table that the name means."""
        return next((found for found in self.of(root) if found.top), None)

    def of(self, root: str) -> Iterator[Relation]:
        """A table and all its descendants."""
        return (relation for relation in self.relations if relation.root == root)

    def parted(self, root: str) -> bool:
        """Whether a table's rows are in several relations."""
        return len(list(self.of(root))) > 1

    def emptied(self, now: Shape) -> list[Relation]:
        """What has a new file, if nothing else has changed: truncated, perhaps. Else nothing."""
        if [structs.replace(old, file=0, row="") for old in self.relations] != [
            structs.replace(new, file=0, row="") for new in now.relations
        ]:
            return []
        changed = [(old, new) for old, new in zip(self.relations, now.relations, strict=True) if old != new]
        return [new for _, new in changed] if all(old.file != new.file for old, new in changed) else []

    @property
    def oids(self) -> list[int]:
        """Of all of them."""
        return [relation.oid for relation in self.relations]
