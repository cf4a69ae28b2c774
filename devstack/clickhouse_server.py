"""ClickHouse's HTTP interface over the embedded engine, as a child process that `clickhouse` starts.

It has what clickhouse-connect and curl need: the query in the URL, the body or a form; settings and `param_*` in the
URL; compressed requests; credentials, error codes, the summary. It lacks sessions, compressed answers, external data.

    GET, POST /   a query
    GET  /ping    Ok.
    POST /behave  misbehave from now on: a `Behaviour` as JSON, {} for none
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import re
import signal
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing
from http import HTTPStatus
from importlib import import_module
from pathlib import Path

import msgspec
from aiohttp import BasicAuth, web

from devstack.clickhouse_engine import Engine, EngineError, Result, Statement, failure
from devstack.faults import NO_FAULT, Fault, Faults, Refused, refusal, strike_after, strike_before

MAX_BODY_BYTES = 1 << 30
SHUTDOWN_SECONDS = 0.5  # for requests in flight
USER = "default"
CODE_HEADER = "X-ClickHouse-Exception-Code"
INSERT = re.compile(rb"\s*INSERT\b", re.IGNORECASE)
CODE = re.compile(r"Code: (\d+)")

NOT_SETTINGS = frozenset(
    {
        *("query", "database", "user", "password", "default_format", "query_id", "quota_key", "role", "stacktrace"),
        *("session_id", "session_timeout", "session_check", "close_session", "compress", "decompress"),
        *("wait_end_of_query", "buffer_size", "client_protocol_version"),
    }
)
"""URL parameters that are not settings."""

SUMMARY = (
    *("read_rows", "read_bytes", "written_rows", "written_bytes", "total_rows_to_read", "result_rows", "result_bytes"),
    *("elapsed_ns", "memory_usage"),
)

STATUS_OF = {
    "SYNTAX_ERROR": 400,
    "INCORRECT_DATA": 400,
    "TYPE_MISMATCH": 400,
    "AUTHENTICATION_FAILED": 403,
    "QUERY_IS_TOO_LARGE": 413,
    "NOT_IMPLEMENTED": 501,
}
STATUS_OF_FAMILY = {"CANNOT_PARSE": 400, "UNKNOWN": 404}
"""HTTP status of an exception, as in ClickHouse: by name, else by the start of the name, else 500."""


class Behaviour(Fault, frozen=True, kw_only=True):
    """How it misbehaves: a fault that hits some requests, and rules for all of them."""

    only_inserts: bool = True
    """Hit INSERTs only."""
    status: int | None = None
    """As in `Fault`. With 200 a front end answers in place of ClickHouse, and nothing is accepted."""
    exception: str = "Code: 202. DB::Exception: Too many simultaneous queries. (TOO_MANY_SIMULTANEOUS_QUERIES)"
    """The error text, with its code, that goes with `status`."""
    read_only: bool = False
    """Refuse everything that writes, with code 164 (READONLY)."""
    password: str | None = None
    """Require this password; None: the one it was started with."""


class ClickHouseServer:
    """The endpoints."""

    def __init__(self, engine: Engine, password: str) -> None:
        self._engine = engine
        self._password = password
        self._behave(Behaviour())

    def application(self) -> web.Application:
        """For aiohttp to run."""
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.add_routes(
            [
                web.get("/ping", self.get_ping),
                web.post("/behave", self.post_behave),
                web.route("*", "/", self.query),
            ]
        )
        return application

    async def get_ping(self, _: web.Request) -> web.Response:
        """It listens."""
        return web.Response(text="Ok.\n")

    async def post_behave(self, request: web.Request) -> web.Response:
        """Change how it misbehaves from now on."""
        try:
            self._behave(msgspec.json.decode(await request.read(), type=Behaviour))
        except msgspec.DecodeError as exc:
            return web.Response(status=400, text=f"{exc}\n")
        return web.Response()

    async def query(self, request: web.Request) -> web.Response:
        """Run a statement, or misbehave."""
        query_id = request.query.get("query_id") or str(uuid.uuid4())
        try:
            self._authenticate(request)
            statement = await self._statement(request)
            spared = self._behaviour.only_inserts and not INSERT.match(statement.sql)
            fault = NO_FAULT if spared else self._faults.next()
            await strike_before(fault, request)
            result = await asyncio.to_thread(self._engine.run, statement)
            await strike_after(fault)
            response = _success(result)
        except EngineError as error:
            response = self._failure(_status(error.name), str(error))
        except Refused as refused:
            response = refusal(request, refused)
            if refused.status == HTTPStatus.OK:
                return web.Response(text="OK\n")
            if refused.status:
                response = self._failure(refused.status, self._behaviour.exception, refused.headers)
        response.headers["X-ClickHouse-Query-Id"] = query_id
        return response

    def _behave(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._faults = Faults(behaviour)

    def _authenticate(self, request: web.Request) -> None:
        required = self._behaviour.password
        if _credentials(request) != (USER, self._password if required is None else required):
            problem = "Authentication failed: password is incorrect, or there is no user with such name."
            raise failure(516, "AUTHENTICATION_FAILED", f"{USER}: {problem}")

    async def _statement(self, request: web.Request) -> Statement:
        parameters = dict(request.query)
        body = b""
        if request.content_type == "multipart/form-data":
            parameters.update({name: str(value) for name, value in (await request.post()).items()})
        else:
            body = _decompress(await request.read(), request.headers.get("Content-Encoding", "identity"))
        query = parameters.get("query", "").encode()
        return Statement(
            sql=query or body,
            data=body if query else b"",
            database=_parameter(request, "database", "X-ClickHouse-Database", "default"),
            settings={name: value for name, value in parameters.items() if _is_setting(name)},
            parameters={name[6:]: value for name, value in parameters.items() if name.startswith("param_")},
            default_format=_parameter(request, "default_format", "X-ClickHouse-Format", "TabSeparated"),
            read_only=request.method == "GET" or self._behaviour.read_only,
        )

    def _failure(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
        code = CODE.match(text)
        return web.Response(
            status=status,
            text=f"{text} (version {self._engine.version} (official build))\n",
            headers={CODE_HEADER: code[1] if code else "1001", **(headers or {})},
        )


def _success(result: Result) -> web.Response:
    # ClickHouse writes these numbers as strings, and all of them for every statement.
    summary = msgspec.json.encode({name: str(result.summary.get(name, 0)) for name in SUMMARY}).decode()
    headers = {"X-ClickHouse-Summary": summary, "X-ClickHouse-Timezone": "UTC"}
    if result.format:
        headers["X-ClickHouse-Format"] = result.format
    return web.Response(body=result.body, headers=headers)


def _status(name: str) -> int:
    families = (status for family, status in STATUS_OF_FAMILY.items() if name.startswith(family))
    return STATUS_OF.get(name) or next(families, 500)


def _credentials(request: web.Request) -> tuple[str, str]:
    """User and password, from any place where ClickHouse accepts them."""
    headers, query = request.headers, request.query
    if "X-ClickHouse-User" in headers:
        return headers["X-ClickHouse-User"], headers.get("X-ClickHouse-Key", "")
    if "Authorization" in headers:
        try:
            basic = BasicAuth.decode(headers["Authorization"], encoding="utf-8")
        except ValueError as exc:
            raise failure(516, "AUTHENTICATION_FAILED", "Invalid authentication") from exc
        return basic.login, basic.password
    return query.get("user", USER), query.get("password", "")


def _parameter(request: web.Request, name: str, header: str, default: str) -> str:
    return request.query.get(name) or request.headers.get(header) or default


def _is_setting(name: str) -> bool:
    return name not in NOT_SETTINGS and not name.startswith("param_")


def _decompress(body: bytes, encoding: str) -> bytes:
    if encoding not in DECOMPRESS:
        raise failure(48, "NOT_IMPLEMENTED", f"Unknown compression method {encoding}")
    return DECOMPRESS[encoding](body)


def _zstd(body: bytes) -> bytes:
    return bytes(import_module("backports.zstd").decompress(body))


def _lz4(body: bytes) -> bytes:
    return bytes(import_module("lz4.frame").decompress(body))


DECOMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "identity": bytes,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
    "zstd": _zstd,
    "lz4": _lz4,
}


async def serve(server: ClickHouseServer, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    # Raw bodies: aiohttp would decode some of ClickHouse's encodings and refuse the others.
    runner = web.AppRunner(
        server.application(), access_log=None, auto_decompress=False, shutdown_timeout=SHUTDOWN_SECONDS
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await ended.wait()
    await runner.cleanup()


def main() -> None:
    """Serve one directory."""
    parser = argparse.ArgumentParser(description="ClickHouse's HTTP interface over the embedded engine.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--database", required=True, help="made if it is missing")
    parser.add_argument("--password", default="", help=f"of user {USER}")
    arguments = parser.parse_args()
    with closing(Engine(arguments.folder)) as engine:
        engine.create_database(arguments.database)
        asyncio.run(serve(ClickHouseServer(engine, arguments.password), arguments.port))


if __name__ == "__main__":
    main()
