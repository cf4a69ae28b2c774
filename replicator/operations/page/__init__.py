"""The page for people at `/` of the admin address: what is wrong and its cure first, then the way of the data."""
