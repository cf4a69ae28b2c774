"""Makes the keys and arguments of `lua/write.lua` and `lua/slide.lua` from events and the time; pure.

Every key is made here: a script that makes up its keys escapes access rules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

from replicator.contracts.events import Event, Refusal

WINDOW = "top:content:10m"
WINDOW_STATE = "top:content:window"
"""Start of the newest bucket in the window. Without it the window is built from its buckets."""

COUNT_PREFIX, SEEN_PREFIX = "content:count:", "engagement:seen:"
OWNER = "engagement:seen:owner"
"""Which database the counted events come from: event ids of another one would be taken for repeats."""
GENERATION = "engagement:seen:generation"
"""A random marker. If it has changed, Redis was emptied."""
PREFIXES = (
    COUNT_PREFIX,
    "content:newest:",
    "content:last:",
    SEEN_PREFIX,
    "top:content:bucket:",
    WINDOW,
    WINDOW_STATE,
)
"""What every key of the replicator begins with."""

PAGE_BITS = 16  # 8 kB a page: the key costs nothing beside it, and a lone event not much
BIT_MASK = 2**PAGE_BITS - 1
BUCKET_SECONDS = 5  # the window is at most this much too short, half of the 10 s that are promised
WINDOW_SECONDS = 600
WINDOW_SPAN_SECONDS = WINDOW_SECONDS - BUCKET_SECONDS  # from its oldest bucket to its newest
WINDOW_EXPIRY_SECONDS = 120  # two minutes after the last slide it is gone rather than stale
BUCKET_EXPIRY_SECONDS = 900  # from the bucket's start: 5 minutes more than the window needs it
LAST_EXPIRY_SECONDS = 3600
FUTURE_SECONDS_MAX = 86_400
"""Events further ahead are counted but never ranked. Their buckets would have to be kept until their time comes, and a
device whose clock is years ahead would fill Redis with them."""
SLIDE_SECONDS_MAX = 60  # a window further behind (or ahead, after a clock was set back) is built from its buckets

_US = 1_000_000
_BUCKET_US = BUCKET_SECONDS * _US
_TS_BIAS = 2 * 10**17  # makes every microsecond of the years 1 to 9999 a positive number of 18 digits
_ID_BIAS = 2**63  # makes every signed 64-bit id positive, in at most 20 digits
_UNORDERED = "event_ts is infinite or outside the years 1 to 9999; Redis orders and ranks by it"


class Call(NamedTuple):
    """The keys and arguments of a script."""

    keys: list[str]
    args: list[str | int | bytes]


class Write(NamedTuple):
    """A batch for `lua/write.lua`."""

    call: Call
    ranked: bool
    """Whether any event belongs in a bucket."""
    refused: list[Refusal]


def bucket_of(now: float) -> int:
    """Start of the bucket that `now` (Unix seconds) is in."""
    return int(now // BUCKET_SECONDS) * BUCKET_SECONDS


def bucket_key(bucket: int) -> str:
    """The sorted set with the events of a bucket."""
    return f"top:content:bucket:{bucket}"


def moment(event: Event) -> str:
    """`(event_ts, event_id)` and the commit's LSN as digits that sort as text the way the numbers do.

    So a later version of the same event, such as a backfill's with corrected content, replaces an earlier one.
    """
    return f"{(event.ts_us or 0) + _TS_BIAS}{event.id + _ID_BIAS:020}{event.commit_lsn:020}"


def pack(events: Iterable[Event], now: float) -> Write:
    """A batch as one call. Events are indices into the lists of keys, from 1 (bucket 0: none), so big ids stay text.

    One loop over plain ints and dictionaries, because it runs for every event on the reader's loop (0.3 µs each).
    """
    earliest_us, latest_us = _rankable_us(now)
    pages: dict[int, int] = {}
    buckets: dict[int, int] = {}
    contents: dict[int, int] = {}
    newest: list[Event] = []
    indices: list[int] = []
    refused: list[Refusal] = []
    for event in events:
        ts_us, event_id, key = event.ts_us, event.id, event.key
        if ts_us is None:
            refused.append(Refusal(event, _UNORDERED))
            continue
        content = contents.get(key, 0)
        if not content:
            newest.append(event)
            content = contents[key] = len(newest)
        elif _is_newer(ts_us, event_id, newest[content - 1]):
            newest[content - 1] = event
        page = pages.setdefault(event_id >> PAGE_BITS, len(pages) + 1)
        rankable = earliest_us <= ts_us < latest_us
        bucket = buckets.setdefault(ts_us // _BUCKET_US, len(buckets) + 1) if rankable else 0
        indices += (page, event_id & BIT_MASK, content, bucket)
    starts = [bucket * BUCKET_SECONDS for bucket in buckets]
    return Write(_write_call(pages, starts, newest, indices, now), bool(starts), refused)


def _is_newer(ts_us: int, event_id: int, other: Event) -> bool:
    other_us = other.ts_us or 0  # never None: those are refused
    return ts_us > other_us or (ts_us == other_us and event_id > other.id)


def _rankable_us(now: float) -> tuple[int, int]:
    """The range of event times whose buckets are kept, in microseconds. Older buckets have expired by now."""
    earliest = bucket_of(now - BUCKET_EXPIRY_SECONDS) + BUCKET_SECONDS
    return earliest * _US, int((now + FUTURE_SECONDS_MAX) * _US)


def _write_call(
    pages: Iterable[int], buckets: Sequence[int], newest: Sequence[Event], indices: Sequence[int], now: float
) -> Call:
    contents = [str(event.key) for event in newest]
    seen = [f"{SEEN_PREFIX}{page}" for page in pages]
    keys = [WINDOW, WINDOW_STATE, *seen, *map(bucket_key, buckets)]
    keys += [COUNT_PREFIX + content for content in contents]
    keys += ["content:newest:" + content for content in contents]
    keys += ["content:last:" + content for content in contents]
    args: list[str | int | bytes] = [len(seen), len(buckets), WINDOW_SPAN_SECONDS, LAST_EXPIRY_SECONDS]
    args.append(struct.pack(f"<{len(indices)}i", *indices))
    args += buckets
    # A duration by our clock, so that Redis's clock doesn't matter. Never a shorter one: our clock may be set back,
    # and a bucket that expires before it has left the window would stay counted in it.
    args += [max(BUCKET_EXPIRY_SECONDS, ceil(bucket + BUCKET_EXPIRY_SECONDS - now)) for bucket in buckets]
    args += [moment(event) for event in newest]
    args += [event.json for event in newest]
    return Call(keys, args)


def slide_call(now: float) -> Call:
    """The window at `now`, for `lua/slide.lua`: its buckets, and those that it may have to drop."""
    newest = bucket_of(now)
    first = newest - WINDOW_SPAN_SECONDS - SLIDE_SECONDS_MAX
    last = newest + SLIDE_SECONDS_MAX
    keys = [WINDOW, WINDOW_STATE, *map(bucket_key, range(first, last + 1, BUCKET_SECONDS))]
    return Call(keys, [newest, first, BUCKET_SECONDS, WINDOW_SPAN_SECONDS, SLIDE_SECONDS_MAX, WINDOW_EXPIRY_SECONDS])
