-- The role that the replicator logs in as, with the fewest rights that it can work with. Run it as a superuser (on a
-- managed service, as its administrator), in the database with the tables, after sql/source_schema.sql. Running it again
-- changes nothing.
--
--     psql -d engagement -f sql/roles.sql
--     psql -d engagement -f sql/roles.sql -v role=replicator -v password='...'
--
-- role      defaults to replicator
-- password  has no default, because a known one would be an open door. Without it a new role has no password, and an
--           existing role keeps its own. `\password replicator` sets one without showing it in the process list or in
--           the server's log.

\set ON_ERROR_STOP on
\if :{?role}
\else
    \set role replicator
\endif

BEGIN;

SELECT format('CREATE ROLE %I', :'role')
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = :'role')
\gexec

-- LOGIN: to connect. REPLICATION: to create and drop its slot, and to stream from it. Such a role can read every table
-- of the database through the WAL, whatever is granted below, so guard its password like a superuser's.
ALTER ROLE :"role" LOGIN;

-- Managed services have no superuser, and each its own way: on Amazon RDS REPLICATION is a role to be granted, elsewhere
-- their administrator may give the attribute. Where this login may do neither, a warning says so, and the rest is done.
SELECT set_config('replicator.role', :'role', true) AS given \gset
DO $$
DECLARE
    name text := current_setting('replicator.role');
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'rds_replication') THEN
        EXECUTE format('GRANT rds_replication TO %I', name);
    ELSIF NOT (SELECT rolreplication FROM pg_catalog.pg_roles WHERE rolname = name) THEN
        EXECUTE format('ALTER ROLE %I REPLICATION', name);
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'role % may not replicate yet', name
        USING HINT = format('Run this as a superuser, or as the administrator that the service gave you: ALTER ROLE %I'
                            ' REPLICATION', name);
END
$$;

\if :{?password}
    ALTER ROLE :"role" PASSWORD :'password';
\endif

-- CONNECT: PUBLIC has it by default, but careful installations revoke that. The replication connection names this
-- database, too, so the ordinary lines of pg_hba.conf apply, and not those for the keyword "replication".
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";

-- USAGE: without it the role can't name any table of the schema. CREATE is not needed.
GRANT USAGE ON SCHEMA public TO :"role";

-- SELECT on content: to look up a content that has not been seen yet.
-- SELECT on engagement_events: for backfills. The stream needs no right on it.
GRANT SELECT ON public.content, public.engagement_events TO :"role";

-- If row-level security is on for these two tables: `ALTER ROLE replicator BYPASSRLS`. The stream comes from the WAL
-- and ignores policies, so a backfill that obeyed them would differ. Reading is therefore refused if a policy applies.

-- Optional: `GRANT pg_read_all_stats TO replicator` fills the columns time_lag and last_reply of sql/slot_lag.sql. It
-- is left out because it also shows the statements of every session.

COMMIT;
