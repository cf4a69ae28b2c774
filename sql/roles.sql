-- The role that the replicator logs in as, with the least it can work with. Run as a superuser, in the database
-- that holds the tables, after sql/source_schema.sql; running it again changes nothing.
--
--     psql -d engagement -f sql/roles.sql
--     psql -d engagement -f sql/roles.sql -v role=replicator -v password='...'
--
-- role      defaults to replicator
-- password  defaults to none: a known default would be an open door. Without it a new role has no password, an
--           existing one keeps its own, and `\password replicator` sets one without showing it to the process list
--           and the server's log.

\set ON_ERROR_STOP on
\if :{?role}
\else
    \set role replicator
\endif

BEGIN;

SELECT format('CREATE ROLE %I', :'role')
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = :'role')
\gexec

-- LOGIN: it connects. REPLICATION: it makes and drops its slot and streams from it. Mind that this attribute reads
-- every table of the database through the WAL, whatever is granted below: guard its password like a superuser's.
-- (Amazon RDS has no such attribute to give: use `GRANT rds_replication TO replicator` there.)
ALTER ROLE :"role" LOGIN REPLICATION;

\if :{?password}
    ALTER ROLE :"role" PASSWORD :'password';
\endif

-- CONNECT: PUBLIC has it by default, but careful installations take that away. The replication connection names
-- this database too, so pg_hba.conf's ordinary lines for it apply, not those for the keyword "replication".
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";

-- USAGE: without it no table in the schema can be named. CREATE is not needed.
GRANT USAGE ON SCHEMA public TO :"role";

-- SELECT on content: an event of a content not seen yet is looked up.
-- SELECT on engagement_events: backfill reads it; the stream itself needs no right on it.
GRANT SELECT ON public.content, public.engagement_events TO :"role";

-- Where row-level security is on for these two tables: `ALTER ROLE replicator BYPASSRLS`. Reading is refused where a
-- policy applies, whatever it says: the stream, which comes from the WAL, knows none, and a backfill would differ.

-- Optional, and left out: `GRANT pg_read_all_stats TO replicator` fills the columns time_lag and last_reply of
-- sql/slot_lag.sql. It also shows every session's statements, so it is no part of the least.

COMMIT;
