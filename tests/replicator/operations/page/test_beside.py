"""Questions that the page asks of others: one at a time for all who look, and an answer that hangs holds up nothing."""

from __future__ import annotations

import asyncio

import pytest

from replicator.contracts.errors import SinkUnavailable
from replicator.operations.page import beside
from replicator.operations.page.beside import Asked


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(beside, "FIRST_SECONDS", 0.05)


async def test_an_answer_that_hangs_is_waited_for_once() -> None:
    """Whoever looks meanwhile starts no other question, and gets the page without the answer."""
    asked = 0
    answer = asyncio.Event()

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await answer.wait()
        return 7

    question = Asked(ask)
    async with asyncio.timeout(5):
        for _ in range(3):
            question.renew()
            await question.settle()
        assert (1, None, "") == (asked, question.value, question.trouble)
        answer.set()
        await question.settle()
    assert 7 == question.value


async def test_a_failure_is_said_and_over_with_the_next_answer() -> None:
    """An error of ours in its own words; of one that nobody expected, what it is called."""
    failures: list[Exception] = [SinkUnavailable(sink="redis", detail="no answer"), ValueError("a secret")]

    async def ask() -> int:
        if failures:
            raise failures.pop(0)
        return 7

    question = Asked(ask)
    said = []
    for _ in range(3):
        question.renew()
        await question.settle()
        said.append((question.value, question.trouble))
    assert "no answer" in said[0][1]
    assert [(None, "It can't be asked (ValueError)."), (7, "")] == said[1:]


async def test_nobody_waits_for_it_after_the_end() -> None:
    """The question is given up."""
    question = Asked(asyncio.Event().wait)
    question.renew()
    await question.settle()
    question.stop()
    async with asyncio.timeout(5):
        await question.settle()
    assert question.value is None
