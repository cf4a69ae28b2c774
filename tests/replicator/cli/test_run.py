"""`run` without servers: it starts again when it was overtaken, unless it was stopped meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from enrichment import EnrichmentSettings, tables_of
from replicator.app import App
from replicator.cli import stream
from replicator.contracts.errors import Overtaken
from replicator.contracts.settings import CoreSettings, load
from replicator.operations.notices.notifier import Notifier
from replicator.operations.notices.ring import Notices


class Overtaking:
    """A pipeline that drains for a while, having been overtaken."""

    signalled = False

    def __init__(self, *_: object) -> None:
        self.stopping = asyncio.Event()
        self.fan_out = SimpleNamespace(lanes=[], taps=[])

    def stop(self) -> None:
        """As the signal says."""
        self.stopping.set()

    async def run(self) -> None:
        """A signal may come while it drains."""
        if self.signalled:
            os.kill(os.getpid(), signal.SIGTERM)
            await self.stopping.wait()
        raise Overtaken(checkpoint="0/5", stored="0/B")


class Signalled(Overtaking):
    """With a signal."""

    signalled = True


class Broken(Overtaking):
    """Ends with an error of the operating system, as a sink of another package may raise it."""

    async def run(self) -> None:
        """Raise."""
        raise BrokenPipeError("a socket of the sink")


class Watching:
    """A watchdog that sees nothing."""

    standby = ""
    is_up = True

    def __init__(self, pipeline: object, _: object, settings: CoreSettings, *_others: object) -> None:
        self.pipeline = pipeline
        self.notices = Notices()
        self.notifier = Notifier(settings, self.notices, lambda: False)

    async def run(self) -> None:
        """For ever."""
        await asyncio.Event().wait()

    notice = run

    def state(self) -> str:
        """For the service manager."""
        return "reading"


class Closing:
    """An enricher that has nothing open."""

    async def close(self) -> None:
        """Nothing to release."""


class Store:
    """Likewise."""

    def files(self) -> list[Path]:
        """It keeps nothing."""
        return []

    def close(self) -> None:
        """Nothing to release."""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restored afterwards: a second signal would end the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not where a replicator of this machine has its own."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))


async def run_with(pipeline: type[Overtaking], monkeypatch: pytest.MonkeyPatch) -> int:
    """`run`, with these."""
    monkeypatch.setattr("replicator.app.running.Pipeline", pipeline)
    monkeypatch.setattr("replicator.app.running.Watchdog", Watching)
    monkeypatch.setenv("REPLICATOR_ADMIN_LISTEN", "")
    monkeypatch.setattr(App, "source", lambda _: None)
    app = App(load(CoreSettings), tables_of(load(EnrichmentSettings)), cast("Any", Closing()), [], cast("Any", Store()))
    monkeypatch.setattr(App, "load", lambda *_: app)
    return await stream.run()


async def test_overtaken_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` starts the program again."""
    with pytest.raises(Overtaken):
        await run_with(Overtaking, monkeypatch)


async def test_told_to_stop_meanwhile_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM during the drain is not forgotten: exit code 0, nothing starts again."""
    assert 0 == await run_with(Signalled, monkeypatch)


async def test_a_broken_pipe_of_a_sink_is_not_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` says nothing about a closed standard output; this ends with a traceback."""
    with pytest.raises(BrokenPipeError, match="a socket of the sink"):
        await run_with(Broken, monkeypatch)


async def test_a_file_that_no_sink_reads_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page shows the settings of what runs: those of other sinks are not read, nor their packages imported."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL_FILE", "/nonexistent")
    with pytest.raises(Overtaken):
        await run_with(Overtaking, monkeypatch)
