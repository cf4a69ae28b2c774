"""Advice about secrets in clear: for addresses elsewhere, and only for those that a secret goes to."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from enrichment import EVENT
from replicator.contracts.settings import CoreSettings, PostgresDsn, Settings
from replicator.contracts.sink import Sink, SinkContext
from replicator.operations.exposure import is_here, secrets_in_clear, unverified
from sinks.http.settings import HttpSettings
from sinks.http.sink import HttpSink
from sinks.redis.settings import RedisSettings
from sinks.redis.sink import RedisSink
from sinks.testing import MemorySink

CORE = CoreSettings.model_validate({})


def _http(url: str, token: str | None = None) -> Sink:
    return HttpSink(HttpSettings.model_validate({"http_url": url, "http_bearer_token": token}), SinkContext(EVENT))


def _redis(url: str) -> Sink:
    return RedisSink(RedisSettings.model_validate({"redis_url": url}), SinkContext(EVENT))


@pytest.mark.parametrize(
    ("sink", "advice"),
    [
        (_http("http://api.example.com/in", "hunter2"), "Use https:// in REPLICATOR_HTTP_URL"),
        (_http("http://user:hunter2@api.example.com/in"), "Use https:// in REPLICATOR_HTTP_URL"),
        (_http("http://api.example.com/in"), None),
        (_http("https://api.example.com/in", "hunter2"), None),
        (_http("http://127.0.0.1/in", "hunter2"), None),
        (_redis("redis://:hunter2@redis.example.com"), "Use rediss:// in REPLICATOR_REDIS_URL"),
        (_redis("redis://redis.example.com"), None),
        (_redis("redis://:hunter2@[::1]"), None),
    ],
)
def test_a_sink_s_secret_in_clear(sink: Sink, advice: str | None) -> None:
    """Named with the scheme that is safe, and without the secret."""
    found = [*secrets_in_clear(CORE, [sink])]
    assert [advice] * bool(advice) == [finding.cure for finding in found]
    assert all(finding.ok and "hunter2" not in finding.what for finding in found)


class _Settings(Settings):
    """Of a sink that writes to PostgreSQL."""

    memory_dsn: PostgresDsn


@pytest.mark.parametrize(
    ("dsn", "lines"),
    [
        ("postgresql://app:hunter2@db.example.com/x", 1),
        ("postgresql://app:hunter2@db.example.com/x?sslmode=verify-full", 0),
        ("postgresql://app:hunter2@localhost/x", 0),
    ],
)
def test_a_sink_that_writes_to_postgresql(dsn: str, lines: int) -> None:
    """Its server has to prove itself, as the source has."""
    found = [*secrets_in_clear(CORE, [MemorySink(_Settings.model_validate({"memory_dsn": dsn}))])]
    said = ["sink memory at db.example.com: with sslmode=prefer an impostor would get the password"]
    assert said * lines == [finding.what for finding in found]


@pytest.mark.parametrize(
    ("host", "mode", "lines"),
    [
        ("db.example.com", "require", 1),
        ("db.example.com", "verify-full", 0),
        ("127.0.0.1", "prefer", 0),
        ("/run", "", 0),
    ],
)
def test_a_server_that_need_not_prove_itself(host: str, mode: str, lines: int) -> None:
    """Encrypted is not enough: to whom matters."""
    found = [*unverified("PostgreSQL", host, mode, "REPLICATOR_POSTGRES_DSN")]
    assert lines == len(found)
    assert all("require_auth=scram-sha-256 in REPLICATOR_POSTGRES_DSN" in finding.cure for finding in found)


def test_a_checkpoint_database_elsewhere() -> None:
    """It has a password as well."""
    url = SecretStr("postgresql://app:hunter2@db.example.com/state")
    [finding] = secrets_in_clear(CORE.model_copy(update={"checkpoint_url": url}), [])
    assert finding.what.startswith("the checkpoint database at db.example.com: with sslmode=prefer an impostor")


def test_whoever_is_told_in_clear() -> None:
    """The whole address is a secret."""
    told = {"notify_url": "http://chat.example.com/hunter2", "heartbeat_url": "https://hc.example.com/hunter2"}
    [finding] = secrets_in_clear(CoreSettings.model_validate(told), [])
    assert ("REPLICATOR_NOTIFY_URL: it goes to chat.example.com unencrypted", True) == (finding.what, finding.ok)


def test_what_is_this_machine() -> None:
    """Names are not looked up."""
    assert all(map(is_here, ("localhost", "127.9.9.9", "::1", "/var/run/postgresql", "", None)))
    assert not any(map(is_here, ("redis", "10.0.0.1", "localhost.example.com")))
