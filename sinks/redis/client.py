"""Redis as the sink uses it: redis-py with our timeouts, our errors and the scripts in `lua/`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple, cast

import hiredis
from pydantic import SecretStr
from redis._parsers import _AsyncRESP2Parser
from redis._parsers.socket import SERVER_CLOSED_CONNECTION_ERROR
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.maint_notifications import MaintNotificationsConfig
from redis.typing import EncodableT

from replicator.contracts.errors import SinkUnavailable
from replicator.contracts.events import Id
from sinks.redis.errors import is_read_only, rights_on, sink_error
from sinks.redis.info import Info
from sinks.redis.keys import FORM, GENERATION, INSERTED_NUMBERS, OWNER, Call

OPTIONS = frozenset(
    {
        "client_name", "db", "health_check_interval", "password", "socket_connect_timeout", "socket_keepalive",
        "socket_timeout", "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile",
        "ssl_check_hostname", "ssl_ciphers", "ssl_keyfile", "ssl_password", "username",
    }
)  # fmt: skip
"""What a URL may set. redis-py takes others, which change what its answers are, who retries, or how it breaks."""
ANSWER_BYTES_MAX = 4_000_000
"""The largest answer is 64 pages of seen bits, half a megabyte."""
ANSWER_SECONDS_MAX = 600.0
SCANNED_KEYS = 1_000
"""A page takes some 0.3 ms, and Redis serves nobody else meanwhile."""
NO_ANSWER = "the answer is not Redis's"


class _Bounded(_AsyncRESP2Parser):
    """Reads answers up to a size. In Python: hiredis makes a list of any length that a server announces."""

    async def read_response(self, disable_decoding: bool = False) -> Any:
        self._left = ANSWER_BYTES_MAX
        try:
            return await super().read_response(disable_decoding)
        except (ValueError, RecursionError) as exc:  # no number, a line without an end, lists in lists in lists
            raise InvalidResponse(NO_ANSWER) from exc

    async def _read(self, length: int) -> bytes:
        self._spend(length)
        return await super()._read(length)

    async def _readline(self) -> bytes:
        line = await super()._readline()
        self._spend(len(line))
        return line

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise InvalidResponse("the answer is too large")


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


class _FreshTls(SSLConnection):
    """Each connect reads the files of authorities and certificates: they may have been replaced."""

    def _connection_arguments(self) -> Mapping[str, object]:
        self.ssl_context.context = None
        return super()._connection_arguments()


def connections(url: SecretStr, timeout_seconds: float) -> ConnectionPool:
    """A pool with our timeouts unless the URL sets others. A URL that is wrong is a ValueError, or redis-py's error."""
    pool = ConnectionPool.from_url(
        url.get_secret_value(), socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds
    )
    options = pool.connection_kwargs
    if {*parse_url(url.get_secret_value())} - OPTIONS - {"host", "port", "path", "connection_class"}:
        raise ValueError("an option that changes what the sink relies on")
    if not all(0 < options[name] <= ANSWER_SECONDS_MAX for name in ("socket_timeout", "socket_connect_timeout")):
        raise ValueError("a timeout that is none")
    # Asked for at each connect: a password that is rotated is used from then on, by connections that were made before.
    words = [str(options.pop(key, None) or "") for key in ("username", "password")]
    options |= {
        "credential_provider": _Login(*words),
        "retry": Retry(NoBackoff(), 0),  # the lane retries
        "protocol": 2,  # every server and proxy speaks it, and version 3 would gain us nothing
        "parser_class": _Bounded,
        "driver_info": None,  # CLIENT SETINFO would be a right more
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),  # likewise; and they change timeouts
    }
    own = (_PackedInC, _FreshTls) if issubclass(pool.connection_class, SSLConnection) else (_PackedInC,)
    pool.connection_class = type("Connection", (*own, pool.connection_class), {})
    return pool


class Script(NamedTuple):
    """A Lua script, and what Redis knows it by."""

    text: str
    digest: str


