"""What stands before a destination and answers in its place: a front end of HTTP, a proxy of Redis.

Both pass everything on until they are told to lie. They run in a thread. `devstack.proxy` breaks the network instead.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias
from urllib.parse import unquote

from devstack.process import free_port

COMMAND_TIMEOUT_SECONDS = 10.0
CHUNK_BYTES = 65_536
HTML = b"<html><body><h1>Please come back later</h1></body></html>\n"


class Request(NamedTuple):
    """One HTTP request."""

    head: bytes
    """With the empty line at its end."""
    body: bytes
    """As it was sent, chunks included."""

    @property
    def line(self) -> str:
        """Method and target, decoded."""
        return unquote(self.head.partition(b"\r\n")[0].decode("latin-1"))

    def header(self, name: str) -> str:
        """Its value; empty if there is none."""
        found = re.search(rb"(?im)^%b: *(.*?)\r$" % re.escape(name.encode()), self.head)
        return found[1].decode("latin-1") if found else ""

    @property
    def inserts(self) -> bool:
        """For ClickHouse: whether it writes rows."""
        return "INSERT INTO" in self.line.replace("+", " ") or self.body.lstrip().startswith(b"INSERT INTO")


Forward: TypeAlias = Callable[[Request], Awaitable[bytes]]
"""Gives a request to the destination and returns the whole answer."""
Lie: TypeAlias = Callable[[Request, Forward], Awaitable[bytes | None]]
"""The answer to a request; None: the connection is closed without one."""


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """A whole HTTP answer. `status` is code and phrase."""
    lines = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers))
    return lines.encode("latin-1") + b"\r\n" + body


class Front:
    """Serves connections in a thread of its own: `with Front(port) as front`. Subclasses say how."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"front of {target_port}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(COMMAND_TIMEOUT_SECONDS)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(COMMAND_TIMEOUT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Close every open connection."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(COMMAND_TIMEOUT_SECONDS)

    async def _end(self) -> None:
        self._server.close()
        await self._cut()

    async def _cut(self) -> None:
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self.serve(reader, writer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until it ends."""
        raise NotImplementedError


class HttpFront(Front):
    """A front end that may lie, and that lets nobody in without the right password or token."""

    def __init__(self, target_port: int, unauthorised: bytes) -> None:
        super().__init__(target_port)
        self.lie: Lie | None = None
        self.secret: str | None = None
        """What a client has to know; None: nothing."""
        self._unauthorised = unauthorised

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests, one after the other."""
        while True:
            request = await _read(reader)
            said = await self._answer(request)
            if said is None:
                return
            writer.write(said)
            await writer.drain()

    async def _answer(self, request: Request) -> bytes | None:
        if self.secret is not None and self.secret not in _secrets(request):
            return self._unauthorised
        lie = self.lie
        return await (lie(request, self._forward) if lie else self._forward(request))

    async def _forward(self, request: Request) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            first, _, rest = request.head.partition(b"\r\n")
            ours = b"connection|authorization|x-clickhouse-key"  # who may come in is for this front to say
            rest = re.sub(rb"(?im)^(%b):.*\r\n" % ours, b"", rest)
            writer.write(first + b"\r\nConnection: close\r\n" + rest + request.body)
            found = await reader.read()
            if not found:
                raise ConnectionResetError
            return re.sub(rb"(?im)^connection: close\r\n", b"", found, count=1)
        finally:
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    request = Request(head, b"")
    if length := request.header("Content-Length"):
        return Request(head, await reader.readexactly(int(length)))
    return Request(head, await _chunks(reader) if "chunked" in request.header("Transfer-Encoding") else b"")


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    read = b""
    while True:
        line = await reader.readline()
        size = int(line.partition(b";")[0], 16)
        read += line + await reader.readexactly(size + 2)
        if not size:
            return read


def _secrets(request: Request) -> tuple[str, ...]:
    """A bearer token, a password of basic authentication, ClickHouse's key."""
    scheme, _, value = request.header("Authorization").partition(" ")
    if scheme.lower() == "basic":
        value = base64.b64decode(value).decode().partition(":")[2]
    return value, request.header("X-ClickHouse-Key")


class RedisFront(Front):
    """A proxy of Redis that may answer every command, or only the scripts, with one line of its own."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.line: bytes | None = None
        self.only_scripts = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client and its connection to Redis."""
        there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        answers = asyncio.create_task(_pump(there, writer))
        try:
            while True:
                command = await _command(reader)
                line = self.line
                if line is not None and (b"EVAL" in command[:64] or not self.only_scripts):
                    writer.write(line)
                    await writer.drain()
                else:
                    back.write(command)
                    await back.drain()
        finally:
            answers.cancel()
            back.transport.abort()


async def _command(reader: asyncio.StreamReader) -> bytes:
    """One command as it was sent: an array of texts, each with its length before it."""
    read = head = await reader.readuntil(b"\r\n")
    for _ in range(int(head[1:])):
        length = await reader.readuntil(b"\r\n")
        read += length + await reader.readexactly(int(length[1:]) + 2)
    return read


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(CHUNK_BYTES):
            sink.write(data)
            await sink.drain()
    sink.transport.abort()


class Elsewhere(Front):
    """Where a redirect leads: takes everything, answers 200, and remembers how much it was given."""

    def __init__(self) -> None:
        super().__init__(0)
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests, one after the other."""
        while True:
            await _read(reader)
            self.requests += 1
            writer.write(answer("200 OK"))
            await writer.drain()
