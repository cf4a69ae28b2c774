"""Standard output, for a look at a slot."""
