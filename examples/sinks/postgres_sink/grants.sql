-- The least rights of the role that the sink logs in as, after `replicator init` made the two tables as their owner:
--
--     psql -d warehouse -v role=replicator_warehouse -f grants.sql
--
-- SELECT: an event that comes again is compared with the one that is there.
\set ON_ERROR_STOP on
BEGIN;
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";
GRANT USAGE ON SCHEMA public TO :"role";
GRANT SELECT, INSERT, UPDATE ON public.events TO :"role";
GRANT SELECT, UPDATE ON public.events_position TO :"role";
COMMIT;
