"""`rebuild-redis` that is stopped before it has begun to write."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from replicator.cli import reconcile
from replicator.cli.backfill import Run
from replicator.contracts.sink import Rebuildable
from sinks.testing import MemorySink


class Emptied(MemorySink, Rebuildable):
    """It has keys until it is emptied."""

    async def empty(self) -> int:
        """Delete three."""
        return 3

    async def generation(self) -> str:
        """Always the same."""
        return "one"

    async def filled(self, generation: str) -> None:
        """Nothing to do."""


@pytest.mark.parametrize("from_empty", [True, False])
async def test_stopped_after_the_keys_were_deleted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, from_empty: bool
) -> None:
    """Counting what there is takes a while in a large table: who stops it then is told that the keys are gone."""
    counting = asyncio.Event()

    async def opened() -> None:
        pass

    async def deliver(_: Run) -> int:
        counting.set()
        await asyncio.Event().wait()
        return 0

    monkeypatch.setattr(reconcile, "deliver", deliver)
    app = SimpleNamespace(sinks=[Emptied()], store=SimpleNamespace(create=lambda: None))
    history: Any = SimpleNamespace(open=opened)
    again = "`rebuild-redis --resume`"
    run = Run(cast("Any", app), history, "rebuild-redis", 1, None, resume=False, again=again)
    work = asyncio.create_task(reconcile._rebuild(run, from_empty=from_empty))  # noqa: SLF001  the command asks first
    await counting.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    told = "the keys may be deleted, and none is made again; to continue: `rebuild-redis --resume`\n"
    assert (told if from_empty else "") == capsys.readouterr().err
