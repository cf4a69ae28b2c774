"""Redis as the sink uses it: redis-py with our timeouts, our errors and the scripts in `lua/`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple, cast

import hiredis
from pydantic import SecretStr
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import NoPermissionError, NoScriptError, RedisError, ResponseError
from redis.typing import EncodableT

from sinks.redis.errors import is_read_only, sink_error
from sinks.redis.info import Info
from sinks.redis.keys import GENERATION, Call

SINK = "redis"


class _PackedInC:
    """Mixed into redis-py's connections, which pack a command in Python: 0.8 µs of CPU an event more than hiredis."""

    def pack_command(self, name: str, *args: EncodableT) -> list[bytes]:
        return [hiredis.pack_command((*name.split(), *args))]  # type: ignore[arg-type]  # its stub knows one argument


class _Login(CredentialProvider):
    """User and password; empty where there is none."""

    def __init__(self, user: str, password: str) -> None:
        self.user, self.password = user, password

    def get_credentials(self) -> tuple[str, ...]:  # type: ignore[override]  # none at all is right as well
        return tuple(filter(None, (self.user, self.password)))

    async def get_credentials_async(self) -> tuple[str, ...]:  # type: ignore[override]  # as above
        return self.get_credentials()


def connections(url: SecretStr, timeout_seconds: float) -> ConnectionPool:
    """A pool with our timeouts unless the URL sets others. Raises what redis-py raises for a URL that is wrong."""
    pool = ConnectionPool.from_url(
        url.get_secret_value(),
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),  # the lane retries
        protocol=2,  # every server and proxy speaks it, and version 3 would gain us nothing
    )
    # Asked for at each connect: a password that is rotated is used from then on, by connections that were made before.
    words = [str(pool.connection_kwargs.pop(key, None) or "") for key in ("username", "password")]
    pool.connection_kwargs["credential_provider"] = _Login(*words)
    pool.connection_class = type("Connection", (_PackedInC, pool.connection_class), {})
    return pool


class Script(NamedTuple):
    """A Lua script, and what Redis knows it by."""

    text: str
    digest: str


def script(name: str) -> Script:
    """The one in `lua/<name>.lua`."""
    text = (files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


class RedisClient:
    """One Redis. Every method raises a SinkError for what goes wrong.

    `answer_seconds` is how long an answer may take, whatever the URL says; by default `timeout_seconds`.
    """

    def __init__(self, url: SecretStr, timeout_seconds: float, answer_seconds: float | None = None) -> None:
        pool = connections(url, timeout_seconds)
        if answer_seconds:
            pool.connection_kwargs["socket_timeout"] = answer_seconds
        self._redis = Redis.from_pool(pool)
        options = pool.connection_kwargs
        self.address = str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")
        """Where Redis is, without user and password."""
        self._login: _Login = options["credential_provider"]

    async def run(self, script: Script, call: Call) -> list[int]:
        """What the script returns. Redis has it by digest; it gets the text when it has forgotten it.

        Never by SCRIPT LOAD: behind a proxy that may reach another server than the call, and is a right more.
        """
        async with self._translated():
            try:
                return cast("list[int]", await self._redis.evalsha(script.digest, *_arguments(call)))
            except NoScriptError:
                return cast("list[int]", await self._redis.eval(script.text, *_arguments(call)))

    async def probe(self, calls: Sequence[tuple[Script, Call]]) -> None:
        """Run scripts on keys of our patterns, and remove the keys, in one transaction."""
        async with self._translated(), self._redis.pipeline(transaction=True) as pipeline:
            used: set[str] = set()
            known: set[Script] = set()
            for script, call in calls:
                keys = [key + ":probe" for key in call.keys]
                arguments = _arguments(Call(keys, call.args))
                if script in known:
                    pipeline.evalsha(script.digest, *arguments)
                else:
                    pipeline.eval(script.text, *arguments)
                known.add(script)
                used.update(keys)
            pipeline.delete(*used)
            await pipeline.execute()

    async def generation(self) -> tuple[bool, str]:
        """A word that is lost with everything else, and whether it had to be made: Redis is new, or was emptied.

        Behind it stands which run of the server this is. A server that was restarted may have lost its latest writes.
        """
        async with self._translated():
            made = await self._redis.set(GENERATION, secrets.token_hex(8), nx=True)
            word = (cast("bytes | None", await self._redis.get(GENERATION)) or b"").decode()
            with suppress(ResponseError):  # INFO is denied or unknown: a restart goes unnoticed
                word += f" {(await self._redis.info('server')).get('run_id', '')}"
        return bool(made), word

    async def info(self) -> Info | None:
        """Redis's INFO; None where it is denied."""
        async with self._translated():
            try:
                return cast("Info", await self._redis.info())
            except NoPermissionError:
                return None

    async def values(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of these keys."""
        async with self._translated():
            return cast("list[bytes | None]", await self._redis.mget(keys)) if keys else []

    async def login_as(self, url: SecretStr) -> None:
        """Take user and password from this URL."""
        found: _Login = connections(url, 1.0).connection_kwargs["credential_provider"]
        self._login.user, self._login.password = found.user, found.password
        await self._redis.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Release the connections; safe to call twice."""
        await self._redis.aclose()

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as exc:  # OSError: of the program itself, such as no more file descriptors
            if is_read_only(exc):
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise sink_error(SINK, exc, [self._login.password] if self._login.password else []) from exc


def _arguments(call: Call) -> tuple[Any, ...]:
    return (len(call.keys), *call.keys, *call.args)
