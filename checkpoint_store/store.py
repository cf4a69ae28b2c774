"""`SqlCheckpointStore`: the four protocols of `contracts/stores.py` on any database of SQLAlchemy's.

`schema` has the tables, `database` the connection and the durability of its commits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from msgspec import structs
from sqlalchemy import Connection, RowMapping, String, Table, cast, func, literal, select
from sqlalchemy.exc import SQLAlchemyError

from checkpoint_store import contents, database, schema
from checkpoint_store.contents import pieces
from checkpoint_store.schema import checkpoints, dead_letters, sink_positions, tasks
from replicator.contracts.errors import CheckpointBackward, CheckpointLost, CheckpointUnusable, DeadLettersFull
from replicator.contracts.events import (
    Checkpoint,
    ContentChange,
    DeadLetter,
    Id,
    LetterCounts,
    Position,
    SinkPosition,
    Stage,
    format_lsn,
)
from replicator.contracts.stores import Task

MOST_OF_A_NAME = 100  # a text may be an identity, and a key has a bound


class SqlCheckpointStore:
    """Checkpoints, dead letters and progress in the database of a SQLAlchemy URL. Raises SettingsError for the URL."""

    def __init__(self, url: str, current: Callable[[], str] | None = None) -> None:
        """`current` gives the URL of the moment: its password may have been rotated."""
        self._engine = database.open_engine(url, current or (lambda: url))
        self._tables_seen = False

    def files(self) -> list[Path]:
        return database.files(self._engine.url)

    def close(self) -> None:
        self._engine.dispose()

    def create(self) -> list[str]:
        with self._connection(writes=True, creates=True) as connection:
            return schema.create(connection)

    def load(self, slot: str) -> Checkpoint | None:
        with self._connection() as connection:
            return _read(connection, slot)

    def save(
        self, checkpoint: Checkpoint, changes: Sequence[ContentChange] = (), known: Checkpoint | None = None
    ) -> None:
        with self._connection(writes=True) as connection:
            stored = _read(connection, checkpoint.slot, lock=True)
            if stored is not None:
                _refuse_backward(stored, checkpoint)
            if known is not None:
                _refuse_lost(stored, known)
            _write(connection, checkpoint)
            contents.apply(connection, checkpoint.slot, changes)

    def replace(self, checkpoint: Checkpoint) -> None:
        with self._connection(writes=True) as connection:
            _read(connection, checkpoint.slot, lock=True)
            connection.execute(sink_positions.delete().where(sink_positions.c.slot == checkpoint.slot))
            connection.execute(checkpoints.delete().where(checkpoints.c.slot == checkpoint.slot))
            # The same positions may hold other events now. A letter's own number takes the position's place in its key.
            key = literal("restored/") + cast(dead_letters.c.id, String)
            connection.execute(
                dead_letters.update()
                .where(dead_letters.c.slot == checkpoint.slot, dead_letters.c.commit_lsn.is_not(None))
                .values(origin="restored", letter_key=key, commit_lsn=None, ordinal=None)
            )
            _write(connection, checkpoint)

    def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter], most: int | None = None) -> LetterCounts:
        rows: dict[str, dict[str, Any]] = {}
        for letter in letters:
            rows.setdefault(_letter_key(letter), _letter_row(slot, letter))
        with self._connection(writes=True) as connection:
            before = _count_letters(connection, slot)
            known = _known_keys(connection, slot, [*rows])
            same = _known_rows(connection, slot, [*rows.values()])
            if new := [row for key, row in rows.items() if key not in known and _content(row) not in same]:
                connection.execute(dead_letters.insert(), new)
            after = _count_letters(connection, slot)
            if most is not None:
                _refuse_too_many(before, after, most)
            return after

    def dead_letters(
        self, slot: str, *, sink: str | None = None, stage: Stage | None = None, after_id: int = 0, limit: int = 100
    ) -> list[DeadLetter]:
        page = select(dead_letters).where(dead_letters.c.slot == slot, dead_letters.c.id > after_id)
        if stage is not None:
            page = page.where(dead_letters.c.sink.is_(None) == (stage == "row"))
        if sink is not None:
            page = page.where(dead_letters.c.sink == sink)
        with self._connection() as connection:
            found = connection.execute(page.order_by(dead_letters.c.id).limit(limit))
            return [_letter(row) for row in found.mappings()]

    def count_dead_letters(self, slot: str) -> LetterCounts:
        with self._connection() as connection:
            return _count_letters(connection, slot)

    def drop_dead_letters(self, slot: str, ids: Sequence[int]) -> int:
        of_slot = dead_letters.delete().where(dead_letters.c.slot == slot)
        with self._connection(writes=True) as connection:
            some = (of_slot.where(dead_letters.c.id.in_(piece)) for piece in pieces(ids))
            return sum(connection.execute(piece).rowcount for piece in some)

    def load_progress(self, slot: str, task: str) -> str | None:
        query = select(tasks.c.progress).where(tasks.c.slot == slot, tasks.c.task == task)
        with self._connection() as connection:
            progress: str | None = connection.execute(query).scalar()
        return progress

    def tasks(self, slot: str) -> list[Task]:
        query = select(tasks.c.task, tasks.c.progress, tasks.c.updated_at).where(tasks.c.slot == slot)
        with self._connection() as connection:
            return [Task(*row) for row in connection.execute(query.order_by(tasks.c.updated_at.desc()))]

    def save_progress(self, slot: str, task: str, progress: str | None) -> None:
        with self._connection(writes=True) as connection:
            if progress is None:
                connection.execute(tasks.delete().where(tasks.c.slot == slot, tasks.c.task == task))
            else:
                row = {"slot": slot, "task": task, "progress": progress, "updated_at": time.time()}
                _put(connection, tasks, row)

    def clear_contents(self, slot: str) -> None:
        with self._connection(writes=True) as connection:
            of_slot = checkpoints.c.slot == slot.partition("/")[0]  # the copy may be one of several
            connection.execute(checkpoints.update().where(of_slot).values(contents=None))
            contents.clear(connection, slot)

    def add_contents(self, slot: str, found: Mapping[Id, str]) -> None:
        with self._connection(writes=True) as connection:
            contents.add(connection, slot, found)

    def find_contents(self, slot: str, ids: Collection[Id]) -> dict[Id, str]:
        with self._connection() as connection:
            return contents.find(connection, slot, ids)

    def newest_contents(self, slot: str, highest: Id, most: int) -> dict[Id, str]:
        with self._connection() as connection:
            return contents.newest(connection, slot, highest, most)

    @contextmanager
    def _connection(self, *, writes: bool = False, creates: bool = False) -> Iterator[Connection]:
        """In a transaction, with the tables there."""
        if not writes:
            database.require_file(self._engine.url)
        try:
            with self._engine.execution_options(writes=writes).begin() as connection:
                if not (creates or self._tables_seen):  # once a process: an operator changes them while it is stopped
                    schema.require(connection)
                    self._tables_seen = True
                yield connection
        except SQLAlchemyError as exc:
            self._engine.dispose()  # this connection may lead to a standby by now, or be poisoned: the next is new
            raise database.explain(exc, self._engine.dialect, self._engine.url) from exc


def _put(connection: Connection, table: Table, row: dict[str, Any]) -> None:
    """Update the row that has this primary key, or insert it."""
    key = [column == row[column.name] for column in table.primary_key]
    if not connection.execute(table.update().where(*key), row).rowcount:
        connection.execute(table.insert(), row)


def _read(connection: Connection, slot: str, *, lock: bool = False) -> Checkpoint | None:
    # The checkpoint is locked first, on behalf of its sinks: the second statement sees what the last holder did.
    queries = [select(table).where(table.c.slot == slot) for table in (checkpoints, sink_positions)]
    if lock:  # SQLite has no row locks: see database._begin
        queries = [query.with_for_update() for query in queries]
    row = connection.execute(queries[0]).mappings().first()
    if row is None:
        return None
    found = connection.execute(queries[1])
    positions = {
        at.sink: SinkPosition(position=Position(at.commit_lsn, at.ordinal), end_lsn=at.end_lsn) for at in found
    }
    return Checkpoint(**row, sinks=positions)


def _refuse_lost(stored: Checkpoint | None, known: Checkpoint) -> None:
    if stored is None:
        raise CheckpointLost(slot=known.slot, stored="gone", known=format_lsn(known.end_lsn))
    try:
        _refuse_backward(known, stored)
    except CheckpointBackward:
        at, was = format_lsn(stored.end_lsn), format_lsn(known.end_lsn)
        raise CheckpointLost(slot=known.slot, stored=f"at {at}", known=was) from None


def _refuse_backward(stored: Checkpoint, offered: Checkpoint) -> None:
    # LSNs of two clusters compare like any numbers, so nothing else would notice.
    if stored.system_identifier != offered.system_identifier:
        raise CheckpointUnusable(
            problem=f"the checkpoint of slot {stored.slot} belongs to the PostgreSQL cluster"
            f" {stored.system_identifier}, not to {offered.system_identifier}",
            cure="If another cluster is replicated with the same slot name, give this one its own database in"
            f" {database.URL_SETTING} or another name in REPLICATOR_SLOT",
        )
    if offered.end_lsn < stored.end_lsn:
        was, would_be = format_lsn(stored.end_lsn), format_lsn(offered.end_lsn)
        raise CheckpointBackward(slot=stored.slot, stored=was, offered=would_be)
    for sink, new in offered.sinks.items():
        old = stored.sinks.get(sink)
        if old is not None and (new.position < old.position or new.end_lsn < old.end_lsn):
            raise CheckpointBackward(slot=stored.slot, stored=_describe(sink, old), offered=_describe(sink, new))


def _describe(sink: str, at: SinkPosition) -> str:
    commit_lsn, ordinal = at.position
    return f"{format_lsn(at.end_lsn)} (sink {sink} at row {ordinal} of commit {format_lsn(commit_lsn)})"


def _write(connection: Connection, checkpoint: Checkpoint) -> None:
    row = structs.asdict(checkpoint) | {"updated_at": time.time()}
    sinks: dict[str, SinkPosition] = row.pop("sinks")
    _put(connection, checkpoints, row)
    for sink, at in sinks.items():
        position = {"commit_lsn": at.position.commit_lsn, "ordinal": at.position.ordinal, "end_lsn": at.end_lsn}
        _put(connection, sink_positions, {"slot": checkpoint.slot, "sink": sink, **position})


def _count_letters(connection: Connection, slot: str) -> LetterCounts:
    sink = dead_letters.c.sink
    query = select(sink, func.count()).where(dead_letters.c.slot == slot).group_by(sink)
    counts = {name: count for name, count in connection.execute(query)}  # noqa: C416  mypy types it by this
    return LetterCounts(rows=counts.pop(None, 0), sinks=counts)


def _refuse_too_many(before: LetterCounts, after: LetterCounts, most: int) -> None:
    for sink, count in ((None, after.rows), *after.sinks.items()):
        known = before.rows if sink is None else before.sinks.get(sink, 0)
        if 0 < known < count > most:
            raise DeadLettersFull(sink=sink, stored=known, count=count - known, limit=most)


def _known_keys(connection: Connection, slot: str, keys: Sequence[str]) -> set[str]:
    query = select(dead_letters.c.letter_key).where(dead_letters.c.slot == slot)
    found = (connection.execute(query.where(dead_letters.c.letter_key.in_(piece))) for piece in pieces(keys))
    return {key for piece in found for key in piece.scalars()}


def _known_rows(connection: Connection, slot: str, rows: Sequence[dict[str, Any]]) -> set[tuple[Id, bytes]]:
    """Those that no event can be made of: one may come through the stream and be read from the table as well."""
    columns, known = dead_letters.c, set[tuple[Id, bytes]]()
    for name in ("event_id", "event_name"):
        query = select(columns[name], columns.payload).where(columns.slot == slot, columns.sink.is_(None))
        for ids in pieces([row[name] for row in rows if row["sink"] is None and row[name] is not None]):
            found = connection.execute(query.where(columns[name].in_(ids)))
            known |= {(event_id, bytes(payload)) for event_id, payload in found}
    return known


def _content(row: dict[str, Any]) -> tuple[Id, bytes] | None:
    """What makes two rows the same; None for a letter of a sink: each refusal is one."""
    event_id = row["event_id"] if row["event_name"] is None else row["event_name"]
    return (event_id, row["payload"]) if row["sink"] is None else None


def _letter_key(letter: DeadLetter) -> str:
    """What makes two letters of a slot the same."""
    identity = f"event {letter.event_id}"
    if len(identity) > MOST_OF_A_NAME:
        identity = f"event {sha256(identity.encode()).hexdigest()}"
    if letter.position is not None:
        identity = f"{format_lsn(letter.position.commit_lsn)}#{letter.position.ordinal}"
    return f"{letter.origin}/{letter.sink or ''}/{identity}"


def _letter_row(slot: str, letter: DeadLetter) -> dict[str, Any]:
    row = structs.asdict(letter) | {"slot": slot, "letter_key": _letter_key(letter), "created_at": time.time()}
    del row["id"]
    row["event_name"] = row["event_id"] if isinstance(row["event_id"], str) else None
    row["event_id"] = None if isinstance(row["event_id"], str) else row["event_id"]
    row["commit_lsn"], row["ordinal"] = row.pop("position") or (None, None)
    # A destination's words may hold what a text column can't: NUL in PostgreSQL, lone surrogates anywhere.
    row["reason"] = letter.reason.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
    return row


def _letter(row: RowMapping) -> DeadLetter:
    position = None if row["commit_lsn"] is None else Position(row["commit_lsn"], row["ordinal"])
    same = {name: row[name] for name in ("id", "sink", "origin", "reason", "payload", "created_at")}
    same["event_id"] = row["event_id"] if row["event_name"] is None else row["event_name"]
    return DeadLetter(position=position, **same)
