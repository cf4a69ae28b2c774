"""The Redis sink: every content's newest event and exact count, and what was watched most in the last 10 minutes.

Each `write` is one Lua call, `write.lua`; a call of `slide.lua` once a second keeps the window right when
nothing arrives. `redis_batch.py` makes keys and arguments of both, `redis_errors.py` reads the errors; retries and
their pauses, dead letters and how far the sink is belong to its lane (`replicator/delivery/lane.py`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, cast

import hiredis
from pydantic import Field, SecretStr, field_validator
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import NoPermissionError, RedisError, ResponseError
from redis.typing import EncodableT

from replicator.contracts.errors import SinkError, SinkUnavailable
from replicator.contracts.events import Event, Finding, Refusal, SinkPosition
from replicator.contracts.settings import Settings, variable
from replicator.contracts.sink import Contract, HasCounter, Mode, Rebuildable, Sink
from sinks.redis.errors import is_read_only, sink_error
from sinks.redis.info import findings
from sinks.redis.keys import BUCKET_SECONDS, GENERATION, PREFIXES, Call, pack, slide_call
from sinks.redis.ledger import RedisLedger

SLIDE_INTERVAL_SECONDS = 1.0  # on the full second: a bucket enters the window as it begins
EMPTY_TIMEOUT_SECONDS = 3600.0  # some 1 µs a key
SCRIPTS = Path(__file__).parent

EMPTIED = (
    "Redis at %s was emptied, or came back without its keys: counts began again at 0, and what was counted before is"
    " missing. `python -m replicator rebuild-redis` makes it all again, while this goes on (nothing to do if that runs)"
)
RESTARTED = (
    "Redis at %s was restarted, or another one answers now: unless it keeps an append-only file with appendfsync"
    " always, what it was told last is missing. `python -m replicator reconcile --start ... --end ... --repair`"
    " of the last hours finds and mends that"
)

_log = logging.getLogger(__name__)


class RedisSettings(Settings):
    """Options of the Redis sink."""

    redis_url: SecretStr = Field(
        default=SecretStr("redis://localhost:6379/0"),
        description="a redis://, rediss:// or unix:// URL, with redis-py's query options (ssl_ca_certs and the like)",
    )
    redis_timeout_seconds: float = Field(
        default=5.0,  # a write takes some 10 ms, building the window anew at worst a second or so
        gt=0,
        le=600,
        description="seconds that connecting to Redis, and an answer from it, may take, up to 600",
    )

    @field_validator("redis_url")
    @classmethod
    def _usable(cls, value: SecretStr) -> SecretStr:
        """Says what is wrong without repeating it: it may carry a password."""
        try:
            _pool(value, 1.0).make_connection()  # type: ignore[no-untyped-call]  # redis-py left it untyped
        except (TypeError, ValueError, RedisError) as exc:
            raise ValueError("it is not such a URL, or has an option that redis-py does not know") from exc
        return value


class _PackedInC:
    """Mixed into redis-py's asyncio connections, which build a command in Python: 2 µs an event more than hiredis."""

    def pack_command(self, name: str, *args: EncodableT) -> list[bytes]:
        """The command on the wire; redis-py's names may be two words."""
        return [hiredis.pack_command((*name.split(), *args))]  # type: ignore[arg-type]  # its stub knows one argument


def _pool(url: SecretStr, timeout_seconds: float) -> ConnectionPool:
    """Connections with our timeouts, unless the URL sets others; the lane retries, redis-py doesn't."""
    pool = ConnectionPool.from_url(
        url.get_secret_value(),
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        protocol=2,  # every server and proxy speaks it, and version 3 would gain us nothing
    )
    pool.connection_class = type("Connection", (_PackedInC, pool.connection_class), {})
    return pool


def _address(pool: ConnectionPool) -> str:
    """Where Redis is, without user and password."""
    options = pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")


