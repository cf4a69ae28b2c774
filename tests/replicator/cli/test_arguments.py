"""`run` without servers: begun anew when it was overtaken, unless it was told to stop meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from typing import Any, cast

import pytest

from replicator.cli import commands
from replicator.cli.commands import Parts
from replicator.contracts.errors import Overtaken
from replicator.contracts.settings import CoreSettings, load


class Overtaking:
    """A pipeline that drains for a while, having been overtaken."""

    signalled = False

    def __init__(self, *_: object) -> None:
        self.stopping = asyncio.Event()

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


class Watching:
    """A monitor that sees nothing."""

    def __init__(self, *_: object) -> None:
        """Whatever it is given."""

    async def run(self) -> None:
        """For ever."""
        await asyncio.Event().wait()


class Closing:
    """An enricher that has nothing open."""

    async def close(self) -> None:
        """Nothing to release."""


class Store:
    """Likewise."""

    def close(self) -> None:
        """Nothing to release."""


async def run_with(pipeline: type[Overtaking], monkeypatch: pytest.MonkeyPatch) -> int:
    """`run`, with these."""
    monkeypatch.setattr(commands, "Pipeline", pipeline)
    monkeypatch.setattr(commands, "Monitor", Watching)
    monkeypatch.setenv("REPLICATOR_ADMIN_LISTEN", "")
    monkeypatch.setattr(Parts, "source", lambda _: None)
    parts = Parts(load(CoreSettings), cast("Any", Closing()), [], cast("Any", Store()))
    return await commands.run(parts, argparse.Namespace())


async def test_overtaken_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`__main__` begins the program anew."""
    with pytest.raises(Overtaken):
        await run_with(Overtaking, monkeypatch)


async def test_told_to_stop_meanwhile_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM during the drain is not forgotten: exit code 0, nothing begins anew."""
    assert 0 == await run_with(Signalled, monkeypatch)
