"""Contents after a restart: those of the commit, whatever was committed since; against a model of random histories."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from msgspec import structs

from checkpoint_store import SqlCheckpointStore
from enrichment import EVENT, StreamEnricher, Tables
from enrichment.streams import content
from enrichment.streams.content import look_up, preload
from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Checkpoint, Event, Lsn, Position, Row
from tests.support.rows import EVENT_TABLES, columns_of, insert

Table = dict[int, tuple[str, int | None]]
"""Contents by their ids."""

FIRST: Lsn = 1_000
IDS = range(1, 9)


class Source:
    """The source database: it has the contents of today only, and counts who asks for some."""

    def __init__(self, today: Table) -> None:
        self.today = today
        self.looked_up: list[int] = []
        self.away = False

    async def rows(self, query: str, parameters: Mapping[str, Any]) -> list[tuple[int, str, int | None]]:
        """As `enrichment.database.Database`."""
        if self.away:
            raise SourceUnavailable(detail="away")
        if query == preload(EVENT_TABLES, *EVENT_TABLES.joins):
            ids = sorted((number for number in self.today if number <= parameters["highest"]), reverse=True)
            return [(number, *self.today[number]) for number in ids[: parameters["count"]]]
        assert query == look_up(EVENT_TABLES, *EVENT_TABLES.joins)
        self.looked_up += parameters["ids"]
        return [(number, *self.today[number]) for number in parameters["ids"] if number in self.today]


class Transaction(NamedTuple):
    """Its rows, and the contents that its events have by PostgreSQL's own order."""

    commit_lsn: Lsn
    rows: list[Row]
    wanted: dict[Position, tuple[str | None, int | None]]

    @property
    def end_lsn(self) -> Lsn:
        """The next commit can be there."""
        return self.commit_lsn + 10


class History:
    """Transactions with events and changes of content at random; `table` is what they have made of it."""

    def __init__(self, table: Table, chance: random.Random, transactions: int) -> None:
        self.table = table
        self._chance = chance
        self._number = 0
        self.transactions = [self._transaction(FIRST + 10 * number) for number in range(transactions)]

    def _transaction(self, commit_lsn: Lsn) -> Transaction:
        made = Transaction(commit_lsn, [], {})
        for ordinal in range(1, self._chance.randrange(1, 9)):
            row = self._event() if self._chance.random() < 0.6 else self._change()
            row.commit_lsn, row.ordinal = commit_lsn, ordinal
            made.rows.append(row)
            if row.table == "engagement_events":
                key = next(column.value for column in row.columns if column.name == "content_id")
                made.wanted[Position(commit_lsn, ordinal)] = self.table.get(key, (None, None))
        return made

    def _event(self) -> Row:
        self._number += 1
        return insert(id=self._number, content_id=self._chance.choice(IDS))

    def _change(self) -> Row:
        number, other = self._chance.choice(IDS), self._chance.choice(IDS)
        action = self._chance.choice("UUUUUDDT")
        if action == "T" and self._chance.random() < 0.3:
            self.table.clear()
            return change("T")
        value = self._chance.choice(["video", "film", "podcast"]), self._chance.choice([None, 0, 60, 300])
        if number not in self.table:
            self.table[number] = value
            return change("I", number, value)
        if action == "D":
            del self.table[number]
            return change("D", identity=number)
        renumbered = other if other not in self.table and self._chance.random() < 0.3 else number
        del self.table[number]
        self.table[renumbered] = value
        return change("U", renumbered, value, identity=number)


def change(
    action: str, number: int | None = None, value: tuple[str, int | None] = ("", 0), identity: int | None = None
) -> Row:
    """A row of the content table."""
    columns = [("content_id", number), ("content_type", value[0]), ("length_seconds", value[1])]
    return Row(
        action,
        "public",
        "content",
        columns_of(columns if number is not None else []),
        columns_of([] if identity is None else [("content_id", identity)]),
    )


def found(event: Event) -> tuple[str | None, int | None]:
    """The content that an event went out with."""
    fields = msgspec.json.decode(event.json)
    return fields["content_type"], fields["length_seconds"]


def enricher(source: Source, size: int) -> StreamEnricher:
    """A new process on that database."""
    made = StreamEnricher("", Tables(EVENT), size)
    made._contents[0]._database = made._database = source  # type: ignore[assignment]  # noqa: SLF001  no server needed
    return made


@pytest.fixture
def store(tmp_path: Path) -> SqlCheckpointStore:
    """With a first checkpoint, as the slot is made."""
    store = SqlCheckpointStore(f"sqlite:///{tmp_path}/checkpoint.db")
    store.create()
    store.save(Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=FIRST, sinks={}))
    return store


def stored(store: SqlCheckpointStore) -> Checkpoint:
    """What is on disk."""
    checkpoint = store.load("s")
    assert checkpoint is not None
    return checkpoint


