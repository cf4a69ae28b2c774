"""Options of the Redis sink. Messages about a value never repeat it: it may carry a password."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator
from redis.exceptions import RedisError

from replicator.contracts.settings import Settings
from sinks.redis.client import connections


class RedisSettings(Settings):
    """Where Redis is."""

    redis_url: SecretStr = Field(
        default=SecretStr("redis://localhost:6379/0"),
        description="a redis://, rediss:// or unix:// URL, with redis-py's query options (ssl_ca_certs and the like)",
    )
    redis_timeout_seconds: float = Field(
        default=5.0,  # a write takes some 10 ms, rebuilding the window at worst a second or so
        gt=0,
        le=600,
        description="seconds that connecting to Redis, and an answer from it, may take, up to 600",
    )

    @field_validator("redis_url")
    @classmethod
    def _usable(cls, value: SecretStr) -> SecretStr:
        try:
            connections(value, 1.0).make_connection()  # type: ignore[no-untyped-call]  # redis-py left it untyped
        except (TypeError, ValueError, RedisError) as exc:
            raise ValueError("it is not such a URL, or has an option that redis-py does not know") from exc
        return value
