"""The copies of contents that are kept beside a checkpoint: what a restart begins with.

`content.py` reads and fills them; `checkpoint_store` has the tables.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

import msgspec

from enrichment.events.draft import Content, fitting
from enrichment.tables.declared import Join
from replicator.contracts import stores
from replicator.contracts.events import Checkpoint, Id, Lsn, format_lsn, parse_lsn

Page: TypeAlias = list[tuple[Id, Content]]
"""Contents with their ids, highest first; a table with children may have an id twice."""


class Copies(NamedTuple):
    """What a checkpoint says of its copies; as text it is `Checkpoint.contents`."""

    name: str = ""
    """Of the tables that they are of; empty: there is none that can be used."""
    until: Lsn = 0
    """Changes of content up to here are in them already."""
    as_of: Lsn = 0
    """The checkpoint's `end_lsn`."""

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> Copies:
        """Those of the checkpoint. An older release moves it and leaves the rest: then the copies are not as of it."""
        parts = (checkpoint.contents or "").split() if checkpoint else []
        if checkpoint is None or len(parts) != len(cls._fields) or parts[-1] != format_lsn(checkpoint.end_lsn):
            return cls()
        name, until, _ = parts
        return cls(name, parse_lsn(until), checkpoint.end_lsn)

    def __str__(self) -> str:
        return f"{self.name} {format_lsn(self.until)} {format_lsn(self.as_of)}"


class Copy:
    """The copy of one dimension of a slot, in the store's thread."""

    def __init__(self, store: stores.Contents, slot: str, join: Join) -> None:
        self._store = store
        self._join = join
        self._slot = slot

    async def clear(self) -> None:
        """Begin a new copy."""
        await asyncio.to_thread(self._store.clear_contents, self._slot)

    async def add(self, found: Page) -> None:
        """Add these to it."""
        texts = {content_id: content_text(content) for content_id, content in found}
        await asyncio.to_thread(self._store.add_contents, self._slot, texts)

    async def find(self, ids: Collection[Id]) -> dict[Id, Content]:
        """The content of each id."""
        found = await asyncio.to_thread(self._store.find_contents, self._slot, ids)
        return dict.fromkeys(ids, self._join.missing) | {
            content_id: self._parsed(text) for content_id, text in found.items()
        }

    async def newest(self, highest: Id, most: int) -> Page:
        """Those with the highest ids up to this one, highest first."""
        found = await asyncio.to_thread(self._store.newest_contents, self._slot, highest, most)
        return [(content_id, self._parsed(text)) for content_id, text in found.items()]

    def _parsed(self, text: str) -> Content:
        return fitting(self._join, interned(_decode(text)))


def interned(values: Iterable[Any]) -> Content:
    """The values as a content. Few texts differ among many contents: each text once takes a third of the memory."""
    return tuple(sys.intern(value) if type(value) is str else value for value in values)


_encode = msgspec.json.Encoder(decimal_format="number").encode
_decode = msgspec.json.Decoder(tuple[Any, ...], float_hook=Decimal).decode


def content_text(content: Content) -> str:
    """As it is kept."""
    return _encode(content).decode()
