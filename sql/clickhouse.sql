-- The table that the ClickHouse sink writes to. `python -m replicator init` runs this file, with the database of
-- REPLICATOR_CLICKHOUSE_URL in place of `engagement`. By hand: `clickhouse-client --queries-file sql/clickhouse.sql`.
-- Each statement ends with a semicolon, and there is no other semicolon in this file, not even in a comment.

CREATE DATABASE IF NOT EXISTS `engagement`;

-- One row per enriched event. Read it with FINAL to see each event once, even if it was sent again:
--   SELECT * FROM engagement.events_enriched FINAL ORDER BY event_id DESC LIMIT 5
CREATE TABLE IF NOT EXISTS `engagement`.events_enriched
(
    event_id           Int64,
    content_id         Int64,
    user_id            Int64,
    event_type         LowCardinality(String),            -- few different values
    event_ts           DateTime64(6, 'UTC'),              -- microseconds, as in PostgreSQL
    -- 64 bits although the source has int: ClickHouse silently wraps JSON numbers that are too big for a column, and
    -- the source's columns may become bigint one day. Compressed, both cost the same.
    duration_ms        Nullable(Int64),
    device             LowCardinality(Nullable(String)),
    content_type       LowCardinality(Nullable(String)),
    length_seconds     Nullable(Int64),
    -- Decimal, not Float64: every digit of the JSON number is kept, sums are exact, and a value that does not fit is an
    -- error and not a different value. 18 digits take 64 bits.
    engagement_seconds Nullable(Decimal(18, 3)),
    engagement_pct     Nullable(Decimal(18, 2)),

    -- The LSN of the event's commit, or, for a backfill, the end of the WAL when the row was read. Of several rows of
    -- one event the one with the highest _lsn stays. If these are equal, the one that was inserted last stays.
    _lsn               UInt64,
    _inserted_at       DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree(_lsn)
PARTITION BY toYYYYMM(event_ts)
-- The identity of an event. Time comes first, because queries ask for it. None of the three ever changes.
ORDER BY (event_ts, content_id, event_id)
-- ClickHouse remembers the tokens of the last 1000 inserts (a quarter of an hour) and does not store the same batch
-- twice. By default this is off for tables that are not replicated.
SETTINGS non_replicated_deduplication_window = 1000;