async def save(store: SqlCheckpointStore, made: StreamEnricher, end_lsn: Lsn, *, heard: bool = True) -> None:
    """A checkpoint; not `heard`: the answer is lost."""
    contents, changes = made.changed(end_lsn)
    checkpoint = structs.replace(stored(store), end_lsn=end_lsn, contents=contents)
    await asyncio.to_thread(store.save, checkpoint, changes)
    if heard:
        made.saved(end_lsn)


async def compare(made: StreamEnricher, transactions: Sequence[Transaction], chance: random.Random) -> None:
    """Enrich them in pieces of any size; every event has the content of its commit."""
    rows = [row for transaction in transactions for row in transaction.rows]
    wanted = {at: value for transaction in transactions for at, value in transaction.wanted.items()}
    while rows:
        count = chance.randrange(1, 7)
        for event in (await made.enrich([structs.replace(row) for row in rows[:count]])).events:
            assert wanted[Position(event.commit_lsn, event.ordinal)] == found(event)
        del rows[:count]


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_events_have_the_content_of_their_commit(store: SqlCheckpointStore, size: int) -> None:
    """Killed anywhere, the answer of a save lost, the stream begun again: with memory for one content, or for all."""
    seed = random.randrange(2**32)  # noqa: S311  test data
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test fails
    chance = random.Random(seed)  # noqa: S311  test data
    source = Source({1: ("video", 300), 2: ("video", 120), 3: ("article", None)})
    first = enricher(source, size)
    await first.open(store, stored(store))
    await save(store, first, FIRST)
    history = History(dict(source.today), chance, 120)
    source.today = history.table  # everything that follows was committed before the first of it is read
    while (begin := stored(store)).end_lsn < history.transactions[-1].end_lsn:
        made = enricher(source, size)
        await made.open(store, begin)
        left = [transaction for transaction in history.transactions if transaction.commit_lsn >= begin.end_lsn]
        read = 0
        for _ in range(chance.randrange(1, 5)):
            more = min(len(left), read + chance.randrange(1, 12))
            await compare(made, left[read:more], chance)
            read = more
            if chance.random() < 0.6:
                done = left[chance.randrange(read)].end_lsn
                await save(store, made, max(done, stored(store).end_lsn), heard=chance.random() < 0.8)
            if chance.random() < 0.4:  # the stream breaks, and begins again after the checkpoint: sinks have all this
                again = [transaction for transaction in left[:read] if transaction.commit_lsn >= begin.end_lsn]
                for transaction in again:
                    await made.enrich([structs.replace(row) for row in transaction.rows])
    assert [] == source.looked_up
    copy = store.newest_contents("s", 2**63 - 1, 100)
    assert history.table == {number: tuple(msgspec.json.decode(text)) for number, text in copy.items()}


async def test_without_a_copy_the_contents_of_today_are_copied(store: SqlCheckpointStore) -> None:
    """An older release's checkpoint, or another table than the copy's: from here on everything is exact."""
    source = Source({number: ("video", number) for number in IDS})
    store.add_contents("s", {77: '["of another table",1]'})
    store.save(structs.replace(stored(store), contents="another table"))
    made = enricher(source, 2)
    await made.open(store, stored(store))
    assert made.changed(FIRST).contents not in (None, "another table")
    assert [7, 8] == list(made._contents[0].known)  # noqa: SLF001
    assert set(IDS) == set(store.newest_contents("s", 2**63 - 1, 100))
    await save(store, made, FIRST)
    source.today = {}
    made = enricher(source, 2)
    await made.open(store, stored(store))
    [event] = (await made.enrich([insert(content_id=3)])).events
    assert ("video", 3) == found(event)


async def test_a_copy_that_is_cut_short_is_never_used(store: SqlCheckpointStore) -> None:
    """The source goes away in the middle: the checkpoint names no copy, and the next try makes all of it."""
    source = Source({1: ("video", 1)})
    source.away = True
    made = enricher(source, 2)
    with pytest.raises(SourceUnavailable):
        await made.open(store, stored(store))
    assert made.changed(FIRST).contents is None
    source.away = False
    await made.open(store, stored(store))
    assert made.changed(FIRST).contents is not None


