"""The Redis sink: every content's newest event and exact count, and what was watched most in the last 10 minutes.

A `write` is one or more calls of `lua/write.lua`, each whole or not at all; `keys.py` makes their keys and arguments.
`window.py` keeps the ranking, `client.py` talks to Redis, `errors.py` interprets its errors; the lane
(`replicator/delivery/lane.py`) retries.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import ClassVar, cast

from replicator.contracts.errors import SinkError, SinkUnavailable, SinkUnusable, SourceError, command
from replicator.contracts.events import Event, Finding, Id, Refusal, SinkPosition
from replicator.contracts.fields import Stream
from replicator.contracts.settings import variable
from replicator.contracts.sink import HasCounter, Held, Mode, Ranks, Rebuildable, Sink, SinkContext, Traces
from sinks.redis.client import RedisClient, script
from sinks.redis.errors import OF_ROWS, evicted_error, foreign_error, form_error, lost_error
from sinks.redis.info import findings
from sinks.redis.keys import (
    CHANGING,
    EVICTED,
    FILLING,
    INSERTED,
    INSERTED_NUMBERS,
    LOST,
    OWNER,
    PREFIXES,
    WHOLE,
    WINDOW,
    Call,
    continues,
    naming,
    pack,
    refusals,
)
from sinks.redis.ledger import RedisLedger
from sinks.redis.rows.writer import CALL_EVENTS, RowsWriter, UnionWindow
from sinks.redis.settings import RedisSettings
from sinks.redis.window import Window

EMPTY_TIMEOUT_SECONDS = 3600.0  # some 1 µs a key

UNKNOWN = -1
RUNS = 16
"""So many of Redis's runs are remembered: more than answer behind a proxy."""

RESTARTED = (
    "Redis at %s was restarted, or another one answers now. Unless it keeps an append-only file with appendfsync"
    " always, it may have lost its latest writes. %s over the last hours finds and repairs them"
)
VERIFY_CURE = (
    "Anyone in between can read the password: remove ssl_cert_reqs and ssl_check_hostname from REPLICATOR_REDIS_URL"
)

_LOSSES = {LOST: lost_error, EVICTED: evicted_error}

_log = logging.getLogger(__name__)


