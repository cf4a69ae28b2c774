"""Sinks are found by name: ours without any metadata, others through the entry points of installed packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from enrichment import EVENT
from replicator.contracts import fields
from replicator.contracts.errors import SettingsError
from replicator.contracts.settings import Settings
from replicator.contracts.sink import SinkContext
from sinks import create_sinks, known_sinks, settings_classes
from sinks.testing import MemorySink
from tests.support.plugin import install

Install = Callable[..., None]

BROKEN_SINKS = """
from typing import Annotated
from pydantic import AfterValidator, model_validator
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Sink
class NoWrite(Sink):
    name = "broken"
class OddSettings(Sink):
    name, settings_class = "broken", dict
    async def write(self, events): return []
class Working(Sink):
    async def write(self, events): return []
class NoMost(Working):
    name = "broken"
class NoStart(Working):
    name, max_events = "broken", 1
    def __init__(self, settings, context): raise RuntimeError("hunter2")
class TakesStream(Working):
    name, max_events = "broken", 1
    def __init__(self, settings, stream): super().__init__(settings, stream)
class NoSuper(Working):
    name, max_events = "broken", 1
    def __init__(self, settings, context): pass
class Divides(Settings):
    broken_x: Annotated[int, AfterValidator(lambda x: 1 // x)] = 0
class NoRoom(Working):
    name, max_events, max_repeats = "broken", 10, 5
class NoHurry(Working):
    name, max_events, linger_seconds = "broken", 10, "1"
class NoNumber(Working):
    name, max_events, concurrency = "broken", 10, None
class Together(Settings):
    @model_validator(mode="after")
    def _both(self): raise ValueError("they exclude each other")
class NotTogether(Working):
    name, max_events, settings_class = "broken", 1, Together
class NoName(Working):
    max_events = 1
class Elsewhere(Settings):
    postgres_dsn: str = ""
class Everywhere(Working):
    name, max_events, settings_class = "broken", 1, Elsewhere
class Source(Everywhere):
    name = "postgres"
class Needs(Settings):
    broken_url: str
class Needy(Working):
    name, max_events, settings_class = "broken", 1, Needs
class NoSettings(Working):
    name, max_events, settings_class = "broken", 1, Divides
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs the example, in this process."""
    monkeypatch.syspath_prepend(tmp_path)
    known_sinks.cache_clear()
    yield lambda *arguments: install(tmp_path, *arguments)
    known_sinks.cache_clear()


@pytest.mark.usefixtures("installed")
def test_ours_need_no_metadata() -> None:
    """A checkout has none."""
    assert ["clickhouse", "redis", "http", "stdout"] == list(known_sinks())


def test_an_installed_sink_is_one_of_them(installed: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, with its settings from the environment; the same code as ours makes it."""
    installed()
    monkeypatch.setenv("REPLICATOR_LINES_PATH", "/somewhere/events.jsonl")
    [sink] = create_sinks(["lines", "lines"], SinkContext(EVENT))
    assert ("lines", EVENT) == (sink.name, sink.stream)
    assert {"lines_path": Path("/somewhere/events.jsonl")} == sink.settings.model_dump()
    assert "LinesSettings" in [settings.__name__ for settings in settings_classes()]


def test_a_sink_may_have_a_stream_of_its_own() -> None:
    """An argument by that name is not what older sinks got in place of the context."""

    class Printer(MemorySink):
        def __init__(self, settings: Settings, context: SinkContext, *, stream: IO[str]) -> None:
            super().__init__(settings, context)
            self.output = stream

    [sink] = create_sinks([partial(Printer, stream=sys.stderr)], SinkContext(EVENT))
    assert EVENT == sink.stream


async def test_the_example_checks_its_file(installed: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is none, and where there is no folder there will be no file."""
    installed()
    for path, expected in ((tmp_path / "new.jsonl", True), (tmp_path, False), (tmp_path / "none" / "new.jsonl", False)):
        monkeypatch.setenv("REPLICATOR_LINES_PATH", str(path))
        [sink] = create_sinks(["lines"], SinkContext(EVENT))
        [finding] = await sink.check()
        assert (expected, expected) == (finding.ok, not finding.cure)


def test_a_sink_gets_no_stream_that_it_does_not_know(installed: Install) -> None:
    """It would take a row that is gone for an event, or an identity for a number."""
    installed()
    named = fields.Field("event_id", fields.TEXT, column="id", role=fields.Role.IDENTITY)
    for other in (replace(EVENT, updates="upsert"), replace(EVENT, fields=(named, *EVENT.fields[1:]))):
        with pytest.raises(SettingsError, match="'lines' takes no stream whose rows change, or whose identity or key"):
            create_sinks(["lines"], SinkContext(other))
        assert ["stdout"] == [sink.name for sink in create_sinks(["stdout"], SinkContext(other))]


def test_a_sink_does_not_share_a_setting_with_the_replicator(installed: Install, tmp_path: Path) -> None:
    """It would write into the database that is read."""
    installed("broken", {"postgres": "broken_sinks:Source"})
    (tmp_path / "broken_sinks.py").write_text(BROKEN_SINKS, encoding="utf-8")
    with pytest.raises(SettingsError, match="whose setting 'postgres_dsn' is one of the replicator itself"):
        create_sinks(["postgres"], SinkContext(EVENT))


def test_an_unknown_name_lists_what_there_is(installed: Install) -> None:
    """The installed ones, too."""
    installed()
    with pytest.raises(SettingsError, match=r"no sink 'kafka'. It takes one or more of .*, http, stdout, lines,"):
        create_sinks(["redis", "kafka"], SinkContext(EVENT))


def test_two_sinks_of_one_name_are_an_error(installed: Install) -> None:
    """Neither is the obvious one; the other sinks work. The same sink declared twice is one sink."""
    installed("ours", {"redis": "sinks.redis.sink:RedisSink"})
    assert ["redis"] == [sink.name for sink in create_sinks(["redis"], SinkContext(EVENT))]
    known_sinks.cache_clear()
    installed("other", {"redis": "replicator_lines:LinesSink"})
    problem = (
        r"sink 'redis' is the name of 2: sinks\.redis\.sink:RedisSink and replicator_lines:LinesSink\. .* http, stdout"
    )
    with pytest.raises(SettingsError, match=problem):
        create_sinks(["http", "redis"], SinkContext(EVENT))
    assert ["http"] == [sink.name for sink in create_sinks(["http"], SinkContext(EVENT))]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("no_such_module:Sink", "can't be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken_module:Sink", "can't be loaded: ZeroDivisionError \\(broken_module.py, line 1\\)"),
        ("leaving_module:Sink", "can't be loaded: SystemExit \\(leaving_module.py, line 1\\)"),
        ("not an object", "can't be loaded: "),
        ("sinks.testing:SinkConformance", "is sinks.testing:SinkConformance, which is no class that inherits Sink"),
        ("broken_sinks:NoWrite", "which lacks write"),
        ("broken_sinks:OddSettings", "whose settings_class does not inherit Settings"),
        ("broken_sinks:NoName", "which has no name"),
        ("broken_sinks:Everywhere", "whose setting 'postgres_dsn' does not begin with 'broken_'"),
        ("broken_sinks:Needy", "REPLICATOR_BROKEN_URL is unusable: it is not set"),
        ("broken_sinks:NoMost", "sink 'broken' has None as its max_events"),
        ("broken_sinks:NoStart", r"sink 'broken' can't be made \(RuntimeError\)"),
        ("broken_sinks:TakesStream", "whose __init__ takes a stream: it gets a SinkContext"),
        ("broken_sinks:NoSuper", "has an __init__ that does not call Sink's"),
        ("broken_sinks:NoRoom", "sink 'broken' has concurrency 1 and max_repeats 5"),
        ("broken_sinks:NoHurry", "sink 'broken' has 1 as its linger_seconds"),
        ("broken_sinks:NoNumber", "sink 'broken' has None as its concurrency"),
        ("broken_sinks:NotTogether", "Together is unusable: they exclude each other"),
        ("broken_sinks:NoSettings", r"Divides is unusable: their validation failed \(ZeroDivisionError\)"),
        ("replicator.contracts.sink:Sink", "which lacks write"),
        ("replicator_lines:Missing", "can't be loaded: .*Missing"),
        ("replicator_lines:LinesSettings", "which is no class that inherits Sink"),
        ("replicator_lines:LinesSink", "whose name is 'lines'"),
    ],
)
def test_a_broken_sink_is_named_and_hinders_no_other(
    installed: Install, value: str, problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Configured it is an error; otherwise a warning, and the others work."""
    (tmp_path / "broken_module.py").write_text("1 / 0", encoding="utf-8")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(7)", encoding="utf-8")
    (tmp_path / "broken_sinks.py").write_text(BROKEN_SINKS, encoding="utf-8")
    installed("broken", {"broken": value})
    with pytest.raises(SettingsError, match=problem):
        create_sinks(["broken"], SinkContext(EVENT))
    assert "RedisSettings" in [settings.__name__ for settings in settings_classes()]
    assert ("broken" in caplog.text) == ("can't be loaded" in problem or "which " in problem or "whose " in problem)
    assert ["redis"] == [sink.name for sink in create_sinks(["redis"], SinkContext(EVENT))]
