"""The engagement enricher: rows in stream order to events; the `contracts.stream.Enricher`.

Three steps: `codec.py` reads the rows, `content.py` looks up what is not known, and then events are made and content
changes take effect in the order of the rows. Until the look-up has succeeded nothing has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec import structs
from pydantic import Field

from enrichment import codec
from enrichment.check import check
from enrichment.codec import DRAFT_KEY, Content, Draft, RowUnusable
from enrichment.content import Change, Contents, changes
from enrichment.contract import CONTENT, CONTENT_TABLE, EVENTS, EVENTS_TABLE, SCHEMA
from enrichment.database import Database
from replicator.contracts.errors import PROGRAM, SourceUnusable
from replicator.contracts.events import DeadLetter, Event, Finding, Row
from replicator.contracts.settings import Settings, load
from replicator.contracts.stream import Enriched
from replicator.source.connection import Dsn

HISTORY = """
-- The number of events, and the shortest range of whole seconds, end excluded, that holds them all. Events at infinity
-- and outside the years 1 to 9999 can't be backfilled.
SELECT count(*), to_char(min(event_ts) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS'),
       to_char(max(event_ts) AT TIME ZONE 'UTC' + interval '1 second', 'YYYY-MM-DD"T"HH24:MI:SS')
FROM public.engagement_events
WHERE event_ts >= '0001-01-01 00:00:00+00' AND event_ts < '9999-12-31 00:00:00+00'
"""

HISTORY_TIMEOUT_SECONDS = 600
"""It reads the whole table, once in the product's life, at some 10 million rows a second."""


class EnrichmentSettings(Settings):
    """Options of the enrichment."""

    content_cache_size: int = Field(
        100_000,  # some 200 bytes each: 20 MB; a catalog that fits is never looked up again
        ge=1,
        le=100_000_000,
        description="how many contents are kept in memory, 1 to 100000000; some 200 bytes each",
    )


def create_enricher(dsn: Dsn) -> EngagementEnricher:
    """The enricher for the database at `dsn`, with its settings from the environment. Raises SettingsError."""
    return EngagementEnricher(dsn, load(EnrichmentSettings))


class _Plan:
    """What some rows mean, before anything is changed."""

    def __init__(self) -> None:
        self.drafts: list[Draft] = []
        self.changes: list[tuple[int, Change]] = []
        """Each with the number of drafts before it."""
        self.changed: set[int] = set()
        """Ids of contents that these rows change."""
        self.wanted: set[int] = set()
        """Ids of contents to look up: an event needs them, or a row changes them and does not carry all of them."""
        self.refused: list[DeadLetter] = []
        self.ignored: Counter[str] = Counter()
        self.lost_track = False
        """A content changed and its row could not be read: what is known may be out of date."""

    def change(self, row: Row) -> None:
        """A row of the content table. Raises RowUnusable."""
        if (table := f"{row.schema}.{row.table}") != CONTENT:
            raise RowUnusable(f"{table} is not a table that events are made of")
        for change in changes(row):
            self.changes.append((len(self.drafts), change))
            if change.content_id is not None:
                self.changed.add(change.content_id)
                if change.content is None:
                    self.wanted.add(change.content_id)


class EngagementEnricher:
    """Enriches `public.engagement_events` with `public.content`."""

    tables: Sequence[str] = (CONTENT, EVENTS)

    def __init__(self, dsn: Dsn, settings: EnrichmentSettings) -> None:
        self._dsn = dsn
        self._database = Database(dsn)
        self._contents = Contents(self._database, settings.content_cache_size)
        self._reader = codec.RowReader()
        self.ignored: Counter[str] = Counter()

    async def open(self) -> None:
        await self._contents.preload()

    async def enrich(self, rows: Sequence[Row]) -> Enriched:
        plan = self._plan(rows)
        found = await self._contents.look_up(plan.wanted)
        for content_id, content in found.items():
            self._contents.known.setdefault(content_id, content)
        events = self._carry_out(plan, found)
        self.ignored.update(plan.ignored)
        if plan.lost_track:
            self._contents.known.clear()
        self._contents.trim()
        return Enriched(events, plan.refused)

    async def restore(self, letters: Sequence[DeadLetter]) -> Enriched:
        """A row is enriched with today's content."""
        events: list[Event] = []
        refused: list[DeadLetter] = []
        for letter in letters:
            try:
                if letter.stage == "row":
                    again = await self.enrich([codec.stored_row(letter)])
                    events += again.events
                    refused += again.refused
                else:
                    events.append(codec.stored_event(letter))
            except RowUnusable as exc:
                refused.append(structs.replace(letter, reason=str(exc)))
        return Enriched(events, refused)

    async def history(self) -> str:
        database = Database(self._dsn, timeout_seconds=HISTORY_TIMEOUT_SECONDS)
        try:
            [(count, start, end)] = await database.rows(HISTORY)
        except SourceUnusable as exc:
            return f"older rows could not be counted: {exc}"
        finally:
            await database.close()
        if not count:
            return ""
        message = f"{EVENTS} holds {count} rows; those from before the slot do not come through it"
        return f"{message}. To bring all of them: {PROGRAM} backfill --start {start} --end {end}"

    async def check(self) -> list[Finding]:
        return await check(self._dsn)

    async def close(self) -> None:
        await self._database.close()

    def _plan(self, rows: Sequence[Row]) -> _Plan:
        plan, read, known = _Plan(), self._reader.read, self._contents.known
        append, changed = plan.drafts.append, plan.changed
        for row in rows:
            ours = row.table == EVENTS_TABLE and row.schema == SCHEMA
            try:
                if ours and row.action == "I":
                    draft = read(row)
                    content_id = draft[DRAFT_KEY]
                    if content_id not in known and content_id not in changed:
                        plan.wanted.add(content_id)
                    append(draft)
                elif ours:
                    plan.ignored[row.action] += 1
                else:
                    plan.change(row)
            except RowUnusable as exc:
                plan.refused.append(codec.dead_letter(row, str(exc)))
                plan.lost_track |= row.table == CONTENT_TABLE
        return plan

    def _carry_out(self, plan: _Plan, found: dict[int, Content]) -> list[Event]:
        """Make the events and apply the content changes, in the order of the rows."""
        events: list[Event] = []
        done = 0
        for count, change in plan.changes:
            codec.build_events(plan.drafts[done:count], self._contents.known, events)
            self._contents.apply(change, found)
            done = count
        codec.build_events(plan.drafts[done:], self._contents.known, events)
        return events
