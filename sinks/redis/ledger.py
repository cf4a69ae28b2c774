"""What Redis has counted, for `reconcile`; a `contracts.ledger.EventCounter`. `keys.py` makes the keys and bits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from replicator.contracts.errors import SinkUnusable
from sinks.redis.client import SINK, RedisClient
from sinks.redis.errors import FOREIGN_CURE
from sinks.redis.keys import BIT_MASK, COUNT_PREFIX, PAGE_BITS, SEEN_PREFIX

PAGES = 64  # half a megabyte an answer


class RedisLedger:
    """The counts in `redis`."""

    def __init__(self, redis: RedisClient, require_ours: Callable[[], Awaitable[None]]) -> None:
        """`require_ours` raises SinkUnusable if what is counted here are another source's events."""
        self._redis = redis
        self._require_ours = require_ours

    async def counts(self, keys: Sequence[int]) -> list[int]:
        await self._require_ours()
        found = await self._redis.values([f"{COUNT_PREFIX}{key}" for key in keys])
        try:
            return [int(value or b"0") for value in found]
        except ValueError:
            detail = "a key of content:count:* is not a number"
            raise SinkUnusable(sink=SINK, detail=detail, cure=FOREIGN_CURE) from None

    async def unseen(self, ids: Sequence[int]) -> list[int]:
        await self._require_ours()
        pages = sorted({event_id >> PAGE_BITS for event_id in ids})
        unseen: list[int] = []
        for start in range(0, len(pages), PAGES):
            some = pages[start : start + PAGES]
            found = await self._redis.values([f"{SEEN_PREFIX}{page}" for page in some])
            bits = {page: value or b"" for page, value in zip(some, found, strict=True)}
            unseen += [event_id for event_id in ids if event_id >> PAGE_BITS in bits and not _is_set(bits, event_id)]
        return unseen


def _is_set(bits: dict[int, bytes], event_id: int) -> bool:
    page, place = bits[event_id >> PAGE_BITS], event_id & BIT_MASK
    return place >> 3 < len(page) and bool(page[place >> 3] & 128 >> (place & 7))