async def test_an_id_that_is_there_twice_does_not_end_the_copy(
    store: SqlCheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a table with inheritance children: the pages go on behind it."""
    monkeypatch.setattr(content, "PRELOAD_PAGE", 2)

    class Twice(Source):
        """Has the highest id in a child as well."""

        async def rows(self, query: str, parameters: Mapping[str, Any]) -> list[tuple[int, str, int | None]]:
            found = await super().rows(query, parameters)
            return [*found[:1], *found][: parameters["count"]]

    made = enricher(Twice({number: ("video", number) for number in IDS}), 100)
    await made.open(store, stored(store))
    assert {*IDS} == set(store.newest_contents("s", 2**63 - 1, 100)) == set(made._contents[0].known)  # noqa: SLF001


async def test_too_many_changes_are_told_and_copied_anew(
    store: SqlCheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory is bounded: the copy is given up until the checkpoint has passed them."""
    monkeypatch.setattr(content, "MOST_CHANGES", 5)
    source = Source({1: ("video", 0)})
    made = enricher(source, 10)
    await made.open(store, stored(store))
    await save(store, made, FIRST)
    rows = [structs.replace(change("U", 1, ("video", n), identity=1), commit_lsn=FIRST, ordinal=n) for n in range(1, 8)]
    await made.enrich(rows)
    assert "more than 5 changes of public.content wait for the checkpoint" in caplog.text
    await save(store, made, FIRST)
    assert stored(store).contents is None
    event = structs.replace(insert(content_id=1), commit_lsn=FIRST + 10, ordinal=1)
    assert ("video", 7) == found((await made.enrich([event])).events[0])
    assert made.changed(FIRST).contents is None
    source.today = {1: ("video", 7)}
    await save(store, made, FIRST + 10)
    await made.enrich([event])
    await save(store, made, FIRST + 20)
    assert {1: '["video",7]'} == store.newest_contents("s", 9, 9)
    assert stored(store).contents is not None


async def test_a_change_that_can_not_be_read_gives_the_copy_up(store: SqlCheckpointStore) -> None:
    """Nobody knows which content it was: the next checkpoint says that there is no copy."""
    made = enricher(Source({1: ("video", 1)}), 10)
    await made.open(store, stored(store))
    await save(store, made, FIRST)
    await made.enrich([structs.replace(change("D"), commit_lsn=FIRST, ordinal=1)])
    await save(store, made, FIRST + 10)
    assert stored(store).contents is None


@pytest.mark.parametrize("size", [1, 100])
async def test_a_copy_of_this_table_needs_every_change_after_it(store: SqlCheckpointStore, size: int) -> None:
    """The tables were looked at later than the copy was made: what came in between is still of this table."""
    first = enricher(Source({1: ("video", 1), 2: ("video", 2)}), size)
    await first.open(store, stored(store))
    await save(store, first, FIRST)
    made = enricher(Source({}), size)
    made._guard.content_untils = {"content": FIRST + 1000}  # noqa: SLF001
    await made.open(store, stored(store))
    rows = [change("I", 7, ("film", 7)), insert(content_id=7), change("U", 1, ("film", 1), identity=1)]
    assert [("film", 7), ("film", 1), ("video", 2)] == await enriched(
        made, *rows, insert(content_id=1), insert(content_id=2)
    )


@pytest.mark.parametrize("size", [1, 100])
async def test_changes_of_a_former_table_are_not_this_ones(store: SqlCheckpointStore, size: int) -> None:
    """It was copied behind a backlog of the former table's, and the process ended before it had read that."""
    source = Source({1: ("video", 1), 2: ("video", 2)})
    for _ in range(2):
        made = enricher(source, size)
        made._guard.content_untils = {"content": FIRST + 1000}  # noqa: SLF001
        await made.open(store, stored(store))
        await save(store, made, FIRST)
    rows = [change("U", 1, ("former", 9), identity=1), insert(content_id=1), change("D", identity=2)]
    assert [("video", 1), ("video", 2)] == await enriched(made, *rows, insert(content_id=2))
    assert made.changed(FIRST + 10).contents is None, "it is copied again behind the backlog"


@pytest.mark.parametrize("size", [1, 100])
async def test_events_behind_a_change_that_can_not_be_read(store: SqlCheckpointStore, size: int) -> None:
    """They have what the table has: nobody knows which content has changed."""
    source = Source({1: ("video", 1)})
    made = enricher(source, size)
    await made.open(store, stored(store))
    source.today = {1: ("film", 2)}
    rows = [insert(content_id=1), change("D"), insert(content_id=1), change("U", 1, ("film", 3), identity=1)]
    assert [("video", 1), ("film", 2), ("film", 3)] == (await enriched(made, *rows, insert(content_id=1)))


async def test_a_checkpoint_that_an_older_release_has_moved_has_no_copy(store: SqlCheckpointStore) -> None:
    """It keeps what it does not know as it is."""
    source = Source({1: ("video", 1)})
    made = enricher(source, 1)
    await made.open(store, stored(store))
    await save(store, made, FIRST)
    store.save(structs.replace(stored(store), end_lsn=FIRST + 10))
    source.today = {1: ("film", 2)}
    made = enricher(source, 1)
    await made.open(store, stored(store))
    assert [("film", 2)] == await enriched(made, insert(content_id=1))


async def enriched(made: StreamEnricher, *rows: Row) -> list[tuple[str | None, int | None]]:
    """The contents of the events of one transaction, which come in one piece."""
    rows = tuple(structs.replace(row, commit_lsn=FIRST, ordinal=n) for n, row in enumerate(rows, 1))
    return [found(event) for event in (await made.enrich(rows)).events]
