"""The shortcut: an ordinary insert from its message to the finished event, in one go.

Decoding a row, reading it and encoding its event take 3.4 µs in a loop of their own. In the program they took 6.7 µs:
500 decoded rows hold more than the processor's cache, and each step met them in memory. So an event is finished while
its message is in the cache. A type made for the table's columns, as they stood in the last row, checks names, order and
values while it decodes. Whatever it does not take, and whatever is unusual, goes the general way (`codec.py`), which
decides what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from enrichment.events.codec import Codec
from enrichment.events.compiled import FINISH
from enrichment.events.draft import Content, DerivedUnusable
from replicator.contracts.enricher import Shortcut
from replicator.contracts.events import Event, Lsn, Row
from replicator.contracts.fields import INT64_MAX, INT64_MIN, Field

MOST_LAYOUTS = 16
"""Parts of a table may have their columns in different orders; making a type takes some 0.5 ms."""

_MAKE = f"""
def _make(_decode, {{known}}):
    def _shortcut(_payload, _commit_lsn, _ordinal):
        try:
            _columns = _decode(_payload).columns
            {{values}}
            {{time}} = _fromisoformat({{time}})
            {{content}}
        except _UNUSUAL:
            return None
        if {{time}}.tzinfo is not _UTC{{unfit}}:
            return None{FINISH}
        return _event
    return _shortcut
"""

_UNUSUAL = (msgspec.MsgspecError, ValueError, KeyError, ArithmeticError, RecursionError)


class Layout(NamedTuple):
    """How the rows of some tables stand."""

    schema: str
    columns: tuple[str, ...]

    @classmethod
    def of(cls, row: Row) -> Layout:
        """As in a row of wal2json's."""
        return cls(row.schema, tuple(column.name for column in row.columns))


class Shortcuts:
    """Makes the shortcut for the layout of the last row that went the general way, in any table of its schema."""

    def __init__(self, codec: Codec, contents: Sequence[Mapping[Any, Content]]) -> None:
        self.current: Shortcut | None = None
        self._derives = codec.derives
        self._own = {field.column: field for field in codec.tables.own}
        self._make = codec.compiler.finishing(_MAKE, "_make", {"_UNUSUAL": _UNUSUAL})
        self._contents = contents
        self._tables: dict[str, list[str]] = {}
        self._made: dict[Layout, Shortcut | None] = {}

    def begin(self, tables: Iterable[tuple[str, str]]) -> None:
        """Forget all layouts: from here on the rows of events come from these tables, each its schema and its name."""
        self._tables = {}
        for schema, table in tables:
            self._tables.setdefault(schema, []).append(table)
        self._made, self.current = {}, None

    def learn(self, layout: Layout, known: Sequence[str]) -> None:
        """A row stood like this; `known`: its columns under the names that we know them by."""
        if layout not in self._made:
            if len(self._made) >= MOST_LAYOUTS:
                return
            self._made[layout] = self._new(layout, known)
        self.current = self._made[layout]

    def _new(self, layout: Layout, known: Sequence[str]) -> Shortcut | None:
        if layout.schema not in self._tables or not self._own.keys() <= set(known) or len(set(known)) < len(known):
            return None
        columns = (
            _column(name, self._own.get(column), number)
            for number, (name, column) in enumerate(zip(layout.columns, known, strict=True))
        )
        # Longer and shorter rows do not fit: an array-like type that forbids unknown fields has a fixed length.
        row = msgspec.defstruct("Columns", columns, array_like=True, forbid_unknown_fields=True, gc=False)
        message = msgspec.defstruct(
            "Message",
            [
                ("action", _literal("I")),
                ("schema", _literal(layout.schema)),
                ("table", _literal(*self._tables[layout.schema])),
                ("columns", row),
                ("identity", tuple[()], ()),  # an insert has none
            ],
            gc=False,
        )
        shortcut: Shortcut = self._wrapped(
            self._make(msgspec.json.Decoder(message, float_hook=Decimal).decode, *self._contents)
        )
        return shortcut

    def _wrapped(self, shortcut: Shortcut) -> Shortcut:
        """Without the declaration's own errors: the general way tells them."""
        if not self._derives:
            return shortcut

        def careful(payload: memoryview | bytes, commit_lsn: Lsn, ordinal: int) -> Event | None:
            try:
                return shortcut(payload, commit_lsn, ordinal)
            except DerivedUnusable:
                return None

        return careful


def _column(name: str, field: Field | None, number: int) -> tuple[str, type]:
    # Not a tagged type: msgspec takes one without its tag for it.
    value = ("value", _type(field)) if field else ("value", Any, None)
    return field.name if field else f"other_{number}", msgspec.defstruct(
        "Column", [("name", _literal(name)), value], gc=False
    )


def _type(field: Field) -> Any:
    ranged = Annotated[int, msgspec.Meta(ge=INT64_MIN, le=INT64_MAX)]
    fitting: Any = ranged if field.type.python is int else field.type.python
    return fitting | None if field.type.optional else fitting


def _literal(*names: str) -> Any:
    return Literal.__getitem__(names)
