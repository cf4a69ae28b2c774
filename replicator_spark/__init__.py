"""The replicator's backfill on a Spark cluster. An extra: nothing in the product imports it, and only it knows Spark.

`backfill.py` is the driver's side, `turn.py` the tasks', `nodes.py` sees that both mean the same servers, `session.py`
reaches the cluster.
"""
