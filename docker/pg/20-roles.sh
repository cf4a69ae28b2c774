#!/usr/bin/env bash
# Creates the role of sql/roles.sql. That file takes psql variables, so it can't be an init script itself.
# psql reads the password from the environment: `ps` would show it on the command line.
set -euo pipefail

psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --no-psqlrc <<'SQL'
\getenv password REPLICATOR_PASSWORD
\i /usr/local/share/replicator/roles.sql
SQL
