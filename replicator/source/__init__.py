"""PostgreSQL's side: the replication connection, wal2json, the slot, and where to begin."""
