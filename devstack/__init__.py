"""Private servers for demo, tests and benchmarks: PostgreSQL with wal2json, Redis, ClickHouse and an HTTP API.

with DevStack("postgres", "redis", "clickhouse", "api") as stack:
    print(stack.postgres.dsn, stack.redis.url, stack.clickhouse.url, stack.api.url)
"""

from devstack.process import DevStackError, Service, free_port, wait_until
from devstack.stack import DevStack

__all__ = ["DevStack", "DevStackError", "Service", "free_port", "wait_until"]
