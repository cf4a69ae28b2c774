"""Makes the keys and arguments of the scripts in `lua/` from events and the time; pure.

Every key is made here: a script that makes up its keys escapes access rules.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from replicator.contracts.events import Event, Refusal

WINDOW = "top:content:10m"
WINDOW_STATE = "top:content:window"
"""The word of who keeps the window. Without it, whoever comes first does."""
BUILDING = "top:content:building"
"""The window while it is built."""

COUNT_PREFIX, LAST_PREFIX, SEEN_PREFIX = "content:count:", "content:last:", "engagement:seen:"
NEWEST_PREFIX = "content:newest:"
OWNER = "engagement:seen:owner"
"""Which database the counted events come from: event ids of another one would be taken for repeats."""
GENERATION = "engagement:seen:generation"
"""A random marker, and behind it one of these states, or none. If the marker has changed, Redis was emptied."""
LOST = "lost"
"""Keys are missing: Redis was emptied, and has not been filled again."""
EVICTED = "evicted"
"""Redis has thrown keys away to make room: what is counted is wrong until it is counted anew."""
FILLING = "filling"
"""A rebuild found nothing, and has not finished."""
WHOLE = "whole"
"""A rebuild has finished."""
FORM = "engagement:seen:form"
"""Which rows the keys are made for, in these words. Where there are keys without it: for INSERTED_NUMBERS."""
INSERTED_NUMBERS = "inserted rows whose identity and key are numbers"
INSERTED = "inserted rows whose identity or key is no number"
CHANGING = "rows that change"
PREFIXES = (
    COUNT_PREFIX,
    NEWEST_PREFIX,
    LAST_PREFIX,
    SEEN_PREFIX,
    "top:content:bucket:",
    "top:content:log:",
    WINDOW,
    WINDOW_STATE,
    BUILDING,
)
"""What every key of the replicator begins with."""

PAGE_BITS = 16  # 8 kB a page: the key costs nothing beside it, and a lone event not much
BIT_MASK = 2**PAGE_BITS - 1
BUCKET_SECONDS = 5  # the window is at most this much too short, half of the 10 s that are promised
WINDOW_SECONDS = 600
WINDOW_SPAN_SECONDS = WINDOW_SECONDS - BUCKET_SECONDS  # from its oldest bucket to its newest
WINDOW_EXPIRY_SECONDS = 120  # two minutes after the last slide it is gone rather than stale
KEEPER_EXPIRY_SECONDS = 30  # who keeps it calls every few seconds; another one that is open takes over from the dead
BUCKET_EXPIRY_SECONDS = 900  # from the bucket's start: 5 minutes more than the window needs it
LAST_EXPIRY_SECONDS = 3600
FUTURE_SECONDS_MAX = 86_400
"""Events further ahead are counted but never ranked. Their buckets would have to be kept until their time comes, and a
device whose clock is years ahead would fill Redis with them."""
CALL_CONTENTS = 180
"""A call has so many of many contents: some 2 ms, 4 at worst, and Redis serves nobody else meanwhile."""
CALL_KEYS, CALL_EVENTS = 1_100, 16_000
"""A call ends at so many contents and runs of events, or events: some 6 ms each."""
FEW_CONTENTS = 1_000
"""To put the events of so few together takes us longer than it saves Redis."""

US = 1_000_000
_BUCKET_US = BUCKET_SECONDS * US
TS_BIAS = 2 * 10**17  # makes every microsecond of the years 1 to 9999 a positive number of 18 digits
_ID_BIAS = 2**63  # makes every signed 64-bit id positive, in at most 20 digits
_20_DIGITS = 10**20
_UNORDERED = "its time is infinite or outside the years 1 to 9999; Redis orders and ranks by it"


def continues(ours: str, owner: str) -> bool:
    """Whether we are the keys' owner, or what became of it: a failover begins a later timeline of the same database.

    An earlier one is not: what it has counted, a promoted copy has counted, too, and both go on.
    """
    (name, _, timeline), (known, _, at) = (source.partition(", timeline ") for source in (ours, owner))
    return name == known and (at or "0").isdecimal() and int(at or 0) <= int(timeline or 0)


def naming(prefix: str, redis_name: str, name: str) -> Callable[[str], str]:
    """From a key as it is called here, which is the engagement stream's, to what it is called in Redis."""
    words = {"content:": f"{redis_name}:", "top:content:": f"top:{redis_name}:", "engagement:": f"{name}:"}

    def named(key: str) -> str:
        ours = next(word for word in words if key.startswith(word))
        return f"{prefix}{words[ours]}{key[len(ours) :]}"

    return named if [*words] != [*words.values()] else (lambda key: prefix + key) if prefix else str


