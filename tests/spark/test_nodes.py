"""Whether a node means what the driver means, and that no secret is in what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrichment import EVENT
from replicator.contracts.errors import SettingsError
from replicator.contracts.sink import SinkContext
from replicator_spark.nodes import digests, meant_by_sink, refuse_single
from sinks import create_sinks

KEY = b"key"
NAMES = ["redis", "http"]
PLAIN = {
    "REPLICATOR_SLOT": "one",
    "REPLICATOR_REDIS_URL": "redis://:planted@redis:6379/0",
    "REPLICATOR_HTTP_URL": "https://app:planted@api:8000/events",
}


def _given(monkeypatch: pytest.MonkeyPatch, **changed: str) -> dict[str, str]:
    for name, value in (PLAIN | changed).items():
        monkeypatch.setenv(name, value)
    return digests(NAMES, KEY)


@pytest.mark.usefixtures("empty_directory")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REPLICATOR_SLOT", "two"),
        ("REPLICATOR_REDIS_URL", "redis://:planted@other:6379/0"),
        ("REPLICATOR_REDIS_URL", "redis://:planted@redis:6379/1"),
        ("REPLICATOR_REDIS_URL", "redis://:planted@redis:6379/0?db=3"),
        ("REPLICATOR_REDIS_URL", "unix:///run/redis.sock"),
        ("REPLICATOR_HTTP_URL", "https://app:planted@api:8000/other"),
        ("REPLICATOR_HTTP_BATCH_SIZE", "7"),
    ],
)
def test_another_value_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Another server, another database there, another path, another option."""
    driver = _given(monkeypatch)
    node = _given(monkeypatch, **{name: value})
    assert [name] == [each for each in driver if driver[each] != node[each]]


@pytest.mark.usefixtures("empty_directory")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "/run"])
def test_localhost_is_another_server_on_another_machine(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Its events would be where nobody looks for them, and the driver would be told that they are written."""
    url = f"unix://{host}/redis.sock" if host == "/run" else f"redis://{host}:6379/0"
    driver = _given(monkeypatch, REPLICATOR_REDIS_URL=url)
    assert driver == _given(monkeypatch, REPLICATOR_REDIS_URL=url)
    monkeypatch.setattr("platform.node", lambda: "another")
    node = _given(monkeypatch, REPLICATOR_REDIS_URL=url)
    assert ["REPLICATOR_REDIS_URL"] == [each for each in driver if driver[each] != node[each]]


@pytest.mark.usefixtures("empty_directory")
def test_another_socket_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Unix socket's URL has no host."""
    driver = _given(monkeypatch, REPLICATOR_REDIS_URL="unix:///run/one.sock")
    assert driver != _given(monkeypatch, REPLICATOR_REDIS_URL="unix:///run/two.sock")
    assert driver == _given(monkeypatch, REPLICATOR_REDIS_URL="unix://:rotated@/run/one.sock")


@pytest.mark.usefixtures("empty_directory")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REPLICATOR_REDIS_URL", "redis://:rotated@redis:6379/0"),
        ("REPLICATOR_REDIS_URL", "redis://redis:6379/0?password=rotated"),
        ("REPLICATOR_POSTGRES_DSN", "postgresql://app:planted@standby/engagement"),
        ("REPLICATOR_CHECKPOINT_URL", "sqlite:////elsewhere/checkpoint.db"),
        ("REPLICATOR_LOG_FORMAT", "json"),
    ],
)
def test_what_is_a_nodes_own(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A password that is being rotated, the way to the source, what is only the driver's."""
    assert _given(monkeypatch) == _given(monkeypatch, **{name: value})


@pytest.mark.usefixtures("empty_directory")
def test_no_secret_leaves_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent has neither a password nor an address."""
    told = str(_given(monkeypatch))
    assert "planted" not in told
    assert "api" not in told


@pytest.mark.usefixtures("empty_directory")
def test_the_embedded_clickhouse_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process holds its directory."""
    monkeypatch.setenv("REPLICATOR_CLICKHOUSE_URL", f"chdb://{tmp_path}/engagement")
    with pytest.raises(SettingsError, match="REPLICATOR_CLICKHOUSE_URL is unusable: one process alone"):
        refuse_single(create_sinks(["clickhouse"], SinkContext(EVENT)))


@pytest.mark.usefixtures("empty_directory")
def test_standard_output_is_refused() -> None:
    """That of a node is Spark's, and its logs would have the events."""
    with pytest.raises(SettingsError, match="REPLICATOR_SINKS is unusable: stdout is one process's"):
        refuse_single(create_sinks(["stdout"], SinkContext(EVENT)))


@pytest.mark.usefixtures("empty_directory")
def test_who_only_writes_needs_that_sinks_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots, and sinks of other applications, may be others on the nodes."""
    _given(monkeypatch)
    driver = meant_by_sink("redis", KEY)
    _given(monkeypatch, REPLICATOR_SLOT="two", REPLICATOR_HTTP_BATCH_SIZE="7")
    assert driver == meant_by_sink("redis", KEY)
    _given(monkeypatch, REPLICATOR_REDIS_PREFIX="two:")
    assert driver != meant_by_sink("redis", KEY)