class RedisSink(Sink, HasCounter, Ranks, Rebuildable, Traces):
    """Exact under replay: a bit per event says whether it was counted.

    What Redis loses, a backfill brings back. A backfill writes counts and last events; the window is left to the
    running replicator, and expires if there is none, for no window is better than a stale one.
    """

    name = "redis"
    settings_class: ClassVar = RedisSettings
    takes_any_stream = True
    max_events = 64_000  # in a backlog: a content costs most, and once a write
    concurrency = 2  # one is with Redis while the other waits for a busy loop: half as fast again in a backlog

    def __init__(
        self, settings: RedisSettings, context: SinkContext, *, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(settings, context)
        stream = context.stream
        self.new_events: int = 0
        self._settings = settings
        self._named = naming(settings.redis_prefix, stream.redis_name or stream.name, stream.name)
        self._redis = RedisClient(self.name, settings.redis_url, settings.redis_timeout_seconds, self._named)
        self._script = script("write")
        self._clock = clock
        numbered = stream.identity.type.python is stream.key.type.python is int
        self._form = CHANGING if stream.follows else INSERTED_NUMBERS if numbered else INSERTED
        self._form_known = False
        self._rows = None if self._form == INSERTED_NUMBERS else self._rows_of(stream)
        self.window = UnionWindow(self._redis, clock) if self._rows else Window(self._redis, clock)
        self._keeps_window = True
        self._resumes = False
        self._generation = ""
        self._runs = dict[str, int]()  # of Redis that we know, the latest last, and how many keys it has thrown away
        self._state = ""  # LOST or EVICTED, while keys are missing
        self._ours: str | None = None  # empty: it can't be known
        self._rival = ""  # the owner for which we last asked who we are
        self._foreign: SinkError | None = None

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
        """Try all commands on keys of a probe, bring the window to the present, and keep it there."""
        self._resumes, self._keeps_window = start is not None, mode is Mode.LIVE
        await self._probe()
        await self._require_ours(claim=True)
        if self._keeps_window:
            await self.window.slide()
            await self._notice_loss()
            self.window.keep(self._look, self.refresh)

    async def check(self) -> list[Finding]:
        address = self._redis.address
        try:
            await self._probe()
            with suppress(SourceError):  # PostgreSQL's own line says so
                await self._require_ours(claim=False)
            info, appendfsync = await self._redis.info(), await self._redis.appendfsync()
        except SinkError as exc:
            cure = f"Start Redis, or correct {variable('redis_url')}" if isinstance(exc, SinkUnavailable) else exc.cure
            return [Finding(False, f"Redis at {address}: {exc.detail}", cure)]
        unverified = (
            [Finding(True, f"Redis at {address} is not verified", VERIFY_CURE)] if self._redis.unverified else []
        )
        return [
            Finding(True, f"Redis at {address} answers and may be written to"),
            *unverified,
            *([Finding(False, lost.problem, lost.cure)] if (lost := self._lost) else []),
            *findings(info, appendfsync, self.context.stream_option),
        ]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """Also raises what hinders the window, or has ended its task."""
        self._raise_what_lasts()
        if self._rows:
            self.new_events += await self._rows.write(events)
            if self._keeps_window and self.window.failure:
                await self.window.slide()
            return refusals(events)
        refused = refusals(events)
        kept = [event for event in events if event.ts_us is not None] if refused else events
        for part in pack(kept, self._clock()):
            [new] = await self._redis.run(self._script, part.call, returns=1)
            self.new_events += new
            if self._keeps_window and part.buckets:
                self.window.written()
            if self._keeps_window and self.window.failure:
                await self.window.slide()
        return refused

    def look(self) -> None:
        """Keys that have become another source's or are gone, and a window that is not kept right."""
        self._raise_what_lasts()
        if found := self.window.failure or self._lost:
            raise found

    def remember(self) -> str:
        return " ".join([self._state] * bool(self._state) + [f"{run}={evicted}" for run, evicted in self._runs.items()])

    def recall(self, memory: str) -> None:
        """That keys are missing, which Redis knows, too, but it is not asked while the sink is paused; and its runs.

        A power cut ends Redis and us: Redis comes back without its latest writes, and only its run tells.
        """
        known = memory.split()
        self._state = next((word for word in known if word in _LOSSES), "")
        self._runs = dict(_run(word) for word in known if word not in _LOSSES)

    async def renew(self) -> None:
        self._settings = cast("RedisSettings", self.settings)
        await self._redis.login_as(self._settings.redis_url)

    async def close(self) -> None:
        try:
            await self.window.stop()
        finally:
            await self._redis.close()

    def counter(self) -> RedisLedger:
        return RedisLedger(self._redis, partial(self._require_ours, claim=False), self._rows, self.stream)

    async def top(self, most: int) -> list[tuple[Id, int]]:
        return await self._redis.highest(WINDOW, most, self.stream.key.type.python)

    async def trace(self, event_id: Id, event: Event | None) -> Held:
        return await self.counter().trace(event_id, event)

    async def generation(self) -> str:
        await self._require_form(claim=True)
        found = await self._redis.generation(FILLING)
        return f"{found.word} {found.run}={found.evicted}" if found.run else found.word

    async def filled(self, generation: str) -> None:
        word, _, run = generation.partition(" ")
        await self._redis.mark(word, WHOLE, FILLING, LOST, "")
        self._runs |= [_run(run)] if run else []

    async def empty(self) -> int:
        """Takes some 1 µs a key. Redis serves nobody meanwhile, and finishes whether anyone waits or not.

        It needs no `open`, which refuses keys that are made for other rows.
        """
        await self._probe()
        await self._require_source(claim=True)
        url, timeout_seconds = self._settings.redis_url, self._settings.redis_timeout_seconds
        patient = RedisClient(self.name, url, timeout_seconds, self._named, EMPTY_TIMEOUT_SECONDS)
        try:
            [deleted] = await patient.run(script("empty"), Call([], [*map(self._named, PREFIXES)]), returns=1)
        finally:
            await patient.close()
        self._form_known = True
        return deleted

    def _rows_of(self, stream: Stream) -> RowsWriter:
        self._redis.rights += OF_ROWS
        self.max_events = CALL_EVENTS
        self.concurrency = 1
        return RowsWriter(self._redis, self._clock, follows=stream.follows)

    def _raise_what_lasts(self) -> None:
        self.window.raise_bug()
        if self._foreign:
            raise self._foreign

    async def _look(self) -> None:
        """Notice what happens to the keys between two writes."""
        try:
            await self._require_ours(claim=True)  # Redis may have been emptied, and another been faster
            self._foreign = None
        except SinkUnusable as exc:
            self._foreign = exc
        await self._notice_loss()

    async def _require_ours(self, *, claim: bool) -> None:
        """Raise SinkUnusable if the keys are made for other rows, or are another source's."""
        await self._require_form(claim=claim)
        await self._require_source(claim=claim)

    async def _require_form(self, *, claim: bool) -> None:
        """Raise SinkUnusable if the keys are made for other rows: what they have counted would be counted again."""
        found = await self._redis.form(self._form, claim=claim, known=self._form_known)
        if found != self._form:
            raise form_error(self.name, found, self._form, self.context.stream_option)
        self._form_known |= claim

    async def _require_source(self, *, claim: bool) -> None:
        """Raise SinkUnusable if the keys are another source's: event ids of two would be taken for repeats."""
        if self._ours is None:
            self._ours = await self.context.origin()
        if not self._ours or (owner := await self._redis.owner(self._ours, claim=claim)) == self._ours:
            return
        if owner != self._rival:  # we may have followed a failover meanwhile
            with suppress(SourceError):  # no answer: asked again at the next look, and until then the keys are not ours
                if known := await self.context.origin():
                    self._ours, self._rival = known, owner
        if not continues(self._ours, owner):
            raise foreign_error(self.name, owner, self._ours, self._named(OWNER))
        if claim:
            await self._redis.adopt(self._ours)

    @property
    def _lost(self) -> SinkError | None:
        """That keys are missing."""
        return _LOSSES[self._state](self.name, self._redis.address, self.context.stream_option) if self._state else None

    async def _notice_loss(self) -> None:
        """Say that keys are gone, until they are made again, or may be: writing goes on as if nothing had happened."""
        before = self._generation
        found = await self._redis.generation(LOST if before or self._resumes else "")
        changed = bool(before) and before != found.word
        # Behind some proxies several answer in turn. Where INFO is denied, there is no run.
        if restarted := bool(self._runs and found.run and found.run not in self._runs):
            self.window.forget()
        # With a volatile policy only those go that expire by themselves soon.
        evicts = UNKNOWN < self._runs.get(found.run, UNKNOWN) < found.evicted and "volatile" not in found.policy
        lost = found.state == LOST or (found.state == FILLING and (changed or self._resumes))
        if evicts or found.state == EVICTED:
            self._state = EVICTED
        elif lost or (changed and found.state != WHOLE):
            self._state = LOST
        else:
            self._state = ""
            if restarted and not changed:
                cure = command(f"reconcile --start ... --end ... --repair{self.context.stream_option}")
                _log.error(RESTARTED, self._redis.address, cure, extra={"code": "R516"})
        if self._state not in {"", found.state} and not await self._redis.mark(found.word, self._state, found.state):
            return  # a rebuild was faster, which may have counted before the keys went: the next look compares again
        self._generation = found.word
        self._runs |= {found.run: found.evicted} if found.run else {}
        if len(self._runs) > RUNS:
            del self._runs[next(iter(self._runs))]

    async def _probe(self) -> None:
        """Run the scripts to every command in them. A missing right shows here, not between two changes of a batch."""
        now = self._clock()
        if self._rows:
            await self._redis.probe([*self._rows.probes(_probe_event(1, now)), *self.window.probes()])
            return
        writes = [
            (self._script, part.call) for event_id in (1, 2, 2) for part in pack([_probe_event(event_id, now)], now)
        ]
        await self._redis.probe([*writes, *self.window.probes()])


def _probe_event(event_id: int, now: float) -> Event:
    return Event(commit_lsn=0, ordinal=0, id=event_id, key=0, ts_us=int(now * 1_000_000), json=b"{}")


def _run(word: str) -> tuple[str, int]:
    """Of Redis, and how many keys it had thrown away: an earlier release's memory does not say."""
    run, _, evicted = word.partition("=")
    return run, int(evicted) if evicted.isdecimal() else UNKNOWN
