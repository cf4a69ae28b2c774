"""Reads a PostgreSQL logical replication slot and fans its rows out to sinks; see `python -m replicator --help`."""
