"""What follows from the tables being watched: what counts as verified, and what the stream could not show."""
