"""The ground floor: everything that enrichment, sinks and checkpoint stores import. It imports nothing else of ours."""
