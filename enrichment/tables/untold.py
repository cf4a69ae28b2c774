"""Rows that may be gone without a delete in the slot, so that the sinks keep them; `guard.py` looks for them.

A part of the events' table can be dropped, detached, renamed or replaced, or the WAL may not tell which of its rows are
deleted. What a look finds of this is in the record until it is a dead letter: a restart forgets nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from enrichment.events.codec import codec_of
from enrichment.tables import fit
from enrichment.tables.catalog import Relation, Shape
from enrichment.tables.declared import Tables
from replicator.contracts.events import DeadLetter, Lsn, Row

BY_COLUMN = (
    "while the column of the identity had another name or type, nothing told which rows were deleted, or got another"
    " identity: {take_out}"
)


class Untold(NamedTuple):
    """A part, and where the WAL ended when it was found that its deletes are not told."""

    schema: str
    name: str
    since: Lsn


Parts = Mapping[int, tuple[str, str]]
"""By oid: schema and name."""


def parts(tables: Tables, shape: Shape) -> Parts:
    """Those whose rows the sinks may have, if rows are followed."""
    return {part.oid: (part.schema, part.name) for part in _parts(tables, shape)}


def _parts(tables: Tables, shape: Shape) -> Iterator[Relation]:
    found = shape.of(tables.events) if tables.stream.follows else ()
    return (part for part in found if part.kind == "r")


def told(tables: Tables, shape: Shape) -> Parts:
    """Those of which the slot shows every change."""
    silent = fit.untold(tables, shape)
    shown = (part for part in _parts(tables, shape) if part.streamed and part not in silent)
    return {part.oid: (part.schema, part.name) for part in shown}


def found(tables: Tables, before: Parts, shape: Shape, now: Lsn) -> dict[int, Untold]:
    """What the slot does not show from now on. Where deletes are ignored, the sinks keep a part that is gone anyway."""
    there, shown = parts(tables, shape), told(tables, shape)
    kept = before.keys() if tables.stream.deletes == "delete" else before.keys() & there.keys()
    return {oid: Untold(*before[oid], now) for oid in before if oid in kept and oid not in shown}


def letters(tables: Tables, untold: Mapping[int, Untold], shape: Shape) -> list[DeadLetter]:
    """One for each part. Its number is the letter's place: found again, it is the same letter."""
    there, made = parts(tables, shape), []
    for oid, part in sorted(untold.items()):
        row = Row("D", part.schema, part.name, [], [], part.since, oid)
        made.append(codec_of(tables).dead_letter(row, _reason(tables, part, gone=oid not in there)))
    return made


def _reason(tables: Tables, part: Untold, *, gone: bool) -> str:
    name, table = f"{part.schema}.{part.name}", tables.stream.table
    if not gone:
        return (
            f"for a while the WAL did not tell which rows of {name} were deleted, or got another identity (a replica"
            f" identity without it, UNLOGGED, or the table was away): {tables.take_out}"
        )
    what = "is another table now" if name == table else f"is no longer a part of {table}"
    return f"{name} {what}, and the WAL has no deletes for the rows that went with it: {tables.take_out}"


def tells(row: Row) -> bool:
    """Whether it is the row of such a letter: it is none of the table's, and no event can be made of it ever."""
    return row.action == "D" and not row.identity and not row.columns
