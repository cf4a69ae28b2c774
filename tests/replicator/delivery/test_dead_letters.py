"""Why events were refused, as the page shows it: told apart up to a bound, and without row values."""

from __future__ import annotations

from collections.abc import Sequence

from replicator.contracts.events import DeadLetter, LetterCounts, Position
from replicator.contracts.settings import CoreSettings
from replicator.delivery.dead_letters import REASONS, DeadLetters


class FakeStore:
    """Keeps nothing."""

    def add_dead_letters(self, _slot: str, letters: Sequence[DeadLetter], _most: int | None = None) -> LetterCounts:
        """How many there would be."""
        return LetterCounts(sinks={"http": len(letters)})


def _letter(sink: str | None, reason: str) -> DeadLetter:
    return DeadLetter(sink=sink, position=Position(1, 1), event_id=1, reason=reason, payload=b"{}")


async def test_reasons_are_counted_without_row_values() -> None:
    """A letter's own reason may quote the event; what the log says does not. Rows have no sink."""
    letters = DeadLetters(FakeStore(), CoreSettings.model_validate({}))  # type: ignore[arg-type]  # as much of one as it needs
    await letters.keep([_letter("http", "422: device is <script>")] * 3, ["answered 422"] * 3)
    await letters.keep([_letter(None, "event_ts is no time")])
    assert {"http": {"answered 422": 3}, "": {"event_ts is no time": 1}} == letters.reasons


async def test_reasons_have_a_bound() -> None:
    """A destination may word each refusal differently."""
    letters = DeadLetters(FakeStore(), CoreSettings.model_validate({}))  # type: ignore[arg-type]  # likewise
    for number in range(100):
        await letters.keep([_letter("http", "no")], [f"refused, number {number}"])
    reasons = letters.reasons["http"]
    assert (REASONS + 1, 100) == (len(reasons), reasons.total())
    assert 100 - REASONS == reasons["other reasons"]
