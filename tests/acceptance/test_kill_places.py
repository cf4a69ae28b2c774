"""The short form of the crash matrix that `make prove` runs in full: every place, and each shape but the largest.

What failed is brought back by the command that stands in the failure.
"""

from __future__ import annotations

import random

import pytest

from devstack import DevStack
from tests.prove.failpoints import PLACES
from tests.prove.matrix import Case, play

CASES = [f"{place}/interleaved" for place in PLACES]
CASES += ["received/single", "answered-http/ten-thousand", "answered-redis/ten-thousand", "before-save/empties"]


@pytest.mark.parametrize("name", CASES)
def test_killed_at(stack: DevStack, name: str) -> None:
    """SIGKILL at a named place; after a restart every field of every event is in every sink, as often as allowed."""
    case = Case.named(name, random.randrange(10**6))  # noqa: S311  not a secret
    outcome = play(stack, case)
    assert outcome.good, f"{case.again}: {outcome}"
