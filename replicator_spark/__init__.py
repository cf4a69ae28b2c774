"""The replicator on a Spark cluster. An extra: nothing in the product imports it, and only it knows Spark.

`stream/` follows the slot, `backfill/` sends older events again. `nodes.py` sees that driver and nodes mean the same
servers, `settings.py` that Spark's own settings may be so, `session.py` reaches the cluster.
"""
