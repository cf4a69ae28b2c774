"""Commands for whoever looks after a running replicator."""
