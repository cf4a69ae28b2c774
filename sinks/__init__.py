"""Destinations: each module is one, with its own settings; see `replicator.protocols.Sink`."""
