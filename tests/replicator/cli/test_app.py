"""What commands share, with sinks and a store that do what the test says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from enrichment import EnrichmentSettings, tables_of
from replicator.cli.app import App
from replicator.cli.dead_letters import _replay
from replicator.cli.stream import _created
from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkRefusesAll, SinkUnavailable
from replicator.contracts.events import Checkpoint, DeadLetter, Position, SinkPosition
from replicator.contracts.settings import CoreSettings, load
from replicator.contracts.stream import Enriched
from sinks.testing import MemorySink

AT = SinkPosition(position=Position(1, 1), end_lsn=2)
ROW = DeadLetter(sink=None, position=Position(1, 1), event_id=1, reason="no type", payload=b"{}", id=7)


class FakeEnricher:
    """Makes nothing of anything."""

    async def restore(self, _letters: Sequence[DeadLetter]) -> Enriched:
        """No event."""
        return Enriched([], [])

    async def close(self) -> None:
        """Nothing to close."""


class FakeStore:
    """Has a checkpoint of these sinks."""

    def __init__(self, *sinks: str) -> None:
        self.sinks = sinks
        self.closed = False

    def load(self, slot: str) -> Checkpoint:
        """Where they are."""
        sinks = dict.fromkeys(self.sinks, AT)
        return Checkpoint(slot=slot, system_identifier="7", timeline=1, end_lsn=2, sinks=sinks)

    def close(self) -> None:
        """Note it."""
        self.closed = True


class Breaks(MemorySink):
    """Can't be closed, and makes nothing."""

    async def create(self) -> list[str]:
        """Fail."""
        raise RuntimeError("s3cret")

    async def close(self) -> None:
        """Fail."""
        raise RuntimeError("the window's keeper failed")


def app(store: FakeStore, *sinks: MemorySink) -> App:
    """An app of these parts."""
    parts: Any = FakeEnricher(), list(sinks), store
    return App(load(CoreSettings), tables_of(load(EnrichmentSettings)), *parts)


@pytest.mark.parametrize(("configured", "left"), [(("redis",), [7]), (("redis", "http"), [])])
async def test_a_row_stays_until_every_sink_has_it(configured: Sequence[str], left: list[int]) -> None:
    """Every sink lacks a row that no event could be made of: those of this shell are not all that there are."""
    here = app(FakeStore("redis", "http"), *(MemorySink(name=name) for name in configured))
    assert left == list(await _replay(here, [ROW]))


async def test_a_sink_that_can_not_be_closed_hides_nothing() -> None:
    """The others are closed as well, and the command's own error is the one that is raised."""
    store = FakeStore()
    with pytest.raises(RuntimeError, match="keeper failed"):
        async with app(store, Breaks()).closing():
            pass
    assert store.closed
    with pytest.raises(KeyError, match="its own"):
        async with app(store, Breaks()).closing():
            raise KeyError("its own")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SinkUnavailable(sink="redis", detail="away"), "Sink redis failed: away."),
        (SinkMisconfigured(sink="redis", detail="WRONGPASS", cure="See x"), "Sink redis failed: WRONGPASS. See x."),
        (
            SinkRefusesAll(sink="redis", detail="422"),
            "Sink redis failed: 422. Check that the settings REPLICATOR_REDIS_…",
        ),
    ],
)
async def test_a_command_does_not_promise_to_try_again(error: SinkError, told: str) -> None:
    """It asks once, and keeps no events."""
    with pytest.raises(SinkError) as raised:
        async with app(FakeStore()).closing():
            raise error
    assert str(raised.value).startswith(told)
    assert "kept" not in str(raised.value)


async def test_what_a_sink_can_not_make_is_one_line() -> None:
    """Whatever a sink of another package raises, and without its words."""
    with pytest.raises(
        SinkError, match=r"Sink keeper failed in an unexpected way \(RuntimeError\)\. REPLICATOR_LOG_LEV"
    ):
        await _created(Breaks(name="keeper"))
