"""The replicator's end of the socket. One replicator has it; a standby on the same machine takes it over.

Nobody but the user that the replicator runs as can connect, root apart.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import IO

import msgspec

from replicator.contracts.errors import CheckpointError
from replicator.operations.control.address import LINE_BYTES, SHORTER, Answer, Request, too_long
from replicator.operations.follow.tail import Seen

REQUEST_SECONDS = 5.0
LOOK_SECONDS = 2.0
"""How often a standby looks whether the socket is free."""

log = logging.getLogger(__name__)

Act = Callable[[Request], Awaitable[Answer]]
Show = Callable[[str], AsyncGenerator[Seen, None]]


class Control:
    """Listens at `path`, and calls `act` for what comes; `show` is asked for a `tail`."""

    def __init__(self, path: Path, act: Act, show: Show) -> None:
        self._path = path
        self._act = act
        self._show = show

    async def run(self) -> None:
        """Serve until cancelled. Without a socket the replicator works as well, and the log says so once."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("ab") as lock:
                await _locked(lock)
                await self._listen()
        except OSError as exc:
            problem = too_long(self._path)
            message = "pause, resume, retry and tail can't reach this replicator: no socket at %s (%s). %s"
            why, cure = problem or exc.strerror or exc, SHORTER if problem else ""
            log.warning(message, self._path, why, cure, extra={"code": "R107"})

    async def _listen(self) -> None:
        self._path.unlink(missing_ok=True)  # a killed process has left it: who lives has the lock
        server = await asyncio.start_unix_server(self._serve, sock=self._bound(), limit=LINE_BYTES)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            self._path.unlink(missing_ok=True)

    def _bound(self) -> socket.socket:
        """Its user's alone, whatever the umask is: nobody can connect before it listens, and it does not yet."""
        bound = socket.socket(socket.AF_UNIX)
        try:
            bound.bind(str(self._path))
            self._path.chmod(0o600)
        except OSError:
            bound.close()
            raise
        return bound

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readuntil(b"\n")
            await self._answer(line, writer)
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):  # gone, nonsense, or the end
            pass
        finally:
            writer.close()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            request = msgspec.json.decode(line, type=Request)
            answer = await self._act(request)
        except msgspec.DecodeError:
            answer = Answer(done=False, lines=["the replicator has another version than this command"])
        except CheckpointError as exc:
            answer = Answer(done=False, lines=[str(exc), "nothing was changed"])
        else:
            if answer.done and request.do == "tail":
                async with aclosing(self._show(request.sink)) as seen:
                    async for one in seen:  # an empty one, too: writing it shows whether anybody is there
                        await _write(writer, one)
        await _write(writer, answer)


async def _write(writer: asyncio.StreamWriter, message: Answer | Seen) -> None:
    writer.write(msgspec.json.encode(message) + b"\n")
    await writer.drain()


async def _locked(file: IO[bytes]) -> None:
    """Wait for the lock, which ends with the process, however that ends."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(LOOK_SECONDS)
        else:
            return
