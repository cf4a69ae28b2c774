"""What a sink that takes any stream must do with rows that change, as tests; `conformance.py` has the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

import msgspec
import pytest

from replicator.contracts.errors import BatchRefused, SinkUnavailable
from replicator.contracts.events import Event, Id, Position, RowChange, SinkPosition, unfolded
from replicator.contracts.sink import Mode, Sink
from sinks.testing.destination import CHANGING, Destination, decode, sample

IDENTITY = CHANGING.identity.name
CANCELLED_AFTER = [0, 1, 2, 4, 8, 16, 32]
"""So many turns of the loop."""


def _position(revision: int) -> Position:
    """Ascending: four a commit. Neither the LSNs alone tell which is later, nor the ordinals, nor any of it as text."""
    return Position(98 + revision // 4, 8 + revision % 4)


def _id(number: int) -> Id:
    return sample(CHANGING, number).id


def _row(number: int, revision: int, was: int | None = None) -> RowChange:
    """Row `number` as it is from this revision on; until then it `was` another number's."""
    event = sample(CHANGING, number)
    json = msgspec.json.encode({**decode(event.json), "revision": revision})
    former = None if was is None else _id(was)
    return RowChange(*_position(revision), event.id, event.key, event.ts_us, json, CHANGING.name, was=former)


def _gone(number: int, revision: int) -> RowChange:
    """It is deleted, and the source tells no more of it than its identity."""
    json = msgspec.json.encode({IDENTITY: _id(number)})
    return RowChange(*_position(revision), _id(number), "", None, json, CHANGING.name, deleted=True)


HISTORY: tuple[RowChange, ...] = (
    *(_row(number, number) for number in range(1, 8)),
    _row(1, 8),
    _gone(2, 9),
    _row(10, 10, was=3),
    _gone(4, 11),
    _row(4, 12),  # there again
    _row(3, 13),  # another row has that identity now
    _gone(20, 14),  # it never was there
    _row(5, 15),
    _row(5, 16),
    _row(11, 17, was=6),
    _gone(11, 18),
    _row(12, 19, was=1),
    _row(1, 20, was=12),
    _row(21, 21),
    _gone(21, 22),
)
"""In the order of the stream; each row has a key of its own."""


def there(changes: Iterable[Event]) -> list[Event]:
    """The rows that are there after them, in whichever order they came."""
    last: dict[Id, Event] = {}
    for change in unfolded(changes, IDENTITY):
        if change.id not in last or last[change.id].version <= change.version:
            last[change.id] = change
    return [change for change in last.values() if not change.deleted]


def followed(destination: Destination) -> Destination:
    """The same, of a stream whose rows change."""
    if not destination.sink().takes_any_stream:
        pytest.skip("this sink takes no stream whose rows change")
    destination.follow()
    assert destination.sink().stream is destination.stream, "`Destination.sink` makes one for another stream"
    return destination


async def write_when_up(sink: Sink, events: Sequence[Event]) -> None:
    """As a lane does: again, as long as the destination is away."""
    async with asyncio.timeout(60):
        while True:
            with suppress(SinkUnavailable):
                await sink.write(events)
                return
            await asyncio.sleep(0.05)


async def cancel_and_write_again(
    sink: Sink, events: Sequence[Event], turns: int, assert_written: Callable[[], None]
) -> None:
    """The write is cancelled after so many turns of the loop. One that returns all the same has written them."""
    write = asyncio.ensure_future(sink.write(events))
    for _ in range(turns):
        await asyncio.sleep(0)
    write.cancel()
    await asyncio.wait([write])
    if not write.cancelled():
        assert not write.result()
        assert_written()
    assert not await sink.write(events)


async def _write(sink: Sink, changes: Sequence[Event]) -> None:
    """In as few writes as it takes."""
    for at in range(0, len(changes), sink.max_events):
        assert not await sink.write(changes[at : at + sink.max_events])


