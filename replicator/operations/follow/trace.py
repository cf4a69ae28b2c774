"""Where is this event? In PostgreSQL, in each sink, among the dead letters; what differs, and what is on its way.

A sink that `Traces` is asked. Of another one its position tells: it has everything up to there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from replicator.contracts.enricher import Page
from replicator.contracts.errors import SinkError, SourceError
from replicator.contracts.events import DeadLetter, Event, Id, Lsn, format_lsn, parse_lsn
from replicator.contracts.fields import Stream
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Held, Sink, Traces
from replicator.contracts.stores import CheckpointStore, ask
from replicator.delivery.dead_letters import is_for
from replicator.operations.status import collect
from replicator.operations.status.form import SinkStatus

PAGE = 1_000
"""Dead letters in memory at once."""
NO_QUESTIONS = "it can't be asked"
BAD = ("dead letter", "not found", "differs")

_encode = msgspec.json.Encoder(decimal_format="number").encode

State = Literal["written", "waiting", "dead letter", "not found", "differs", "unknown"]


class Place(Struct, frozen=True, kw_only=True):
    """What became of the event at one sink."""

    state: State
    dead_letter: int | None = None
    """Its number."""
    reason: str = ""
    """Why it was refused."""
    differences: dict[str, tuple[Any, Any]] = {}
    """By field: as PostgreSQL has it, and as it is there."""
    notes: list[str] = []


class Trace(Struct, frozen=True, kw_only=True):
    """One event everywhere. docs/reference/commands.md says what each field means."""

    event_id: Id
    in_postgresql: bool
    event: Any
    """As it would be made today; None when there is none."""
    commit_lsn: str | None
    """Of the view that a sink or a dead letter has; None when nobody knows it."""
    sinks: dict[str, Place]

    @property
    def differs(self) -> bool:
        """It is not everywhere as it is in PostgreSQL, and not on its way there either."""
        states = {place.state for place in self.sinks.values()}
        return not states.isdisjoint(BAD) or (not self.in_postgresql and "written" in states)


async def follow(
    event_id: Id, page: Page | None, sinks: Sequence[Sink], settings: CoreSettings, store: CheckpointStore
) -> Trace:
    """The event of this id; `page` is what the tables have of it, read before."""
    event = page.enriched.events[0] if page and page.enriched.events else None
    # Before the sinks are asked: what one lacks that is past the event, it will not get by waiting.
    now = await collect.collect(settings, [sink.name for sink in sinks], store)
    letters = await ask(_letters, store, settings.slot, event_id)
    if any(sink.context.stream_option for sink in sinks):  # another stream may have an event of this id, too
        letters = [letter for letter in letters if any(is_for(letter, sink) for sink in sinks)]
    asked = await asyncio.gather(*(_ask(sink, event_id, event) for sink in sinks))
    known = [found.held.commit_lsn for found in asked if found.held and found.held.commit_lsn]
    known += [letter.position.commit_lsn for letter in letters if letter.position]
    row = _Row(event, page.position.commit_lsn if page and (event or page.enriched.refused) else None, known)
    places = {
        sink.name: _place(row, found, _letter_of(sink, letters), now.sinks[sink.name], sink.stream)
        for sink, found in zip(sinks, asked, strict=True)
    }
    return Trace(
        event_id=event_id,
        in_postgresql=row.before is not None,
        event=event and json.loads(event.json, parse_float=Decimal),
        commit_lsn=format_lsn(min(known)) if known else None,
        sinks=places,
    )


class _Row(NamedTuple):
    """What is known of the event before a sink is looked at."""

    event: Event | None
    before: Lsn | None
    """It was committed before this end of the WAL; None: there is no such row."""
    known: Sequence[Lsn]
    """Commits that sinks and dead letters name."""


class _Asked(NamedTuple):
    """What a sink has, or why that is not known."""

    held: Held | None
    why: str = ""


def _letters(store: CheckpointStore, slot: str, event_id: Id) -> list[DeadLetter]:
    """Those of this event, the newest last."""
    found: list[DeadLetter] = []
    after = 0
    while page := store.dead_letters(slot, after_id=after, limit=PAGE):
        after = page[-1].id or 0
        found += [letter for letter in page if letter.event_id == event_id]
    return found


def _letter_of(sink: Sink, letters: Sequence[DeadLetter]) -> DeadLetter | None:
    """The sink's own, or that of the row, which every sink lacks."""
    return next((letter for letter in reversed(letters) if is_for(letter, sink)), None)


