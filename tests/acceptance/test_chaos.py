"""A short stretch of the random chaos that `make prove` runs for half an hour; see `tests/prove/chaos.py`."""

from __future__ import annotations

import random

import pytest

from tests.prove.chaos import run
from tests.prove.plan import KILLS, WEIGHTS, draw
from tests.prove.subjects import SUBJECTS

SECONDS = 10.0


@pytest.mark.parametrize("stream", SUBJECTS)
def test_chaos(stream: str) -> None:
    """Everything is killed, stalled and cut under hostile traffic: every sink exact, the rule never broken."""
    seed = random.randrange(10**6)  # noqa: S311  not a secret
    print(f"python -m tests.prove.chaos --stream {stream} --minutes 0 --seed {seed}")  # noqa: T201  shown when it fails
    result = run(0, seed, stream=stream, round_seconds=SECONDS)
    print(result.line())  # noqa: T201  as above
    assert result.kills > 0
    assert result.events > 0
    assert result.looks > 0


def test_a_seed_brings_the_plan_back() -> None:
    """The same seed, the same deeds; half an hour of them has the kills that it promises, of every victim."""
    plan = {victim: draw("7/1", victim, 1_800) for victim in WEIGHTS}
    assert plan == {victim: draw("7/1", victim, 1_800) for victim in WEIGHTS}
    assert plan != {victim: draw("7/2", victim, 1_800) for victim in WEIGHTS}
    kills = {victim: sum(strike.deed in KILLS for strike in strikes) for victim, strikes in plan.items()}
    assert min(kills.values()) > 20
    assert sum(kills.values()) > 300
