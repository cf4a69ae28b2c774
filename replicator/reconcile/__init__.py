"""PostgreSQL against the sinks. Optional to read: nothing but the command line imports it."""
