"""Who is told what is wrong: the ring of notices for whoever looks, and messages to whoever does not."""
