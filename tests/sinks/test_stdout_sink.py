"""The stdout sink on pipes and a terminal: readers that are gone, slow or easily led."""

from __future__ import annotations

import asyncio
import os
import pty
from collections.abc import Iterator

import pytest

from enrichment import EVENT
from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.events import Event
from replicator.contracts.settings import Settings
from replicator.contracts.sink import SinkContext
from sinks.stdout import sink as stdout
from sinks.stdout.sink import StdoutSink
from sinks.testing import decode

SIZE = 300_000
"""Of events: more than a pipe holds."""


def event(number: int, device: str = "web") -> Event:
    """An event of some bytes."""
    json = '{"event_id":%d,"device":"%s"}' % (number, device)  # noqa: UP031  braces
    return Event(commit_lsn=100, ordinal=number, id=number, key=1, ts_us=0, json=json.encode())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its reading and its writing end."""
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        try:
            os.close(end)
        except OSError:
            continue


async def _read(reading: int, size: int) -> bytes:
    read = b""
    while len(read) < size:
        read += await asyncio.to_thread(os.read, reading, size - len(read))
    return read


@pytest.mark.parametrize("blocking", [True, False])
async def test_more_than_the_pipe_holds_waits_for_the_reader(pipe: tuple[int, int], *, blocking: bool) -> None:
    """Whether the descriptor blocks or not."""
    reading, writing = pipe
    os.set_blocking(writing, blocking)
    large = event(1, "x" * SIZE)
    written = asyncio.ensure_future(StdoutSink(Settings(), SinkContext(EVENT), output=writing).write([large, event(2)]))
    expected = b"%s\n%s\n" % (large.json, event(2).json)
    assert expected == await _read(reading, len(expected))
    assert [] == await written


async def test_a_reader_that_is_gone_is_named(pipe: tuple[int, int]) -> None:
    """With what to do; the events are kept."""
    reading, writing = pipe
    os.close(reading)
    with pytest.raises(SinkUnavailable, match=r"its reader has ended\. Restart the replicator"):
        await StdoutSink(Settings(), SinkContext(EVENT), output=writing).write([event(1)])


async def test_a_reader_that_takes_nothing_is_named(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines stay whole: what was begun is written first when it reads again, then the events that came again."""
    monkeypatch.setattr(stdout, "WRITE_SECONDS", 0.05)
    reading, writing = pipe
    sink = StdoutSink(Settings(), SinkContext(EVENT), output=writing)
    large = event(1, "x" * SIZE)
    for _ in range(2):
        with pytest.raises(SinkUnavailable, match="its reader has taken nothing"):
            await sink.write([large])
    monkeypatch.setattr(stdout, "WRITE_SECONDS", 10)
    written = asyncio.ensure_future(sink.write([large, event(2)]))
    expected = b"%s\n%s\n%s\n" % (large.json, large.json, event(2).json)
    assert expected == await _read(reading, len(expected))
    await written


async def test_a_line_that_was_cut_off_ends(pipe: tuple[int, int]) -> None:
    """Half a line stands alone, and the event comes again whole."""
    reading, writing = pipe
    sink = StdoutSink(Settings(), SinkContext(EVENT), output=writing)
    write = asyncio.ensure_future(sink.write([event(1, "x" * SIZE)]))
    await _read(reading, 1000)
    os.close(reading)
    with pytest.raises(SinkUnavailable):
        await write
    reading, again = os.pipe()
    os.dup2(again, writing)
    os.close(again)
    await sink.write([event(2)])
    os.close(writing)
    assert b"\n%s\n" % event(2).json == os.read(reading, 1000)
    os.close(reading)


async def test_a_terminal_is_not_led_astray() -> None:
    """Rows may hold anything. It is still the same JSON."""
    reading, writing = pty.openpty()
    try:
        await StdoutSink(Settings(), SinkContext(EVENT), output=writing).write([event(1, "a\x9bb\u202ec日本")])
        line = await asyncio.to_thread(os.read, reading, 1000)
    finally:
        os.close(reading)
        os.close(writing)
    assert b"\\u009bb\\u202ec" in line
    assert {"event_id": 1, "device": "a\x9bb\u202ec日本"} == decode(line.strip())
