#!/usr/bin/env bash
# The least-privileged role of sql/roles.sql, which takes psql variables and so can't be an init script itself.
# psql reads the password from the environment: on the command line anybody's `ps` would show it.
set -euo pipefail

psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --no-psqlrc <<'SQL'
\getenv password REPLICATOR_PASSWORD
\i /usr/local/share/replicator/roles.sql
SQL
