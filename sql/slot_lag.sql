-- How far behind is each replication slot, what does it keep on the disk, and is anything wrong?
--
--     psql -d engagement -f sql/slot_lag.sql
--
-- PostgreSQL 14 to 18, primary or standby, any role. Read the verdict first; the other columns are its evidence:
--   confirmed_lag  WAL that the reader has not confirmed: it still has to read it, or would get it again
--   restart_lag    WAL that PostgreSQL decodes again after a reconnect; a long transaction that writes makes it large
--   retained_wal   the WAL files on this server's disk, from the oldest that the slot needs
--   safe_wal_size  WAL that may still be written before the slot is lost; empty: no limit (max_slot_wal_keep_size)
--   time_lag       time between a commit and its confirmation
--   last_reply     time since the reader last sent something. Both times are empty if no reader is connected, and for
--                  roles without pg_read_all_stats

\set QUIET on
\x auto
\set QUIET off

WITH server AS (
    SELECT
        CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn,
        64 * 1024 ^ 2 AS behind_bytes,  -- a reader under full load has some 20 MB in flight
        -- With less room than this the slot is about to be lost: a quarter of the limit.
        (SELECT nullif(setting::numeric, -1) * 1024 ^ 2 / 4 FROM pg_settings WHERE name = 'max_slot_wal_keep_size')
            AS danger_bytes,
        (SELECT setting::numeric FROM pg_settings WHERE name = 'wal_segment_size') AS segment_bytes
),

slot AS (
    SELECT
        s.*,
        -- Columns of PostgreSQL 17; null before.
        to_jsonb(s) ->> 'invalidation_reason' AS lost_because,
        (to_jsonb(s) ->> 'inactive_since')::timestamptz AS unread_since,
        coalesce((to_jsonb(s) ->> 'synced')::boolean, false) AS copied_from_primary,
        -- A physical slot has only a restart_lsn.
        coalesce(s.confirmed_flush_lsn, s.restart_lsn) AS confirmed_lsn,
        r.flush_lag,
        r.reply_time
    FROM pg_replication_slots AS s
    LEFT JOIN pg_stat_replication AS r ON r.pid = s.active_pid
),

lag AS (
    SELECT
        slot.*,
        server.behind_bytes,
        server.danger_bytes,
        pg_wal_lsn_diff(server.lsn, slot.confirmed_lsn) AS confirmed_bytes,
        pg_wal_lsn_diff(server.lsn, slot.restart_lsn) AS restart_bytes,
        -- whole files, including the one that is being written
        (div(pg_wal_lsn_diff(server.lsn, '0/0'), server.segment_bytes)
            - div(pg_wal_lsn_diff(slot.restart_lsn, '0/0'), server.segment_bytes) + 1) * server.segment_bytes
            AS retained_bytes
    FROM server
    LEFT JOIN slot ON true  -- without any slot there is still one line that says so
)

SELECT
    slot_name,
    CASE
        WHEN slot_name IS NULL
            THEN 'NO SLOT: PostgreSQL keeps no WAL for any reader. If there was a slot, it was dropped.'
                || ' Start the replicator: it says what is missing and how to backfill it'
        WHEN wal_status = 'lost'
            THEN 'LOST: ' || CASE
                    WHEN lost_because <> 'wal_removed' THEN 'PostgreSQL has invalidated it (' || lost_because || ')'
                    ELSE 'WAL that it needed was removed'
                END
                || coalesce('. It was read up to ' || confirmed_flush_lsn, '')
                || '. Start the replicator: it says how to continue and what to backfill'
        WHEN wal_status = 'unreserved'
            THEN 'NEARLY LOST: the next checkpoint may remove WAL that it needs. Raise max_slot_wal_keep_size and'
                || ' reload at once' || CASE WHEN active THEN '' ELSE ', then start its reader' END
        WHEN safe_wal_size < danger_bytes
            THEN 'IN DANGER: it is lost after ' || pg_size_pretty(safe_wal_size) || ' more WAL. Raise'
                || ' max_slot_wal_keep_size and reload' || CASE WHEN active THEN '' ELSE ', then start its reader' END
        WHEN copied_from_primary
            THEN 'OK: a copy of the primary''s slot, not read here'
        WHEN restart_lsn IS NULL
            THEN 'NEVER READ: it keeps no WAL yet'
        WHEN NOT active
            THEN 'NOT READ: no reader is connected' || coalesce(' since ' || unread_since::timestamptz(0), '') || ', and '
                || pg_size_pretty(retained_bytes) || ' of WAL is kept for it. Start its reader, or drop the slot'
                || ' before it fills the disk'
        WHEN confirmed_bytes > behind_bytes
            THEN 'BEHIND: a reader is connected, but ' || pg_size_pretty(confirmed_bytes) || ' is not confirmed.'
                || ' If that grows, look at the reader: `python -m replicator status` names the slow sink'
        WHEN wal_status = 'extended'
            -- Decoding starts where the oldest transaction began that has written something and has not ended.
            THEN 'HELD BACK: the reader keeps up, yet ' || pg_size_pretty(retained_bytes) || ' of WAL is kept. If it'
                || ' stays so, a transaction that has written was left open: look in pg_stat_activity for the oldest'
                || ' xact_start with a backend_xid, and in pg_prepared_xacts'
        ELSE 'OK'
    END AS verdict,
    coalesce(plugin, slot_type) AS plugin,
    database,
    active,
    active_pid,
    wal_status,
    pg_size_pretty(confirmed_bytes) AS confirmed_lag,
    pg_size_pretty(restart_bytes) AS restart_lag,
    pg_size_pretty(retained_bytes) AS retained_wal,
    pg_size_pretty(safe_wal_size) AS safe_wal_size,
    flush_lag AS time_lag,
    clock_timestamp() - reply_time AS last_reply,
    confirmed_bytes AS confirmed_lag_bytes,
    restart_bytes AS restart_lag_bytes,
    retained_bytes AS retained_wal_bytes,
    safe_wal_size AS safe_wal_size_bytes
FROM lag
ORDER BY slot_name;
