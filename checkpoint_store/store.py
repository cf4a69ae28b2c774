"""`SqlCheckpointStore`: what `contracts.stores.CheckpointStore` promises, on any database of SQLAlchemy's.

`schema` has the tables, `database` the connection and the durability of its commits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, String, and_, bindparam, cast, exists, func, literal, select
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

IDS_PER_STATEMENT = 500  # well under every database's limit of parameters

# Statements are made once: SQLAlchemy then finds their compiled form by a key that it has already computed.
_OF_SLOT = checkpoints.c.slot == bindparam("of_slot")
_SINKS_OF_SLOT = sink_positions.c.slot == bindparam("of_slot")
_READ_CHECKPOINT = select(checkpoints).where(_OF_SLOT)
_READ_SINKS = select(sink_positions).where(_SINKS_OF_SLOT)
_LOCK_CHECKPOINT = _READ_CHECKPOINT.with_for_update()  # SQLite has no such lock; see database._begin
_LOCK_SINKS = _READ_SINKS.with_for_update()
_INSERT_CHECKPOINT = checkpoints.insert()
_INSERT_SINK = sink_positions.insert()
_UPDATE_CHECKPOINT = (
    checkpoints.update()
    .where(_OF_SLOT)
    .values({name: bindparam(name) for name in ("timeline", "end_lsn", "committed_at", "updated_at")})
)
_UPDATE_SINK = (
    sink_positions.update()
    .where(_SINKS_OF_SLOT, sink_positions.c.sink == bindparam("of_sink"))
    .values({name: bindparam(name) for name in ("commit_lsn", "ordinal", "end_lsn")})
)
_DELETE_SINKS = sink_positions.delete().where(_SINKS_OF_SLOT)
_DELETE_CHECKPOINT = checkpoints.delete().where(_OF_SLOT)

_KEY = ("slot", "letter_key")
_LETTER = (
    *_KEY,
    "origin",
    "sink",
    "commit_lsn",
    "ordinal",
    "event_id",
    "reason",
    "payload",
    "created_at",
)
_INSERT_LETTER_ONCE = dead_letters.insert().from_select(
    _LETTER,
    select(*(bindparam(name, type_=dead_letters.c[name].type) for name in _LETTER)).where(
        ~exists().where(
            and_(*(dead_letters.c[name] == bindparam(name, type_=dead_letters.c[name].type) for name in _KEY))
        )
    ),
)
_COUNT_LETTERS = (
    select(dead_letters.c.sink, func.count().label("letters"))
    .where(dead_letters.c.slot == bindparam("of_slot"))
    .group_by(dead_letters.c.sink)
)
# After a restore the same positions can hold different events. The letter's own number takes the position's place.
_RELEASE_POSITIONS = (
    dead_letters.update()
    .where(dead_letters.c.slot == bindparam("of_slot"), dead_letters.c.commit_lsn.is_not(None))
    .values(
        origin=Origin.RESTORED.value,
        letter_key=literal(f"{Origin.RESTORED}/") + cast(dead_letters.c.id, String),
        commit_lsn=None,
        ordinal=None,
    )
)
_DROP_LETTERS = dead_letters.delete().where(
    dead_letters.c.slot == bindparam("of_slot"), dead_letters.c.id.in_(bindparam("ids", expanding=True))
)
_TASK = and_(tasks.c.slot == bindparam("of_slot"), tasks.c.task == bindparam("of_task"))
_READ_TASK = select(tasks.c.progress).where(_TASK)
_DELETE_TASK = tasks.delete().where(_TASK)


class SqlCheckpointStore:
    """Checkpoints and dead letters in the database of a SQLAlchemy URL; see `stores.CheckpointStore`."""

    def __init__(self, url: str) -> None:
        self._engine = database.open_engine(url)
        self._writing_engine = self._engine.execution_options(writes=True)
        self._schema_is_ours = False

    def create(self) -> list[str]:
        """Make the tables; a line for each thing done."""
        with self._transaction(self._writing_engine) as connection:
            return schema.create(connection)

    def load(self, slot: str) -> Checkpoint | None:
        """The slot's checkpoint, or None."""
        with self._reading() as connection:
            return _read(connection, slot)

    def save(self, checkpoint: Checkpoint) -> None:
        """Move the checkpoint forward. The row stays locked from the comparison to the commit."""
        with self._writing() as connection:
            stored = _read(connection, checkpoint.slot, lock=True)
            if stored is None:
                _insert(connection, checkpoint)
                return
            _refuse_other_cluster(stored, checkpoint)
            _refuse_backward(stored, checkpoint)
            _update(connection, stored, checkpoint)

    def replace(self, checkpoint: Checkpoint) -> None:
        """Put the checkpoint in the place of whatever was there."""
        with self._writing() as connection:
            of_slot = {"of_slot": checkpoint.slot}
            connection.execute(_LOCK_CHECKPOINT, of_slot)
            connection.execute(_DELETE_SINKS, of_slot)
            connection.execute(_DELETE_CHECKPOINT, of_slot)
            connection.execute(_RELEASE_POSITIONS, of_slot)
            _insert(connection, checkpoint)

    def add_dead_letters(self, slot: str, letters: Sequence[DeadLetter], most: int | None = None) -> LetterCounts:
        """Keep the letters that are not there yet; how many there are then."""
        now = time.time()
        with self._writing() as connection:
            before = _count_letters(connection, slot)
            if not letters:
                return before
            connection.execute(_INSERT_LETTER_ONCE, [_letter_row(slot, letter, now) for letter in letters])
            after = _count_letters(connection, slot)
            if most is not None:
                _refuse_too_many(before, after, most)
            return after

    def dead_letters(
        self, slot: str, *, sink: str | None = None, stage: Stage | None = None, after_id: int = 0, limit: int = 100
    ) -> list[DeadLetter]:
        """The page behind `after_id`, oldest first."""
        page = select(dead_letters).where(dead_letters.c.slot == slot, dead_letters.c.id > after_id)
        if stage is not None:
            of_rows = dead_letters.c.sink.is_(None)
            page = page.where(of_rows if stage is Stage.ROW else ~of_rows)
        if sink is not None:
            page = page.where(dead_letters.c.sink == sink)
        with self._reading() as connection:
            rows = connection.execute(page.order_by(dead_letters.c.id).limit(limit)).all()
        return [_letter(row) for row in rows]

    def count_dead_letters(self, slot: str) -> LetterCounts:
        """How many there are now."""
        with self._reading() as connection:
            return _count_letters(connection, slot)

    def drop_dead_letters(self, slot: str, ids: Sequence[int]) -> int:
        """Remove these; how many there were."""
        with self._writing() as connection:
            return sum(
                connection.execute(
                    _DROP_LETTERS, {"of_slot": slot, "ids": ids[start : start + IDS_PER_STATEMENT]}
                ).rowcount
                for start in range(0, len(ids), IDS_PER_STATEMENT)
            )

    def load_progress(self, slot: str, task: str) -> str | None:
        """How far the task was, or None."""
        with self._reading() as connection:
            progress: str | None = connection.execute(_READ_TASK, {"of_slot": slot, "of_task": task}).scalar()
        return progress

    def save_progress(self, slot: str, task: str, progress: str | None) -> None:
        """Put it in the place of what was there; None: the task is done."""
        with self._writing() as connection:
            connection.execute(_DELETE_TASK, {"of_slot": slot, "of_task": task})
            if progress is not None:
                row = {"slot": slot, "task": task, "progress": progress, "updated_at": time.time()}
                connection.execute(tasks.insert(), row)

    def close(self) -> None:
        """Release the connection."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Connection]:
        try:
            with engine.begin() as connection:
                yield connection
        except SQLAlchemyError as exc:
            raise database.explain(exc, engine.dialect, engine.url) from exc

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        database.require_file(self._engine.url)
        with self._transaction(self._engine) as connection:
            self._require_schema(connection)
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._transaction(self._writing_engine) as connection:
            self._require_schema(connection)
            yield connection

    def _require_schema(self, connection: Connection) -> None:
        # Once a process: only an operator changes it, with the program stopped.
        if not self._schema_is_ours:
            schema.require(connection)
            self._schema_is_ours = True


def _read(connection: Connection, slot: str, *, lock: bool = False) -> Checkpoint | None:
    # The checkpoint's lock comes first and stands for its sinks' too: the second statement sees what the holder did.
    of_slot = {"of_slot": slot}
    row = connection.execute(_LOCK_CHECKPOINT if lock else _READ_CHECKPOINT, of_slot).first()
    if row is None:
        return None
    sinks = connection.execute(_LOCK_SINKS if lock else _READ_SINKS, of_slot).all()
    return Checkpoint(
        slot=slot,
        system_identifier=row.system_identifier,
        timeline=row.timeline,
        end_lsn=row.end_lsn,
        sinks={
            sink: SinkPosition(position=Position(commit_lsn, ordinal), end_lsn=end_lsn)
            for _, sink, commit_lsn, ordinal, end_lsn in sinks
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
            cure="If another cluster is replicated with the same slot name, give this one a database of its own in"
            " REPLICATOR_CHECKPOINT_URL or another name in REPLICATOR_SLOT",
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


def _insert(connection: Connection, checkpoint: Checkpoint) -> None:
    row = {
        "slot": checkpoint.slot,
        "system_identifier": checkpoint.system_identifier,
        "timeline": checkpoint.timeline,
        "end_lsn": checkpoint.end_lsn,
        "committed_at": checkpoint.committed_at,
        "updated_at": time.time(),
    }
    connection.execute(_INSERT_CHECKPOINT, row)
    _insert_sinks(connection, checkpoint, checkpoint.sinks)


def _insert_sinks(connection: Connection, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    rows = [{"slot": checkpoint.slot, "sink": name, **_position_row(checkpoint.sinks[name])} for name in names]
    if rows:
        connection.execute(_INSERT_SINK, rows)


def _update(connection: Connection, stored: Checkpoint, checkpoint: Checkpoint) -> None:
    row = {"timeline": checkpoint.timeline, "end_lsn": checkpoint.end_lsn, "committed_at": checkpoint.committed_at}
    connection.execute(_UPDATE_CHECKPOINT, {"of_slot": checkpoint.slot, "updated_at": time.time(), **row})
    moved = [
        {"of_slot": checkpoint.slot, "of_sink": name, **_position_row(at)}
        for name, at in checkpoint.sinks.items()
        if name in stored.sinks and at != stored.sinks[name]
    ]
    if moved:
        connection.execute(_UPDATE_SINK, moved)
    _insert_sinks(connection, checkpoint, checkpoint.sinks.keys() - stored.sinks.keys())


def _position_row(at: SinkPosition) -> dict[str, int]:
    return {"commit_lsn": at.position.commit_lsn, "ordinal": at.position.ordinal, "end_lsn": at.end_lsn}


def _count_letters(connection: Connection, slot: str) -> LetterCounts:
    sinks = {row.sink: row.letters for row in connection.execute(_COUNT_LETTERS, {"of_slot": slot})}
    return LetterCounts(rows=sinks.pop(None, 0), sinks=sinks)


def _refuse_too_many(before: LetterCounts, after: LetterCounts, most: int) -> None:
    for sink, count in ((None, after.rows), *after.sinks.items()):
        known = before.rows if sink is None else before.sinks.get(sink, 0)
        if 0 < known < count > most:
            raise DeadLettersFull(sink=sink, stored=known, count=count - known, limit=most)


def _letter_key(letter: DeadLetter) -> str:
    if letter.position is None:
        identity = f"event {letter.event_id}"
    else:
        identity = f"{format_lsn(letter.position.commit_lsn)}#{letter.position.ordinal}"
    return f"{letter.origin}/{letter.sink or ''}/{identity}"


def _letter_row(slot: str, letter: DeadLetter, now: float) -> dict[str, Any]:
    # A destination's words may hold what a text column can't: NUL in PostgreSQL, lone surrogates anywhere.
    reason = letter.reason.replace("\0", "�").encode(errors="replace").decode()
    commit_lsn, ordinal = letter.position or (None, None)
    return {
        "slot": slot,
        "letter_key": _letter_key(letter),
        "origin": letter.origin.value,
        "sink": letter.sink,
        "commit_lsn": commit_lsn,
        "ordinal": ordinal,
        "event_id": letter.event_id,
        "reason": reason,
        "payload": letter.payload,
        "created_at": now,
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
