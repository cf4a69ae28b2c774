-- Every event of the demo's traffic as the contract wants it, with the content as it was when the event was inserted:
-- `traffic` notes that in raw_payload. Run it in a session with TimeZone=UTC.
SELECT id AS event_id,
       content_id,
       user_id,
       event_type,
       to_char(event_ts AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS event_ts,
       duration_ms,
       device,
       content_type,
       length_seconds,
       trim_scale(duration_ms / 1000.0) AS engagement_seconds,
       trim_scale(round(duration_ms / 1000.0 / nullif(length_seconds, 0), 2)) AS engagement_pct
FROM public.engagement_events,
     jsonb_to_record(raw_payload) AS content_then (content_type text, length_seconds int)
ORDER BY id
