"""The server behind the stream: whose history it has, whether it shuts down, whether its commits wait for us.

A promoted standby continues the history of its primary as a new timeline, from where it had got it. `stream.py` asks
the server, `slot.py` looks at the slot.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping

import msgspec
from psycopg import conninfo, pq

from replicator.contracts.errors import SourceUnavailable
from replicator.contracts.events import Checkpoint, Lsn, format_lsn, parse_lsn
from replicator.source.connection import Dsn, parts

PATIENCE_SECONDS = 2.0
"""Sinks that are well take the rest, and the checkpoint is saved: then PostgreSQL has all that it asks for."""
PAUSE_SECONDS = 0.2
"""In a shutdown the next question follows each answer, a round trip later. Else PostgreSQL asks only if it has heard
nothing for half of wal_sender_timeout."""
PING_TIMEOUT_SECONDS = 5


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A server: its cluster, its timeline, and the timelines that this one came from."""

    system_identifier: str
    timeline: int
    branches: Mapping[int, Lsn] = {}
    """Earlier timelines, and the LSN at which this server left each of them; asked for only where it matters."""


def parse_history(content: str) -> dict[int, Lsn]:
    """What PostgreSQL's timeline history file says: a line `number, LSN, reason` for each earlier timeline.

    Raises ValueError for anything else.
    """
    lines = (line.split(maxsplit=2) for line in content.splitlines())
    return {int(words[0]): parse_lsn(words[1]) for words in lines if words and not words[0].startswith("#")}


def parted(identity: Identity, checkpoint: Checkpoint) -> str:
    """Why the server's history is not the one that was read up to the checkpoint; else empty."""
    if identity.system_identifier != checkpoint.system_identifier:
        return f"the server is system {identity.system_identifier}, the checkpoint is of {checkpoint.system_identifier}"
    if identity.timeline == checkpoint.timeline:
        return ""
    new, old = identity.timeline, checkpoint.timeline
    if old not in identity.branches:
        return f"the server is on timeline {new}, which does not continue the checkpoint's, {old} (a restore)"
    if not lost_by_failover(identity, checkpoint):
        return ""
    return (
        f"the server's timeline {new} left the checkpoint's, {old}, at {format_lsn(identity.branches[old])}, before the"
        f" {format_lsn(furthest(checkpoint))} that sinks have reached: what was committed between the two is in the"
        " sinks and no longer in PostgreSQL (a failover to a standby that had not received it, or a restore)"
    )


def lost_by_restore(identity: Identity, checkpoint: Checkpoint, server_lsn: Lsn) -> bool:
    """Whether the sinks may have what the server has no more: its history, or its WAL, ends before theirs."""
    return bool(parted(identity, checkpoint)) or server_lsn < furthest(checkpoint)


def lost_by_failover(identity: Identity, checkpoint: Checkpoint) -> bool:
    """Whether sinks may have commits that the server lost: it left the checkpoint's timeline before the last of them.

    Then even a checkpoint before that can't be continued: a sink would take what is new there for what it has.
    """
    return furthest(checkpoint) > identity.branches.get(checkpoint.timeline, furthest(checkpoint))


def furthest(checkpoint: Checkpoint) -> Lsn:
    """Up to where the fastest sink has come."""
    commits = (at.position.commit_lsn + 1 for at in checkpoint.sinks.values())  # its record begins there
    return max(checkpoint.end_lsn, *commits, *(at.end_lsn for at in checkpoint.sinks.values()), 0)


class Insistence:
    """How long PostgreSQL has been asking, without a pause, to confirm one position."""

    def __init__(self) -> None:
        self._lsn: Lsn = 0
        self._since = self._last = 0.0  # time.monotonic()

    def asked(self, lsn: Lsn) -> bool:
        """It asks again; whether that has lasted too long."""
        now = time.monotonic()
        if lsn != self._lsn or now - self._last > PAUSE_SECONDS:
            self._lsn, self._since = lsn, now
        self._last = now
        return now - self._since > PATIENCE_SECONDS


def shuts_down() -> SourceUnavailable:
    """Why the stream was let go."""
    return SourceUnavailable(
        problem="PostgreSQL shuts down",
        detail="it would wait until the sinks have taken everything, so the replicator disconnected",
        cure="What is not confirmed comes again: `run` connects when PostgreSQL is back",
    )


def given_up() -> SourceUnavailable:
    """Why a stream was let go on which nothing comes any more."""
    return SourceUnavailable(
        problem="the network dropped the stream without a sign",
        detail="nothing came, and nobody reads the slot",
        cure="What is not confirmed comes again: `run` connects",
    )


async def refuses_everybody(dsn: Dsn, stream: pq.abc.PGconn) -> bool:
    """Whether the server of a stream lets nobody in: it shuts down (57P03, which only a ping can tell)."""
    there = {name: getattr(stream, name).decode() for name in ("host", "hostaddr", "port")}
    ours = {"connect_timeout": PING_TIMEOUT_SECONDS, "target_session_attrs": "any"}
    info = conninfo.make_conninfo(**(parts(dsn) | there | ours))
    return await asyncio.to_thread(pq.PGconn.ping, info.encode()) == pq.Ping.REJECT


def application_name(slot: str) -> str:
    """Of the stream, whatever the DSN says: synchronous_standby_names goes by it."""
    return f"replicator {slot}"


def chooses(synchronous_standby_names: str, slot: str) -> bool:
    """Whether PostgreSQL takes the slot's stream for a synchronous standby: its commits then wait for the sinks."""
    names = [name.strip('"').casefold() for name in re.findall(r'"[^"]*"|[^\s,()]+', synchronous_standby_names)]
    return "*" in names or application_name(slot).casefold() in names
