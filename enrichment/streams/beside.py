"""What `enricher.py` says beside the events: what no slot brings, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Sequence

from enrichment.database import Database
from enrichment.tables.declared import Tables, quoted
from replicator.contracts.errors import PROGRAM, SourceUnusable
from replicator.contracts.events import counted
from replicator.source.connection import Dsn

HISTORY_TIMEOUT_SECONDS = 600
"""It reads the whole table, once in the product's life, at some 10 million rows a second."""

ORIGIN = """
-- A promoted copy has the same cluster and a later timeline. The control file has the new one only after a checkpoint.
SELECT system_identifier, current_database(),
       CASE WHEN NOT pg_is_in_recovery()
            THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END
FROM pg_control_system()
"""


async def older_rows(dsn: Dsn, tables: Tables, emptied: Sequence[str]) -> str:
    """As `Enricher.history`."""
    database = Database(dsn, timeout_seconds=HISTORY_TIMEOUT_SECONDS)
    try:
        [(count, start, end)] = await database.rows(_query(tables))
    except SourceUnusable as exc:
        return f"older rows could not be counted: {exc}"
    finally:
        await database.close()
    if not count:
        return ""
    why, chosen = "those from before the slot do not come through it", ""
    if emptied:
        why = f"what {' and '.join(emptied)} needs was only made now, and lacks the older ones"
        chosen = f" --sinks {','.join(emptied)}"
    message = f"{tables.stream.table} holds {counted(count, 'row')}; {why}"
    bring = f"{PROGRAM} backfill --start {start} --end {end}{chosen}{tables.stream_option}"
    return f"{message}. To bring all of them: {bring}"


def _query(tables: Tables) -> str:
    """What stands in the table, and when it was."""
    time = quoted(tables.time.column)
    return f"""
-- The number of events, and the shortest range of whole seconds, end excluded, that holds them all. Events at infinity
-- and outside the years 1 to 9999 can't be backfilled.
SELECT count(*), to_char(min({time}) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS'),
       to_char(max({time}) AT TIME ZONE 'UTC' + interval '1 second', 'YYYY-MM-DD"T"HH24:MI:SS')
FROM {tables.rows_of(tables.events)} AS e
WHERE {time} >= '0001-01-01 00:00:00+00' AND {time} < '9999-12-31 00:00:00+00'
"""  # noqa: S608  names in the declaration


async def origin(dsn: Dsn) -> str:
    """As `Enricher.origin`."""
    database = Database(dsn)
    try:
        [(cluster, name, timeline)] = await database.rows(ORIGIN)
    except SourceUnusable:  # a service that denies the function
        return ""
    finally:
        await database.close()
    return f"cluster {cluster}, database {name}, timeline {timeline}" if timeline else ""
