"""`dead-letters list|replay|drop`: what a sink, or the enrichment, refused for good."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer
from msgspec import structs

from replicator.cli.arguments import Json, Yes, confirmed, count, duration, letter_id, load_app, one_sink
from replicator.contracts.errors import CheckpointError, SettingsError, command
from replicator.contracts.events import DeadLetter, Position, Stage, counted, utc
from replicator.contracts.stores import ask
from replicator.operations.logs import printable

if TYPE_CHECKING:
    from replicator.app import App
    from replicator.contracts.enricher import Enricher
    from replicator.contracts.sink import Sink

PAGE = 500
"""Dead letters in memory at once."""

SinkName: TypeAlias = Annotated[str | None, typer.Option("--sink", metavar="NAME", help="the name of one sink")]
StageName: TypeAlias = Annotated[
    Literal["row", "event"] | None,
    typer.Option("--stage", help="`row`: the row could not be made into an event; `event`: a sink refused the event"),
]
Ids: TypeAlias = Annotated[
    list[int] | None,
    typer.Option("--id", parser=letter_id, metavar="N", help="the number of a dead letter; can be repeated"),
]
Where: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="FIELD=VALUE", help="FIELD=VALUE, such as user_id=42; can be repeated: all hold"),
]
Limit: TypeAlias = Annotated[int | None, typer.Option(parser=count, metavar="N", help="the most to show, 1 to 1000000")]
Since: TypeAlias = Annotated[
    timedelta | None,
    typer.Option(
        "--last",
        parser=duration,
        metavar="SPAN",
        help="the time in which they were refused, until now, such as 30m or 1d",
    ),
]


class _Chosen:
    """The dead letters that the arguments choose. Raises SettingsError for an unknown sink."""

    def __init__(
        self,
        sink: str | None,
        stage: Stage | None,
        ids: Sequence[int] | None,
        where: Sequence[str] | None,
        last: timedelta | None = None,
    ) -> None:
        from sinks import known_sinks

        self.app = load_app()
        self.found: set[int | None] = set()
        self._excluded: set[int | None] = set()  # by conditions, though their numbers were given
        self._looked_at = 0
        self._fields: set[str] = set()  # that letters have
        # Of several streams, each has its own: redis/orders.
        several = any(one.context.stream_option for one in self.app.sinks)
        self._known = self.app.settings.sinks if several else known_sinks()
        self._sink = sink
        self._stage = stage
        self._ids = ids or []
        self._where = [_condition(text) for text in where or ()]
        self._since = time.time() - last.total_seconds() if last else 0.0

    async def pages(self) -> AsyncIterator[list[DeadLetter]]:
        """Oldest first. Raises SettingsError at the end for a condition on a field that there is not: none had it."""
        after, slot = 0, self.app.settings.slot
        await self._refuse_unknown_sink()
        fetch = partial(self.app.store.dead_letters, slot, sink=self._sink, stage=self._stage, limit=PAGE)
        while page := await ask(partial(fetch, after_id=after)):
            after = page[-1].id or 0
            self._looked_at += len(page)
            if chosen := [letter for letter in page if self._has(letter)]:
                self.found.update(letter.id for letter in chosen)
                yield chosen
        self._refuse_unknown_fields()

    async def _refuse_unknown_sink(self) -> None:
        """One that has letters is known, under a former name, too."""
        if self._sink is not None and self._sink not in self._known:
            kept: Iterable[str] = ()
            with suppress(CheckpointError):
                kept = (await ask(self.app.store.count_dead_letters, self.app.settings.slot)).sinks
            one_sink(self._sink, dict.fromkeys([*self._known, *kept]))

    def _refuse_unknown_fields(self) -> None:
        """A misspelt name would look as if there were no such letters."""
        known = [*dict.fromkeys(field.name for tables in self.app.streams for field in tables.stream.fields)]
        for field, _ in self._where:
            if field not in self._fields.union(known):
                close = get_close_matches(field, known, n=1)
                expected = f"one of {', '.join(known)}, or a column of a refused row, then = and the value"
                raise SettingsError(
                    name="--where",
                    problem=f"no dead letter has a field {field!r}",
                    expected=f"{expected}; perhaps you mean {close[0]}" if close else expected,
                )

    def _has(self, letter: DeadLetter) -> bool:
        if self._ids and letter.id not in self._ids:
            return False
        if not self._fits(letter):
            self._excluded.add(letter.id)
            return False
        return True

    def _fits(self, letter: DeadLetter) -> bool:
        if letter.created_at < self._since:
            return False
        try:
            values = _values(letter, self.app) if self._where else {}
        except (ValueError, KeyError, TypeError):  # none that this release has written
            print(f"dead letter {letter.id} can't be searched: look at it with --id {letter.id}", file=sys.stderr)
            return False
        self._fields.update(values)
        return all(str(values.get(field)) == value for field, value in self._where)

    async def drop(self, ids: Sequence[int | None]) -> int:
        """How many of these there were."""
        numbers = [number for number in ids if number is not None]
        return await asyncio.to_thread(self.app.store.drop_dead_letters, self.app.settings.slot, numbers)

    def report_absent(self) -> int:
        """Say which numbers are not there; the exit code."""
        of_sink = f" of sink {self._sink}" if self._sink else ""
        absent = sorted(set(self._ids).difference(self.found))
        for number in absent:
            excluded = f"dead letter {number}{of_sink} is there, but does not fit the other options"
            missing = f"there is no dead letter {number}{of_sink}"
            print(excluded if number in self._excluded else missing, file=sys.stderr)
        if not self.found and not absent:
            none = f"none of {counted(self._looked_at, 'dead letter')}{of_sink} matches" if self._looked_at else None
            print(none or f"no dead letters{of_sink}", file=sys.stderr)
        return int(bool(absent))


def _condition(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise SettingsError(name="--where", problem=f"{text!r} has no =", expected="FIELD=VALUE, such as user_id=42")
    return field, value


def _values(letter: DeadLetter, app: App) -> dict[str, Any]:
    """Of the event, or of the row: by its columns' names in the table, and by the event's."""
    found = json.loads(letter.payload)
    if letter.stage == "event":
        return dict(found)
    row = {column["name"]: column.get("value") for column in found["columns"]}
    theirs = [(field.name, tables.named(tables.events, field.column)) for tables in app.streams for field in tables.own]
    return row | {ours: row[column] for ours, column in theirs if column in row}


async def show(
    sink: SinkName = None,
    stage: StageName = None,
    ids: Ids = None,
    where: Where = None,
    last: Since = None,
    limit: Limit = None,
    summary: Annotated[bool, typer.Option("--summary", help="count them by reason instead")] = False,
    as_json: Json = False,
) -> int:
    """Show dead letters, each with its reason and payload.

    The oldest comes first.
    """
    chosen = _Chosen(sink, stage, ids, where, last)
    async with chosen.app.closing():
        if summary:
            await _summarize(chosen, as_json=as_json)
        else:
            await _list(chosen, limit, as_json=as_json)
    return chosen.report_absent()


async def _list(chosen: _Chosen, limit: int | None, *, as_json: bool) -> None:
    letters: list[dict[str, Any]] = []
    left = limit or sys.maxsize
    async for page in chosen.pages():
        forms = [_form(letter) for letter in page[:left]]
        left -= len(forms)
        if as_json:
            letters += forms
        elif forms:
            print("\n".join(map(_text, forms)))
        if not left:
            break
    if as_json:
        print(json.dumps({"dead_letters": letters}))


async def _summarize(chosen: _Chosen, *, as_json: bool) -> None:
    """How many for which reason, the most frequent first."""
    found: dict[tuple[str | None, str], dict[str, Any]] = {}
    async for page in chosen.pages():
        for letter in page:
            new = {"count": 0, "sink": letter.sink, "reason": letter.reason, "first": utc(letter.created_at)}
            line = found.setdefault((letter.sink, letter.reason), new)
            line |= {"count": line["count"] + 1, "last": utc(letter.created_at)}
    lines = sorted(found.values(), key=lambda line: line["count"], reverse=True)
    if as_json:
        print(json.dumps({"summary": lines}))
        return
    for line in lines:
        whose = line["sink"] or "every sink"
        print(f"{line['count']:>7}  {whose}  {line['first']} to {line['last']}  {printable(line['reason'])}")


def _form(letter: DeadLetter) -> dict[str, Any]:
    """The form of `--json`."""
    from replicator.delivery.dead_letters import place

    return {
        "id": letter.id,
        "created_at": utc(letter.created_at),
        "sink": letter.sink,
        "stage": letter.stage,
        "origin": letter.origin,
        "event_id": letter.event_id,
        "position": place(letter) if letter.position else None,
        "reason": letter.reason,
        "payload": letter.payload.decode(errors="replace"),
    }


def _text(form: dict[str, Any]) -> str:
    whose, where = form["sink"] or "every sink", form["position"] or form["origin"]
    head = f"{form['id']}  {form['created_at']}  {whose}  event {form['event_id']}  {where}  {form['reason']}"
    return f"{printable(head)}\n    {printable(form['payload'])}"


async def replay(sink: SinkName = None, stage: StageName = None, ids: Ids = None, where: Where = None) -> int:
    """Give dead letters to their sink again.

    It sends what the letter holds: a row that was corrected in PostgreSQL comes with a backfill. Those that the sink
    takes are dropped. The exit code is 1 if any is left.
    """
    chosen = _Chosen(sink, stage, ids, where)
    left = 0
    async with chosen.app.closing():
        await chosen.app.enricher.open()
        async for page in chosen.pages():
            kept = await _replay(chosen.app, page)
            taken = [letter.id for letter in page if letter.id not in kept]
            await chosen.drop(taken)
            print(f"{len(taken)} taken, {len(kept)} left")
            for letter in page:
                if letter.id in kept:
                    whose = f" of {letter.sink}" if letter.sink else ""
                    print(f"dead letter {letter.id}{whose} stays: {printable(kept[letter.id])}")
            left += len(kept)
    return chosen.report_absent() or int(bool(left))


async def _replay(app: App, letters: Sequence[DeadLetter]) -> dict[int | None, str]:
    """Those that are left, each with the reason; every sink that the others are for has taken them now."""
    from replicator.delivery.dead_letters import is_for

    left = {letter.id: why for letter in letters if letter.sink is not None and (why := _stays(app.sinks, letter))}
    stored = await asyncio.to_thread(app.store.load, app.settings.slot)
    # A row is every sink's: the others get it now.
    if why := next(filter(None, (_absent(app.sinks, name) for name in sorted(stored.sinks if stored else ()))), ""):
        left |= {letter.id: why for letter in letters if letter.sink is None}
    for sink in app.sinks:
        # Under its present name: by that, the enricher knows the stream.
        mine = [
            letter if letter.sink is None else structs.replace(letter, sink=sink.name)
            for letter in letters
            if letter.sink is None or (letter.id not in left and is_for(letter, sink))
        ]
        if mine:  # another sink may be down: these letters are not for it
            refused = await _give(app.enricher, sink, mine)
            positions = {letter.id: letter.replay_position for letter in mine}
            left |= {number: refused[at] for number, at in positions.items() if at in refused}
    return left


def _absent(sinks: Sequence[Sink], name: str) -> str:
    """Why none of these has, or had, this name; empty if one does."""
    if any(name in {sink.name, sink.kind, f"{sink.kind}/{sink.stream.name}"} for sink in sinks):
        return ""
    if any(name.startswith(f"{sink.kind}/") for sink in sinks):
        return f"sink {name} is of a stream that REPLICATOR_STREAM does not name: name it, too, for this command"
    return f"sink {name} is not among REPLICATOR_SINKS"


def _stays(sinks: Sequence[Sink], letter: DeadLetter) -> str:
    """Why an event's letter can be given to none of the sinks; empty if it can."""
    from replicator.delivery.dead_letters import is_for

    if why := _absent(sinks, str(letter.sink)):
        return why
    streams = [sink.stream.name for sink in sinks if is_for(letter, sink)]
    if len(streams) == 1:
        return ""
    whose = f"may be of {' or '.join(streams)}" if streams else "has the fields of none of these"
    again = command(f"dead-letters replay --id {letter.id}")
    return f"it is from when there was one stream, and {whose}: run {again} with REPLICATOR_STREAM naming its own alone"


