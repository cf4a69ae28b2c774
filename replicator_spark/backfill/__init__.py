"""A backfill on a cluster.

`command.py` is the driver's side, `plan.py` says how far it is, and `crew.py` works it off with the tasks of `turn.py`.
"""
