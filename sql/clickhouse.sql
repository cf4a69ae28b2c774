-- What the ClickHouse sink writes to. `python -m replicator init` runs this file, with the database of
-- REPLICATOR_CLICKHOUSE_URL in the place of `engagement`, and so does `clickhouse-client --queries-file sql/clickhouse.sql`.
-- Statements end with a semicolon and there is none anywhere else in this file, comments included.

CREATE DATABASE IF NOT EXISTS `engagement`;

-- One row an enriched event. Read it with FINAL to see each event once, whatever was sent again:
--   SELECT * FROM engagement.events_enriched FINAL ORDER BY event_id DESC LIMIT 5
CREATE TABLE IF NOT EXISTS `engagement`.events_enriched
(
    event_id           Int64,
    content_id         Int64,
    user_id            Int64,
    event_type         LowCardinality(String),            -- a handful of words
    event_ts           DateTime64(6, 'UTC'),              -- microseconds, as in PostgreSQL
    -- 64 bits although the source has int: JSON numbers that are too big for a column wrap around silently, and
    -- the source's columns may be widened to bigint one day. Compressed they cost the same.
    duration_ms        Nullable(Int64),
    device             LowCardinality(Nullable(String)),
    content_type       LowCardinality(Nullable(String)),
    length_seconds     Nullable(Int64),
    -- Decimal, not Float64: the text of the JSON number is kept digit by digit, sums are exact, and a value that does
    -- not fit is an error instead of another value. 18 digits are 64 bits.
    engagement_seconds Nullable(Decimal(18, 3)),
    engagement_pct     Nullable(Decimal(18, 2)),

    -- The commit this view of the event was read from, or where the WAL ended when a backfill read it. Of several views
    -- of one event the latest stays, of equal ones the one inserted last.
    _lsn               UInt64,
    _inserted_at       DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree(_lsn)
PARTITION BY toYYYYMM(event_ts)
-- The identity of an event, led by time because that is what queries ask for. None of the three ever changes.
ORDER BY (event_ts, content_id, event_id)
-- A batch that is sent again within the last 1000 inserts (a quarter of an hour) is recognised by its token and not
-- stored twice. Off by default on tables that are not replicated.
SETTINGS non_replicated_deduplication_window = 1000;
