"""What the server says of itself: its timelines, that it shuts down, whom its commits wait for."""

from __future__ import annotations

import time

import pytest

from replicator.source.server import PATIENCE_SECONDS, Insistence, chooses, parse_history

AFTER_TWO_FAILOVERS = """\
1\t0/3000148\tno recovery target specified

# somebody's note
2\t1A/B374D848\tbefore 2026-01-08 09:12:44+00
"""


def test_where_each_earlier_timeline_was_left() -> None:
    """Reasons, empty lines and comments do not matter."""
    assert {1: 0x3000148, 2: 0x1A_B374D848} == parse_history(AFTER_TWO_FAILOVERS)
    assert {} == parse_history("")


@pytest.mark.parametrize("content", ["one\t0/1\tx", "1\tnowhere\tx"])
def test_what_is_no_history_is_an_error(content: str) -> None:
    """Nothing is taken for shared because it could not be read."""
    with pytest.raises(ValueError, match=r"one|nowhere"):
        parse_history(content)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("", False),
        ("*", True),
        ('"*"', True),
        ("standby1", False),
        ("FIRST 1 (standby1, *)", True),
        ("ANY 2 (standby1,standby2)", False),
        ('ANY 1 (standby1, "Replicator Engagement_Slot")', True),
        ('2 ("replicator engagement_slot", b)', True),
        ('"replicator engagement_slot_2", replicator, engagement_slot', False),
    ],
)
def test_commits_wait_for_whom_the_setting_names(names: str, *, chosen: bool) -> None:
    """In every form that PostgreSQL takes, in capitals or not."""
    assert chosen == chooses(names, "engagement_slot")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One number: the time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def insists(clock: list[float], pause_seconds: float, *, moves: int = 0) -> bool:
    """PostgreSQL asks so often for twice our patience, for a position that moves so far each time."""
    insistence, told = Insistence(), False
    for question in range(int(2 * PATIENCE_SECONDS / pause_seconds)):
        clock[0] += pause_seconds
        told = told or insistence.asked(100 + question * moves)
    return told


def test_a_shutdown_asks_without_a_pause(clock: list[float]) -> None:
    """Over any network that a stream is read through."""
    assert insists(clock, 0.0005)
    assert insists(clock, 0.15)


def test_what_asks_now_and_then_does_not_shut_down(clock: list[float]) -> None:
    """The server asks for a sign of life in half of wal_sender_timeout; it goes on while the position moves."""
    assert not insists(clock, 0.5)
    assert not insists(clock, 0.01, moves=8)
