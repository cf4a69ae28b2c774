"""Destinations that answer wrong, in every way that people have met: most answers come from what stands before them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator

from tests.prove.world.fronts import HTML, Forward, HttpFront, Lie, Request, answer
from tests.prove.world.world import Victim, World, fault

HANGS_SECONDS = 60.0
"""Longer than the program waits."""
PROXY_TAKES_BYTES = 20_000


def _lying(front: HttpFront, lie: Lie) -> Iterator[None]:
    front.lie = lie
    yield
    front.lie = None


def _always(said: bytes) -> Lie:
    async def lie(_: Request, __: Forward) -> bytes:
        await asyncio.sleep(0)
        return said

    return lie


def _for_inserts(lie: Lie) -> Lie:
    """Everything else passes."""

    async def chosen(request: Request, forward: Forward) -> bytes | None:
        return await (lie(request, forward) if request.inserts else forward(request))

    return chosen


def _sometimes(lie: Lie, chance: random.Random) -> Lie:
    """Half of the requests pass."""

    async def chosen(request: Request, forward: Forward) -> bytes | None:
        return await (lie if chance.random() < 0.5 else _through)(request, forward)

    return chosen


async def _through(request: Request, forward: Forward) -> bytes:
    return await forward(request)


async def hangs(_: Request, __: Forward) -> None:
    """No answer while the program waits."""
    await asyncio.sleep(HANGS_SECONDS)


async def _cut_before(_: Request, __: Forward) -> None:
    await asyncio.sleep(0)


async def _answer_is_lost(request: Request, forward: Forward) -> None:
    await forward(request)


async def _too_large(request: Request, forward: Forward) -> bytes:
    if len(request.body) > PROXY_TAKES_BYTES:
        return answer("413 Request Entity Too Large", HTML, "Content-Type: text/html")
    return await forward(request)


async def _endless(_: Request, __: Forward) -> bytes:
    await asyncio.sleep(0)
    return answer("200 OK", b"x" * 30_000_000)


def _redirect(world: World, status: str) -> bytes:
    return answer(status, b"", f"Location: http://127.0.0.1:{world.elsewhere.port}/")


def _exception(status: str, code: int, name: str) -> bytes:
    text = f"Code: {code}. DB::Exception: something went wrong. ({name})\n".encode()
    return answer(status, text, f"X-ClickHouse-Exception-Code: {code}")


# -- ClickHouse ----------------------------------------------------------------------------------------------------

CODES = (
    (202, "TOO_MANY_SIMULTANEOUS_QUERIES"),
    (241, "MEMORY_LIMIT_EXCEEDED"),
    (252, "TOO_MANY_PARTS"),
    (60, "UNKNOWN_TABLE"),
    (27, "CANNOT_PARSE_INPUT_ASSERTION_FAILED"),
    (53, "TYPE_MISMATCH"),
    (6, "CANNOT_PARSE_TEXT"),
    (395, "FUNCTION_THROW_IF_VALUE_IS_NON_ZERO"),
    (201, "QUOTA_EXCEEDED"),
    (164, "READONLY"),
    (497, "ACCESS_DENIED"),
    (999, "KEEPER_EXCEPTION"),
    (4711, "NOBODY_KNOWS_IT"),
)
INSERTED = b'{"read_rows":"0","read_bytes":"0","written_rows":"%d","written_bytes":"100"}'


def _clickhouse(name: str, make: Callable[[World, random.Random], Lie]) -> None:
    _register("clickhouse", name, lambda world: world.clickhouse, make)


def _register(
    victim: Victim, name: str, front: Callable[[World], HttpFront], make: Callable[[World, random.Random], Lie]
) -> None:
    def script(world: World, chance: random.Random) -> Iterator[None]:
        yield from _lying(front(world), make(world, chance))

    fault(victim, name)(script)


def _any_code(world: World, chance: random.Random) -> Lie:
    status = chance.choice(("500 Internal Server Error", "400 Bad Request", "404 Not Found"))
    lie = _always(_exception(status, *chance.choice(CODES)))
    return chance.choice((lie, _for_inserts(lie), _sometimes(_for_inserts(lie), chance)))


class _Cached:
    """Answers an insert with the answer to the one before it."""

    def __init__(self) -> None:
        self._said: bytes | None = None

    async def __call__(self, request: Request, forward: Forward) -> bytes:
        if self._said is None or not request.inserts:
            said = await forward(request)
            self._said = said if request.inserts else self._said
            return said
        return self._said


async def _without_settings(request: Request, forward: Forward) -> bytes:
    """Strips every parameter but those on its list, as chproxy does."""
    line, _, rest = request.head.partition(b"\r\n")
    method, target, version = line.split(b" ")
    path, _, query = target.partition(b"?")
    kept = [pair for pair in query.split(b"&") if pair.split(b"=")[0] in (b"query", b"database", b"query_id")]
    head = b" ".join((method, path + b"?" + b"&".join(kept), version)) + b"\r\n" + rest
    return await forward(Request(head, request.body))


_clickhouse(
    "says 200 and an exception",
    lambda *_: _for_inserts(_always(answer("200 OK", b"Code: 241. DB::Exception: Memory limit exceeded"))),
)
_clickhouse(
    "says 200 and its exception in a header",
    lambda *_: _for_inserts(_always(_exception("200 OK", 241, "MEMORY_LIMIT_EXCEEDED"))),
)
_clickhouse("says 200 and a page", lambda *_: _for_inserts(_always(answer("200 OK", HTML, "Content-Type: text/html"))))
_clickhouse("says 200 and a page to everything", lambda *_: _always(answer("200 OK", HTML, "Content-Type: text/html")))
_clickhouse("says 200 and nothing", lambda *_: _for_inserts(_always(answer("200 OK"))))
_clickhouse(
    "says that it wrote nothing",
    lambda *_: _for_inserts(_always(answer("200 OK", b"", f"X-ClickHouse-Summary: {(INSERTED % 0).decode()}"))),
)
_clickhouse("answers from a cache", lambda *_: _Cached())
_clickhouse("refuses large requests", lambda *_: _too_large)
_clickhouse("redirects inserts", lambda world, _: _for_inserts(_always(_redirect(world, "307 Temporary Redirect"))))
_clickhouse(
    "redirects everything",
    lambda world, chance: _always(
        _redirect(world, chance.choice(("301 Moved Permanently", "302 Found", "308 Permanent Redirect")))
    ),
)
_clickhouse("says an exception", _any_code)
_clickhouse("says another exception", _any_code)
_clickhouse("says a third exception", _any_code)
_clickhouse("loses parameters", lambda *_: _without_settings)
_clickhouse("does not answer", lambda *_: hangs)
_clickhouse("loses its answers", lambda _, chance: _sometimes(_for_inserts(_answer_is_lost), chance))
_clickhouse("answers without end", lambda *_: _for_inserts(_endless))
_clickhouse(
    "is not there behind its front end",
    lambda _, chance: _always(
        answer(
            chance.choice(
                ("502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout", "404 Not Found", "403 Forbidden")
            ),
            HTML,
        )
    ),
)


@fault("clickhouse")
def a_view_is_broken(world: World, chance: random.Random) -> Iterator[None]:
    """A materialized view into a table that is dropped, or whose cast fails."""
    query = world.stack.clickhouse.query
    query("CREATE TABLE IF NOT EXISTS copy (event_id Int64, n Int64) ENGINE = MergeTree ORDER BY event_id")
    value = "toInt64(event_type)" if chance.random() < 0.5 else "1"
    query(f"CREATE MATERIALIZED VIEW view TO copy AS SELECT event_id, {value} AS n FROM events_enriched")
    if value == "1":
        query("DROP TABLE copy SYNC")
    yield
    query("DROP VIEW view SYNC")


@fault("clickhouse")
def reads_only(world: World, chance: random.Random) -> Iterator[None]:
    """Somebody has set it so."""
    world.stack.clickhouse.behave(read_only=True)
    yield
    world.stack.clickhouse.behave()


# -- the API -------------------------------------------------------------------------------------------------------

REFUSALS = (
    "400 Bad Request",
    "402 Payment Required",
    "403 Forbidden",
    "404 Not Found",
    "405 Method Not Allowed",
    "406 Not Acceptable",
    "409 Conflict",
    "410 Gone",
    "412 Precondition Failed",
    "413 Content Too Large",
    "414 URI Too Long",
    "415 Unsupported Media Type",
    "418 I'm a teapot",
    "419 Page Expired",
    "420 Enhance Your Calm",
    "422 Unprocessable Content",
    "423 Locked",
    "424 Failed Dependency",
    "429 Too Many Requests",
    "430 Too Many",
    "440 Login Time-out",
    "449 Retry With",
    "451 Unavailable For Legal Reasons",
    "460 Nobody Knows",
    "494 Header Too Large",
    "497 HTTP To HTTPS",
    "499 Client Closed",
    "500 Internal Server Error",
    "501 Not Implemented",
    "502 Bad Gateway",
    "503 Service Unavailable",
    "504 Gateway Timeout",
    "507 Insufficient Storage",
    "600 Beyond",
    "101 Switching Protocols",
)
KINDS_OF_REFUSAL = 6
"""So many of the API's faults are a status for everything, drawn from the list."""
SAME_AGAIN = 4
"""Restarts may bring a request once or twice more."""
ODD_2XX = (
    answer("202 Accepted", b"later"),
    answer("207 Multi-Status", b"<multistatus/>"),
    answer("200 OK", b"{}", "X-Large: " + "x" * 9_000),
    answer("204 No Content", b"a body"),
    answer("299 Odd", b"\xff\xfe not text", "Content-Type: application/json; charset=nobody"),
    answer("200 OK", b"{}", *(f"Set-Cookie: c{n}={'x' * 200}" for n in range(150))),
    b"HTTP/1.0 200 OK\r\n\r\nno length",
    b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer("200 OK", b"{}"),
    answer("200 OK", b"not gzip", "Content-Encoding: gzip"),
)


