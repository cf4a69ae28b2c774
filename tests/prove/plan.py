"""What chaos does to whom, and when, drawn from a seed alone so that it can be repeated. `chaos.py` does it.

Each victim has its own time line; they overlap at random.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

Victim: TypeAlias = Literal["replicator", "postgres", "clickhouse", "redis", "api"]
Deed: TypeAlias = Literal[
    # to a process
    "kill", "pause", "stop", "take over", "take over from a paused one",
    # to the network in front of it; see devstack.proxy
    "down", "reset", "stalled", "mute", "no answers", "slow",
    # only our own servers can do this
    "errors", "lost answers",
]  # fmt: skip

WEIGHTS: Mapping[Victim, Mapping[Deed, int]] = {
    "replicator": {"kill": 12, "pause": 2, "stop": 2, "take over": 2, "take over from a paused one": 1},
    "postgres": {"kill": 6, "reset": 2, "down": 1, "stalled": 2, "mute": 2, "slow": 1},
    "clickhouse": {"kill": 5, "pause": 1, "no answers": 2, "reset": 1, "stalled": 1, "errors": 1, "lost answers": 2},
    "redis": {"kill": 5, "pause": 1, "no answers": 3, "reset": 2, "down": 1, "mute": 1, "slow": 1},
    "api": {"kill": 5, "pause": 1, "no answers": 3, "down": 1, "stalled": 1, "errors": 2, "lost answers": 2},
}
EVERY_SECONDS: Mapping[Victim, float] = {
    "replicator": 3.0,
    "postgres": 7.0,
    "clickhouse": 9.0,
    "redis": 7.0,
    "api": 6.0,
}
"""Mean pause before a deed: hundreds of kills in half an hour, with time for work in between."""
KILLS: frozenset[Deed] = frozenset({"kill", "take over", "take over from a paused one"})
"""Deeds that end a process without warning."""
MOST_SECONDS = 2.5
"""How long a deed lasts at most. Real outages differ only in length."""


class Strike(NamedTuple):
    """One deed."""

    after_seconds: float
    """Since the end of the one before."""
    deed: Deed
    seconds: float
    """Until it is undone; after a kill, until the victim is restarted."""


def draw(seed: str, victim: Victim, seconds: float) -> list[Strike]:
    """Everything that happens to this victim in a round."""
    chance = random.Random(f"{seed} {victim}")  # noqa: S311  not a secret
    deeds, weights = list(WEIGHTS[victim]), list(WEIGHTS[victim].values())
    strikes: list[Strike] = []
    at = 0.0
    while True:
        strike = Strike(
            after_seconds=chance.uniform(0.2, 1.8) * EVERY_SECONDS[victim],
            deed=chance.choices(deeds, weights)[0],
            seconds=chance.choice([0.0, chance.uniform(0.0, 0.5), chance.uniform(0.5, MOST_SECONDS)]),
        )
        at += strike.after_seconds + strike.seconds
        if at > seconds:
            return strikes
        strikes.append(strike)
