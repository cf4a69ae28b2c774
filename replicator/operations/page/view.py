"""What the page says, from the one status: a state, a sentence and its cure. `render.py` makes HTML of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from replicator.operations.status import SinkStatus, Status, span

State: TypeAlias = Literal["well", "paused", "standby", "trouble", "wrong"]
"""Its colour: green, two calm ones, amber, red. It is red exactly while there are `Status.reasons`."""

WORDS: dict[State, str] = {
    "well": "All is well",
    "paused": "Paused",
    "standby": "Standing by",
    "trouble": "Trouble has begun",
    "wrong": "Something is wrong",
}
_SENTENCE_ENDS = re.compile(r"(?<=\.)\s+(?=[A-Z`])")


class Saying(NamedTuple):
    """What is wrong, or what to know."""

    what: str
    cure: str

    @classmethod
    def of(cls, message: str) -> Saying:
        """A message's first sentence, and the others: its cure comes last."""
        what, *cure = _SENTENCE_ENDS.split(message, maxsplit=1)
        return cls(what, " ".join(cure))


class Headline(NamedTuple):
    """One colour and what it means; more than one thing may be wrong."""

    state: State
    sayings: list[Saying]

    @property
    def word(self) -> str:
        """For whoever sees no colours."""
        return WORDS[self.state]


def headline(status: Status) -> Headline:
    """What an operator has to know first."""
    if status.reasons:
        return Headline("wrong", [*map(Saying.of, status.reasons)])
    if begun := [*_begun(status)]:
        return Headline("trouble", begun)
    if status.standby:
        return Headline("standby", [Saying.of(status.standby)])
    return Headline("well", [Saying(_well(status), "")])


def _begun(status: Status) -> Iterator[Saying]:
    """Trouble that is too young to be a reason: most of it ends by itself."""
    messages = [status.slot.trouble, status.checkpoint.trouble, *(sink.trouble for sink in status.sinks.values())]
    yield from (Saying.of(message) for message in dict.fromkeys(messages) if message)


def _well(status: Status) -> str:
    letters = status.dead_letters
    kept = letters.rows + sum(letters.sinks.values()) if letters else 0
    behind = max((sink.lag_seconds or 0.0 for sink in status.sinks.values()), default=0.0)
    near = (
        "Every sink has what was committed a second ago" if behind < 1 else f"The slowest sink is {behind:.0f} s behind"
    )
    return f"{near}{f', except {kept:,} kept as dead letters' if kept else ''}."


def sink_state(sink: SinkStatus, status: Status) -> State:
    """The colour of one sink."""
    if not sink.trouble:
        return "well"
    return "wrong" if sink.trouble in status.reasons else "trouble"


def note(sink: SinkStatus) -> str:
    """The same in a word or two."""
    if not sink.trouble:
        return "well"
    return f"in trouble for {span(sink.trouble_seconds)}" if sink.trouble_seconds else "in trouble"