class Call(NamedTuple):
    """The keys and arguments of a script."""

    keys: list[str]
    args: list[str | int | bytes]


class Write(NamedTuple):
    """Events for one call of `lua/write.lua`."""

    call: Call
    buckets: list[int]
    """Those that its events belong in."""


def bucket_of(now: float) -> int:
    """Start of the bucket that `now` (Unix seconds) is in."""
    return int(now // BUCKET_SECONDS) * BUCKET_SECONDS


def bucket_key(bucket: int) -> str:
    """The sorted set with the events of a bucket."""
    return f"top:content:bucket:{bucket}"


def log_key(bucket: int) -> str:
    """What was counted in a bucket, in the order of the calls that did."""
    return f"top:content:log:{bucket}"


LOGGED_BYTES = 12


def logged(data: bytes) -> Iterator[tuple[int, int]]:
    """Part of a log, as `lua/write.lua` writes it: which content, and how many more events."""
    return struct.iter_unpack("<qI", data)


def bucket_expiry_seconds(bucket: int, now: float) -> int:
    """How long a bucket is kept from now on.

    A duration by our clock, so that Redis's clock doesn't matter. Never a shorter one: our clock may be set back, and a
    bucket that expires before it has left the window could not be taken out of it.
    """
    return max(BUCKET_EXPIRY_SECONDS, ceil(bucket + BUCKET_EXPIRY_SECONDS - now))


def moment(event: Event) -> str:
    """`(event_ts, event_id)` and the commit's LSN as digits that sort as text the way the numbers do.

    So a later version of the same event, such as a backfill's with corrected content, replaces an earlier one.
    """
    number: Any = event.id  # one number of 58 digits: to format three takes nearly twice as long
    return str((((event.ts_us or 0) + TS_BIAS) * _20_DIGITS + number + _ID_BIAS) * _20_DIGITS + event.commit_lsn)


def refusals(events: Iterable[Event]) -> list[Refusal]:
    """What Redis can't hold."""
    return [Refusal(event, _UNORDERED) for event in events if event.ts_us is None and not event.deleted]


def pack(events: Sequence[Event], now: float) -> Iterator[Write]:
    """Events, none of them refused, as calls; each is made when it is asked for.

    Its contents cost Redis some 5 µs each, its events 0.4 µs: so all events of a content come in one call if they can.
    """
    for part in _parts(events):
        left = iter(part)
        while call := _part(left, now):
            yield call


def _parts(events: Sequence[Event]) -> Sequence[Sequence[Event]]:
    """The events by content, each part for one call. In the order of the stream, as they lie so in memory."""
    keys = [event.key for event in events]
    contents = dict.fromkeys(keys)
    if len(contents) <= FEW_CONTENTS:
        return [events]
    parts: list[list[Event]] = [[] for _ in range(ceil(len(contents) / CALL_CONTENTS))]
    add = {key: parts[number // CALL_CONTENTS].append for number, key in enumerate(contents)}
    for key, event in zip(keys, events, strict=True):
        add[key](event)
    return parts


def _part(events: Iterator[Any], now: float) -> Write | None:
    """Take events for one call. In it, they are indices into the lists of keys, from 1 (bucket 0: none).

    One loop over plain ints and dictionaries, because it runs for every event on the reader's loop (0.3 µs each).
    """
    earliest_us, latest_us = rankable_us(now)
    contents: dict[int, int] = {}
    newest: list[Event] = []
    runs: dict[tuple[int, int | None], list[int]] = {}
    last: tuple[int, int | None] | None = None
    run: list[int] = []
    for event in islice(events, CALL_EVENTS):
        ts_us, event_id, key = event.ts_us or 0, event.id, event.key
        content = contents.get(key)
        if content is None:
            newest.append(event)
            content = contents[key] = len(newest)
        else:
            other = newest[content - 1]
            if ts_us > (other_us := other.ts_us or 0) or (
                ts_us == other_us and (event_id, event.commit_lsn) > (other.id, other.commit_lsn)
            ):
                newest[content - 1] = event
        place = event_id >> PAGE_BITS, ts_us // _BUCKET_US if earliest_us <= ts_us < latest_us else None
        if place != last:
            run, last = runs.setdefault(place, []), place
        run += (event_id & BIT_MASK, content)
        if len(newest) + len(runs) >= CALL_KEYS:
            break
    return _write(runs, newest, now) if newest else None


def rankable_us(now: float) -> tuple[int, int]:
    """The range of event times whose buckets are kept, in microseconds. Older buckets have expired by now."""
    earliest = bucket_of(now - BUCKET_EXPIRY_SECONDS) + BUCKET_SECONDS
    return earliest * US, int((now + FUTURE_SECONDS_MAX) * US)


def _write(runs: Mapping[tuple[int, int | None], list[int]], newest: Sequence[Event], now: float) -> Write:
    pages = _numbered(page for page, _ in runs)
    buckets = _numbered(bucket for _, bucket in runs if bucket is not None)
    numbers: list[int] = []
    for (page, bucket), run in runs.items():
        numbers += (pages[page], 0 if bucket is None else buckets[bucket], len(run) // 2)
        numbers += run
    packed = struct.pack(f"<{len(numbers)}H", *numbers)
    starts = [bucket * BUCKET_SECONDS for bucket in buckets]
    return Write(_write_call(list(pages), starts, newest, packed, now), starts)


def _numbered(things: Iterable[int]) -> dict[int, int]:
    """Each of them once, numbered from 1."""
    return {thing: number for number, thing in enumerate(dict.fromkeys(things), 1)}


def _write_call(
    pages: Sequence[int], buckets: Sequence[int], newest: Sequence[Event], packed: bytes, now: float
) -> Call:
    contents = [str(event.key) for event in newest]
    keys = [WINDOW, WINDOW_STATE, *(f"{SEEN_PREFIX}{page}" for page in pages)]
    keys += [*map(bucket_key, buckets), *map(log_key, buckets)]
    keys += [COUNT_PREFIX + content for content in contents]
    keys += [NEWEST_PREFIX + content for content in contents]
    keys += [LAST_PREFIX + content for content in contents]
    args: list[str | int | bytes] = [len(pages), len(buckets), LAST_EXPIRY_SECONDS, packed]
    args.append(struct.pack(f"<{len(newest)}q", *(event.key for event in newest)))
    args += [bucket_expiry_seconds(bucket, now) for bucket in buckets]
    args += [moment(event) for event in newest]
    args += [event.json for event in newest]
    return Call(keys, args)


def kept_buckets(now: float) -> range:
    """The buckets that have begun and not expired by now."""
    newest = bucket_of(now)
    return range(newest - BUCKET_EXPIRY_SECONDS + BUCKET_SECONDS, newest + 1, BUCKET_SECONDS)


def window_buckets(now: float) -> range:
    """Those of them that the window is the sum of."""
    newest = bucket_of(now)
    return range(newest - WINDOW_SPAN_SECONDS, newest + 1, BUCKET_SECONDS)


def sizes_call(buckets: Sequence[int]) -> Call:
    """For `lua/sizes.lua`."""
    return Call([*map(log_key, buckets)], [])


def window_call(
    word: str, action: str, *args: int | str, target: str = WINDOW, keep: int = WINDOW_EXPIRY_SECONDS
) -> Call:
    """For `lua/window.lua`; the target is kept so many seconds."""
    return Call([WINDOW_STATE, WINDOW, BUILDING, target], [word, KEEPER_EXPIRY_SECONDS, keep, action, *args])
