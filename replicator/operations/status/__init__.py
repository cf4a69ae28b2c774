"""Where the slot, the checkpoint and every sink are: one form for people, programs, /status and /metrics.

A running replicator fills it in from inside (`watchdog.py`), the command `status` from outside (`collect.py`).
"""
