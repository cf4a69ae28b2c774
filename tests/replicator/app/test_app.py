"""What commands share, with sinks and a store that do what the test says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from enrichment import EnrichmentSettings, tables_of
from replicator.app import App
from replicator.cli.dead_letters import _replay
from replicator.cli.stream import _created
from replicator.contracts.enricher import Enriched
from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkRefusesAll, SinkUnavailable
from replicator.contracts.events import Checkpoint, DeadLetter, Position, SinkPosition
from replicator.contracts.fields import BIGINT, TIMESTAMPTZ, Field, Role, Stream
from replicator.contracts.settings import CoreSettings, load
from replicator.contracts.sink import SinkContext
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


def plays(name: str, *fields: str) -> Stream:
    """A stream of these numbers."""
    more = (Field(field, BIGINT) for field in fields)
    roles = Field("id", BIGINT, role=Role.IDENTITY), Field("place", BIGINT, role=Role.KEY)
    return Stream(name, f"public.{name}", (*roles, Field("at", TIMESTAMPTZ, role=Role.TIME), *more))


def event(sink: str, **fields: int) -> DeadLetter:
    """One that a sink refused."""
    payload = json.dumps({"id": 1, "place": 2, "at": "2026-01-08T09:00:00Z", **fields}).encode()
    return DeadLetter(sink=sink, position=None, event_id=1, reason="422", payload=payload, id=7)


HERE = "sink {} is not among REPLICATOR_SINKS"
ELSEWHERE = "sink {} is of a stream that REPLICATOR_STREAM does not name: name it, too, for this command"
ALONE = (
    "it is from when there was one stream, and {}: run `python -m replicator dead-letters replay --id 7` with"
    " REPLICATOR_STREAM naming its own alone"
)


@pytest.mark.parametrize(
    ("letter", "why"),
    [
        (event("http/rides", speed=1), ""),
        (event("http", speed=1), ""),
        (event("http", price=1), ""),
        (event("http"), ALONE.format("may be of rides or sales")),
        (event("http", other=1), ALONE.format("has the fields of none of these")),
        (event("http/walks", speed=1), ELSEWHERE.format("http/walks")),
        (event("redis/rides", speed=1), HERE.format("redis/rides")),
        (event("redis", speed=1), HERE.format("redis")),
    ],
)
async def test_whose_an_event_is_under_a_former_name(letter: DeadLetter, why: str) -> None:
    """Its fields tell the stream where its sink's name does not; what may be of two is given to none."""
    streams = plays("rides", "speed"), plays("sales", "price")
    contexts = [SinkContext(stream, f" --stream {stream.name}") for stream in streams]
    sinks = [MemorySink(name="http", context=context) for context in contexts]
    assert ({7: why} if why else {}) == await _replay(app(FakeStore(), *sinks), [letter])


@pytest.mark.parametrize(("stored", "left"), [("http", []), ("http/rides", []), ("http/walks", [7])])
async def test_a_row_is_for_the_sinks_by_their_names_of_today(stored: str, left: list[int]) -> None:
    """A former name in the checkpoint is no sink that lacks the row; that of a stream that is not here is."""
    here = app(FakeStore(stored), MemorySink(name="http", context=SinkContext(plays("rides"))))
    assert left == list(await _replay(here, [ROW]))


async def test_a_sink_that_can_not_be_closed_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The others are closed as well, and the result is the command's own."""
    store = FakeStore()
    async with app(store, Breaks(name="keeper")).closing():
        pass
    assert store.closed
    assert ["sink keeper could not be closed (RuntimeError)"] == caplog.messages
    with pytest.raises(KeyError, match="its own"):
        async with app(store, Breaks(name="keeper")).closing():
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


async def test_nor_is_what_a_sink_says_that_it_has_made() -> None:
    """A sink of another package may forget that it is a list of lines."""

    class Says(MemorySink):
        async def create(self) -> list[str]:
            """Say a number."""
            return 7  # type: ignore[return-value]  # its author has no type checker

    with pytest.raises(SinkError, match=r"Sink says failed in an unexpected way \(TypeError\)"):
        await _created(Says(name="says"))