class RedisSink(Sink, HasCounter, Rebuildable):
    """`contracts.sink.Sink` on Redis; exact under replay, since each event's bit tells whether it was counted.

    What it keeps is as durable as Redis is: after a Redis that lost everything, a backfill brings it all back.
    In a backfill events still go where they belong, but time is left to the replicator: a
    window that nobody keeps any more expires, for it is gone rather than stale.
    """

    name = "redis"
    settings_class: ClassVar = RedisSettings
    max_events = 2_000  # touching 900 contents: 7 ms of Redis, which serves nobody else meanwhile, and 3 ms of ours
    linger_seconds = 0.0
    concurrency = (
        2  # one is with Redis while the other waits for its turn on a busy loop: half as fast again in a backlog
    )

    def __init__(
        self, settings: RedisSettings, contract: Contract = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(settings, contract)
        self._url = settings.redis_url
        self._timeout_seconds = settings.redis_timeout_seconds
        pool = _pool(settings.redis_url, settings.redis_timeout_seconds)
        self._redis = Redis.from_pool(pool)
        self._address = _address(pool)
        self._write_script = self._script("write.lua")
        self._slide_script = self._script("slide.lua")
        self._clock = clock
        self._keeps_window = True
        self._resumes = False
        self._slider: asyncio.Task[None] | None = None
        self._window_failed = False
        self._generation = ""
        self._generations: set[str] = set()
        self.new_events: int = 0

    def _script(self, name: str) -> AsyncScript:
        return self._redis.register_script((SCRIPTS / name).read_text(encoding="utf-8"))

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
        """Try everything on keys of a probe, bring the window to the present, and start to keep it there."""
        self._resumes, self._keeps_window = start is not None, mode is Mode.LIVE
        await self._probe()
        if not self._keeps_window:
            return
        await self.slide()
        await self._notice_a_loss()
        if self._slider is None:
            self._slider = asyncio.create_task(self._keep_window(), name="redis window")

    async def check(self) -> list[Finding]:
        """Reachable, writable, and set so that it forgets nothing?"""
        try:
            await self._probe()
        except SinkError as exc:
            cure = f"Start Redis, or correct {variable('redis_url')}" if isinstance(exc, SinkUnavailable) else exc.cure
            return [Finding(False, f"Redis at {self._address}: {exc.detail}", cure)]
        writable = Finding(True, f"Redis at {self._address} answers and may be written to")
        try:
            return [writable, *findings(await self._redis.info())]
        except NoPermissionError:
            return [writable, Finding(True, "Redis: version, eviction and persistence are unknown, INFO is denied")]
        except RedisError as exc:
            return [writable, Finding(False, f"Redis: {sink_error(self.name, exc).detail}", "Try again")]

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """See `contracts.sink.Sink`; also raises what ended the keeping of the window, or hinders it."""
        if self._slider is not None and self._slider.done():
            self._slider.result()
        batch = pack(events, self._clock())
        if len(batch.refused) == len(events):
            return batch.refused
        complete, new = await self._run(self._write_script, batch.call)
        self.new_events += new
        if self._keeps_window and (self._window_failed or (batch.ranked and not complete)):
            await self.slide()
        return batch.refused

    async def slide(self) -> None:
        """Bring the window to the present; once open, the sink does so by itself every second."""
        try:
            await self._run(self._slide_script, slide_call(self._clock()))
        except SinkError:
            self._window_failed = True
            raise
        self._window_failed = False

    async def generation(self) -> str:
        """A word that stays the same until Redis loses its keys, is emptied, or may have gone back in time.

        That is a restart or another server: the key alone could be in a snapshot that lacks the latest writes.
        """
        return (await self._generation_now())[1]

    async def _generation_now(self) -> tuple[bool, str]:
        """Whether the word had to be made, because Redis has forgotten it or is new; and the word."""
        try:
            made = await self._redis.set(GENERATION, secrets.token_hex(8), nx=True)
            word = (cast("bytes | None", await self._redis.get(GENERATION)) or b"").decode()
            with suppress(ResponseError):  # no right to INFO, or no such command: a restart is not noticed
                word += f" {(await self._redis.info('server')).get('run_id', '')}"
        except RedisError as exc:
            raise await self._wrapped(exc) from exc
        return bool(made), word

    async def values(self, keys: Sequence[str]) -> list[bytes | None]:
        """What stands in these keys, for a comparison."""
        try:
            return cast("list[bytes | None]", await self._redis.mget(keys)) if keys else []
        except RedisError as exc:
            raise await self._wrapped(exc) from exc

    async def scan(self, pattern: str) -> AsyncIterator[list[str]]:
        """The keys of a pattern, in pages; one that comes or goes meanwhile may be missing, and one may come twice."""
        cursor = 0
        while True:
            try:
                cursor, keys = await self._redis.scan(cursor, match=pattern, count=5_000)
            except RedisError as exc:
                raise await self._wrapped(exc) from exc
            yield [str(key, "utf-8", "replace") for key in cast("list[bytes]", keys)]
            if not cursor:
                return

    def counter(self) -> RedisLedger:
        """Its counts, for a comparison."""
        return RedisLedger(self.values, self.scan)

    async def empty(self) -> int:
        """Delete every key of ours, in one moment; how many there were. See `empty.lua`.

        With many keys that takes longer than a write ever does, and Redis goes on with it whether we wait or not.
        """
        pool = _pool(self._url, self._timeout_seconds)
        pool.connection_kwargs["socket_timeout"] = EMPTY_TIMEOUT_SECONDS
        client = Redis.from_pool(pool)
        try:
            script = client.register_script((SCRIPTS / "empty.lua").read_text(encoding="utf-8"))
            [deleted] = await self._run(script, Call([], list(PREFIXES)))
        finally:
            await client.aclose()
        return deleted

    async def close(self) -> None:
        """Stop keeping the window, which then expires; release connections."""
        slider, self._slider = self._slider, None
        if slider is not None:
            slider.cancel()
            await asyncio.wait([slider])
        await self._redis.aclose()
        if slider is not None and not slider.cancelled():
            slider.result()

    async def _keep_window(self) -> None:
        """Slide until closed. A failure is logged when it begins, and raised by the next write; see `write`."""
        # `close` cancels, but redis-py sends within asyncio.wait_for, which can lose that (before 3.12; bpo-37658).
        while self._slider is not None:
            await asyncio.sleep(SLIDE_INTERVAL_SECONDS - self._clock() % SLIDE_INTERVAL_SECONDS)
            failed_before = self._window_failed
            try:
                await self.slide()
            except SinkError as exc:
                if not failed_before:
                    _log.warning("top:content:10m can't be kept right and will expire: %s", exc)
            else:
                if failed_before:
                    _log.info("top:content:10m is kept right again")
                with suppress(SinkError):  # who writes next meets it, too
                    await self._notice_a_loss()

    async def _notice_a_loss(self) -> None:
        """Say it when keys may be gone: writing goes on as if nothing had happened."""
        made, word = await self._generation_now()
        before, self._generation = self._generation, word
        if before.split()[:1] != word.split()[:1] and (before or (made and self._resumes)):
            _log.error(EMPTIED, self._address)
        elif before and word not in self._generations:  # behind some proxies there are several, in turn
            _log.error(RESTARTED, self._address)
        self._generations.add(word)

    async def _run(self, script: AsyncScript, call: Call) -> list[int]:
        """What the script returns. Redis has it by digest; redis-py sends its text when Redis has forgotten it."""
        try:
            return cast("list[int]", await script(call.keys, call.args))
        except RedisError as exc:
            raise await self._wrapped(exc) from exc

    async def _wrapped(self, exc: RedisError) -> SinkError:
        if is_read_only(exc):
            await self._redis.connection_pool.disconnect(inuse_connections=False)
        return sink_error(self.name, exc)

    async def _probe(self) -> None:
        """Run both scripts to every command in them on keys of our patterns, and remove the keys, in one transaction.

        A right that is missing shows here, not between two changes of a batch.
        """
        now = self._clock()
        calls = [
            (self._write_script, pack([_probe_event(1, now)], now).call),
            (self._slide_script, slide_call(now)),
            (self._write_script, pack([_probe_event(2, now)], now).call),
            (self._slide_script, slide_call(now + BUCKET_SECONDS)),
        ]
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                used: set[str] = set()
                for script, call in calls:
                    keys = [key + ":probe" for key in call.keys]
                    await script(keys, call.args, client=pipeline)
                    used.update(keys)
                pipeline.delete(*used)
                await pipeline.execute()
        except RedisError as exc:
            raise await self._wrapped(exc) from exc


def _probe_event(event_id: int, now: float) -> Event:
    return Event(commit_lsn=0, ordinal=0, id=event_id, key=0, ts_us=int(now * 1_000_000), json=b"{}")
