"""The SQL that reads a stream's tables, made from its declaration; `pages.py` asks it."""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

from psycopg import sql

from enrichment.history.moment import REPLAYED, WAL_END
from enrichment.tables.declared import Tables, quoted
from enrichment.tables.fit import as_sql

Order: TypeAlias = Literal["event_ts", "id"]


class Queries:
    """The SQL that reads the tables of a stream; `queries_of` gives it."""

    def __init__(self, tables: Tables) -> None:
        identity, time = quoted(tables.identity.column), quoted(tables.time.column)
        self._tables, self._identity, self._time = tables, identity, time
        self._events = f"{tables.rows_of(tables.events)} AS e"
        self.counted = tables.identity.type.python is int
        """Whether identities are numbers, which begin somewhere and end somewhere."""
        self._up_to = f"AND p.{identity} <= %(last_id)s::bigint" if self.counted else ""
        within = " AND ".join(
            filter(None, [f"{time} >= %(start)s::timestamptz AND {time} < %(end)s::timestamptz", tables.wanted("e")])
        )
        in_range = f"p.{time} >= %(start)s::timestamptz AND p.{time} < %(end)s::timestamptz"
        self._in_range = " AND ".join(filter(None, [in_range, tables.wanted("p")]))
        name = tables.named(tables.events, tables.time.column)
        names = ", ".join(as_sql(one, one) for one in (name, tables.identity_name))
        self.index = f"CREATE INDEX CONCURRENTLY ON {tables.stream.table} ({names})"
        """Makes a backfill of a short range fast on a long table."""
        self.indexed = f"""
-- Whether an index gives events in the order of their time.
SELECT EXISTS (
    SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = {sql.Literal(tables.stream.table).as_string()}::regclass
      AND a.attname = {sql.Literal(name).as_string().replace("%", "%%")}
      AND m.amname = 'btree' AND i.indisvalid AND i.indpred IS NULL)
"""  # noqa: S608  names in the declaration
        ends = f"min({identity})::bigint, max({identity})::bigint" if self.counted else "NULL, NULL"
        self.span = f"""
-- The number of events in a range, their first id and their last.
SELECT count(*), {ends} FROM {self._events}
WHERE {within}
"""  # noqa: S608  names in the declaration
        self.hours = f"""
-- The number of events in each hour of a range, by the hour's start in seconds since 1970.
SELECT floor(extract(epoch FROM {time}) / 3600)::bigint * 3600, count(*) FROM {self._events}
WHERE {within}
GROUP BY 1 ORDER BY 1
"""  # noqa: S608  names in the declaration

    @cache  # noqa: B019  there are as many objects as streams
    def page(self, order: Order, *, begun: bool = True, standby: bool = False) -> str:
        """The page after an event, or, for ids that are not numbers, the first one."""
        wal_end = self._moment(REPLAYED if standby else WAL_END)
        p_time, p_id = f"p.{self._time}", f"p.{self._identity}"
        if order == "event_ts":
            return self._page(self._by_time(begun=begun), f"{p_time}, {p_id}", self._in_range, wal_end)
        return self._page(self._by_id(begun=begun), p_id, self._in_range, wal_end)

    def _by_time(self, *, begun: bool) -> str:
        time, identity = self._time, self._identity
        if self.counted:
            return f"""
({time}, {identity}) >= (%(ts)s::timestamptz, %(id)s::bigint) AND {time} < %(end)s::timestamptz
AND {identity} <= %(last_id)s::bigint ORDER BY {time}, {identity} LIMIT %(rows)s"""
        after = f"({time}, {identity}) > (%(ts)s::timestamptz, %(id)s)"
        begins = after if begun else f"{time} >= %(ts)s::timestamptz"
        return f"{begins} AND {time} < %(end)s::timestamptz ORDER BY {time}, {identity} LIMIT %(rows)s"

    def _by_id(self, *, begun: bool) -> str:
        identity = self._identity
        if self.counted:
            return f"{identity} BETWEEN %(id)s::bigint AND %(last_id)s::bigint ORDER BY {identity} LIMIT %(rows)s"
        begins = f"{identity} > %(id)s" if begun else "true"  # as the column's own type, which orders them
        return f"{begins} ORDER BY {identity} LIMIT %(rows)s"

    @property
    def picked(self) -> str:
        """The events of some ids, in the order in which Python sorts them."""
        kind, order = self._tables.identity.type, f"p.{self._identity}"
        order = f'{kind.select(order)} COLLATE "C"' if kind.postgres == "text" else order
        wanted = self._tables.wanted("p") or "true"
        return self._page(self._tables.among, order, wanted, self._moment(WAL_END))

    def _moment(self, wal_end: str) -> str:
        """SQL for the position that the page is as of."""
        return "%(as_of)s::text" if self._tables.stream.follows else wal_end

    def _page(self, rows: str, order: str, wanted: str, wal_end: str) -> str:
        tables = self._tables
        own = tables.own
        texts = [f"coalesce(octet_length({quoted(field.column)}::text), 0)" for field in own if field.type.is_long]
        listed = ", ".join(quoted(field.column) for field in own)
        selected = ", ".join(field.type.select(f"p.{quoted(field.column)}") for field in own)
        of_content = [
            field.type.select(f"{join.alias}.{quoted(field.joined)}") for join in tables.joins for field in join.fields
        ]
        usable = " AND ".join(filter(None, (field.type.usable(f"p.{quoted(field.column)}") for field in own)))
        return f"""
-- A page of events with their contents as of the same snapshot, cut where its text becomes too much. The page's last
-- row always comes, wanted or not: the next page begins after it. The WAL's end (inserted, not written: a commit may
-- be visible before it is on disk) is read while the statement runs, hence after its snapshot was taken; where rows
-- change, before that (`as_of`).
WITH found AS MATERIALIZED (
    SELECT p.*, {" + ".join(["1", *texts])} AS "_size"
    FROM (SELECT {listed} FROM {tables.rows_of(tables.events)} AS e WHERE {rows}) p
), measured AS (
    SELECT p.*, sum("_size") OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) AS "_size_up_to" FROM found p
), page AS MATERIALIZED (SELECT * FROM measured WHERE "_size_up_to" - "_size" < %(bytes)s::bigint)
SELECT ({wal_end}), {wanted}, {usable},
       {selected}{"," * bool(of_content)}
       {", ".join(of_content)}
FROM page p{tables.joined("p")}
WHERE {wanted} OR p."_size_up_to" = (SELECT max("_size_up_to") FROM page)
ORDER BY p."_size_up_to"
"""  # noqa: S608  names in the declaration

    def spans(self, order: Order) -> str:
        """The events of a range in equal spans of their order."""
        key, number = (
            (self._time, "extract(epoch FROM {})::numeric") if order == "event_ts" else (self._identity, "{}::numeric")
        )
        events = f"{self._tables.rows_of(self._tables.events)} AS p"
        wanted = f"{self._in_range} {self._up_to}"
        bounds = f"{number.format(f'p.{key}')}, {number.format('low')}, {number.format('high')} + 1"
        return f"""
-- The events of a range in equal spans of their order: how many each span has, and where its first one is.
WITH ends AS (SELECT min(p.{key}) AS low, max(p.{key}) AS high FROM {events} WHERE {wanted})
SELECT count(*), min(p.{key})::text FROM {events} CROSS JOIN ends WHERE {wanted}
GROUP BY width_bucket({bounds}, %(spans)s::int) ORDER BY min(p.{key})
"""  # noqa: S608  names in the declaration


@cache
def queries_of(tables: Tables) -> Queries:
    """Made once."""
    return Queries(tables)
