"""A TCP proxy in front of one server that breaks the network on command: `with Proxy(port) as proxy`.

It runs in a thread of the process that made it. For faults of the server itself see `faults`; to kill or freeze a
server see `process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from devstack.process import free_port

CHUNK_BYTES = 65_536
COMMAND_TIMEOUT_SECONDS = 10.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # no lingering: close() sends RST instead of FIN

Network: TypeAlias = Literal["whole", "down", "reset", "stalled", "forgotten", "mute", "no answers", "slow"]
"""whole      everything passes
down       connections are closed, new ones too
reset      the same with RST
stalled    connections stay open, nothing moves
forgotten  the same for those that are open, for ever; new ones pass
mute       what the client sends arrives, the answers wait
no answers what the client sends arrives; the connection is reset instead of an answer
slow       every chunk is delayed"""

SLOW_SECONDS = 0.05


class Proxy:
    """Forwards everything unless told otherwise. With `tls` it accepts TLS and forwards plain text."""

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._tls = tls
        self._network: Network = "whole"
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._forgotten: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy to {target_port}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls))
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def behave(self, network: Network) -> None:
        """Change the state, for open connections and new ones."""
        self._call(self._behave(network))

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(COMMAND_TIMEOUT_SECONDS)

    async def _behave(self, network: Network) -> None:
        self._network = network
        if network == "forgotten":
            self._forgotten |= self._writers
        self._changed.set()
        self._changed = asyncio.Event()
        if network in ("down", "reset"):
            self._cut()

    async def _close(self) -> None:
        self._server.close()
        self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cut(self) -> None:
        for writer in self._writers:
            if self._network != "down":
                peer: socket.socket = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):  # already closed
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._network in ("down", "reset"):
                self._cut()
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(back)
            try:
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self._pump(reader, back))
                    pumps.create_task(self._pump(there, writer, answers=True))
            finally:
                self._writers.discard(back)
                back.transport.abort()
        except* OSError:
            pass  # the server is down, or one side hung up: close the other
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool = False) -> None:
        while data := await source.read(CHUNK_BYTES):
            while self._network == "stalled" or (answers and self._network == "mute"):
                await self._changed.wait()
            await self._unless_forgotten(sink)
            if answers and self._network == "no answers":
                self._cut()
                raise ConnectionResetError
            if self._network == "slow":
                await asyncio.sleep(SLOW_SECONDS)
            sink.write(data)
            await sink.drain()
        await self._unless_forgotten(sink)
        raise ConnectionResetError  # the end of one direction ends both: none of these servers sends after that

    async def _unless_forgotten(self, sink: asyncio.StreamWriter) -> None:
        if sink in self._forgotten:  # not even its end comes through
            await asyncio.Event().wait()
