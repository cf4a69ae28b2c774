"""What some rows of the stream mean, before anything is changed; `enricher.py` makes plans and carries them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from enrichment.events.draft import Content, Draft
from enrichment.streams.content import FORGET, Change, Contents, changes
from replicator.contracts.events import DeadLetter, Event, Id, Position, Row


class Needs:
    """What some rows need of the contents of one dimension."""

    def __init__(self, contents: Contents) -> None:
        self.join = contents.join
        self.known: Mapping[Id, Content] = contents.known
        """What need not be looked up."""
        self.changed: set[Id] = set()
        """Ids of contents that these rows change."""
        self.wanted: set[Id] = set()
        """Ids of contents that are not known and an event needs."""
        self.partial: set[Id] = set()
        """Ids of contents that a row changes without carrying all of them."""
        self.forgotten = False
        """Whether all contents that later events need are looked up, those that were known included."""
        self.lost_track = False
        """Whether a content changed, and its row could not be read or used: what is known may be out of date."""

    def note(self, change: Change) -> None:
        """The rows make this change."""
        if change == FORGET:
            self.forget()
        elif change.content_id is not None:
            self.changed.add(change.content_id)
            if change.content is None:
                self.partial.add(change.content_id)

    def forget(self) -> None:
        """What was known and what these rows have changed is not known any more."""
        self.forgotten, self.known = True, {}
        self.changed.clear()


class Plan:
    """The drafts of events, and what changes between them."""

    def __init__(self, contents: Sequence[Contents]) -> None:
        self.drafts: list[Draft] = []
        self.changes: list[tuple[int, Position, Event | tuple[int, Change]]] = []
        """Rows that are gone, and contents, with the number of their dimension; each with the number of drafts before
        it, and where its row stands."""
        self.needs = [Needs(of_one) for of_one in contents]
        self.was: dict[Position, Id] = {}
        """The former identities of rows that have another one now."""
        self.refused: list[DeadLetter] = []
        self.ignored: Counter[str] = Counter()
        self.other_shape = 0
        """Rows from before the tables became what they are; the history brings them as they are now."""

    def change(self, number: int, row: Row, *, part: bool) -> None:
        """A row of a dimension's table, or of a part of it. Raises RowUnusable."""
        needs = self.needs[number]
        for change in changes(needs.join, row, part=part):
            self.changes.append((len(self.drafts), _position(row), (number, change)))
            needs.note(change)

    def remove(self, row: Row, gone: Event) -> None:
        """An event ends."""
        self.changes.append((len(self.drafts), _position(row), gone))

    def lose_track(self, number: int, row: Row) -> None:
        """A content changed and nobody can tell to what: the events from here on need it as it is now."""
        self.needs[number].lost_track = True
        self.needs[number].forget()
        if not self.changes or self.changes[-1][-1] != (number, FORGET):  # it costs what is known
            self.changes.append((len(self.drafts), _position(row), (number, FORGET)))


def _position(row: Row) -> Position:
    return Position(row.commit_lsn, row.ordinal)
