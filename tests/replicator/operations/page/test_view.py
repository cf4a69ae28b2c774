"""What the page says first, in every state: red while `/readyz` is not ready, green only for nothing at all."""

from __future__ import annotations

import time
import types

import pytest

from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.stores import Task
from replicator.delivery.retry import Trouble
from replicator.operations.notices.ring import Reason
from replicator.operations.page.beside import Running, running
from replicator.operations.page.charts import HEIGHT, chart
from replicator.operations.page.history import STEPS
from replicator.operations.page.view import headline, note, sink_state
from replicator.operations.status.form import CheckpointStatus, DeadLetterStatus, SinkStatus, SlotStatus, Status
from replicator.operations.watchdog import UNASKED

REASON = Reason("sink", "redis", "sink redis is away. Start it", "Start it")
UNKNOWN = Reason("slot", "s", UNASKED)


class Found:
    """A watchdog that has found this."""

    def __init__(
        self, *found: Reason, warnings: tuple[Reason, ...] = (), pauses: tuple[str, ...] = (), trouble: str = ""
    ) -> None:
        self.found = lambda: [*found]
        self.warnings = lambda: [*warnings]
        self.pauses = lambda: [*pauses]
        lane = types.SimpleNamespace(name="redis", trouble=Trouble())
        if trouble:
            lane.trouble.say(SinkUnavailable(sink="redis", detail=trouble))
        fan_out = types.SimpleNamespace(lanes=[lane])
        self.pipeline = types.SimpleNamespace(fan_out=fan_out, letters=types.SimpleNamespace(trouble=Trouble()))


def status(*, standby: str = "", letters: int = 0, lag: float = 0.1) -> Status:
    """Of a replicator with one sink."""
    return Status(
        reasons=[],
        standby=standby,
        replicator=None,
        slot=SlotStatus(name="s"),
        checkpoint=CheckpointStatus(),
        sinks={"redis": SinkStatus(lag_seconds=lag)},
        dead_letters=DeadLetterStatus(rows=0, sinks={"redis": letters}, limit=9),
    )


@pytest.mark.parametrize(
    ("found", "now", "state", "what", "cure"),
    [
        (Found(), status(), "well", "No sink is more than a second behind.", ""),
        (Found(), status(lag=7.2), "well", "The slowest sink is 7 s behind.", ""),
        (
            Found(),
            status(letters=1200),
            "well",
            "No sink is more than a second behind, except 1,200 kept as dead letters.",
            "",
        ),
        (Found(REASON), status(), "wrong", "sink redis is away.", "Start it"),
        (Found(REASON, pauses=("paused",)), status(standby="held"), "wrong", "sink redis is away.", "Start it"),
        (Found(UNKNOWN), status(), "starting", "The replicator is connecting.", ""),
        (Found(UNKNOWN, REASON), status(), "wrong", "sink redis is away.", "Start it"),
        (Found(warnings=(REASON,), pauses=("paused",)), status(), "trouble", "sink redis is away.", "Start it"),
        (Found(), status(standby="held by process 7"), "standby", "held by process 7", ""),
        (Found(pauses=("sink redis is paused",)), status(), "paused", "sink redis is paused", ""),
    ],
)  # fmt: skip
def test_the_first_sentence(found: Found, now: Status, state: str, what: str, cure: str) -> None:
    """Reasons come first, then what has begun, then what is meant to be so."""
    said = headline(found, now)  # type: ignore[arg-type]  # as much of one as it needs
    assert (state, what, cure) == (said.state, said.reasons[0].problem, said.reasons[0].cure)
    assert said.word


def test_trouble_that_is_no_reason_yet_is_not_green() -> None:
    """A sink may take nothing for some seconds before `/readyz` says so."""
    said = headline(Found(trouble="no answer"), status())  # type: ignore[arg-type]  # likewise
    assert "trouble" == said.state
    assert "no answer" in said.reasons[0].problem


def test_every_sink_has_a_colour_and_words() -> None:
    """The same as the headline's."""
    sinks = {
        "well": SinkStatus(),
        "paused": SinkStatus(paused="it is", paused_until="2026-01-08T10:00:00Z"),
        "trouble": SinkStatus(trouble="no answer", trouble_seconds=3.2),
        "wrong": SinkStatus(trouble="away", trouble_seconds=200.0),
    }
    now = Status(
        reasons=["away"],
        replicator=None,
        slot=SlotStatus(name="s"),
        checkpoint=CheckpointStatus(),
        sinks=sinks,
        dead_letters=None,
    )
    assert [*sinks] == [sink_state(sink, now) for sink in sinks.values()]
    words = ["well", "paused until 2026-01-08T10:00:00Z", "in trouble for 3 s", "in trouble for 3 minutes"]
    assert words == [note(sink) for sink in sinks.values()]


def test_a_line_has_steps_and_gaps() -> None:
    """Equal values are one step; what is not known is not drawn; a quiet hour is no mountain."""
    made = chart([None, 1.0, 1.0, 4.0, None, 0.0], 1.0)
    assert f"M1 {HEIGHT}V30H3V0H4V{HEIGHT}M5 {HEIGHT}V40H6V{HEIGHT}" == made.path
    assert (4.0, 6) == (made.most, made.width)
    assert f"M0 {HEIGHT}V36H1V{HEIGHT}" == chart([1.0], 10.0).path
    assert ("", 0.0) == chart([None] * 3, 1.0)[:2]


def test_a_restless_hour_is_small() -> None:
    """No two values are the same."""
    assert len(chart([step * 7919 % 10_007 * 9.7 for step in range(STEPS)], 1.0).path) < 3_500


def test_backfills_are_found_among_the_notes_of_the_stream() -> None:
    """One that moves, one that has stopped, one that nobody will go on with."""
    now, progress = time.time(), '{"place":"p","events":50,"total":200}'
    tasks = [
        Task("backfill 2026-01-08T09:00:00Z 2026-01-08T10:00:00Z http,redis", progress, now - 1),
        Task("rebuild-redis abc", progress, now - 100),
        Task("backfill a b c", progress, now - 100_000),
        Task("tables of s", "anything", now),
        Task("left out redis", '{"place":"p"}', now),
    ]
    moving, stopped = running(tasks, now)
    span = "2026-01-08T09:00:00Z to 2026-01-08T10:00:00Z"
    assert Running("backfill into http,redis", span, 50, 200, None) == moving
    assert ("rebuild-redis", "", 100, 25) == (stopped.name, stopped.span, stopped.idle, stopped.percent)
