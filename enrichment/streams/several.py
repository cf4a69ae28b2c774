"""Several streams in one slot; a `contracts.enricher.Enricher` made of one for each.

A row goes to the streams that its table belongs to, and an event says which stream it is of. Each stream has a copy of
its contents; the checkpoint names them together, so they can be used all or none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import structs

from enrichment.streams.copies import Copies
from enrichment.streams.enricher import StreamEnricher
from enrichment.tables.declared import EnrichmentSettings, tables_of
from replicator.contracts import stores
from replicator.contracts.closing import close_all
from replicator.contracts.enricher import ContentChanges, Enriched, Enricher, History, Page, Shortcut, Tell
from replicator.contracts.errors import SourceError
from replicator.contracts.events import Checkpoint, DeadLetter, Event, Finding, Lsn, Position, Row
from replicator.source.connection import Dsn


def create_enricher(dsn: Dsn, settings: EnrichmentSettings) -> Enricher:
    """The enricher of these streams for the database at `dsn`."""
    made = [StreamEnricher(dsn, tables, settings.content_cache_size) for tables in tables_of(settings)]
    return SeveralStreams(made) if len(made) > 1 else made[0]


class SeveralStreams:
    """What each of these makes of the slot."""

    def __init__(self, streams: Sequence[StreamEnricher]) -> None:
        self._streams = {stream.name: stream for stream in streams}
        self._done: tuple[list[Position], dict[str, Enriched]] = ([], {})
        """What some of the streams made of rows that have to be given again."""

    @property
    def tables(self) -> Sequence[tuple[str, str]]:
        return list(dict.fromkeys(table for stream in self._streams.values() for table in stream.tables))

    @property
    def ignored(self) -> Mapping[str, int]:
        return sum((stream.ignored for stream in self._streams.values()), Counter[str]())

    async def fit(self) -> None:
        for stream in self._streams.values():
            await stream.fit()

    async def look(self, record: str | None, after: Lsn, tell: Tell | None = None) -> History | None:
        found: dict[str, History | None] = {}
        failed: list[SourceError] = []
        for name, stream in self._streams.items():
            try:
                found[name] = await stream.look(record, after, tell)
            except SourceError as exc:  # the others look all the same: the record is of all of them
                failed.append(exc)
        if failed:
            raise failed[0]
        missed = {name: history for name, history in found.items() if history is not None}
        return MissedHistories(missed) if missed else None

    async def open(self, store: stores.Contents | None = None, checkpoint: Checkpoint | None = None) -> None:
        self._done = ([], {})
        copies = Copies.of(checkpoint)
        usable = copies.name == self._contents_name
        for stream_name, stream in self._streams.items():
            theirs = checkpoint
            if checkpoint is not None:
                contents = str(copies._replace(name=stream.contents_name)) if usable else None
                slot = f"{checkpoint.slot}/{stream_name}"
                theirs = structs.replace(checkpoint, slot=slot, contents=contents)
            await stream.open(store, theirs)

    @property
    def _contents_name(self) -> str:
        names = " ".join(f"{name} {stream.contents_name}" for name, stream in self._streams.items())
        return hashlib.sha256(names.encode()).hexdigest()[:24]

    def changed(self, before: Lsn) -> ContentChanges:
        """The changes of those that are copied, in any case: a copy that misses some is none."""
        changes = [
            change._replace(copy=f"{name}/{change.copy}" if change.copy else name)
            for name, stream in self._streams.items()
            for change in stream.changes(before)
        ]
        theirs = [(stream.copies(before), stream.contents_name) for stream in self._streams.values()]
        if any(copies.name != name for copies, name in theirs):
            return ContentChanges(None, changes)
        until = max(copies.until for copies, _ in theirs)
        return ContentChanges(str(Copies(self._contents_name, until, before)), changes)

    def saved(self, end_lsn: Lsn) -> None:
        for stream in self._streams.values():
            stream.saved(end_lsn)

    async def verify(self) -> Lsn:
        return min([await stream.verify() for stream in self._streams.values()])

    def accept(self) -> None:
        for stream in self._streams.values():
            stream.accept()

    def record(self) -> str:
        records = {name: record for name, stream in self._streams.items() if (record := stream.record())}
        return msgspec.json.encode(records).decode() if records else ""

    def shortcut(self) -> Shortcut | None:
        """None where a row means something to several: only `enrich` gives it to each."""
        if self._shared_tables():
            return None
        known = [shortcut for stream in self._streams.values() if (shortcut := stream.shortcut())]

        def first(payload: memoryview | bytes, commit_lsn: Lsn, ordinal: int) -> Event | None:
            for shortcut in known:
                if event := shortcut(payload, commit_lsn, ordinal):
                    return event
            return None

        return first if known else None

    def _shared_tables(self) -> bool:
        streams = self._streams.values()
        return any(
            not one.event_tables.isdisjoint(other.tables) for one in streams for other in streams if one is not other
        )

    async def enrich(self, rows: Sequence[Row], before: Sequence[Event] = ()) -> Enriched:
        positions = [Position(row.commit_lsn, row.ordinal) for row in rows]
        if self._done[0] != positions:
            self._done = (positions, {})
        for name, theirs in self._shares(rows).items():
            if name not in self._done[1]:  # a later one may not be able to look something up: then all come again
                earlier = [event for event in before if event.stream == name]
                self._done[1][name] = await self._streams[name].enrich(theirs, earlier)
        made, self._done = self._done[1].values(), ([], {})
        return Enriched([event for one in made for event in one.events], [row for one in made for row in one.refused])

    def _shares(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """By stream, in their order. What belongs to none of them the first one refuses."""
        shares: dict[str, list[Row]] = {name: [] for name in self._streams}
        first = next(iter(self._streams))
        for row in rows:
            names = [name for name, stream in self._streams.items() if stream.knows(row)] or [first]
            for name in names:  # each may change what it is given
                own = row if len(names) == 1 else structs.replace(row, columns=[*row.columns], identity=[*row.identity])
                shares[name].append(own)
        return shares

    async def restore(self, letters: Sequence[DeadLetter]) -> Enriched:
        events: list[Event] = []
        refused: list[DeadLetter] = []
        for letter in letters:
            for name in self._of(letter):
                again = await self._streams[name].restore([letter])
                events += again.events
                refused += again.refused
        return Enriched(events, refused)

    def _of(self, letter: DeadLetter) -> list[str]:
        """Of a row that means something to several nobody knows which of them refused it."""
        if letter.sink is not None:
            return [letter.sink.rpartition("/")[2]]
        return [name for name, stream in self._streams.items() if stream.made(letter)] or [*self._streams][:1]

    async def history(self, emptied: Sequence[str] = ()) -> str:
        """Of a stream whose table in a sink was made now every sink may lack them: it may be new in this slot."""
        concerned = {sink.rpartition("/")[2] for sink in emptied} or self._streams.keys()
        told = [await stream.history() for name, stream in self._streams.items() if name in concerned]
        return "\n".join(filter(None, told))

    async def origin(self) -> str:
        return await next(iter(self._streams.values())).origin()

    async def check(self) -> list[Finding]:
        return list(dict.fromkeys([finding for stream in self._streams.values() for finding in await stream.check()]))

    async def close(self) -> None:
        await close_all(*self._streams.values())


class MissedHistories:
    """What several streams have missed, one after the other. A place is a stream's name and one of its history's."""

    def __init__(self, histories: Mapping[str, History]) -> None:
        self._histories = histories
        self._names = list(histories)

    async def open(self) -> None:
        for history in self._histories.values():
            await history.open()

    async def begin(self) -> tuple[str, int]:
        place, _ = await self._histories[self._names[0]].begin()
        return f"{self._names[0]} {place}", 0

    async def read(self, place: str, after: Position, rows: int) -> Page | None:
        name, _, at = place.partition(" ")
        page = await self._histories[name].read(at, after, rows)
        if page is not None:
            return page._replace(place=f"{name} {page.place}")
        later = self._names[self._names.index(name) + 1 :]
        if not later:
            return None
        begins, _ = await self._histories[later[0]].begin()
        return Page(Enriched([], []), after, f"{later[0]} {begins}")

    async def close(self) -> None:
        await close_all(*self._histories.values())
