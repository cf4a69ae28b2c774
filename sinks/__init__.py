"""Destinations, a folder each; `contracts/sink.py` says what one implements.

A sink is a class with its own settings. Those in `BUILT_IN` are ours; an installed package adds others through the
entry point group `replicator.sinks`, name → "module:Class".
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeGuard

from replicator.contracts.errors import SettingsError
from replicator.contracts.fields import Contract
from replicator.contracts.settings import Settings, load, variable
from replicator.contracts.sink import Sink

GROUP = "replicator.sinks"

_log = logging.getLogger(__name__)

BUILT_IN = {
    "clickhouse": "sinks.clickhouse.sink:ClickHouseSink",
    "redis": "sinks.redis.sink:RedisSink",
    "http": "sinks.http.sink:HttpSink",
    "stdout": "sinks.stdout.sink:StdoutSink",
}
"""Name in REPLICATOR_SINKS → "module:Class". Not entry points: a checkout that is not installed has none."""


COMPLETE = "sinks that are installed completely"
WHOLE = "sinks that keep the contract"


@cache
def known_sinks() -> Mapping[str, EntryPoint]:
    """Every sink there is, built-in or installed, by its name in REPLICATOR_SINKS. Imports none of them.

    Raises SettingsError if two packages use one name.
    """
    found = {name: EntryPoint(name, where, GROUP) for name, where in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            raise _unusable(f"two sinks are called {entry.name!r}: {first.value} and {entry.value}", "one of the two")
    return found


def settings_classes(first: Sequence[str] = ()) -> Iterator[type[Settings]]:
    """The settings of all sinks, of these first. A sink that can't be loaded is named in the log and left out."""
    for name in sorted(known_sinks(), key=lambda name: name not in first):
        try:
            yield sink_class(name).settings_class
        except SettingsError as exc:
            _log.warning("%s", exc)


def create_sinks(names: Iterable[str], contract: Contract) -> list[Sink]:
    """The sinks of these names, with their settings. Raises SettingsError for an unknown name or unusable settings."""
    classes = [sink_class(name) for name in dict.fromkeys(names)]
    return [_create(found, load(found.settings_class), contract) for found in classes]


def _create(found: type[Sink], settings: Settings, contract: Contract) -> Sink:
    try:
        sink = found(settings, contract)
    except Exception as exc:  # its own words may hold a secret
        raise _unusable(f"sink {found.name!r} can't be made ({type(exc).__name__})", WHOLE) from exc
    most = getattr(sink, "max_events", None)
    if not isinstance(most, int) or most < 1:
        raise _unusable(f"sink {found.name!r} has {most} as its max_events", WHOLE)
    if sink.concurrency < 1 or (sink.max_repeats is not None and sink.max_repeats < most):  # it would never write
        problem = f"sink {found.name!r} has concurrency {sink.concurrency} and max_repeats {sink.max_repeats}"
        raise _unusable(problem, f"{WHOLE}: at least 1, and at least max_events or None")
    return sink


def sink_class(name: str) -> type[Sink]:
    """The class of that name. Raises SettingsError if there is none, or it is not a sink."""
    entry = known_sinks().get(name)
    if entry is None:
        expected = f"one or more of {', '.join(known_sinks())}, separated by commas"
        raise _unusable(f"there is no sink {name!r}", expected)
    try:
        found = entry.load()
    except Exception as exc:  # its module runs, and may fail at anything
        raise _unusable(f"sink {name!r} can't be loaded: {type(exc).__name__}: {exc}", COMPLETE) from exc
    if _is_sink(found, name):
        return found
    raise _unusable(f"{entry.value} is not a Sink named {name!r}", WHOLE)


def _is_sink(found: object, name: str) -> TypeGuard[type[Sink]]:
    if not (isinstance(found, type) and issubclass(found, Sink) and getattr(found, "name", None) == name):
        return False
    settings_class: object = found.settings_class
    return isinstance(settings_class, type) and issubclass(settings_class, Settings) and not found.__abstractmethods__


def _unusable(problem: str, expected: str) -> SettingsError:
    return SettingsError(name=variable("sinks"), problem=problem, expected=expected)
