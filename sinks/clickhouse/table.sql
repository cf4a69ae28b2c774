-- The table that the ClickHouse sink writes to. `replicator init` creates it in the database that is named in
-- REPLICATOR_CLICKHOUSE_URL. `replicator sql clickhouse` prints these statements for clickhouse-client.
-- Each ends with a semicolon, and there is no other semicolon in this file, comments included.

CREATE DATABASE IF NOT EXISTS `$database`;

-- One row per enriched event. Read it with FINAL to see each event once, whatever was sent again:
--   SELECT * FROM $database.$table FINAL ORDER BY event_id DESC LIMIT 5
--
-- Int64 even where the source has int: ClickHouse silently wraps a JSON number that is too big for a column, and the
-- source's columns may be widened to bigint one day. Compressed they cost the same.
-- Decimal, not Float64: it keeps the JSON number digit by digit, sums are exact, and a value that does not fit is an
-- error instead of another value. 18 digits are 64 bits.
-- DateTime64(6) has microseconds, as PostgreSQL does. LowCardinality is for columns with a handful of values.
--
-- _lsn: the commit that this version of the event was read from, or where the WAL ended when a backfill read it. Of
-- several versions the latest stays, and of equal ones the one that was inserted last.
CREATE TABLE IF NOT EXISTS `$database`.$table
(
$columns
    _inserted_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree($version)
$partition-- The identity of an event, led by time because that is what queries ask for. None of the three ever changes.
ORDER BY ($sort_key)
-- A batch that is sent again within the last 1000 inserts (a quarter of an hour) is recognised by its token and not
-- stored twice. Off by default on tables that are not replicated.
-- fsync: PostgreSQL is told that a position is flushed when ClickHouse has answered. Without it the rows of the last
-- seconds may be gone after a power cut.
SETTINGS non_replicated_deduplication_window = 1000, fsync_after_insert = 1, fsync_part_directory = 1;
