"""The command line's end of the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path

import msgspec

from replicator.contracts.errors import CheckpointAbsent, CheckpointError, ReplicatorError
from replicator.contracts.stores import CheckpointStore
from replicator.contracts.stores import ask as ask_store
from replicator.operations.control.address import LINE_BYTES, SHORTER, Answer, Request, too_long
from replicator.operations.follow.tail import Seen
from replicator.source.stream import Source

_decode = msgspec.json.Decoder(Seen | Answer).decode

ANSWER_SECONDS = 60.0
"""Longer than the writes in flight, which a pause waits for, and than a save of the checkpoint database."""


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """To the replicator that runs here; None: there is none. Raises ReplicatorError when it can't be reached."""
    if problem := too_long(path):
        raise ReplicatorError(f"the replicator's socket can't be at {path}: {problem}", SHORTER)
    try:
        return await asyncio.open_unix_connection(path, limit=LINE_BYTES)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):  # refused: left by a killed process
        return None
    except PermissionError as exc:
        cure = "Run this command as the user that the replicator runs as"
        raise ReplicatorError(f"the replicator's socket {path} may not be opened", cure) from exc
    except OSError as exc:
        raise ReplicatorError(f"the replicator's socket {path} can't be opened: {exc.strerror}") from exc


async def watch(path: Path, request: Request) -> AsyncGenerator[Seen | Answer, None]:
    """What a `tail` shows, until the replicator ends it; an Answer says why there is nothing more.

    Raises ReplicatorError when no replicator runs here.
    """
    if (connection := await connect(path)) is None:
        cure = "Run it where the replicator runs (in its container), with its settings and as its user"
        raise ReplicatorError(f"no replicator runs here: nothing listens at {path}", cure)
    reader, writer = connection
    try:
        writer.write(msgspec.json.encode(request) + b"\n")
        async for line in reader:
            yield _decode(line)
    except (OSError, ValueError) as exc:  # ValueError: a line that is too long, or no message of ours
        raise ReplicatorError(f"the replicator at {path} has ended the view ({type(exc).__name__})") from exc
    finally:
        writer.close()


async def cluster(source: Source, store: CheckpointStore, slot: str) -> str:
    """The system identifier of the cluster that the settings mean: by the checkpoint, for PostgreSQL may be away.

    Empty: the checkpoint database does not say. Raises SourceError where there is no checkpoint yet.
    """
    try:
        stored = await ask_store(store.load, slot)
    except CheckpointAbsent:
        stored = None
    except CheckpointError:
        return ""
    if stored:
        return stored.system_identifier
    with closing(source):
        identity, _ = await source.connect()
    return identity.system_identifier


async def ask(path: Path, request: Request) -> Answer | None:
    """What the replicator that runs here answers; None: none runs here. Raises ReplicatorError."""
    if (connection := await connect(path)) is None:
        return None
    reader, writer = connection
    try:
        writer.write(msgspec.json.encode(request) + b"\n")
        async with asyncio.timeout(ANSWER_SECONDS):
            return msgspec.json.decode(await reader.readuntil(b"\n"), type=Answer)
    except (OSError, EOFError, msgspec.DecodeError, asyncio.LimitOverrunError) as exc:
        cure = "`status` shows whether it was done"
        raise ReplicatorError(f"the replicator at {path} has not answered ({type(exc).__name__})", cure) from exc
    finally:
        writer.close()
