"""What comes next in the slot. Nothing is taken from it: a temporary copy of the slot is read.

The copy ends with its connection, however this process ends. It goes while the replicator reads the slot, too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import msgspec
from msgspec import Struct

from replicator.contracts.errors import SourceError, SourceUnavailable, command
from replicator.contracts.events import ACTIONS, Lsn, Row, counted, format_lsn
from replicator.source.connection import Dsn
from replicator.source.stream import Source

PATIENCE_SECONDS = 20.0
"""PostgreSQL sends nothing of a transaction before it has decoded all of it."""
PAUSE_SECONDS = 0.05
READ_BYTES = 64_000_000
"""Of rows. PostgreSQL decodes one after the other, and a reader of more would keep it at work for minutes."""
VALUE_LENGTH = 1_000
"""Characters of one value: a row may have 1 GB, which nobody reads."""

_encode = msgspec.json.Encoder(decimal_format="number").encode


class Change(Struct, frozen=True, kw_only=True):
    """One row that comes."""

    position: str
    action: str
    table: str
    columns: dict[str, Any]
    """As the slot brings them, long texts cut; those of a deleted row are what identifies it."""


class Peeked(Struct, frozen=True, kw_only=True):
    """What comes after the confirmed position."""

    after: str
    """What is confirmed."""
    changes: list[Change]
    more: bool
    """There is more behind them, or may be."""


async def peek(dsn: Dsn, slot: str, tables: Iterable[tuple[str, str]], most: int) -> Peeked:
    """The next rows of these tables, at most so many. Raises SourceError."""
    with closing(Source(dsn, f"replicator_peek_{os.getpid()}")) as source:
        await source.connect()
        state = await source.copy(slot)
        if state is None or state.confirmed_lsn is None:
            raise SourceError(
                f"replication slot {slot} does not exist, or is being made", f"{command('init')} makes it"
            )
        await source.start(state.confirmed_lsn, tables)
        changes = await _read(source, state.server_lsn, most)
        more = len(changes) > most or source.received < state.server_lsn
        return Peeked(after=format_lsn(state.confirmed_lsn), changes=changes[:most], more=more)


async def _read(source: Source, end: Lsn, most: int) -> list[Change]:
    """Up to this end of the WAL, or until there are more than so many, or too many bytes."""
    changes: list[Change] = []
    size = 0
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(changes) <= most and source.received < end and size < READ_BYTES:
                source.send_feedback(ask=True)  # on an idle server nothing else says how far it is
                chunk = await source.read()
                changes += map(_change, chunk.rows)  # at once: no row stays whole
                size += sum(map(_size, chunk.rows))
                await asyncio.sleep(0 if chunk.rows else PAUSE_SECONDS)
    except TimeoutError:
        if not changes:
            what = f"nothing came in {PATIENCE_SECONDS:.0f} s"
            cure = "PostgreSQL decodes a large transaction first: `status` shows how far the slot is"
            raise SourceUnavailable(problem="the slot can't be looked into", detail=what, cure=cure) from None
    return changes


def _size(row: Row) -> int:
    """Of its texts."""
    return sum(len(column.value) for column in row.columns or row.identity if isinstance(column.value, str))


def _cut(value: Any) -> Any:
    """A long text's beginning."""
    return f"{value[:VALUE_LENGTH]}…" if isinstance(value, str) and len(value) > VALUE_LENGTH else value


def _change(row: Row) -> Change:
    return Change(
        position=f"{format_lsn(row.commit_lsn)}#{row.ordinal}",
        action=ACTIONS.get(row.action, row.action),
        table=f"{row.schema}.{row.table}",
        columns={column.name: _cut(column.value) for column in row.columns or row.identity},
    )


def as_json(found: Peeked) -> str:
    """For programs."""
    return _encode(found).decode()


def as_text(found: Peeked) -> Iterator[str]:
    """For people."""
    for change in found.changes:
        yield f"{change.position}  {change.action} {change.table} {_encode(change.columns).decode()}"
    end = "there is more" if found.more else "nothing else is waiting"
    rows = counted(len(found.changes), "row")
    yield f"{rows} after {found.after}, the confirmed position; {end}"
