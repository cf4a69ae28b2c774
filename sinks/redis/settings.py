"""Options of the Redis sink. Messages about a value never repeat it: it may carry a password."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator
from redis.exceptions import RedisError

from replicator.contracts.settings import Settings, unbroken
from sinks.redis.client import OPTIONS, connections


class RedisSettings(Settings):
    """Where Redis is."""

    redis_url: SecretStr = Field(
        default=SecretStr("redis://localhost:6379/0"),
        description="a redis://, rediss:// or unix:// URL, with options such as ssl_ca_certs",
    )
    redis_prefix: str = Field(
        default="",
        pattern=r"^([A-Za-z0-9_.-]{1,60}:)?$",
        description="a word and a colon that begin every key, such as shop:, for a Redis that several share",
    )
    redis_timeout_seconds: float = Field(
        default=5.0,  # no call takes more than some 10 ms
        gt=0,
        le=600,
        description="seconds that connecting to Redis, and an answer from it, may take, up to 600",
    )

    @field_validator("redis_url")
    @classmethod
    def _usable(cls, value: SecretStr) -> SecretStr:
        unbroken(value)
        try:
            connections(value, 1.0).make_connection()  # type: ignore[no-untyped-call]  # redis-py left it untyped
        except (TypeError, ValueError, RedisError) as exc:
            raise ValueError(f"it is not such a URL, or has an option other than {', '.join(sorted(OPTIONS))}") from exc
        return value
