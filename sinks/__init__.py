"""Destinations, a folder each; `contracts/sink.py` says what one implements.

A sink is a class with its own settings. Those in `BUILT_IN` are ours; an installed package adds others through the
entry point group `replicator.sinks`, name → "module:Class".
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any, TypeAlias, cast

from replicator.contracts.errors import SettingsError, unimported
from replicator.contracts.fields import Stream
from replicator.contracts.settings import CoreSettings, Settings, load, variable
from replicator.contracts.sink import Sink, SinkContext

GROUP = "replicator.sinks"

Wanted: TypeAlias = str | Callable[..., Sink]
"""The name of a sink, its class, or a `functools.partial` of that, with more arguments by name."""

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
def known_sinks() -> Mapping[str, Sequence[EntryPoint]]:
    """Every sink there is, built-in or installed, by its name in REPLICATOR_SINKS. Imports none of them.

    Several of one name: two packages use it, and none of the sinks can be chosen.
    """
    found = {name: [EntryPoint(name, where, GROUP)] for name, where in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        of_name = found.setdefault(entry.name, [])
        if entry.value not in [other.value for other in of_name]:
            of_name.append(entry)
    return found


def settings_classes(first: Sequence[str] = ()) -> Iterator[type[Settings]]:
    """The settings of all sinks, of these first. A sink that can't be loaded is left out.

    The log names it, unless it is one of the first: whoever wants it will be told.
    """
    for name in sorted(known_sinks(), key=lambda name: name not in first):
        try:
            yield sink_class(name).settings_class
        except SettingsError as exc:
            if name not in first:
                _log.warning("%s", exc)


def create_sinks(wanted: Iterable[Wanted], context: SinkContext, known: Mapping[str, Any] | None = None) -> list[Sink]:
    """The sinks of a stream, with their settings; `known` ones are not read from the environment.

    Raises SettingsError for an unknown name, for what is no sink, and for unusable settings.
    """
    made = [_create(one, context, known or {}) for one in dict.fromkeys(wanted)]
    for name, count in Counter(sink.name for sink in made).items():
        if count > 1:  # two would keep one position
            problem, expected = f"two are called {name}", "sinks, each with a name of its own"
            raise SettingsError(name=variable("sinks"), problem=problem, expected=expected)
    return made


def kind_of(wanted: Wanted) -> str:
    """Its name as in REPLICATOR_SINKS; empty if it has none."""
    return wanted if isinstance(wanted, str) else str(getattr(_made_by(wanted), "name", ""))


def _made_by(wanted: Callable[..., Sink]) -> object:
    return wanted.func if isinstance(wanted, partial) else wanted


def _class(wanted: Wanted) -> type[Sink]:
    if isinstance(wanted, str):
        return sink_class(wanted)
    found, name = _made_by(wanted), kind_of(wanted)
    if flaw := _flaw(found, name):
        raise _unusable(name, f"is {wanted!r}, {flaw}", WHOLE)
    return cast("type[Sink]", found)


def _create(wanted: Wanted, context: SinkContext, known: Mapping[str, Any]) -> Sink:
    found = _class(wanted)
    settings = load(found.settings_class, **known)
    _refuse_stream(found, context.stream)
    try:
        made = (found if isinstance(wanted, str) else wanted)(settings, context)
    except Exception as exc:  # its own words may hold a secret
        raise _unusable(found.name, f"can't be made ({type(exc).__name__})", WHOLE) from exc
    return _checked(made, found.name)


def _refuse_stream(sink: type[Sink], stream: Stream) -> None:
    numbered = stream.identity.type.python is stream.key.type.python is int
    if not sink.takes_any_stream and (stream.follows or not numbered):
        problem = "takes no stream whose rows change, or whose identity or key is no number"
        raise _unusable(sink.name, problem, f"another sink for the stream {stream.name!r}")


def _checked(sink: Sink, name: str) -> Sink:
    if not hasattr(sink, "context"):
        raise _unusable(name, "has an __init__ that does not call Sink's", WHOLE)
    most = getattr(sink, "max_events", None)
    if not isinstance(most, int) or most < 1:
        raise _unusable(name, f"has {most} as its max_events", WHOLE)
    for what in ("concurrency", "linger_seconds"):
        if not isinstance(number := getattr(sink, what), int | float):
            raise _unusable(name, f"has {number} as its {what}", WHOLE)
    if sink.concurrency < 1 or (sink.max_repeats is not None and sink.max_repeats < most):  # it would never write
        problem = f"has concurrency {sink.concurrency} and max_repeats {sink.max_repeats}"
        raise _unusable(name, problem, f"{WHOLE}: at least 1, and at least max_events or None")
    return sink


def sink_class(name: str) -> type[Sink]:
    """The class of that name. Raises SettingsError if there is none, or it is not a sink."""
    entries = known_sinks().get(name, ())
    if not entries:
        expected = f"one or more of {', '.join(known_sinks())}, separated by commas"
        raise SettingsError(name=variable("sinks"), problem=f"there is no sink {name!r}", expected=expected)
    if len(entries) > 1:
        problem = f"is the name of {len(entries)}: {' and '.join(entry.value for entry in entries)}"
        raise _unusable(name, problem, "a name that one installed package uses")
    try:
        found = entries[0].load()
    except (Exception, SystemExit) as exc:  # its module runs, and may fail at anything
        raise _unusable(name, f"can't be loaded: {unimported(exc)}", COMPLETE) from exc
    if flaw := _flaw(found, name):
        raise _unusable(name, f"is {entries[0].value}, {flaw}", WHOLE)
    return cast("type[Sink]", found)


def _flaw(found: object, name: str) -> str:
    """Why it can't be the sink of that name; empty if it can."""
    if not (isinstance(found, type) and issubclass(found, Sink)):
        return "which is no class that inherits Sink"
    if missing := sorted(found.__abstractmethods__):
        return f"which lacks {', '.join(missing)}"
    if not (its_name := getattr(found, "name", None)) or its_name != name:
        return f"whose name is {its_name!r}" if its_name else "which has no name"
    if [*signature(found.__init__).parameters][2:3] == ["stream"]:  # behind the settings: what it got before 0.1.0
        return "whose __init__ takes a stream: it gets a SinkContext, which has the stream"
    return _settings_flaw(found.settings_class, name)


def _settings_flaw(settings: object, name: str) -> str:
    if not (isinstance(settings, type) and issubclass(settings, Settings)):
        return "whose settings_class does not inherit Settings"
    # Else a setting could be another's as well: the address of the source would be that of a destination.
    begin = re.sub(r"\W", "_", name.lower()) + "_"
    others = [field for field in settings.model_fields if not field.startswith(begin)]
    if others:
        return f"whose setting {others[0]!r} does not begin with {begin!r}"
    ours = [field for field in settings.model_fields if field in CoreSettings.model_fields]
    return f"whose setting {ours[0]!r} is one of the replicator itself" if ours else ""


def _unusable(name: str, problem: str, expected: str) -> SettingsError:
    others = ", ".join(other for other in known_sinks() if other != name)
    problem = f"sink {name!r} {problem}"
    return SettingsError(name=variable("sinks"), problem=problem, expected=f"{expected}; other sinks are {others}")
