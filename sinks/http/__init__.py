"""An HTTP API that somebody else runs."""
