"""A batch on its way to every sink: lanes, queues, retries, dead letters."""
