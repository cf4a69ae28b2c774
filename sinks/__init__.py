"""Destinations: each module is one, with its own settings; see `replicator.protocols.Sink`.

A new sink is a new module and a line in `SINKS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from replicator.errors import SettingsError
from replicator.protocols import Sink
from replicator.settings import load

SINKS = {
    "clickhouse": ("sinks.clickhouse", "ClickHouseSink", "ClickHouseSettings"),
    "redis": ("sinks.redis", "RedisSink", "RedisSettings"),
    "http": ("sinks.http_api", "HttpSink", "HttpSettings"),
}
"""Name in REPLICATOR_SINKS → module, sink class, settings class; imported only when used."""


def create_sinks(names: Iterable[str]) -> list[Sink]:
    """The sinks of these names, with their settings. Raises SettingsError for an unknown name or unusable settings."""
    return [_create(name) for name in dict.fromkeys(names)]


def _create(name: str) -> Sink:
    if name not in SINKS:
        expected = f"one or more of {', '.join(SINKS)}, separated by commas"
        raise SettingsError(name="REPLICATOR_SINKS", problem=f"there is no sink {name!r}", expected=expected)
    module_name, sink, settings = SINKS[name]
    module = import_module(module_name)
    created: Sink = getattr(module, sink)(load(getattr(module, settings)))
    return created