def _api(name: str, make: Callable[[World, random.Random], Lie]) -> None:
    _register("api", name, lambda world: world.api, make)


class _Odd:
    """It has taken the events, and says so in a way of its own, which is no reason to give it the same again."""

    def __init__(self, world: World, said: bytes) -> None:
        self._world = world
        self._said = said
        self._taken = Counter[bytes]()

    async def __call__(self, request: Request, forward: Forward) -> bytes:
        await forward(request)
        self._taken[request.body] += 1
        if self._taken[request.body] == SAME_AGAIN:
            self._world.complaints.add(f"the API took a request {SAME_AGAIN} times and said {self._said[:60]!r}")
        return self._said


def _half_refused(_: World, chance: random.Random) -> Lie:
    return _sometimes(_always(answer(chance.choice(("400 Bad Request", "422 Unprocessable Content")))), chance)


for _number in range(1, KINDS_OF_REFUSAL + 1):
    _api(
        f"refuses everything, {_number}",
        lambda _, chance: _always(answer(chance.choice(REFUSALS), b"because\x1b[31m of reasons")),
    )
for _number, _said in enumerate(ODD_2XX, 1):
    _api(f"takes in an odd way, {_number}", lambda world, _, said=_said: _Odd(world, said))  # type: ignore[misc]  # a default binds it
