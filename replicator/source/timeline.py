"""Which cluster the LSNs belong to, and which of its histories: whether a checkpoint lies on the server's own.

A promoted standby continues the history of its primary under a new number, from where it had got it. `stream.py` asks
the server, `slot.py` compares the slot.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from replicator.contracts.events import Checkpoint, Lsn, format_lsn, parse_lsn


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
    branch, end = format_lsn(identity.branches[old]), format_lsn(checkpoint.end_lsn)
    return (
        f"the server's timeline {new} left the checkpoint's, {old}, at {branch}, before the checkpoint's {end}: what"
        " was committed between the two is in the sinks and no longer in PostgreSQL (a failover to a standby that had"
        " not received it, or a restore)"
    )


def lost_by_failover(identity: Identity, checkpoint: Checkpoint) -> bool:
    """Whether the sinks may have commits that the server lost: it left the checkpoint's timeline before its end."""
    return checkpoint.end_lsn > identity.branches.get(checkpoint.timeline, checkpoint.end_lsn)
