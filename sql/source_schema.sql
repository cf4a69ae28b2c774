-- The tables that the replicator reads, and three sample rows of content.
--
--     psql -v ON_ERROR_STOP=1 -f sql/source_schema.sql
--
-- Plain SQL without psql commands: any client can run it. Harmless on a database that has the tables already:
-- what exists stays as it is, and sample rows go only into an empty content table.

-- The dimension. Its primary key is also its replica identity: nothing else is needed for changes to it to arrive in
-- the stream (only inserts and updates matter; an event whose content is gone goes out with nulls).
CREATE TABLE IF NOT EXISTS public.content (
    content_id     bigint PRIMARY KEY,
    content_type   text NOT NULL,
    length_seconds int
);

-- The facts: insert only, as far as the replicator is concerned.
CREATE TABLE IF NOT EXISTS public.engagement_events (
    id          bigserial PRIMARY KEY,
    content_id  bigint NOT NULL REFERENCES public.content,
    user_id     bigint NOT NULL,
    event_type  text NOT NULL,
    event_ts    timestamptz NOT NULL DEFAULT now(),
    duration_ms int,
    device      text,
    raw_payload jsonb
);

INSERT INTO public.content (content_id, content_type, length_seconds)
SELECT * FROM (VALUES (1, 'video', 300), (2, 'video', 120), (3, 'article', NULL)) AS sample
WHERE NOT EXISTS (SELECT FROM public.content)
ON CONFLICT (content_id) DO NOTHING;

-- Replication needs no index. Backfill counts a range of event_ts and then reads it page by page. Without an index the
-- count reads the table, and the pages go by the primary key from the first event of the range to the last: the rows in
-- between are read once, wanted or not. With this one both cost what the range holds, in the order (event_ts, id):
--
--     CREATE INDEX CONCURRENTLY engagement_events_event_ts_id ON public.engagement_events (event_ts, id);
--
-- It is left to you because it costs every insert some time, and because building it on a large table takes long
-- (CONCURRENTLY lets writers go on meanwhile). Where rows arrive nearly in the order of event_ts, this one is a
-- thousandth of the size and almost free to maintain; the count is then fast, and the pages go by id:
--
--     CREATE INDEX CONCURRENTLY engagement_events_event_ts_brin ON public.engagement_events USING brin (event_ts);
