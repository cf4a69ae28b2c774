"""The enricher of one stream: its rows in stream order to events; a `contracts.enricher.Enricher`.

Three steps: `codec.py` reads the rows, `content.py` looks up what is not known, and then events are made and content
changes take effect in the order of the rows. Until the look-up has succeeded nothing has changed. Events that
`shortcut.py` has made of ordinary inserts come before these rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar

import msgspec
from msgspec import structs

from enrichment.database import Database
from enrichment.events.codec import RowReader, codec_of, stored_row
from enrichment.events.draft import Content, Draft, RowUnusable, ShapeUnusable
from enrichment.events.shortcut import Layout, Shortcuts
from enrichment.streams.beside import older_rows, origin
from enrichment.streams.content import Contents
from enrichment.streams.copies import Copies
from enrichment.streams.plan import Needs, Plan
from enrichment.tables import fit, untold
from enrichment.tables.check import check
from enrichment.tables.declared import Join, Tables
from enrichment.tables.guard import Guard, recorded, swaps
from enrichment.tables.guard import contents as name_of
from enrichment.tables.missed import MissedHistory, as_now, complete
from replicator.contracts import stores
from replicator.contracts.closing import close_all
from replicator.contracts.enricher import ContentChanges, Enriched, History, Shortcut, Tell
from replicator.contracts.errors import SourceUnusable, TablesUnfit
from replicator.contracts.events import (
    Checkpoint,
    Column,
    ContentChange,
    DeadLetter,
    Event,
    Finding,
    Id,
    Lsn,
    Position,
    Row,
    RowChange,
)
from replicator.source.connection import Dsn

IDS_AGAIN = (
    "Ids must never be reused (as after RESTART IDENTITY): Redis takes an event with the id of another one for a"
    " repeat and does not count it. If that happens, {anew} counts what is in the table now, and nothing else"
)

TRUNCATED = "TRUNCATE: the WAL has no deletes for its rows, and {take_out}"

INCOMPLETE = (
    "some long values did not change, so they are not in the WAL, and the row is no longer in the table: sinks keep an"
    " earlier version. With REPLICA IDENTITY FULL the WAL has all values"
)

log = logging.getLogger(__name__)

T = TypeVar("T")


class StreamEnricher:
    """Enriches the rows of the stream's table with those of its dimensions."""

    def __init__(self, dsn: Dsn, tables: Tables, cache_size: int) -> None:
        """`cache_size`: the most rows of a dimension that are kept in memory."""
        self._dsn = dsn
        self._database = Database(dsn)
        self._guarding = Database(dsn)
        self._tables = tables
        self._codec = codec_of(self._tables)
        self._guard = Guard(self._guarding, self._tables)
        self._contents = [Contents(self._database, cache_size, tables, join) for join in tables.joins]
        self._shortcuts = Shortcuts(self._codec, [contents.known for contents in self._contents])
        self._shortcuts.begin(self._guard.names(self._tables.events))
        self._reader = RowReader(self._codec)
        self._skipped = 0
        self.ignored: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """The stream's."""
        return self._tables.stream.name

    @property
    def contents_name(self) -> str:
        """The name that its copies would have, as the tables are now; empty where it would have none."""
        return self._naming([contents for contents in self._contents if contents.shown])

    def _naming(self, copies: Sequence[Contents]) -> str:
        """The name of these copies, a part of it for each dimension; empty where there is none."""
        lost = "-" * self._part
        return "".join(self._named(one) if one in copies else lost for one in self._contents) if copies else ""

    def _named(self, contents: Contents) -> str:
        """One dimension's part of the name of the copies."""
        return name_of(self._tables, self._guard.shape, contents.join)[: self._part]

    @property
    def _part(self) -> int:
        """How long each part of the name is: there is room for 24 characters."""
        return 24 // max(len(self._contents), 1)

    @property
    def event_tables(self) -> set[tuple[str, str]]:
        """Those of them whose rows make events."""
        return {*self._guard.names(self._tables.events)}

    def knows(self, row: Row) -> bool:
        """Whether its table is, or was, one of the stream's."""
        return self._guard.root(row) is not None

    def made(self, letter: DeadLetter) -> bool:
        """Whether the letter is of a row of the stream's tables."""
        try:
            return self.knows(stored_row(letter))
        except RowUnusable:
            return False

    @property
    def tables(self) -> Sequence[tuple[str, str]]:
        return self._guard.tables

    async def fit(self) -> None:
        await Guard(self._guarding, self._tables).look(None, 0)

    async def look(self, record: str | None, after: Lsn, tell: Tell | None = None) -> History | None:
        before = await self._guard.look(recorded(record, self._tables), after)
        shape = self._guard.shape
        tables = self._tables
        for contents in self._contents:
            hidden = fit.hidden(tables, shape, contents.join.table)
            contents.shown = hidden is None
            if hidden:
                log.info("%s %s: it is looked up for every event", contents.join.name, hidden.what)
        self._shortcuts.begin(self._guard.names(tables.events))
        if tell and (letters := self._guard.untold()):
            await tell(letters)
            self._guard.told()
        if before is None:
            return None
        if fit.replaced(tables, before.shape, shape):
            told = IDS_AGAIN.format(anew=tables.anew)
            log.warning("%s is another table than before. %s", tables.stream.table, told, extra={"code": "R405"})
        for told in swaps(tables, before.shape, shape):
            log.warning("%s", told, extra={"code": "R406"})
        return MissedHistory.since(self._dsn, tables, before, shape)

    async def open(self, store: stores.Contents | None = None, checkpoint: Checkpoint | None = None) -> None:
        copies = Copies.of(checkpoint)
        for number, contents in enumerate(self._contents):
            name = copies.name[number * self._part : (number + 1) * self._part]
            await self._open(contents, store, checkpoint, copies.until if name == self._named(contents) else None)

    async def _open(
        self, contents: Contents, store: stores.Contents | None, checkpoint: Checkpoint | None, copied_until: Lsn | None
    ) -> None:
        """`copied_until`: from where on its copy needs changes; None: it can't be used."""
        join, usable = contents.join, copied_until is not None
        contents.until = self._guard.content_untils.get(join.table, 0) if copied_until is None else copied_until
        if not contents.shown:
            contents.forget()
            return
        if checkpoint and checkpoint.sinks and not usable:
            told = "%s is copied as it is now: events that were committed before and come now carry that"
            log.info(told, join.name)
        kept, slot = (store, checkpoint.slot) if checkpoint else (None, "")
        await self._asked(join, contents.open(kept, slot, usable=usable))

    def changed(self, before: Lsn) -> ContentChanges:
        copies = self.copies(before)
        return ContentChanges(str(copies) if copies.name else None, self.changes(before))

    def copies(self, before: Lsn) -> Copies:
        """What a checkpoint at this position says of the copies."""
        whole = [contents for contents in self._contents if contents.copied]
        return Copies(self._naming(whole), max((contents.until for contents in whole), default=0), before)

    def changes(self, before: Lsn) -> list[ContentChange]:
        """Those that such a checkpoint brings into the copies."""
        return [change for contents in self._contents if contents.copied for change in contents.changes(before)]

    def saved(self, end_lsn: Lsn) -> None:
        for contents in self._contents:
            contents.saved(end_lsn)

    async def verify(self) -> Lsn:
        return await self._guard.verify()

    def accept(self) -> None:
        self._guard.accept()

    def record(self) -> str:
        return msgspec.json.encode(self._guard.record).decode() if self._guard.record else ""

    def shortcut(self) -> Shortcut | None:
        return self._shortcuts.current if all(contents.shown for contents in self._contents) else None

    async def enrich(self, rows: Sequence[Row], before: Sequence[Event] = ()) -> Enriched:
        last = self._last_insert(rows)
        layout = Layout.of(last) if last else None
        if self._tables.renamed:
            rows = [self._renamed(row) for row in rows]
            last = self._last_insert(rows)
        events, refused = await self._enrich(rows) if rows else Enriched([], [])
        if last and layout and last.commit_lsn >= self._guard.reshaped:
            self._shortcuts.learn(layout, [column.name for column in last.columns])
        if before:
            self._guard.saw_event(before[-1].id)
        return Enriched([*before, *events], refused)

    def _last_insert(self, rows: Sequence[Row]) -> Row | None:
        inserts = (row for row in reversed(rows) if row.action == "I")
        return next((row for row in inserts if self._guard.root(row) == self._tables.events), None)

    async def _enrich(self, rows: Sequence[Row]) -> Enriched:
        gone = await self._look_again(rows) if rows[0].commit_lsn < self._guard.reshaped else set()  # in commit order
        for contents in self._contents:
            await self._asked(contents.join, contents.renew())
        plan = self._plan(rows, gone | await self._complete(rows))
        events = self._carry_out(plan, await self._look_up(plan))
        self.ignored.update(plan.ignored)
        if plan.drafts:
            self._guard.saw_event(plan.drafts[-1][self._codec.draft_id])
        self._tell(plan)
        for contents, needs in zip(self._contents, plan.needs, strict=True):
            if needs.lost_track:
                contents.lose(max(rows[-1].commit_lsn, contents.until))
            if needs.lost_track or not contents.shown:
                contents.known.clear()
            contents.trim()
        return Enriched(events, plan.refused)

    async def _look_up(self, plan: Plan) -> list[dict[Id, Content]]:
        """Make known what is wanted; the contents today of those that have to be looked up in the tables."""
        answers = [
            await self._asked(needs.join, self._found(contents, needs))
            for contents, needs in zip(self._contents, plan.needs, strict=True)
        ]
        for contents, (found, _) in zip(self._contents, answers, strict=True):
            for content_id, content in found.items():
                contents.known.setdefault(content_id, content)
        return [today for _, today in answers]

    async def _found(self, contents: Contents, needs: Needs) -> tuple[dict[Id, Content], dict[Id, Content]]:
        """Those of the moment, and those of today."""
        if contents.copied and not needs.forgotten:
            return await contents.find(needs.wanted), await contents.look_up(needs.partial)
        today = await contents.look_up(needs.wanted | needs.partial)
        return today, today

    async def _complete(self, rows: Sequence[Row]) -> set[Position]:
        """Give updates all of their columns; the positions of those whose rows are gone by now."""
        if not self._tables.stream.follows:
            return set()
        events = [row for row in rows if row.action == "U" and self._guard.root(row) == self._tables.events]
        updates = [row for row in events if self._is_followed(row)]
        return await complete(self._database, self._tables, updates) if updates else set()

    async def _look_again(self, rows: Sequence[Row]) -> set[Position]:
        """Rows from before the columns became what they are get their values from the table. Raises TablesUnfit.

        The positions of those that are gone by now, or have another identity, where a later change says so.
        """
        reshaped = self._guard.reshaped
        actions = "IU" if self._tables.stream.follows else "I"
        inserts = [row for row in rows if row.action in actions and row.commit_lsn < reshaped]
        try:
            events = [row for row in inserts if self._guard.root(row) == self._tables.events]
            gone = await as_now(self._database, self._tables, events)
        except SourceUnusable as exc:
            problem = f"{self._tables.stream.table} can't be read: {exc.detail}"
            raise TablesUnfit(problem=problem, cure=exc.cure) from exc
        return gone if self._tables.stream.deletes == "delete" else set()

    async def restore(self, letters: Sequence[DeadLetter]) -> Enriched:
        """A row is enriched with today's content."""
        events: list[Event] = []
        refused: list[DeadLetter] = []
        for letter in letters:
            try:
                if letter.stage == "row" and untold.tells(row := stored_row(letter)):
                    refused.append(letter)
                elif letter.stage == "row":
                    again = await self._enrich([row])
                    events += again.events
                    refused += again.refused
                else:
                    events.append(self._codec.stored_event(letter))
            except RowUnusable as exc:
                refused.append(structs.replace(letter, reason=str(exc)))
        return Enriched(events, refused)

    async def history(self, emptied: Sequence[str] = ()) -> str:
        return await older_rows(self._dsn, self._tables, emptied)

    async def origin(self) -> str:
        return await origin(self._dsn)

    async def check(self) -> list[Finding]:
        return await check(self._dsn, self._tables)

    async def close(self) -> None:
        await close_all(self._guarding, self._database)

    async def _asked(self, join: Join, answer: Awaitable[T]) -> T:
        """Of a dimension: that it may not be read is a state of the tables, which ends. Raises TablesUnfit."""
        try:
            return await answer
        except SourceUnusable as exc:
            raise TablesUnfit(problem=f"{join.name} can't be read: {exc.detail}", cure=exc.cure) from exc

    def _plan(self, rows: Sequence[Row], gone: set[Position]) -> Plan:
        plan, read = Plan(self._contents), self._reader.read
        append, joined = plan.drafts.append, [*zip(self._codec.draft_ons, plan.needs, strict=True)]
        schema, table, followed = self._tables.schema, self._tables.events, self._is_followed
        for row in rows:
            try:
                if (row.table != table or row.schema != schema) and not self._is_event(row, plan):
                    continue
                if row.action == "I" or (
                    row.action == "U" and followed(row) and (row.commit_lsn, row.ordinal) not in gone
                ):
                    draft = read(row)
                    if not self._codec.takes(draft):
                        self._leave_out(row, plan)
                        continue
                    if row.action == "U":
                        self._note_identity(row, draft, plan)
                    for on, needs in joined:
                        content_id = draft[on]
                        if content_id not in needs.known and content_id not in needs.changed and content_id is not None:
                            needs.wanted.add(content_id)
                    append(draft)
                else:
                    self._drop(row, plan)
            except RowUnusable as exc:
                self._refuse(row, exc, plan)
        return plan

    def _leave_out(self, row: Row, plan: Plan) -> None:
        """A row that the stream does not take; one that it took until now is gone."""
        if row.action == "U":
            self._remove(row, plan)
        else:
            plan.ignored[row.action] += 1

    def _remove(self, row: Row, plan: Plan) -> None:
        plan.remove(row, self._codec.deletion(row))

    def _drop(self, row: Row, plan: Plan) -> None:
        """A row of the events' table that makes none, but perhaps ends one. Raises RowUnusable."""
        ends = self._tables.stream.deletes == "delete"
        followed = row.action == "U" and self._is_followed(row)
        if (ends and row.action == "D") or (followed and (ends or self._is_renamed(row))):
            self._remove(row, plan)
            return
        if followed:
            raise RowUnusable(INCOMPLETE)
        plan.ignored[row.action] += 1
        self._guard.saw(row)
        if ends and row.action == "T":
            raise RowUnusable(TRUNCATED.format(take_out=self._tables.take_out))

    def _is_followed(self, row: Row) -> bool:
        """Whether an update makes an event: where updates are ignored, one by which a later delete is understood."""
        stream = self._tables.stream
        return stream.updates == "upsert" or (stream.deletes == "delete" and self._is_renamed(row))

    def _is_renamed(self, row: Row) -> bool:
        """Whether an update gives the row another identity, as far as the row tells."""
        self._codec.unquote(row.columns)
        try:
            return bool(self._codec.former(row) != self._codec.identity_in(row.columns))
        except RowUnusable:
            return False

    def _note_identity(self, row: Row, draft: Draft, plan: Plan) -> None:
        """An update may give a row another identity: under the old one it is gone."""
        old = self._codec.former(row)
        if old != draft[self._codec.draft_id]:
            plan.was[Position(row.commit_lsn, row.ordinal)] = old

    def _renamed(self, row: Row) -> Row:
        """The row with the names that we know its columns by; the given one stays, as it may be given again."""
        names = {theirs: ours for ours, theirs in self._tables.renamed.get(self._guard.root(row) or "", {}).items()}
        return structs.replace(row, columns=_named(row.columns, names), identity=_named(row.identity, names))

    def _is_event(self, row: Row, plan: Plan) -> bool:
        """Whether a row is of a part of the events' table; from here on it is the table's. Raises RowUnusable."""
        self._guard.saw(row)
        root = self._guard.root(row)
        if root is None:
            raise RowUnusable(f"{row.schema}.{row.table} is not a table that events are made of")
        if root:
            row.schema, _, row.table = self._tables.named_in_schema(root).partition(".")
        for join in self._tables.joins_of(root):
            if row.commit_lsn > self._contents[join.number].until:
                plan.change(join.number, row, part=self._guard.shape.parted(join.table))
            else:
                plan.lose_track(join.number, row)
        return root == self._tables.events

    def _refuse(self, row: Row, exc: RowUnusable, plan: Plan) -> None:
        if isinstance(exc, ShapeUnusable) and row.commit_lsn <= self._guard.until:
            plan.other_shape += 1
            if row.action == "I" or self._codec.tells(row):
                return
            # What is gone no history brings. One letter for all: it says the same each time.
            row = Row("D", row.schema, row.table, [], [], self._guard.until, 1)
            exc = RowUnusable(untold.BY_COLUMN.format(take_out=self._tables.take_out))
        plan.refused.append(self._codec.dead_letter(row, str(exc)))
        for join in self._tables.joins_of(row.table):
            plan.lose_track(join.number, row)

    def _tell(self, plan: Plan) -> None:
        if plan.other_shape and not self._skipped:
            log.info("rows from before the change of %s come as they are in the table now", self._tables.stream.table)
        self._skipped += plan.other_shape
        if plan.ignored["T"] and self._tables.stream.deletes == "ignore":
            told = IDS_AGAIN.format(anew=self._tables.anew)
            log.warning("%s was truncated. %s", self._tables.stream.table, told, extra={"code": "R407"})

    def _carry_out(self, plan: Plan, today: Sequence[Mapping[Id, Content]]) -> list[Event]:
        """Make the events and apply the content changes, in the order of the rows."""
        events: list[Event] = []
        done = 0
        known = [contents.known for contents in self._contents]
        for count, at, change in plan.changes:
            plan.refused += self._codec.build(plan.drafts[done:count], known, events, plan.was)
            if isinstance(change, Event):
                events.append(change)
            else:
                number, content = change
                self._contents[number].apply(content, today[number], at)
            done = count
        plan.refused += self._codec.build(plan.drafts[done:], known, events, plan.was)
        for event in events if plan.was else ():
            if isinstance(event, RowChange):
                event.was = plan.was.get(Position(event.commit_lsn, event.ordinal))
        return events


def _named(columns: Sequence[Column], names: dict[str, str]) -> list[Column]:
    """All at once, as names may be swapped. In a row from before a column was renamed, it has our name already."""
    ours = {names[column.name] for column in columns if column.name in names}
    known = {name: f"other {name}" for name in ours} | names  # other: a column that events are not made of
    return [Column(known.get(column.name, column.name), column.value) for column in columns]
