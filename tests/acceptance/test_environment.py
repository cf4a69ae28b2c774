"""A short stretch of the environment matrix that `make prove` runs for 20 minutes: `tests/prove/world/rounds.py`."""

from __future__ import annotations

import pytest

from tests.prove.subjects import SUBJECTS
from tests.prove.world.rounds import deal, run
from tests.prove.world.world import FAULTS

SECONDS = 20.0
CARDS = 6
SEED = 2026
"""The same cards every time: chance is for `make prove`, which plays all of them."""


@pytest.mark.parametrize("stream", SUBJECTS)
def test_environment(stream: str) -> None:
    """Tables change, destinations answer wrong, secrets are rotated: every sink exact, no green light over a loss."""
    result = run(0, SEED, round_seconds=SECONDS, cards=CARDS, stream=stream)
    print(result.line())  # noqa: T201  as above
    assert CARDS == sum(result.faults.values())
    assert result.events > 0
    assert result.rule_looks > 0
    assert result.looks["ready"] > 0


def test_every_fault_is_dealt_before_any_comes_again() -> None:
    """The same seed, the same cards, in another order with another one."""
    rounds = range(1, len(FAULTS) // CARDS + 1)
    dealt = [card for number in rounds for card in deal(7, number, CARDS)]
    assert len(dealt) == len({card.full_name for card in dealt})
    assert deal(7, 1, CARDS) == deal(7, 1, CARDS)
    assert deal(7, 1, CARDS) != deal(8, 1, CARDS)
