"""What the page says, from the one status: a state, a sentence and its cure. `render.py` makes HTML of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from replicator.operations.notices.ring import Reason
from replicator.operations.status.form import SinkStatus, Status
from replicator.operations.status.text import span, until
from replicator.operations.watchdog import BEGINNING, Watchdog

State: TypeAlias = Literal["well", "starting", "paused", "standby", "trouble", "wrong"]
"""Its colour: green, three calm ones, amber, red. It is red while there are `Status.reasons`, but for a start."""

WORDS: dict[State, str] = {
    "well": "All is well",
    "starting": "Starting",
    "paused": "Paused",
    "standby": "Standby",
    "trouble": "Warning",
    "wrong": "Something is wrong",
}


class Headline(NamedTuple):
    """One colour and what it means. More than one thing may be wrong."""

    state: State
    reasons: Sequence[Reason]
    """What is wrong, or what there is to know, each with its cure."""

    @property
    def word(self) -> str:
        """For whoever sees no colours."""
        return WORDS[self.state]


def headline(watchdog: Watchdog, status: Status) -> Headline:
    """What an operator has to know first."""
    reasons = watchdog.found()
    if wrong := [reason for reason in reasons if reason.text not in BEGINNING]:
        return Headline("wrong", wrong)
    if reasons:
        return _headline("starting", "The replicator is connecting.")
    if begun := [*_begun(watchdog), *watchdog.warnings()]:
        return Headline("trouble", begun)
    if status.standby:
        return _headline("standby", status.standby)
    if pauses := watchdog.pauses():
        return _headline("paused", *pauses)
    return _headline("well", _well(status))


def _headline(state: State, *texts: str) -> Headline:
    """Where nothing is wrong."""
    return Headline(state, [Reason(state, "", text) for text in texts])


def _begun(watchdog: Watchdog) -> Iterator[Reason]:
    """Trouble that is too young to be a reason: most of it ends by itself."""
    for lane in watchdog.pipeline.fan_out.lanes:
        if lane.trouble:
            yield Reason("sink", lane.name, lane.trouble.message, lane.trouble.cure)
    letters = watchdog.pipeline.letters.trouble
    if letters:
        yield Reason("database", "", letters.message, letters.cure)


def _well(status: Status) -> str:
    letters = status.dead_letters
    kept = letters.rows + sum(letters.sinks.values()) if letters else 0
    behind = max((sink.lag_seconds or 0.0 for sink in status.sinks.values()), default=0.0)
    near = "No sink is more than a second behind" if behind < 1 else f"The slowest sink is {behind:.0f} s behind"
    return f"{near}{f', except {kept:,} kept as dead letters' if kept else ''}."


def sink_state(sink: SinkStatus, status: Status) -> State:
    """The colour of one sink."""
    if not sink.trouble:
        return "paused" if sink.paused else "well"
    return "wrong" if sink.trouble in status.reasons else "trouble"


def note(sink: SinkStatus) -> str:
    """The same in a word or two."""
    if not sink.trouble:
        return f"paused {until(sink)}" if sink.paused else "well"
    return f"in trouble for {span(sink.trouble_seconds)}" if sink.trouble_seconds else "in trouble"
