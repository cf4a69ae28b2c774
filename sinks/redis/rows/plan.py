"""What changes in Redis when rows do; pure. `lua/rows.lua` applies it, if nothing has changed meanwhile.

What is known of a row is its last version, and where it is counted: in which bucket, for which key. A version that is
not newer changes nothing, whatever comes again, in any order. A row that is gone stays known, for the same reason; so
does one without a time that Redis could rank it by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from replicator.contracts.events import Event, Id
from sinks.redis.keys import (
    COUNT_PREFIX,
    LAST_EXPIRY_SECONDS,
    LAST_PREFIX,
    NEWEST_PREFIX,
    TS_BIAS,
    US,
    Call,
    bucket_expiry_seconds,
    bucket_key,
    bucket_of,
    rankable_us,
)

ROWS = "engagement:seen:rows"
VERSION_DIGITS = 32

_encode = msgspec.msgpack.Encoder().encode


class State(NamedTuple):
    """What is known of a row."""

    version: int = -1
    bucket: int | None = None
    """The start of the one that it is counted in, if there is one."""
    key: str | None = None
    """What it is counted for; None: it is gone, or never was there."""

    @classmethod
    def parse(cls, text: str) -> State:
        """From what the hash has; empty: nothing."""
        if not text:
            return cls()
        bucket, counted, key = text[VERSION_DIGITS:].partition(" ")
        return cls(int(text[:VERSION_DIGITS], 16), int(bucket) if bucket else None, key if counted else None)

    def __str__(self) -> str:
        counted = "" if self.key is None else f"{'' if self.bucket is None else self.bucket} {self.key}"
        return f"{self.version:0{VERSION_DIGITS}x}{counted}"


def _is_there(event: Event) -> bool:
    """Whether it leaves a row. One without a time is refused, and none: `reconcile` and a rebuild don't see it."""
    return event.ts_us is not None and not event.deleted


def newest_of(events: Sequence[Event], states: Mapping[Id, str]) -> list[str]:
    """The keys whose newest row has to be known before these events can be planned."""
    keys = {str(event.key) for event in events if _is_there(event)}
    keys |= {key for text in states.values() if (key := State.parse(text).key) is not None}
    return sorted(keys)


def _whose(newest: str) -> str:
    """Which row is a key's newest."""
    return newest.partition(" ")[2]


class Plan:
    """The changes of some events, in their order; `states` is what is known of their rows, `newest` of their keys."""

    def __init__(self, states: Mapping[Id, str], newest: Mapping[str, str], now: float, *, follows: bool) -> None:
        self.new = 0
        """Rows that were not known."""
        self._before, self._newest_before = states, newest
        self._states: dict[Id, State] = {}
        self._newest = dict(newest)
        self._lasts: dict[str, str | None] = {}
        self._same: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._ranks: Counter[tuple[int, str]] = Counter()
        self._follows = follows
        self._now = now
        self._rankable = rankable_us(now)

    def add(self, event: Event) -> None:
        """One event more."""
        old = self._states.get(event.id) or State.parse(self._before.get(event.id, ""))
        if event.version <= old.version:
            return
        state = State(event.version)
        if _is_there(event):
            self.new += old.version < 0
            state = State(event.version, self._bucket(event), str(event.key))
        self._states[event.id] = state
        for counted, sign in ((old, -1), (state, 1)):
            if counted.key is not None:
                self._counts[counted.key] += sign
                if counted.bucket is not None and self._is_kept(counted.bucket):
                    self._ranks[counted.bucket, counted.key] += sign
        if old.key is not None and old.key != state.key and _whose(self._newest.get(old.key, "")) == str(event.id):
            self._newest[old.key], self._lasts[old.key] = "", None
        if state.key is not None:
            self._keep_newest(state.key, event)

    def _keep_newest(self, key: str, event: Event) -> None:
        before, name = self._newest.get(key, ""), f" {event.id}"
        # Of rows that change the one that was changed last; else the newest by time. Its own later version replaces it.
        order = f"{event.version:0{VERSION_DIGITS}x}" if self._follows else f"{(event.ts_us or 0) + TS_BIAS}"
        if order + name >= before or _whose(before) == str(event.id):
            if not self._follows and before == order + name and key not in self._lasts:
                self._same.add(key)
            self._newest[key], self._lasts[key] = order + name, event.json.decode()  # Redis reads no binary values

    def _bucket(self, event: Event) -> int | None:
        first, end = self._rankable
        return bucket_of(event.ts_us / US) if event.ts_us is not None and first <= event.ts_us < end else None

    def _is_kept(self, bucket: int) -> bool:
        return self._rankable[0] <= bucket * US < self._rankable[1]

    def call(self) -> Call | None:
        """For `lua/rows.lua`; None: nothing changes."""
        if not self._states:
            return None
        keys = {ROWS: 1}

        def number(key: str) -> int:
            return keys.setdefault(key, len(keys) + 1)

        commands: list[list[Any]] = []
        for event_id, state in self._states.items():
            commands.append(["HSET", 1, str(event_id), str(state)])
        for key, n in self._counts.items():
            if n:
                commands.append(["INCRBY", number(COUNT_PREFIX + key), n])
        counts = [number(COUNT_PREFIX + key) for key, n in self._counts.items() if n]
        for key, last in self._lasts.items():
            commands += self._last(number(NEWEST_PREFIX + key), number(LAST_PREFIX + key), key, last)
        buckets = []
        for (bucket, key), n in self._ranks.items():
            if n:
                buckets.append(number(bucket_key(bucket)))
                commands.append(["ZINCRBY", buckets[-1], n, key])
                commands.append(["EXPIRE", buckets[-1], bucket_expiry_seconds(bucket, self._now)])
        plan = {
            "ids": [str(event_id) for event_id in self._states],
            "states": [self._before.get(event_id, "") for event_id in self._states],
            "newest": [[number(NEWEST_PREFIX + key), self._newest_before.get(key, "")] for key in self._lasts],
            "counts": counts,
            "lasts": [number(LAST_PREFIX + key) for key in self._lasts],
            "buckets": buckets,
            "commands": commands,
        }
        return Call([*keys], [_encode(plan)])

    def _last(self, newest: int, last: int, key: str, json: str | None) -> list[list[Any]]:
        if json is None:
            return [["UNLINK", newest], ["UNLINK", last]]
        keep: list[Any] = (
            ["SET", last, json, "XX", "KEEPTTL"] if key in self._same else ["SETEX", last, LAST_EXPIRY_SECONDS, json]
        )
        return [["SET", newest, self._newest[key]], keep]
