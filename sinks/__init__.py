"""Destinations: each module is one, with its own settings; see `contracts.sink.Sink`.

A new sink is a new module and a line in `SINKS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from replicator.contracts.errors import SettingsError
from replicator.contracts.settings import Settings, load
from replicator.contracts.sink import Sink

SINKS = {
    "clickhouse": ("sinks.clickhouse.sink", "ClickHouseSink", "ClickHouseSettings"),
    "redis": ("sinks.redis.sink", "RedisSink", "RedisSettings"),
    "http": ("sinks.http.sink", "HttpSink", "HttpSettings"),
}
"""Name in REPLICATOR_SINKS → module, sink class, settings class; imported only when used."""


def settings_classes() -> list[type[Settings]]:
    """Of all sinks, configured or not."""
    return [getattr(import_module(module), settings) for module, _, settings in SINKS.values()]


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