_api("refuses half of the requests", _half_refused)
_api("does not answer", lambda *_: hangs)
_api("closes connections", lambda *_: _cut_before)
_api("loses its answers", lambda _, chance: _sometimes(_answer_is_lost, chance))
_api("answers without end", lambda *_: _always(answer("503 Service Unavailable", b"x" * 30_000_000)))
_api(
    "redirects",
    lambda world, chance: _always(
        _redirect(world, chance.choice(("301 Moved Permanently", "307 Temporary Redirect", "308 Permanent Redirect")))
    ),
)
_api("speaks another protocol", lambda *_: _always(b"\x15\x03\x01\x00\x02\x02\x28"))
_api("refuses large requests", lambda *_: _too_large)


@fault("api")
def refuses_one_event_among_good_ones(world: World, chance: random.Random) -> Iterator[None]:
    """What is about an event: that one is a dead letter, at once or later, and no other."""
    with world.tables["events"], world.postgres_is_ours:
        world.refuse_one(chance)
    yield


# -- Redis ---------------------------------------------------------------------------------------------------------

LINES = (
    b"-upstream failure\r\n",
    b"-no upstream host\r\n",
    b"-LOADING Redis is loading the dataset in memory\r\n",
    b"-ERR max daily request limit exceeded. Limit: 10000\r\n",
    b"-ERR max number of clients reached\r\n",
    b"-NOSCRIPT No matching script. Please use EVAL.\r\n",
    b"-CLUSTERDOWN The cluster is down\r\n",
    b"-MASTERDOWN Link with MASTER is down\r\n",
    b"-READONLY You can't write against a read only replica.\r\n",
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    b"-BUSY Redis is busy running a script.\r\n",
    b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    b"-MOVED 3999 127.0.0.1:1\r\n",
    b"-ERR unknown command 'EVALSHA', with args beginning with: \r\n",
    b"-EXECABORT \x1b[31m\x07 something new\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"+OK\r\n",
    b"$-1\r\n",
    b"*2\r\n:7\r\n:7\r\n",
)
KINDS_OF_LINE = 6
"""So many of Redis's faults are a line for everything, drawn from the list."""


def _says_a_line(world: World, chance: random.Random) -> Iterator[None]:
    world.redis.only_scripts = chance.random() < 0.5
    world.redis.line = chance.choice(LINES[:-3] if world.redis.only_scripts else LINES)
    if chance.random() < 0.5:
        world.redis.cut()
    yield
    world.redis.line = None


for _number in range(1, KINDS_OF_LINE + 1):
    fault("redis", f"a proxy says a line, {_number}")(_says_a_line)


@fault("redis")
def its_connections_are_cut(world: World, chance: random.Random) -> Iterator[None]:
    """Again and again."""
    for _ in range(chance.randint(1, 10)):
        world.redis.cut()
        world.wait(chance.uniform(0.0, 0.4))
    yield


@fault("redis")
def it_does_not_answer(world: World, chance: random.Random) -> Iterator[None]:
    """Its process is frozen."""
    world.frozen.set()
    world.stack.redis.pause()
    yield
    world.stack.redis.resume()
    world.frozen.clear()
