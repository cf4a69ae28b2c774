"""Destinations, a folder each; `contracts/sink.py` says what one implements.

A sink is a class with its own settings. Those in `BUILT_IN` are ours; an installed package adds others through the
entry point group `replicator.sinks`, name → "module:Class".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from replicator.contracts.errors import SettingsError
from replicator.contracts.fields import Contract
from replicator.contracts.settings import Settings, load, variable
from replicator.contracts.sink import Sink

GROUP = "replicator.sinks"

BUILT_IN = {
    "clickhouse": "sinks.clickhouse.sink:ClickHouseSink",
    "redis": "sinks.redis.sink:RedisSink",
    "http": "sinks.http.sink:HttpSink",
}
"""Name in REPLICATOR_SINKS → "module:Class". Not entry points: a checkout that is not installed has none."""


@cache
def known_sinks() -> Mapping[str, EntryPoint]:
    """Every sink there is, built-in or installed, by its name in REPLICATOR_SINKS. Imports none of them.

    Raises SettingsError if two packages use one name.
    """
    found: dict[str, EntryPoint] = {name: EntryPoint(name, where, GROUP) for name, where in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            problem = f"two installed sinks are called {entry.name!r}: {first.value} and {entry.value}"
            raise SettingsError(name=variable("sinks"), problem=problem, expected="sinks with different names")
    return found


def sink_names() -> str:
    """The names of all sinks, for messages: "clickhouse, redis, http"."""
    return ", ".join(known_sinks())


def settings_classes() -> list[type[Settings]]:
    """The settings of all sinks, configured or not."""
    return [_sink_class(name).settings_class for name in known_sinks()]


def create_sinks(names: Iterable[str], contract: Contract) -> list[Sink]:
    """The sinks of these names, with their settings. Raises SettingsError for an unknown name or unusable settings."""
    classes = [_sink_class(name) for name in dict.fromkeys(names)]
    return [sink_class(load(sink_class.settings_class), contract) for sink_class in classes]


def _sink_class(name: str) -> type[Sink]:
    if name not in known_sinks():
        expected = f"one or more of {sink_names()}, separated by commas"
        raise SettingsError(name=variable("sinks"), problem=f"there is no sink {name!r}", expected=expected)
    found: type[Sink] = known_sinks()[name].load()
    return found
