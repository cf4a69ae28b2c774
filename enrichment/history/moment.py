"""The position that a page of `pages.py` is as of: where the WAL ends, or, where rows change, one between two commits.

Rows that never change may be told as of a moment after the snapshot, whatever else is committed meanwhile. Rows that
change must not: such a view would replace changes that it does not show, and bring back rows that are gone.
"""

from __future__ import annotations

import asyncio
import time

from enrichment.database import Database
from enrichment.tables.declared import Tables
from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Lsn, format_lsn, parse_lsn

WAL_END = "SELECT pg_current_wal_insert_lsn()::text"
REPLAYED = (
    "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)::text"
)
"""The same of a standby, too, which shows what it has replayed."""

WRITERS = """
-- Transactions that have written to a table, or a part of it, and are not over. Their commit may be in the WAL already
-- while no snapshot shows it yet; with synchronous replication for as long as the other server takes.
WITH RECURSIVE family AS (
    SELECT %(table)s::regclass::oid AS oid
    UNION SELECT i.inhrelid FROM family f JOIN pg_inherits i ON i.inhparent = f.oid
), held AS MATERIALIZED (SELECT * FROM pg_locks WHERE granted)
SELECT DISTINCT l.virtualtransaction, coalesce('process ' || l.pid, 'a prepared transaction')
FROM held l
WHERE l.locktype = 'relation' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.relation IN (SELECT oid FROM family) AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
  AND EXISTS (SELECT FROM held x
              WHERE x.locktype = 'transactionid' AND x.mode = 'ExclusiveLock'
                AND x.virtualtransaction = l.virtualtransaction)
"""
WRITERS_SECONDS = 5.0
"""After so long somebody should know what a page waits for."""
WRITERS_POLL_SECONDS = 0.02

WAL_BLOCK_BYTES = 8192
PAGE_HEADER_BYTES = 40


def last_end(lsn: Lsn) -> Lsn:
    """Where the last record of the WAL ends that ends at this position.

    At the end of a page it is after the next page's header, where no commit ends before there is one.
    """
    over = lsn % WAL_BLOCK_BYTES
    return lsn - over if over <= PAGE_HEADER_BYTES else lsn


async def as_of(database: Database, tables: Tables, *, standby: bool = False) -> str:
    """For rows that change: a position that every commit is before which a snapshot taken from now on shows.

    Every other one is after it. It is between two commits, so that no change is at it. Raises SourceUnavailable.
    """
    if not tables.stream.follows:
        return ""
    [(text,)] = await database.rows(REPLAYED)
    position = format_lsn(last_end(parse_lsn(text)) - 1)
    if standby:  # there a commit is visible before the replayed position passes it
        return position
    await _settled(database, tables)
    return position


async def _settled(database: Database, tables: Tables) -> None:
    """Return when the transactions are over that have written by now."""
    until = time.monotonic() + WRITERS_SECONDS
    writers: dict[str, str] | None = None
    while True:
        now = dict(await database.rows(WRITERS, {"table": tables.stream.table}))
        writers = {one: who for one, who in now.items() if writers is None or one in writers}
        if not writers:
            return
        if time.monotonic() > until:
            raise SourceUnavailable(
                problem=f"{tables.stream.table} is being written to",
                detail=f"{min(writers.values())} has not ended its transaction",
                cure="Its rows are read as soon as it ends (see pg_stat_activity)",
            )
        await asyncio.sleep(WRITERS_POLL_SECONDS)