def script(name: str) -> Script:
    """The one in `lua/<name>.lua`."""
    text = (files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


class Generation(NamedTuple):
    """A word that is lost with everything else in Redis."""

    made: bool
    """There was none before."""
    word: str
    state: str
    """Whether keys are missing: see `keys.py`."""
    run: str
    """Which run of the server this is. One that was restarted may have lost its latest writes."""
    evicted: int
    """How many keys it has thrown away to make room, whoever's."""
    policy: str
    """Which keys it throws away."""


class RedisClient:
    """One Redis. Every method raises a SinkError for what goes wrong.

    `sink` is whose it is, for messages. `named` says what a key is called there. `answer_seconds` is how long an answer
    may take, whatever the URL says; by default `timeout_seconds`.
    """

    def __init__(
        self,
        sink: str,
        url: SecretStr,
        timeout_seconds: float,
        named: Callable[[str], str],
        answer_seconds: float | None = None,
    ) -> None:
        pool = connections(url, timeout_seconds)
        if answer_seconds:
            pool.connection_kwargs["socket_timeout"] = answer_seconds
        self._redis = Redis.from_pool(pool)
        self.sink = sink
        self.named = named
        self.rights = rights_on(self.named)
        """What the user needs."""
        self._mark = script("mark")
        options = pool.connection_kwargs
        self.address = str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")
        """Where Redis is, without user and password."""
        self.unverified = options.get("ssl_cert_reqs", "required") != "required" or not options.get(
            "ssl_check_hostname", True
        )
        """The URL says so."""
        self._login: _Login = options["credential_provider"]

    async def run(self, script: Script, call: Call, returns: int = 0) -> list[int]:
        """The numbers that the script returns, so many; any other answer, such as OK, proves nothing.

        Redis has the script by digest; it gets the text when it has forgotten it. Never by SCRIPT LOAD: behind a proxy
        that may reach another server than the call, and is a right more.
        """
        keys = call.keys if self.named is str else [*map(self.named, call.keys)]
        async with self._translated():
            try:
                answer = await self._redis.evalsha(script.digest, len(keys), *keys, *call.args)
            except NoScriptError:
                answer = await self._redis.eval(script.text, len(keys), *keys, *call.args)
            numbers: object = [] if answer is None else answer
            if not isinstance(numbers, list) or [type(number) for number in numbers] != [int] * returns:
                raise InvalidResponse(NO_ANSWER)
            return numbers

    async def probe(self, calls: Sequence[tuple[Script, Call]]) -> None:
        """Run scripts on keys of our patterns, and remove the keys, in one transaction."""
        async with self._translated(), self._redis.pipeline(transaction=True) as pipeline:
            used: set[str] = set()
            known: set[Script] = set()
            for script, call in calls:
                keys = [f"{self.named(key)}:probe" for key in call.keys]
                if script in known:
                    pipeline.evalsha(script.digest, len(keys), *keys, *call.args)
                else:
                    pipeline.eval(script.text, len(keys), *keys, *call.args)
                known.add(script)
                used.update(keys)
            pipeline.getrange(f"{self.named(OWNER)}:probe", 0, 0)  # a right that no script needs
            pipeline.delete(*used)
            await pipeline.execute()

    async def generation(self, new: str = "") -> Generation:
        """What it is; made with the state `new` if there is none: Redis is new, or was emptied."""
        info: Info = {}
        async with self._translated():
            made = await self._redis.set(self.named(GENERATION), f"{secrets.token_hex(8)} {new}".strip(), nx=True)
            value = (cast("bytes | None", await self._redis.get(self.named(GENERATION))) or b"").decode()
            with suppress(ResponseError):  # INFO is denied or unknown: a restart and evictions go unnoticed
                info = cast("Info", await self._redis.info())
            run, policy = str(info.get("run_id", "")), str(info.get("maxmemory_policy", ""))
            evicted = int(info.get("evicted_keys", 0))
        word, _, state = value.partition(" ")
        return Generation(bool(made), word, state, run, evicted, policy)

    async def mark(self, word: str, state: str, *others: str) -> bool:
        """Give this generation a state, unless it has gone or has none of the others any more; whether it has it."""
        values = [f"{word} {one}".strip() for one in (state, *others)]
        return await self.run(self._mark, Call([GENERATION], [*values]), returns=1) == [1]

    async def form(self, ours: str, *, claim: bool, known: bool) -> str:
        """Which rows the keys are made for; `ours` if there are none yet: then they are from now on, with `claim`.

        `known`: they were for ours, so where it is not said, Redis was emptied.
        """
        found, *others = await self.values([FORM, OWNER, GENERATION])
        if found is None and ours != INSERTED_NUMBERS and (known or not any(others)):
            return await self._claim(FORM, ours) if claim else ours
        return INSERTED_NUMBERS if found is None else found.decode(errors="replace")

    async def owner(self, ours: str, *, claim: bool) -> str:
        """Whose events are counted here; `ours` if nobody's are: then they are ours from now on, with `claim`."""
        [owner] = await self.values([OWNER])
        if owner is None:
            return await self._claim(OWNER, ours) if claim else ours
        return owner.decode(errors="replace")

    async def _claim(self, key: str, ours: str) -> str:
        """The value of a key that had none: ours, unless another one was faster."""
        async with self._translated():
            await self._redis.set(self.named(key), ours, nx=True)
        [found] = await self.values([key])
        return ours if found is None else found.decode(errors="replace")

    async def adopt(self, ours: str) -> None:
        """From now on the keys are ours, whoever had them."""
        async with self._translated():
            await self._redis.set(self.named(OWNER), ours)

    async def info(self) -> Info | None:
        """Redis's INFO; None where it is denied, renamed or unknown."""
        async with self._translated():
            try:
                return cast("Info", await self._redis.info())
            except ResponseError:
                return None

    async def values(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of these keys."""
        async with self._translated():
            named = [*map(self.named, keys)]
            return cast("list[bytes | None]", await self._redis.mget(named)) if named else []

    async def fields(self, key: str, names: Sequence[str]) -> list[bytes | None]:
        """The values of these fields of a hash."""
        async with self._translated():
            found: object = await self._redis.hmget(self.named(key), [*names]) if names else []
            return cast("list[bytes | None]", found)

    async def names(self, prefix: str) -> AsyncIterator[list[str]]:
        """What comes behind this prefix in the names of keys, in pages; one may come twice. It takes the right to SCAN.

        No key that is there all the while is left out. A page reads some thousand keys of Redis, ours or not.
        """
        begin, cursor = self.named(prefix), 0  # no character in it means another than itself to SCAN
        while True:
            async with self._translated():
                cursor, found = await self._redis.scan(cursor, match=f"{begin}*", count=SCANNED_KEYS)
                page = [name.decode(errors="replace").removeprefix(begin) for name in cast("list[bytes]", found)]
            yield page
            if not cursor:
                return

    async def highest(self, key: str, most: int, member: type[Id]) -> list[tuple[Id, int]]:
        """The members of a sorted set that have the highest scores, the highest first."""
        async with self._translated():
            # With `desc` redis-py sends ZREVRANGE, which is a right more.
            found = await self._redis.zrange(self.named(key), -most, -1, withscores=True)
            ranked = cast("list[tuple[bytes, float]]", found)
            return [(member(name.decode()), int(score)) for name, score in reversed(ranked)]

    async def part(self, key: str, start: int, size: int) -> bytes:
        """So many bytes of a string from there on; fewer at its end."""
        async with self._translated():
            found: object = await self._redis.getrange(self.named(key), start, start + size - 1)
            if not isinstance(found, bytes):
                raise InvalidResponse(NO_ANSWER)
            return found

    async def appendfsync(self) -> str:
        """When Redis brings its append-only file to the disk; empty where CONFIG is denied."""
        async with self._translated():
            try:
                return str((await self._redis.config_get("appendfsync")).get("appendfsync", ""))
            except ResponseError:  # denied, renamed or unknown, as at many services
                return ""

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
        except (AttributeError, TypeError, ValueError) as exc:  # redis-py, or we, looked for something else in it
            raise SinkUnavailable(sink=self.sink, detail=NO_ANSWER) from exc
        except (RedisError, OSError) as exc:  # OSError: of the program itself, such as no more file descriptors
            if is_read_only(exc):
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            secrets = filter(None, [self._login.password])
            raise sink_error(self.sink, await self._cause(exc), secrets, self.rights, self.named) from exc

    async def _cause(self, exc: RedisError | OSError) -> RedisError | OSError:
        """Why Redis hangs up. It refuses a long command before a password, and closes before its reason is read."""
        if SERVER_CLOSED_CONNECTION_ERROR in str(exc):
            try:
                await self._redis.ping()
            except AuthenticationError as why:
                return why
            except (AttributeError, TypeError, ValueError, RedisError, OSError):
                pass  # what was seen first says as much
        return exc
