"""Private servers for demo, tests and benchmarks: PostgreSQL with wal2json, Redis, ClickHouse and an HTTP API.

with DevStack("postgres", "redis", "clickhouse", "api") as stack:
    print(stack.postgres.dsn, stack.redis.url, stack.clickhouse.url, stack.api.url)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devstack.process import DevStackError
    from devstack.stack import DevStack

__all__ = ["DevStack", "DevStackError"]


def __getattr__(name: str) -> object:
    """Import the stack lazily: `api_server` runs in an image without its drivers."""
    if name not in __all__:
        raise AttributeError(name)
    return getattr(import_module("devstack.stack"), name)
