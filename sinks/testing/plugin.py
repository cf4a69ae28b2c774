"""`pytest --sink NAME`: the conformance suite on an installed sink, and nothing else.

A `conftest.py` has the fixture `destination`, which says how to look at the sink's destination. pytest finds this
module by the package's entry point.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from replicator.contracts.errors import SettingsError
from sinks import sink_class
from sinks.testing.conformance import SinkConformance
from sinks.testing.destination import Destination

OPTION = "--sink"


class Suite(pytest.Module):
    """The tests, where a `conftest.py` is: its fixtures are theirs."""


class TestSink(SinkConformance):
    """Of the sink that the option names."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    words = "run the conformance suite on this sink; a conftest.py has the fixture `destination`"
    parser.addoption(OPTION, metavar="NAME", help=words)


def pytest_configure(config: pytest.Config) -> None:
    """See that there is such a sink, and that tests may be asynchronous."""
    if not (name := config.getoption(OPTION)):
        return
    if find_spec("pytest_asyncio") is None:
        raise pytest.UsageError(f"{OPTION} needs pytest-asyncio: pip install pytest-asyncio")
    try:
        sink_class(name)
    except SettingsError as exc:
        raise pytest.UsageError(str(exc)) from exc
    Destination.name = name


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """A suite for each `conftest.py` with a destination."""
    conftest = parent.config.pluginmanager.get_plugin(str(file_path))
    if not parent.config.getoption(OPTION) or not hasattr(conftest, "destination"):
        return None
    suite: pytest.Module = Suite.from_parent(parent, path=file_path)
    suite.obj = ModuleType("suite")
    suite.obj.TestSink = TestSink
    return suite


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is no part of the suite."""
    if not config.getoption(OPTION):
        return
    suite = [item for item in items if item.getparent(Suite)]
    if not suite:
        raise pytest.UsageError(f"{OPTION} found no conftest.py with a fixture `destination` (docs/how-to/sink.md)")
    config.hook.pytest_deselected(items=[item for item in items if item not in suite])
    items[:] = suite
