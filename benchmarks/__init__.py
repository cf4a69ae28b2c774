"""Throughput and latency of the real program, beside pg_recvlogical: `python -m benchmarks`."""
