"""Everything that can go wrong, as a tree. A docstring is the message: cause first, cure last.

    ReplicatorError
    ├── SettingsError              exit code 2
    ├── SourceError
    │   ├── SourceUnavailable      retried for ever
    │   ├── SlotInUse              retried for ever: we are the standby
    │   ├── SlotMissing, SlotLost, SlotInvalid
    │   ├── StreamGap              the slot is not continuous with the checkpoint
    │   ├── SourceUnusable         wal_level, wal2json, rights, tables
    │   └── DecodeError
    ├── SinkError
    │   ├── SinkUnavailable        retried for ever, with full jitter
    │   ├── SinkMisconfigured      retried slowly and loudly: the settings are wrong, the events are not
    │   ├── DeadLettersFull        waits, loudly, until somebody has looked at them
    │   └── SinkUnusable           stops the program
    └── CheckpointError
        ├── CheckpointUnavailable  retried for ever; nothing is confirmed meanwhile
        ├── CheckpointBackward
        ├── Overtaken              the program begins anew, as the standby
        └── CheckpointUnusable

What happened is said here; what to do about it is decided by who catches it (lane.py for sinks,
pipeline.py for the source). Whatever nobody names stops the program with its message.
Messages carry table, LSN and sink, never row values or secrets.
"""

from __future__ import annotations

import inspect


class ReplicatorError(Exception):
    """The replicator failed: {detail}."""

    exit_code = 1

    def __init__(self, **facts: object) -> None:
        template = " ".join(inspect.cleandoc(type(self).__doc__ or "").split())
        super().__init__(template.format(**facts))
        self.facts = facts


class SettingsError(ReplicatorError):
    """{name} is unusable: {problem}. It takes {expected}."""

    exit_code = 2


class SourceError(ReplicatorError):
    """Reading from PostgreSQL failed: {detail}."""


class SourceUnavailable(SourceError):
    """PostgreSQL is not reachable: {detail}. `run` tries again until it answers; if it should be up, look at
    REPLICATOR_POSTGRES_DSN and pg_hba.conf."""


class SlotInUse(SourceError):
    """Replication slot {slot} is held by process {pid}. `run` waits for its turn as the standby, nothing to do if
    another one is meant to run; to drop the slot, or to accept a gap, stop that one first."""


class SlotMissing(SourceError):
    """Replication slot {slot} does not exist, but the checkpoint says that it was read up to {checkpoint}: what is
    committed from {since} until there is a new slot will be missing in the sinks. To go on:
    `python -m replicator init --accept-gap` makes the slot and prints the `python backfill.py` command that brings
    what is missing."""


class SlotLost(SourceError):
    """PostgreSQL has thrown away WAL that replication slot {slot} still needed (wal_status {wal_status}); it was
    read up to {checkpoint}: what is committed from {since} until there is a new slot will be missing in the sinks. To
    go on: raise max_slot_wal_keep_size, then `python -m replicator drop-slot`, then
    `python -m replicator init --accept-gap`, which makes a new slot and prints the `python backfill.py` command that
    brings what is missing."""


class SlotInvalid(SourceError):
    """Replication slot {slot} can't be used: {problem}. Drop it or name another one in REPLICATOR_SLOT."""


class StreamGap(SourceError):
    """Replication slot {slot} is not continuous with the checkpoint: {problem}. What was committed from {since} until
    now may be missing in the sinks. If that is understood: `python -m replicator init --accept-gap` begins where the
    slot is, and prints the `python backfill.py` command that brings what is missing."""


class SourceUnusable(SourceError):
    """PostgreSQL can't be replicated from: {problem}. {cure}."""


class DecodeError(SourceError):
    """A message from wal2json at LSN {lsn} can't be understood: {problem}. If the plugin or its options were changed,
    change them back; otherwise this is a bug worth reporting."""


class SinkError(ReplicatorError):
    """Sink {sink} failed: {detail}."""


class SinkUnavailable(SinkError):
    """Sink {sink} did not take the batch: {detail}. It is tried again until it does.

    Raise with `retry_after` (seconds, float) when the destination named a time.
    """

    def __init__(self, *, sink: str, detail: str, retry_after: float | None = None) -> None:
        Exception.__init__(self, f"sink {sink} did not take the batch: {detail}; it is tried again until it does")
        self.facts = {"sink": sink, "detail": detail}
        self.retry_after = retry_after


class SinkMisconfigured(SinkError):
    """Sink {sink} turns us away: {detail}. The events are kept and tried again slowly. {cure}."""


class DeadLettersFull(SinkError):
    """Sink {sink} refuses more than is kept: it has {stored} dead letters, {count} more would pass
    REPLICATOR_DEAD_LETTERS_MAX, {limit}. Its events wait, and nothing is confirmed past them.
    `python -m replicator dead-letters list --sink {sink}` says why they were refused; to go on, when that is mended,
    `python -m replicator dead-letters replay --sink {sink}` delivers them, or
    `python -m replicator dead-letters drop --sink {sink}` forgets them."""


class SinkUnusable(SinkError):
    """Sink {sink} can't be written to: {detail}. {cure}."""


class CheckpointError(ReplicatorError):
    """The checkpoint database failed: {detail}."""


class CheckpointUnavailable(CheckpointError):
    """The checkpoint database does not take what it is given: {detail}. Nothing is confirmed to PostgreSQL until it
    does; see that what REPLICATOR_CHECKPOINT_URL names is reachable, writable and has room."""


class CheckpointBackward(CheckpointError):
    """The checkpoint of slot {slot} would go back from {stored} to {offered}. Another replicator uses the same slot
    and checkpoint database; see that only one of them is active, then start this one again."""


class Overtaken(CheckpointError):
    """Another replicator went on from {checkpoint} to {stored} while this one was cut off. It begins anew, as the
    standby; see that the other one runs."""


class CheckpointUnusable(CheckpointError):
    """The checkpoint database can't be used: {problem}. {cure}."""
