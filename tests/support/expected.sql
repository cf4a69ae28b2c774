-- What the contract says about every event, computed by PostgreSQL from the source tables: the 11 fields in order, one
-- row an event. For comparisons; run it in a session with TimeZone=UTC and DateStyle=ISO, for instance as
--
--     SELECT row_to_json(expected)::text FROM (<this file>) AS expected
--
SELECT e.id AS event_id,
       e.content_id,
       e.user_id,
       e.event_type,
       CASE WHEN e.event_ts >= '0001-01-01 00:00:00+00' AND e.event_ts < '10000-01-01 00:00:00+00'
            THEN to_char(e.event_ts AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
            ELSE e.event_ts::text  -- infinite, before Christ, or past the year 9999: dead-lettered by who can't hold it
       END AS event_ts,
       e.duration_ms,
       e.device,
       c.content_type,
       c.length_seconds,
       trim_scale(e.duration_ms / 1000.0) AS engagement_seconds,
       trim_scale(round(e.duration_ms / 1000.0 / nullif(c.length_seconds, 0), 2)) AS engagement_pct
FROM public.engagement_events AS e
LEFT JOIN public.content AS c USING (content_id)
ORDER BY e.id
