"""The stream on a cluster: the driver is the replicator, and the nodes carry its sinks' writes out.

`command.py` puts it together. On the driver, `carrier.py` is a sink's write and `desk.py` gives writes to the cluster's
cores; on a node, `hands.py` writes. `wire.py` is what they send each other.
"""
