"""What Redis has counted, for `reconcile`; a `contracts.ledger.EventCounter`. `keys.py` makes the keys and bits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

from replicator.contracts.errors import SinkUnusable
from replicator.contracts.events import Event, Id
from replicator.contracts.fields import Stream, Type
from replicator.contracts.sink import Held
from sinks.redis.client import RedisClient
from sinks.redis.errors import foreign_cure
from sinks.redis.keys import BIT_MASK, COUNT_PREFIX, LAST_PREFIX, PAGE_BITS, SEEN_PREFIX
from sinks.redis.rows.plan import State
from sinks.redis.rows.writer import RowsWriter

PAGES = 64  # half a megabyte an answer


class RedisLedger:
    """The counts in `redis`."""

    def __init__(
        self, redis: RedisClient, require_ours: Callable[[], Awaitable[None]], rows: RowsWriter | None, stream: Stream
    ) -> None:
        """`require_ours` raises SinkUnusable if what is counted here are another source's events."""
        self._redis = redis
        self._rows = rows
        self._identity = stream.identity.name
        self._key = stream.key.type
        self._require_ours = require_ours

    async def counts(self, keys: Sequence[Id]) -> list[int]:
        await self._require_ours()
        found = await self._redis.values([f"{COUNT_PREFIX}{key}" for key in keys])
        try:
            return [int(value or b"0") for value in found]
        except ValueError:
            detail = f"a key of {self._redis.named(COUNT_PREFIX)}* is not a number"
            raise SinkUnusable(sink=self._redis.sink, detail=detail, cure=foreign_cure(self._redis.named)) from None

    async def keys(self) -> AsyncIterator[Sequence[Id]]:
        """Other programs' keys, which only begin like ours, are left out."""
        await self._require_ours()
        async for page in self._redis.names(COUNT_PREFIX):
            yield [key for text in page if (key := _read_key(self._key, text)) is not None]

    async def unseen(self, ids: Sequence[Id]) -> list[Id]:
        await self._require_ours()
        if self._rows:
            states = await self._rows.states(ids)
            return [event_id for event_id in ids if State.parse(states[event_id]).key is None]
        return list(await self._unset([int(event_id) for event_id in ids]))

    async def _unset(self, ids: Sequence[int]) -> list[int]:
        pages = sorted({event_id >> PAGE_BITS for event_id in ids})
        unseen: list[int] = []
        for start in range(0, len(pages), PAGES):
            some = pages[start : start + PAGES]
            found = await self._redis.values([f"{SEEN_PREFIX}{page}" for page in some])
            bits = {page: value or b"" for page, value in zip(some, found, strict=True)}
            unseen += [event_id for event_id in ids if event_id >> PAGE_BITS in bits and not _is_set(bits, event_id)]
        return unseen

    async def trace(self, event_id: Id, event: Event | None) -> Held:
        """Whether one event was counted, and what is kept of its content."""
        counted = not await self.unseen([event_id])
        if event is None:
            return Held(counted)
        count, last = f"{COUNT_PREFIX}{event.key}", f"{LAST_PREFIX}{event.key}"
        number, text = await self._redis.values([count, last])
        count, last = self._redis.named(count), self._redis.named(last)
        notes = [f"{count} is {(number or b'0').decode(errors='replace')}"]
        try:
            fields: dict[str, Any] = dict(json.loads(text, parse_float=Decimal)) if text else {}
        except (ValueError, TypeError):
            return Held(counted, notes=[*notes, f"{last} is no event"])
        if fields.get(self._identity) == event_id:
            return Held(counted, fields, notes=notes)
        other = f"is event {fields.get(self._identity)}" if fields else "has expired, an hour after the newest event"
        return Held(counted, notes=[*notes, f"{last} {other}"] if counted else notes)


def _read_key(kind: Type, text: str) -> Id | None:
    """From its text; None: it can't be one."""
    try:
        key = int(text) if kind.python is int else str(UUID(text)) if kind.postgres == "uuid" else text
    except ValueError:
        return None
    return key if str(key) == text and kind.fits(key) else None


def _is_set(bits: dict[int, bytes], event_id: int) -> bool:
    page, place = bits[event_id >> PAGE_BITS], event_id & BIT_MASK
    return place >> 3 < len(page) and bool(page[place >> 3] & 128 >> (place & 7))
