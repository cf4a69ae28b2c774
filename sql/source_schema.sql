-- The tables that the replicator reads, and three sample rows of content.
--
--     psql -v ON_ERROR_STOP=1 -f sql/source_schema.sql
--
-- Plain SQL without psql commands: any client can run it. It changes nothing in a database that already has the tables:
-- what exists stays as it is, and sample rows only go into an empty content table.

-- The dimension. Its primary key is also its replica identity, so its changes arrive in the stream as it is. Only
-- inserts and updates matter: an event whose content was deleted goes out with nulls.
CREATE TABLE IF NOT EXISTS public.content (
    content_id     bigint PRIMARY KEY,
    content_type   text NOT NULL,
    length_seconds int
);

-- The facts. The replicator only reads inserts.
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

-- Replication needs no index. A backfill counts the events of a range of event_ts, then reads them page by page.
-- Without an index the count reads the whole table, and the pages follow the primary key from the first event of the
-- range to the last: all rows between these are read once. With this index both only read the range, in the order
-- (event_ts, id):
--
--     CREATE INDEX CONCURRENTLY engagement_events_event_ts_id ON public.engagement_events (event_ts, id);
--
-- It is left to you, because it slows down every insert a little, and because building it on a large table takes long
-- (with CONCURRENTLY, writers can go on meanwhile). If rows arrive almost in the order of event_ts, a BRIN index is a
-- thousandth of the size and costs almost nothing. It makes the count fast; the pages still follow the primary key:
--
--     CREATE INDEX CONCURRENTLY engagement_events_event_ts_brin ON public.engagement_events USING brin (event_ts);
