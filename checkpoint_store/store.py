"""`SqlCheckpointStore`: the three protocols of `contracts/stores.py` on any database of SQLAlchemy's.

`schema` has the tables, `database` the connection and the durability of its commits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, String, bindparam, cast, func, literal, select
from sqlalchemy.exc import SQLAlchemyError

from checkpoint_store import database, schema
from checkpoint_store.schema import checkpoints, dead_letters, sink_positions, tasks
from replicator.contracts.errors import CheckpointBackward, CheckpointUnusable, DeadLettersFull
from replicator.contracts.events import (
    Checkpoint,
    DeadLetter,
    LetterCounts,
    Origin,
    Position,
    SinkPosition,
    Stage,
    format_lsn,
)

VALUES_PER_STATEMENT = 500  # well under every database's limit of parameters

# What `save` runs is built once: building costs SQLAlchemy three times what running does.
_CHECKPOINT = select(checkpoints).where(checkpoints.c.slot == bindparam("of_slot"))
_SINKS = select(sink_positions).where(sink_positions.c.slot == bindparam("of_slot"))
_LOCKED = (_CHECKPOINT.with_for_update(), _SINKS.with_for_update())  # SQLite: see database._begin
_UPDATE = checkpoints.update().where(checkpoints.c.slot == bindparam("of_slot"))
_UPDATE_SINK = sink_positions.update().where(
    sink_positions.c.slot == bindparam("of_slot"), sink_positions.c.sink == bindparam("of_sink")
)


class SqlCheckpointStore:
    """Checkpoints, dead letters and progress in the database of a SQLAlchemy URL. Raises SettingsError for the URL."""

    def __init__(self, url: str) -> None:
        self._engine = database.open_engine(url)
        self._tables_seen = False

    def close(self) -> None:
        self._engine.dispose()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def create(self) -> list[str]:
        with self._transaction(writes=True) as connection:
            return schema.create(connection)

    def load(self, slot: str) -> Checkpoint | None:
        with self._connection() as connection:
            return _read(connection, slot)

    def save(self, checkpoint: Checkpoint) -> None:
        with self._connection(writes=True) as connection:
            stored = _read(connection, checkpoint.slot, lock=True)
            if stored is not None:
                _refuse_other_cluster(stored, checkpoint)
                _refuse_backward(stored, checkpoint)
            _write(connection, stored, checkpoint)

    def replace(self, checkpoint: Checkpoint) -> None:
        with self._connection(writes=True) as connection:
            _read(connection, checkpoint.slot, lock=True)
            connection.execute(sink_positions.delete().where(sink_positions.c.slot == checkpoint.slot))
            connection.execute(checkpoints.delete().where(checkpoints.c.slot == checkpoint.slot))
            _release_positions(connection, checkpoint.slot)
            _write(connection, None, checkpoint)

    # -- dead letters --------------------------------------------------------------------------------------------

    def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter], most: int | None = None) -> LetterCounts:
        rows: dict[str, dict[str, Any]] = {}
        for letter in letters:
            rows.setdefault(_letter_key(letter), _letter_row(slot, letter))
        with self._connection(writes=True) as connection:
            before = _count_letters(connection, slot)
            known = _known_keys(connection, slot, [*rows])
            if new := [row for key, row in rows.items() if key not in known]:
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
            page = page.where(dead_letters.c.sink.is_(None) == (stage is Stage.ROW))
        if sink is not None:
            page = page.where(dead_letters.c.sink == sink)
        with self._connection() as connection:
            return [_letter(row) for row in connection.execute(page.order_by(dead_letters.c.id).limit(limit))]

    def count_dead_letters(self, slot: str) -> LetterCounts:
        with self._connection() as connection:
            return _count_letters(connection, slot)

    def drop_dead_letters(self, slot: str, ids: Sequence[int]) -> int:
        of_slot = dead_letters.delete().where(dead_letters.c.slot == slot)
        with self._connection(writes=True) as connection:
            return sum(
                connection.execute(of_slot.where(dead_letters.c.id.in_(piece))).rowcount for piece in _pieces(ids)
            )

    # -- progress ------------------------------------------------------------------------------------------------

    def load_progress(self, slot: str, task: str) -> str | None:
        query = select(tasks.c.progress).where(tasks.c.slot == slot, tasks.c.task == task)
        with self._connection() as connection:
            progress: str | None = connection.execute(query).scalar()
        return progress

    def save_progress(self, slot: str, task: str, progress: str | None) -> None:
        with self._connection(writes=True) as connection:
            connection.execute(tasks.delete().where(tasks.c.slot == slot, tasks.c.task == task))
            if progress is not None:
                row = {"slot": slot, "task": task, "progress": progress, "updated_at": time.time()}
                connection.execute(tasks.insert(), row)

    # -- transactions --------------------------------------------------------------------------------------------

    @contextmanager
    def _connection(self, *, writes: bool = False) -> Iterator[Connection]:
        """In a transaction, with the tables there."""
        if not writes:
            database.require_file(self._engine.url)
        with self._transaction(writes=writes) as connection:
            if not self._tables_seen:  # once a process: only an operator changes them, with the program stopped
                schema.require(connection)
                self._tables_seen = True
            yield connection

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        try:
            with self._engine.execution_options(writes=writes).begin() as connection:
                yield connection
        except SQLAlchemyError as exc:
            raise database.explain(exc, self._engine.dialect, self._engine.url) from exc


# -- checkpoints ---------------------------------------------------------------------------------------------------


def _read(connection: Connection, slot: str, *, lock: bool = False) -> Checkpoint | None:
    # The checkpoint is locked first, on behalf of its sinks: the second statement sees what the last holder did.
    checkpoint, sinks = _LOCKED if lock else (_CHECKPOINT, _SINKS)
    row = connection.execute(checkpoint, {"of_slot": slot}).first()
    if row is None:
        return None
    return Checkpoint(
        slot=slot,
        system_identifier=row.system_identifier,
        timeline=row.timeline,
        end_lsn=row.end_lsn,
        sinks={
            at.sink: SinkPosition(position=Position(at.commit_lsn, at.ordinal), end_lsn=at.end_lsn)
            for at in connection.execute(sinks, {"of_slot": slot})
        },
        committed_at=row.committed_at,
        updated_at=row.updated_at,
    )


def _refuse_other_cluster(stored: Checkpoint, offered: Checkpoint) -> None:
    # LSNs of two clusters compare like any numbers, so nothing else would notice.
    if stored.system_identifier != offered.system_identifier:
        raise CheckpointUnusable(
            problem=f"the checkpoint of slot {stored.slot} belongs to the PostgreSQL cluster"
            f" {stored.system_identifier}, not to {offered.system_identifier}",
            cure="If another cluster is replicated with the same slot name, give this one its own database in"
            f" {database.URL_SETTING} or another name in REPLICATOR_SLOT",
        )


def _refuse_backward(stored: Checkpoint, offered: Checkpoint) -> None:
    if offered.end_lsn < stored.end_lsn:
        raise CheckpointBackward(
            slot=stored.slot, stored=format_lsn(stored.end_lsn), offered=format_lsn(offered.end_lsn)
        )
    for sink, new in offered.sinks.items():
        old = stored.sinks.get(sink)
        if old is not None and (new.position < old.position or new.end_lsn < old.end_lsn):
            raise CheckpointBackward(slot=stored.slot, stored=_describe(sink, old), offered=_describe(sink, new))


def _describe(sink: str, at: SinkPosition) -> str:
    commit_lsn, ordinal = at.position
    return f"{format_lsn(at.end_lsn)} (sink {sink} at row {ordinal} of commit {format_lsn(commit_lsn)})"


def _write(connection: Connection, stored: Checkpoint | None, checkpoint: Checkpoint) -> None:
    """What differs from `stored`, which is locked."""
    row = {
        "slot": checkpoint.slot,
        "system_identifier": checkpoint.system_identifier,
        "timeline": checkpoint.timeline,
        "end_lsn": checkpoint.end_lsn,
        "committed_at": checkpoint.committed_at,
        "updated_at": time.time(),
    }
    known = stored.sinks if stored else {}
    if stored is None:
        connection.execute(checkpoints.insert(), row)
    else:
        connection.execute(_UPDATE, {"of_slot": checkpoint.slot, **row})
    for sink, at in checkpoint.sinks.items():
        row = {"commit_lsn": at.position.commit_lsn, "ordinal": at.position.ordinal, "end_lsn": at.end_lsn}
        if sink not in known:
            connection.execute(sink_positions.insert(), {"slot": checkpoint.slot, "sink": sink, **row})
        elif at != known[sink]:
            connection.execute(_UPDATE_SINK, {"of_slot": checkpoint.slot, "of_sink": sink, **row})


# -- dead letters --------------------------------------------------------------------------------------------------


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
    pieces = (connection.execute(query.where(dead_letters.c.letter_key.in_(piece))) for piece in _pieces(keys))
    return {key for piece in pieces for key in piece.scalars()}


def _pieces(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), VALUES_PER_STATEMENT):
        yield values[start : start + VALUES_PER_STATEMENT]


def _release_positions(connection: Connection, slot: str) -> None:
    # The same positions may hold other events now. A letter's own number takes the position's place in its key.
    key = literal(f"{Origin.RESTORED}/") + cast(dead_letters.c.id, String)
    connection.execute(
        dead_letters.update()
        .where(dead_letters.c.slot == slot, dead_letters.c.commit_lsn.is_not(None))
        .values(origin=Origin.RESTORED.value, letter_key=key, commit_lsn=None, ordinal=None)
    )


def _letter_key(letter: DeadLetter) -> str:
    """What makes two letters of a slot the same."""
    identity = f"event {letter.event_id}"
    if letter.position is not None:
        identity = f"{format_lsn(letter.position.commit_lsn)}#{letter.position.ordinal}"
    return f"{letter.origin}/{letter.sink or ''}/{identity}"


def _letter_row(slot: str, letter: DeadLetter) -> dict[str, Any]:
    commit_lsn, ordinal = letter.position or (None, None)
    return {
        "slot": slot,
        "letter_key": _letter_key(letter),
        "origin": letter.origin.value,
        "sink": letter.sink,
        "commit_lsn": commit_lsn,
        "ordinal": ordinal,
        "event_id": letter.event_id,
        # A destination's words may hold what a text column can't: NUL in PostgreSQL, lone surrogates anywhere.
        "reason": letter.reason.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode(),
        "payload": letter.payload,
        "created_at": time.time(),
    }


def _letter(row: Any) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        sink=row.sink,
        origin=Origin(row.origin),
        position=None if row.commit_lsn is None else Position(row.commit_lsn, row.ordinal),
        event_id=row.event_id,
        reason=row.reason,
        payload=row.payload,
        created_at=row.created_at,
    )