@pytest.mark.asyncio
class ChangesConformance:
    """Of a sink with `takes_any_stream`; the others skip them."""

    @pytest.mark.parametrize("mode", Mode)
    async def test_changes_of_one_write(self, destination: Destination, mode: Mode) -> None:
        """A later version replaces an earlier one; what is deleted goes, as does a row under its former identity."""
        async with followed(destination).opened(mode) as sink:
            await _write(sink, HISTORY)
            destination.assert_holds(there(HISTORY))

    async def test_each_change_is_there_when_it_is_written(self, destination: Destination) -> None:
        """Each in a write of its own, with a restart now and then."""
        followed(destination)
        for start in range(0, len(HISTORY), 6):
            async with destination.opened(Mode.LIVE) as sink:
                for end in range(start, min(start + 6, len(HISTORY))):
                    assert not await sink.write([HISTORY[end]])
                    destination.assert_holds(there(HISTORY[: end + 1]))

    @pytest.mark.parametrize("mode", Mode)
    async def test_changes_that_come_again_change_nothing(self, destination: Destination, mode: Mode) -> None:
        """The same ones, after a restart that goes back, of a backfill, and single ones as of dead letters."""
        async with followed(destination).opened() as sink:
            for batch in (HISTORY[:9], HISTORY[:9], HISTORY[5:], HISTORY[5:]):
                await _write(sink, batch)
        start = SinkPosition(position=_position(30), end_lsn=_position(30).commit_lsn + 1)
        async with destination.opened(mode, start) as sink:
            for change in reversed(HISTORY):
                assert not await sink.write([change])
                destination.assert_holds(there(HISTORY))
            for batch in (HISTORY[:7], HISTORY[3:12], HISTORY):
                await _write(sink, batch)
        destination.assert_holds(there(HISTORY))

    @pytest.mark.parametrize("size", [1, 5, len(HISTORY)])
    async def test_an_earlier_version_replaces_no_later_one(self, destination: Destination, size: int) -> None:
        """In the reverse order: what is gone stays gone, though nothing of it was there when it was deleted."""
        changes = HISTORY[::-1]
        async with followed(destination).opened() as sink:
            for at in range(0, len(changes), size):
                await _write(sink, changes[at : at + size])
                destination.assert_holds(there(changes[: at + size]))

    async def test_changes_may_be_written_side_by_side(self, destination: Destination) -> None:
        """As many writes as the sink allows, and a backfill's: earlier versions, while later ones are written."""
        earlier = HISTORY[:7]
        later = [_row(number, 10 + number) if number % 2 else _gone(number, 10 + number) for number in range(1, 8)]
        async with followed(destination).opened() as sink, destination.opened(Mode.BACKFILL) as other:
            parts = [later, *[earlier] * (sink.concurrency - 1)]
            await asyncio.gather(*(write_when_up(sink, part) for part in parts), write_when_up(other, earlier))
        destination.assert_holds(there(later))

    @pytest.mark.parametrize("turns", CANCELLED_AFTER)
    async def test_a_write_of_changes_may_be_cancelled_anywhere(self, destination: Destination, turns: int) -> None:
        """The same changes are then written again."""
        written = partial(followed(destination).assert_holds, there(HISTORY[:15]))
        async with destination.opened() as sink:
            assert not await sink.write(HISTORY[:7])
            await cancel_and_write_again(sink, HISTORY[7:15], turns, written)
        written()

    async def test_a_change_that_it_can_not_hold_is_refused_alone(self, destination: Destination) -> None:
        """The others are written. A delete has no time, and is not refused for that."""
        refused = followed(destination).refused
        if refused is None:
            pytest.skip("this destination holds everything")
        async with destination.opened() as sink:
            assert not await sink.write(HISTORY[:7])
            for _ in range(2):
                refusals = await sink.write([*HISTORY[7:10], refused, *HISTORY[10:15]])
                assert [refusal.event for refusal in refusals] == [refused]
        destination.assert_holds(there(HISTORY[:15]))

    async def test_a_change_that_it_refuses_is_raised(self, destination: Destination) -> None:
        """The whole write, and the change alone; the parts without it are taken, and all of it when it is mended."""
        bad = _row(30, 23)
        refusal = followed(destination).refusal(bad)
        if refusal is None:
            pytest.skip("this destination refuses no event")
        async with destination.opened() as sink:
            assert not await sink.write(HISTORY[:7])
            with refusal:
                for changes in ([*HISTORY[7:10], bad, *HISTORY[10:15]], [bad]):
                    with pytest.raises(BatchRefused):
                        await sink.write(changes)
                for part in (HISTORY[7:10], HISTORY[10:15]):
                    assert not await sink.write(part)
            destination.assert_holds(there(HISTORY[:15]))
            assert not await sink.write([bad])
        destination.assert_holds(there([*HISTORY[:15], bad]))
