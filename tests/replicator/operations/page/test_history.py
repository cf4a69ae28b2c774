"""An hour of every sink: what it says, what it does not know, and what it costs."""

from __future__ import annotations

import asyncio
import tracemalloc
import types

import pytest

from replicator.operations.page import history
from replicator.operations.page.history import STEP_SECONDS, STEPS, History, Line

HOUR = STEPS * STEP_SECONDS


def test_a_step_has_its_mean_rate_and_its_largest_lag() -> None:
    """A look a second; the step that still runs is not shown."""
    line = Line()
    for second in range(31):
        line.add(1000.0 + second, 5 * second, 9.0 if second == 15 else 0.5)
    rates, lags = line.hour(1030.0)
    assert [None, 5.0, 5.0, 5.0] == rates[-4:]
    assert [None, 0.5, 9.0, 0.5] == lags[-4:]
    assert STEPS - 1 == len(rates) == len(lags)
    assert 5.0 == line.rate(1030.0)


def test_what_nobody_saw_is_not_known() -> None:
    """The process stood still for a while: the steps between are empty, the first one after has the mean."""
    line = Line()
    line.add(1000.0, 0, 0.0)
    line.add(1001.0, 10, 0.0)
    line.add(1041.0, 50, 40.0)
    rates, lags = line.hour(1050.0)
    assert [10.0, None, None, None, 1.0] == rates[-5:]
    assert [0.0, None, None, None, 40.0] == lags[-5:]
    assert line.rate(1060.0) is None


def test_an_hour_later_nothing_is_left() -> None:
    """A paused sink has no lane: its line runs out."""
    line = Line()
    for second in range(HOUR + 7):
        line.add(float(second), second, 1.0)
    assert None not in line.hour(HOUR + 10.0)[0]
    assert {None} == set(line.hour(3.0 * HOUR)[0])
    assert {None} == set(line.hour(3.0 * HOUR)[1])


def test_an_hour_of_ten_sinks_is_small() -> None:
    """Under 2 MB were asked for."""
    tracemalloc.start()
    try:
        lines = [Line() for _ in range(10)]
        for second in range(HOUR):
            for line in lines:
                line.add(float(second), second, 1.0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 500_000


async def test_it_goes_on_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lane, until it is stopped."""
    monkeypatch.setattr(history, "LOOK_SECONDS", 0.01)
    lane = types.SimpleNamespace(name="redis", stats=types.SimpleNamespace(events=0))
    fan_out = types.SimpleNamespace(every=[lane])
    watchdog = types.SimpleNamespace(pipeline=types.SimpleNamespace(fan_out=fan_out), lag_seconds=lambda _: 0.0)
    made = History(watchdog)  # type: ignore[arg-type]  # as much as it needs
    assert made.rate("redis") is None
    made.start()
    try:
        async with asyncio.timeout(5):
            while not made.rate("redis"):
                lane.stats.events += 1
                await asyncio.sleep(0.005)
    finally:
        made.stop()
    assert ["redis"] == list(made.hours())


def test_a_backlog_of_the_first_second_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is over before a look has seen the sink without it."""
    now = 1005.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lane = types.SimpleNamespace(name="redis", stats=types.SimpleNamespace(events=40_000))
    fan_out = types.SimpleNamespace(every=list[object]())
    watchdog = types.SimpleNamespace(pipeline=types.SimpleNamespace(fan_out=fan_out), lag_seconds=lambda _: 0.0)
    made = History(watchdog)  # type: ignore[arg-type]  # as much as it needs
    made.look()
    fan_out.every.append(lane)
    for now in (1006.0, 1007.0, 1008.0, 1009.0, 1010.0):  # noqa: B007  the clock reads it
        made.look()
    rates, _ = made.hours()["redis"]
    assert 10_000.0 == rates[-1], "40,000 in the 4 s of the step"
    assert 8_000.0 == made.rate("redis")
