"""At the end everything is closed, and a failure of one hides neither the others nor the result."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from threading import Event

import pytest

from replicator.contracts import closing
from replicator.contracts.closing import close_all, release


class One:
    """Something to close, which may fail at it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.closed = False
        self._error = error

    async def close(self) -> None:
        """Note it, and fail."""
        self.closed = True
        if self._error:
            raise self._error


async def test_those_after_one_that_fails_are_closed() -> None:
    """And its failure is raised."""
    ones = One(), One(OSError("no")), One()
    with pytest.raises(OSError, match="no"):
        await close_all(*ones)
    assert all(one.closed for one in ones)


ODD = OSError("hunter2"), SystemExit(3), asyncio.CancelledError("hunter2")


@pytest.mark.parametrize("error", ODD, ids=repr)
async def test_whatever_a_sink_raises_is_a_line(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """It has the sink, the type and a code, and not the words."""
    other = One()
    await release({"sink lines": One(error).close, "the other": other.close})
    assert other.closed
    [record] = caplog.records
    assert f"sink lines could not be closed ({type(error).__name__})" == record.getMessage()
    assert ("R520", "lines") == (record.__dict__["code"], record.__dict__["sink"])


async def test_one_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After a while, and the others do not wait for it."""
    monkeypatch.setattr(closing, "CLOSE_SECONDS", 0.05)
    ended = asyncio.Event()

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await release({"sink lines": hangs})
    await ended.wait()
    assert ["sink lines could not be closed (it has not ended within 0 s)"] == caplog.messages


async def test_a_sink_that_has_no_coroutine_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Its author has no type checker."""
    await release({"sink lines": lambda: None})  # type: ignore[dict-item, return-value]  # as said
    assert ["sink lines could not be closed (TypeError)"] == caplog.messages


BLOCKS = """
import asyncio, sys, time
from replicator.contracts import closing
from replicator.cli import main
async def close():
    time.sleep(600)
async def ends():
    pass
async def work():
    await closing.release({"the other": ends, "sink lines": close})
closing.CLOSE_SECONDS = closing.GRACE_SECONDS = 0.1
print("the result")
with closing.blocking_ends(main._end):
    asyncio.run(work())
"""


def test_one_that_blocks_ends_the_program() -> None:
    """No signal would end it. What it had to say is said, and it does not look like a success."""
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True, timeout=60, check=False)
    assert (1, "the result\n") == (done.returncode, done.stdout)
    assert "sink lines can't be closed: it blocks the program, which ends" in done.stderr


async def test_one_that_blocks_ends_no_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library it waits: the program is somebody else's."""
    monkeypatch.setattr(closing, "CLOSE_SECONDS", 0.01)
    monkeypatch.setattr(closing, "GRACE_SECONDS", 0.01)
    over = Event()

    async def blocks() -> None:
        over.wait(0.2)

    await release({"sink lines": blocks})
