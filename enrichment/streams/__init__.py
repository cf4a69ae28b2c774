"""More than one stream in a slot."""
