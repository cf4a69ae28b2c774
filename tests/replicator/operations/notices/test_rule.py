"""What people are told: each trouble once, whatever it does all night."""

from __future__ import annotations

import random

import pytest

from replicator.operations.notices.ring import Notice, Reason
from replicator.operations.notices.rule import Message, Rule

SINK = Reason("sink", "http", "Sink http did not take the batch: it is away. Start it.", "Start it.")
STREAM = Reason("stream", "s", "PostgreSQL is not reachable: no route.")


class Night:
    """A clock, what is wrong at the moment, and what was told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.told: list[Message] = []
        self._rule = Rule("s")
        self._lasting: dict[tuple[str, str], Notice] = {}

    def passes(self, seconds: float, *wrong: Reason) -> list[str]:
        """So much time, a second at a time, while this is wrong; what was told meanwhile, in short."""
        begins = len(self.told)
        for _ in range(int(seconds)):
            self._lasting = {
                (reason.kind, reason.subject): self._lasting.get((reason.kind, reason.subject)) or self._new(reason)
                for reason in wrong
            }
            self.told += self._rule.see(self._lasting, self.now)
            self.now += 1.0
        return [f"{message.kind} {message.event}" for message in self.told[begins:]]

    def _new(self, reason: Reason) -> Notice:
        return Notice(
            kind=reason.kind, subject=reason.subject, text=reason.problem, cure=reason.cure, began_at=self.now
        )


@pytest.fixture
def night() -> Night:
    """Nothing is wrong yet."""
    return Night()


def test_each_trouble_is_told_when_it_begins_and_when_it_is_over(night: Night) -> None:
    """Once, however long it lasts."""
    assert ["sink begins"] == night.passes(7200, SINK)
    assert [] == night.passes(59)
    assert ["sink ends"] == night.passes(600)
    begins, ends = night.told
    assert "[s] Sink http did not take the batch: it is away. Start it." == begins.text
    assert "[s] over after 2 hours: Sink http did not take the batch: it is away." == ends.text
    assert ("Start it.", None) == (begins.cure, begins.ended_at)
    assert ends.ended_at is not None
    assert ends.ended_at > begins.began_at == ends.began_at


def test_what_is_back_within_a_minute_was_not_over(night: Night) -> None:
    """It is the same trouble."""
    assert ["sink begins"] == night.passes(30, SINK)
    assert [] == night.passes(50)
    assert [] == night.passes(30, SINK)
    assert ["sink ends"] == night.passes(61)


@pytest.mark.parametrize("away", [70, 130, 300, 900, 1800])
def test_one_that_comes_and_goes_all_night_makes_a_dozen_messages(night: Night, away: int) -> None:
    """Not a hundred: each time it has to stay away twice as long."""
    while night.now < 1_000_000.0 + 10 * 3600:
        night.passes(60, SINK)
        night.passes(away)
    assert 2 <= len(night.told) <= 12


def test_whatever_comes_and_goes_is_told_in_the_end(night: Night) -> None:
    """Beginnings and ends take turns, and an hour after the last trouble nothing is left open."""
    seed = random.randrange(10**9)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test has failed
    chance = random.Random(seed)  # noqa: S311
    for _ in range(60):
        night.passes(chance.choice([1, 5, 20, 100]), *chance.choice([[], [SINK], [STREAM], [SINK, STREAM]]))
    night.passes(3700)
    for kind in ("sink", "stream"):
        events = [message.event for message in night.told if message.kind == kind]
        assert ["begins", "ends"] * (len(events) // 2) == events
    night.passes(3700, SINK)
    assert "begins" == night.told[-1].event


def test_after_a_quiet_hour_it_is_as_new(night: Night) -> None:
    """An end is told after a minute again."""
    for _ in range(3):
        night.passes(60, SINK)
        night.passes(400)
    night.passes(4000)
    assert ["sink begins"] == night.passes(60, SINK)
    assert ["sink ends"] == night.passes(61)


def test_a_restart_of_postgresql_is_not_told(night: Night) -> None:
    """It is over within seconds."""
    assert [] == night.passes(9, STREAM)
    assert [] == night.passes(60)
    assert ["stream begins"] == night.passes(12, STREAM)


def test_what_follows_from_a_trouble_is_not_told_beside_it(night: Night) -> None:
    """One outage, one message; what is left when its cause is gone is told."""
    stall = Reason("stall", "s", "the slot has not moved for 61 s")
    assert ["sink begins"] == night.passes(300, SINK, stall)
    assert ["stall begins"] == night.passes(10, stall)


def test_a_text_calls_nobody(night: Night) -> None:
    """Words of a server may hold what Slack takes for a call of everybody."""
    night.passes(1, SINK._replace(text="it says <!channel> & more", cure=""))
    assert "[s] it says &lt;!channel&gt; &amp; more" == night.told[0].text
    assert "it says <!channel> & more" == night.told[0].problem
