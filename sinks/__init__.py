"""Destinations: each module is one, with its own settings; see `contracts.protocols.Sink`.

A new sink is a new module and a line in `SINKS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from replicator.contracts.errors import SettingsError
from replicator.contracts.protocols import Sink
from replicator.contracts.settings import Settings, load

SINKS = {
    "clickhouse": ("sinks.clickhouse.sink", "ClickHouseSink", "ClickHouseSettings"),
    "redis": ("sinks.redis.sink", "RedisSink", "RedisSettings"),
    "http": ("sinks.http.sink", "HttpSink", "HttpSettings"),
}
"""Name in REPLICATOR_SINKS → module, sink class, settings class; imported only when used."""

BACKFILL: Mapping[str, Mapping[str, Any]] = {"redis": {"keeps_window": False}}
"""What a sink is told when history is written beside the stream: what goes by the clock is the replicator's to keep."""


def settings_classes() -> list[type[Settings]]:
    """Of all sinks, configured or not."""
    return [getattr(import_module(module), settings) for module, _, settings in SINKS.values()]


def create_sinks(names: Iterable[str], *, backfill: bool = False) -> list[Sink]:
    """The sinks of these names, with their settings. Raises SettingsError for an unknown name or unusable settings."""
    return [_create(name, BACKFILL.get(name, {}) if backfill else {}) for name in dict.fromkeys(names)]


def _create(name: str, options: Mapping[str, Any]) -> Sink:
    if name not in SINKS:
        expected = f"one or more of {', '.join(SINKS)}, separated by commas"
        raise SettingsError(name="REPLICATOR_SINKS", problem=f"there is no sink {name!r}", expected=expected)
    module_name, sink, settings = SINKS[name]
    module = import_module(module_name)
    created: Sink = getattr(module, sink)(load(getattr(module, settings)), **options)
    return created
