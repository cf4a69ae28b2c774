"""What every sink must do, as tests. `destination.py` is what they ask of a destination.

Those of rows that change are in `changes.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from replicator.contracts.errors import BatchRefused, SinkError, SinkUnavailable
from replicator.contracts.events import Position, Refusal, SinkPosition
from replicator.contracts.sink import Mode, Sink
from sinks.testing.changes import CANCELLED_AFTER, ChangesConformance, cancel_and_write_again, write_when_up
from sinks.testing.destination import SAMPLE_TEXT, Destination, sample

WRITTEN = SinkPosition(position=Position(100, 1), end_lsn=101)
"""That of the samples."""
PATIENCE_SECONDS = 10.0
"""For what takes milliseconds; the machine may be busy."""
TURNS = 20
"""So often the loop has to go on while a destination is silent, 0.01 s each: every sink has begun to wait by then."""


@pytest.mark.asyncio
class SinkConformance(ChangesConformance):
    """A subclass `Test…` has a fixture `destination`, which is empty for each test. `pytest --sink NAME` makes one."""

    @pytest.mark.parametrize("mode", Mode)
    @pytest.mark.parametrize("count", [0, 1, None], ids=["none", "one", "max_events"])
    async def test_what_is_written_is_there_exactly(
        self, destination: Destination, count: int | None, mode: Mode
    ) -> None:
        """Text, nulls and numbers, in the largest batch too; by the replicator or a backfill.

        It is there when `write` returns: PostgreSQL may forget it then.
        """
        async with destination.opened(mode) as sink:
            more = [sample(destination.stream, number) for number in range(8, sink.max_events)]
            events = [*destination.samples, *more][: sink.max_events if count is None else count]
            refusals = await sink.write(events)
            assert isinstance(refusals, Sequence), f"`write` returns the refused events, such as [], not {refusals!r}"
            assert not refusals
            destination.assert_holds(events)

    async def test_events_that_come_again_change_nothing(self, destination: Destination) -> None:
        """The same batch, overlapping ones, another cut; and from other sinks: after a restart, and of a backfill."""
        events = destination.samples
        async with destination.opened() as sink:
            for batch in (events[:6], events[:6], events[3:], *([event] for event in events)):
                assert not await sink.write(batch)
        for mode in Mode:
            async with destination.opened(mode, WRITTEN) as sink:
                assert not await sink.write(events)
        destination.assert_holds(events)

    async def test_events_of_old_positions_are_written(self, destination: Destination) -> None:
        """Backfills and replayed dead letters bring events from before the sink's own position."""
        first, second, *_ = destination.samples
        for mode, event in zip(Mode, (first, second), strict=True):
            async with destination.opened(mode, SinkPosition(position=Position(200, 1), end_lsn=201)) as sink:
                assert not await sink.write([event])
        destination.assert_holds([first, second])

    async def test_writes_may_run_side_by_side(self, destination: Destination) -> None:
        """As many as the sink allows, and those of a backfill beside the replicator."""
        events = destination.samples
        async with destination.opened() as sink, destination.opened(Mode.BACKFILL) as other:
            parts = [events[start :: sink.concurrency] for start in range(sink.concurrency)]
            await asyncio.gather(*(write_when_up(sink, part) for part in parts), write_when_up(other, events))
        destination.assert_holds(events)

    async def test_the_order_is_kept(self, destination: Destination) -> None:
        """Within a write, and from one to the next."""
        if not destination.keeps_order:
            pytest.skip("this destination has no order")
        events = destination.samples
        async with destination.opened() as sink:
            for batch in (events[:6], events[6:]):
                assert not await sink.write(batch)
        identity = destination.stream.identity.name
        assert [event[identity] for event in destination.read()] == [event.id for event in events]

    async def test_what_it_can_not_hold_is_refused_alone(self, destination: Destination) -> None:
        """The other events of the batch are written. The same write again refuses the same event."""
        events, refused = destination.samples, destination.refused
        if refused is None:
            pytest.skip("this destination holds everything")
        async with destination.opened() as sink:
            for _ in range(2):
                refusals: Sequence[Refusal] = await sink.write([*events[:5], refused, *events[5:]])
                assert [refusal.event for refusal in refusals] == [refused]
                assert all(refusal.reason for refusal in refusals)
        destination.assert_holds(events)

    async def test_what_it_refuses_is_raised(self, destination: Destination) -> None:
        """The whole write, and the event alone; the parts without it are taken, and all of it when it is mended."""
        first, bad, *others = destination.samples
        refusal = destination.refusal(bad)
        if refusal is None:
            pytest.skip("this destination refuses no event")
        async with destination.opened() as sink:
            with refusal:
                for events in (destination.samples, [bad]):
                    with pytest.raises(BatchRefused) as caught:
                        await sink.write(events)
                    assert caught.value.detail
                    _assert_told(sink, caught.value)
                for events in ([first], others):
                    assert not await sink.write(events)
            assert not await sink.write([bad])
        destination.assert_holds(destination.samples)

    @pytest.mark.parametrize("turns", CANCELLED_AFTER)
    async def test_a_write_may_be_cancelled_anywhere(self, destination: Destination, turns: int) -> None:
        """The same events are then written again."""
        written = partial(destination.assert_holds, destination.samples)
        async with destination.opened() as sink:
            await cancel_and_write_again(sink, destination.samples, turns, written)
        written()

    async def test_an_outage_is_unavailable_and_ends(self, destination: Destination) -> None:
        """The lane keeps the sink and tries the same events again. `check` names the outage and a cure."""
        events = destination.samples
        async with destination.opened() as sink:
            assert not await sink.write(events[:3])
            with destination.outage():
                for _ in range(2):
                    with pytest.raises(SinkUnavailable) as caught:
                        await sink.write(events)
                    _assert_told(sink, caught.value)
                findings = await sink.check()
                named = any(not finding.ok and finding.cure for finding in findings)
                assert named, f"`check` does not name the outage, or no cure: {findings}"
                _assert_discreet(sink, *(f"{finding.what} {finding.cure}" for finding in findings))
            await write_when_up(sink, events)
        destination.assert_holds(events)

    async def test_a_start_in_an_outage_is_unavailable_and_ends(self, destination: Destination) -> None:
        """`create` and `open` may do nothing yet, or say so, and are called again."""
        sink = destination.sink()
        with destination.outage(), suppress(SinkUnavailable):
            await sink.create()
            await sink.open()
        await sink.create()
        await sink.open()
        await write_when_up(sink, destination.samples)
        await sink.close()
        destination.assert_holds(destination.samples)

    async def test_a_silent_destination_does_not_hold_the_loop(self, destination: Destination) -> None:
        """Everything else in the program goes on while a write waits: other sinks, and the stream itself."""
        silence = destination.silence()
        if silence is None:
            pytest.skip("this destination is never silent")
        async with destination.opened() as sink:
            assert not await sink.write(destination.samples[:3])
            with ExitStack() as stack:
                stack.enter_context(silence)
                rescue = threading.Timer(PATIENCE_SECONDS, stack.close)
                rescue.start()
                write = asyncio.ensure_future(sink.write(destination.samples))
                for _ in range(TURNS):
                    await asyncio.sleep(0.01)
                held = not rescue.is_alive()
                rescue.cancel()
            assert not held, "`write` holds the event loop until the destination answers"
            with suppress(SinkUnavailable):
                await write
            await write_when_up(sink, destination.samples)
        destination.assert_holds(destination.samples)

    async def test_what_is_closed_is_released_and_may_be_opened_again(self, destination: Destination) -> None:
        """Connections, files and tasks: a pause of the sink closes it, and the end of the pause opens it."""
        sink = destination.sink()
        tasks, files = asyncio.all_tasks(), _open_files()
        for events in (destination.samples[:3], destination.samples[3:]):
            await sink.create()
            await sink.open()
            assert not await sink.write(events)
            await sink.close()
            await _until(lambda: asyncio.all_tasks() <= tasks, "a task still runs")
            await _until(lambda: _open_files() <= files, "a file or a connection is still open")
        destination.assert_holds(destination.samples)

    async def test_open_close_create_and_check_leave_no_trace(self, destination: Destination) -> None:
        """In any order, any number of times. A destination that is well has good findings only."""
        sink = destination.sink()
        await sink.close()
        async with destination.opened() as sink:
            await sink.open(WRITTEN)
            assert await sink.create() == []
            assert all(finding.ok for finding in await sink.check())
            await sink.close()
        destination.assert_holds([])


async def _until(condition: Callable[[], bool], problem: str) -> None:
    for _ in range(round(PATIENCE_SECONDS / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail(problem)


def _open_files() -> int:
    return len([*Path("/dev/fd").iterdir()])


def _assert_told(sink: Sink, error: SinkError) -> None:
    """Whose it is, and neither a secret nor the text of an event."""
    assert error.sink == sink.name, f"an error is of {error.sink!r}, not of `self.name`, here {sink.name!r}"
    _assert_discreet(sink, str(error))


def _assert_discreet(sink: Sink, *messages: str) -> None:
    """Neither a secret nor the text of an event is in them: they go to the log."""
    for text in (*_secrets(sink), SAMPLE_TEXT, SAMPLE_TEXT.splitlines()[-1].strip()):
        assert not [message for message in messages if text in message]


def _secrets(sink: Sink) -> Iterator[str]:
    """Passwords, and what is secret as a whole."""
    for _, value in sink.settings:
        if isinstance(value, SecretStr) and (text := value.get_secret_value()):
            secret = urlsplit(text).password if "://" in text else text
            if secret:
                yield secret
