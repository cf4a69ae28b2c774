"""What people are told, and when: each trouble once when it begins and once when it is over. Pure; `notifier.py` sends.

A trouble is over when it has stayed away for a minute. Each time that it comes back within an hour of being over, it
has to stay away twice as long, an hour at most: so one that comes and goes all night makes a dozen messages, not a
hundred.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct, structs

from replicator.contracts.events import utc
from replicator.operations.notices.ring import Notice
from replicator.operations.status.text import span

PATIENCE_SECONDS = {"stream": 10.0, "slot": 10.0}
"""By kind: a restart of PostgreSQL is over sooner. The other reasons are none before they have lasted."""
AWAY_SECONDS = 60.0
LONGEST_AWAY_SECONDS = 3600.0
CAUSES = {
    "slot": {"stream"},
    "look": {"stream", "slot"},
    "tables": {"stream", "slot"},
    "checkpoint": {"stream", "slot", "tables", "database"},
    "stall": {"stream", "slot", "tables", "checkpoint", "database", "sink"},
}
"""A kind of trouble is not told while one of those lasts that bring it about."""

Key = tuple[str, str]
"""Kind and subject."""


class Message(Struct, frozen=True, kw_only=True):
    """What is sent, as JSON. Slack, and what is compatible with it, shows `text`."""

    text: str
    event: Literal["begins", "ends", "test"]
    slot: str
    kind: str
    subject: str
    code: str
    problem: str
    cure: str
    began_at: str
    ended_at: str | None = None


class _Trouble:
    """One kind of trouble of one subject."""

    def __init__(self) -> None:
        self.told = False
        self.away_seconds = AWAY_SECONDS
        self.away_since: float | None = None
        """None while it lasts."""
        self.over_at: float | None = None
        """When it was said to be over, the last time."""
        self.notice: Notice
        """Its newest."""
        self.began_at = 0.0
        """When what was told began."""


class Rule:
    """Remembers what was told."""

    def __init__(self, slot: str) -> None:
        self._slot = slot
        self._troubles: dict[Key, _Trouble] = {}

    def see(self, lasting: Mapping[Key, Notice], now: float) -> Iterator[Message]:
        """What is to be told now that these notices last; `now` is Unix time, seconds."""
        kinds = {kind for kind, _ in lasting}
        for key, notice in lasting.items():
            trouble = self._troubles.setdefault(key, _Trouble())
            trouble.notice, trouble.away_since = notice, None
            patient = now - notice.began_at < PATIENCE_SECONDS.get(notice.kind, 0.0)
            if trouble.told or patient or kinds & CAUSES.get(notice.kind, set()):
                continue
            yield self._begin(trouble, notice, now)
        for key in self._troubles.keys() - lasting.keys():
            yield from self._end(key, self._troubles[key], now)

    def _begin(self, trouble: _Trouble, notice: Notice, now: float) -> Message:
        again = trouble.over_at is not None and now - trouble.over_at < LONGEST_AWAY_SECONDS
        trouble.away_seconds = min(2 * trouble.away_seconds, LONGEST_AWAY_SECONDS) if again else AWAY_SECONDS
        trouble.told, trouble.began_at = True, notice.began_at
        return message(self._slot, notice, "begins")

    def _end(self, key: Key, trouble: _Trouble, now: float) -> Iterator[Message]:
        trouble.away_since = trouble.away_since or now
        if trouble.told and now - trouble.away_since >= trouble.away_seconds:
            trouble.told, trouble.over_at = False, now
            over = structs.replace(trouble.notice, began_at=trouble.began_at, ended_at=trouble.away_since)
            yield message(self._slot, over, "ends")
        elif not trouble.told and now - (trouble.over_at or 0.0) >= LONGEST_AWAY_SECONDS:
            del self._troubles[key]


def message(slot: str, notice: Notice, event: Literal["begins", "ends", "test"]) -> Message:
    """In words."""
    lasted = f"over after {span((notice.ended_at or 0.0) - notice.began_at)}: " if event == "ends" else ""
    words = f"[{slot}] {lasted}{notice.text}{f' {notice.cure}' if notice.cure and event != 'ends' else ''}"
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # Slack reads <!channel> as a call
        words = words.replace(character, escaped)
    return Message(
        text=words,
        event=event,
        slot=slot,
        kind=notice.kind,
        subject=notice.subject,
        code=notice.code,
        problem=notice.text,
        cure=notice.cure,
        began_at=utc(notice.began_at),
        ended_at=None if notice.ended_at is None else utc(notice.ended_at),
    )
