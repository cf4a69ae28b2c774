"""`tail`: a few of what goes through, the rest counted, and the stream never waits."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest

from replicator.contracts.errors import ReplicatorError
from replicator.contracts.events import Event
from replicator.delivery.lane import Tap
from replicator.delivery.retry import cancel
from replicator.operations.control.address import Answer, Request
from replicator.operations.control.client import watch
from replicator.operations.control.server import Control
from replicator.operations.follow import tail
from replicator.operations.follow.tail import SHOWN_A_BATCH, SHOWN_A_SECOND, WAITING, Seen, Viewer, view


def events(number: int) -> list[Event]:
    """So many."""
    return [Event(0x1E, ordinal, ordinal, 1, 0, b'{"event_id":%d}' % ordinal) for ordinal in range(1, number + 1)]


def clock(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    """Time, in this module alone."""
    monkeypatch.setattr(tail, "time", SimpleNamespace(monotonic=lambda: now))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a second."""
    monkeypatch.setattr(tail, "TICK_SECONDS", 0.01)
    clock(monkeypatch, 7.0)


async def take(viewer: Viewer, number: int) -> list[Seen]:
    """The next lines."""
    return [await viewer.next() for _ in range(number)]


async def test_a_few_are_shown_and_the_others_counted() -> None:
    """Of each batch, and of each second; other sinks are not its concern."""
    viewer = Viewer("http")
    viewer("redis", events(9))
    viewer("http", events(3))
    viewer("http", events(100))
    shown = await take(viewer, 3 + SHOWN_A_BATCH + 1)
    assert ["0/1E#1", "0/1E#2", "0/1E#3", "0/1E#1"] == [seen.position for seen in shown[:4]]
    assert Seen(sink="http", skipped=100 - SHOWN_A_BATCH) == shown[-1]
    for _ in range(100):
        viewer("http", events(10))
    rest = SHOWN_A_SECOND - 3 - SHOWN_A_BATCH
    assert Seen(sink="http", skipped=1_000 - rest) == (await take(viewer, rest + 1))[-1]


async def test_a_viewer_that_never_looks_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it has a bound."""
    viewer = Viewer("")
    for second in range(1_000):
        clock(monkeypatch, second)
        viewer("", events(10))
    shown = await take(viewer, WAITING + 1)
    assert Seen(skipped=10_000 - WAITING) == shown[-1]


async def test_it_ends_with_whoever_asked(tmp_path: Path) -> None:
    """A tap lasts as long as its viewer."""
    taps: list[Tap] = []
    path = tmp_path / "s.sock"

    async def act(_: Request) -> Answer:
        return Answer(done=True, lines=[])

    task = asyncio.create_task(Control(path, act, lambda sink: view(taps, sink)).run())
    with pytest.raises(ReplicatorError, match="No replicator runs here"):
        await anext(watch(tmp_path / "other.sock", Request(do="tail", sink="")))
    async with asyncio.timeout(10):
        while not path.exists():  # noqa: ASYNC110  the socket is made in another task
            await asyncio.sleep(0.001)
        async with aclosing(watch(path, Request(do="tail", sink=""))) as lines:
            assert Seen() == await anext(lines)
            [tap] = taps
            tap("", events(1))
            found = [await anext(lines)]
            while found[-1] == Seen():
                found.append(await anext(lines))
            last = found[-1]
            assert isinstance(last, Seen)
            assert ("0/1E#1", b'{"event_id":1}') == (last.position, bytes(last.event))
        while taps:  # noqa: ASYNC110  the server notices when it writes
            await asyncio.sleep(0.001)
    await cancel([task])


async def test_what_is_refused_is_told(tmp_path: Path) -> None:
    """A paused sink gets nothing."""
    path = tmp_path / "s.sock"

    async def act(_: Request) -> Answer:
        return Answer(done=False, lines=["sink http is paused"])

    task = asyncio.create_task(Control(path, act, lambda sink: view([], sink)).run())
    async with asyncio.timeout(10):
        while not path.exists():  # noqa: ASYNC110  the socket is made in another task
            await asyncio.sleep(0.001)
        async with aclosing(watch(path, Request(do="tail", sink="http"))) as lines:
            assert Answer(done=False, lines=["sink http is paused"]) == await anext(lines)
    await cancel([task])
