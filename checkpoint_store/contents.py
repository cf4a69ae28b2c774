"""The contents as of the checkpoint: a copy of a table of the source, kept current by the changes in the stream.

`store` calls these in its transactions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, select

from checkpoint_store.schema import contents, named_contents
from replicator.contracts.events import ContentChange, Id

VALUES_PER_STATEMENT = 500  # well under every database's limit of parameters


def clear(connection: Connection, slot: str) -> None:
    """Forget all of them."""
    for table in (contents, named_contents):
        connection.execute(table.delete().where(table.c.slot == slot))


def _table(ids: Iterable[Id]) -> Table:
    """Of contents with these ids: all are numbers, or none is."""
    return named_contents if isinstance(next(iter(ids), 0), str) else contents


def add(connection: Connection, slot: str, found: Mapping[Id, str]) -> None:
    """They are not there yet."""
    if found:
        rows = [{"slot": slot, "content_id": content_id, "content": content} for content_id, content in found.items()]
        connection.execute(_table(found).insert(), rows)


def apply(connection: Connection, slot: str, changes: Iterable[ContentChange]) -> None:
    """Change them in this order; only the last change of a content is written."""
    by_copy: dict[str, list[ContentChange]] = {}
    for change in changes:
        by_copy.setdefault(change.copy, []).append(change)
    for copy, theirs in by_copy.items():
        _apply(connection, f"{slot}/{copy}" if copy else slot, theirs)


def _apply(connection: Connection, slot: str, changes: Iterable[ContentChange]) -> None:
    last: dict[Id, str | None] = {}
    for _, content_id, content, _ in changes:
        if content_id is None:
            clear(connection, slot)
            last.clear()
        else:
            last[content_id] = content
    table = _table(last)
    for piece in pieces([*last]):
        connection.execute(table.delete().where(table.c.slot == slot, table.c.content_id.in_(piece)))
    add(connection, slot, {content_id: content for content_id, content in last.items() if content is not None})


def find(connection: Connection, slot: str, ids: Collection[Id]) -> dict[Id, str]:
    """Those that there are."""
    columns = _table(ids).c
    query = select(columns.content_id, columns.content).where(columns.slot == slot)
    found: dict[Id, str] = {}
    for piece in pieces([*ids]):
        rows = connection.execute(query.where(columns.content_id.in_(piece)))
        found.update((content_id, content) for content_id, content in rows)
    return found


def newest(connection: Connection, slot: str, highest: Id, most: int) -> dict[Id, str]:
    """Those with the highest ids, from this one down, highest first."""
    columns = _table([highest]).c
    query = select(columns.content_id, columns.content).where(columns.slot == slot, columns.content_id <= highest)
    rows = connection.execute(query.order_by(columns.content_id.desc()).limit(most))
    return {content_id: content for content_id, content in rows}  # noqa: C416  mypy types it by this


def pieces(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """For a statement each."""
    return (values[start : start + VALUES_PER_STATEMENT] for start in range(0, len(values), VALUES_PER_STATEMENT))
