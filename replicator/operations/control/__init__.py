"""What an operator tells a running replicator, over a Unix socket that only its own user can open.

`server.py` listens in the replicator, `client.py` asks from the command line, `pauses.py` does what is asked.
"""