async def _give(enricher: Enricher, sink: Sink, letters: Sequence[DeadLetter]) -> dict[Position, str]:
    """What the sink refuses, by position, with the reason."""
    from replicator.contracts.sink import Mode
    from replicator.delivery.writer import write_once

    await sink.open(None, Mode.BACKFILL)
    restored = await enricher.restore(letters)
    refused = {letter.replay_position: letter.reason for letter in restored.refused}
    events = [event for event in restored.events if event.stream in ("", sink.stream.name)]
    for start in range(0, len(events), sink.max_events):
        for event, reason, _ in await write_once(sink, events[start : start + sink.max_events]):
            refused[Position(event.commit_lsn, event.ordinal)] = reason
    return refused


async def drop(
    sink: SinkName = None, stage: StageName = None, ids: Ids = None, where: Where = None, yes: Yes = False
) -> int:
    """Forget dead letters, after asking."""
    chosen = _Chosen(sink, stage, ids, where)
    async with chosen.app.closing():
        doomed = [letter.id async for page in chosen.pages() for letter in page]
        if doomed:
            if not confirmed(f"Forget {counted(len(doomed), 'dead letter')}?", yes=yes):
                return 1
            print(f"dropped {counted(await chosen.drop(doomed), 'dead letter')}")
    return chosen.report_absent()
