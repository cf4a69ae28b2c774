"""Streams whose rows change, or whose identities are no numbers: Redis keeps what it knows of each row in a hash."""