async def _ask(sink: Sink, event_id: Id, event: Event | None) -> _Asked:
    if not isinstance(sink, Traces):
        return _Asked(None, NO_QUESTIONS)
    try:
        return _Asked(await sink.trace(event_id, event))
    except (SinkError, SourceError) as exc:
        return _Asked(None, f"it could not be asked: {exc.detail or exc.problem}")


def _place(row: _Row, asked: _Asked, letter: DeadLetter | None, at: SinkStatus, stream: Stream) -> Place:
    held = asked.held
    notes = [*(held.notes if held else ()), *filter(None, (asked.why, at.paused, at.trouble))]
    if held and held.there:
        kept = [f"dead letter {letter.id} of it is still kept"] if letter else []
        return _compared(row.event, held, stream, [*notes, *kept])
    if letter:
        return Place(state="dead letter", dead_letter=letter.id, reason=letter.reason, notes=notes)
    state = _by_position(held, at, row)
    if state != "unknown":
        notes = [f"{NO_QUESTIONS}: this follows from its position" if note == NO_QUESTIONS else note for note in notes]
    return Place(state=state, notes=notes)


def _by_position(held: Held | None, at: SinkStatus, row: _Row) -> State:
    """Of a sink that does not have it, or can't say so: is it past the event?"""
    if not row.known and row.before is None:
        return "not found" if held else "unknown"
    # A transaction ends behind its commit record, where the next one's may begin. A backfill knows an end of the WAL.
    needed = min([lsn + 1 for lsn in row.known] + ([] if row.before is None else [row.before]))
    if at.end_lsn is not None and parse_lsn(at.end_lsn) >= needed:
        return "not found" if held else "written"
    # The end of the WAL is only a bound: a sink that is behind it may have the event all the same.
    return "waiting" if held or row.known else "unknown"


def _compared(event: Event | None, held: Held, stream: Stream, notes: list[str]) -> Place:
    """Written; but does it say the same?"""
    if event is None or held.fields is None:
        return Place(state="written", notes=notes)
    wanted: dict[str, Any] = json.loads(event.json, parse_float=Decimal)
    found = held.fields
    differences = {name: (value, found.get(name)) for name, value in wanted.items() if value != found.get(name)}
    of_content = {field.name for field in stream.fields} - {field.name for field in stream.compared(with_joined=False)}
    if differences and of_content.issuperset(differences):
        return Place(state="written", notes=[*notes, f"its joined row has changed since: {_changes(differences)}"])
    return Place(state="differs" if differences else "written", differences=differences, notes=notes)


def _changes(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {shown(there)} there, {shown(now)} now" for name, (now, there) in differences.items())


def shown(value: object) -> str:
    """One value, for people."""
    return "null" if value is None else str(value)


def as_json(trace: Trace) -> str:
    """For programs."""
    return _encode(trace).decode()


def as_made(trace: Trace) -> str:
    """The event as it would be made today, as JSON for people."""
    return _encode(trace.event).decode()


def as_text(trace: Trace) -> Iterator[str]:
    """For people."""
    yield f"PostgreSQL   {'it has the row' if trace.in_postgresql else 'it has no such row: deleted, or never there'}"
    if trace.commit_lsn:
        yield f"  commit     {trace.commit_lsn}"
    if trace.event:
        yield f"  event      {as_made(trace)}"
    for name, place in trace.sinks.items():
        refused = f" {place.dead_letter} because {place.reason}" if place.dead_letter else ""
        yield f"{name:<12} {place.state}{refused}"
        for field, (wanted, found) in place.differences.items():
            yield f"  ! {field}: {shown(found)} there, {shown(wanted)} in PostgreSQL"
        yield from (f"    {note}" for note in place.notes)
