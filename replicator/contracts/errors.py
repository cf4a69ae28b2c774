"""Everything that can go wrong, as a tree of exceptions.

An error says what happened (`problem`) and what the operator can do (`cure`); its class decides what the program does
(`delivery/retry.py`). One that is not retried stops the program, which prints its message. Messages name table, LSN and
sink; they never hold row values or secrets.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import ssl
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

CITED_CHARACTERS = 500
"""Of what a destination says: enough for its reason, too little for a page."""


def _program() -> str:
    if given := os.environ.get("REPLICATOR_PROGRAM"):  # the container image knows how it is run from outside
        return given
    called = Path(sys.argv[0]) if sys.argv else Path()
    if called.name == "replicator":
        return "replicator" if shutil.which("replicator") == str(called) else shlex.quote(str(called))
    python = f"{shlex.quote(sys.orig_argv[0])} -m replicator"
    if called.parts[-2:] == ("replicator", "__main__.py"):
        return python
    if called.name == "backfill.py":  # the modules are beside it
        folder = called.resolve().parent
        return python if folder == Path.cwd() else f"env PYTHONPATH={shlex.quote(str(folder))} {python}"
    return "python -m replicator"


PROGRAM = _program()
"""How this program was called, so that the commands in messages can be pasted: `replicator`, `python -m replicator`."""


def command(words: str) -> str:
    """A command of this program, in backticks: `command("init")` is "`replicator init`" where that was typed."""
    return f"`{PROGRAM} {words}`"


_WORD = re.compile(r"[a-z][a-z'-]*[,:;.]?(\s|$)")


def _sentence(text: str) -> str:
    first = text[:1].upper() if _WORD.match(text) else text[:1]  # not of a name, such as public.content or wal_level
    return f"{first}{text[1:]}{'' if text.endswith('.') else '.'}"


def cited(text: str, secrets: Iterable[str] = (), most: int = CITED_CHARACTERS) -> str:
    """Words from outside, fit to be kept: on one line, without control characters and secrets, cut."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    shown = "".join(character if character.isprintable() else " " for character in text)
    words = " ".join(shown.split())
    return words if len(words) <= most else f"{words[:most]}…"


def network_words(exc: BaseException) -> str:
    """What the network did, without an address: the words of the system or of TLS, else the kind of the failure."""
    causes = [exc]
    while isinstance(cause := causes[-1].__cause__ or causes[-1].__context__, Exception):  # not a CancelledError
        causes.append(cause)
    for cause in reversed(causes):
        if isinstance(cause, ssl.SSLError):  # its errno is not the system's
            words = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or type(cause).__name__
            return f"TLS: {words.lower().replace('_', ' ') if words.isupper() else words}"
        if isinstance(cause, OSError) and cause.errno:  # asyncio's own words have the address
            return os.strerror(cause.errno) if cause.errno > 0 else cited(cause.strerror or "")
    return type(causes[-1]).__name__


def frames(exc: BaseException) -> str:
    """Where it was raised, a line each: without the lines of the source, in which a secret may stand."""
    calls = traceback.StackSummary.extract(traceback.walk_tb(exc.__traceback__), lookup_lines=False)
    return "\n".join(f'  File "{call.filename}", line {call.lineno}, in {call.name}' for call in calls)


def unimported(exc: BaseException) -> str:
    """Why a module can't be imported. It runs, and may fail at anything: only Python's words, and ours, are shown."""
    *_, (frame, _) = [*traceback.walk_tb(exc.__traceback__)]
    is_ours = str(frame.f_globals.get("__name__")).startswith("replicator.")
    said = f": {cited(str(exc))}" if is_ours or isinstance(exc, _OF_PYTHON) else ""
    return f"{type(exc).__name__}{said}{raised_at(exc)}"


_OF_PYTHON = (ImportError, SyntaxError, NameError, AttributeError, TypeError)


def raised_at(exc: BaseException) -> str:
    """Where in the imported module, if it has come as far as to run."""
    calls = (call for call in traceback.extract_tb(exc.__traceback__)[1:] if "importlib" not in call.filename)
    call = next(calls, None)
    return f" ({Path(call.filename).name}, line {call.lineno})" if call else ""


class ReplicatorError(Exception):
    """Something failed. Base of all; `str(error)` is the problem and the cure as sentences."""

    exit_code = 1
    code = "R100"
    """For whoever searches logs and docs/reference/faults.md: it stays when words change."""

    def __init__(self, problem: str, cure: str = "", *, detail: str = "") -> None:
        super().__init__(" ".join(_sentence(part) for part in (problem, cure) if part))
        self.problem = problem
        """What happened."""
        self.cure = cure
        """What the operator can do, the exact command where there is one."""
        self.detail = detail
        """What happened, without where."""

    @property
    def advice(self) -> str:
        """The cure as the sentence that ends the message."""
        return _sentence(self.cure) if self.cure else ""


class SettingsError(ReplicatorError):
    """A setting, or an argument, can't be used."""

    code = "R101"
    exit_code = 2

    def __init__(self, *, name: str, problem: str, expected: str) -> None:
        super().__init__(f"{name} is unusable: {problem}", f"It takes {expected}")
        self.name = name
        self._said = {"problem": problem, "expected": expected}

    def of_argument(self, name: str) -> SettingsError:
        """The same of a setting that was given by keyword, under this name."""
        error = SettingsError(name=f"argument {name}", **self._said)
        error.name = name
        return error


class PackageHidden(ReplicatorError):
    """Python finds another file or folder under the name of one of the replicator's packages."""

    code = "R108"
    exit_code = 2

    def __init__(self, *, path: str, package: str) -> None:
        super().__init__(
            f"{path} hides the replicator's own package {package}",
            "Rename it; or if it is in the working directory, run `replicator` itself, or `python -P -m replicator`",
        )


class SourceError(ReplicatorError):
    """PostgreSQL can't be read from."""

    code = "R200"


class SourceUnavailable(SourceError):
    """PostgreSQL can't be read from now: it does not answer, or it answers something else. Retried until it can be."""

    code = "R201"

    def __init__(self, *, detail: str, problem: str = "PostgreSQL is not reachable", cure: str = "") -> None:
        unreachable = "`run` retries until it answers; if it should be up, check REPLICATOR_POSTGRES_DSN"
        super().__init__(f"{problem}: {detail}", cure or unreachable, detail=detail)


class SourceRefuses(SourceUnavailable):
    """PostgreSQL refuses the connection: password, right, pg_hba.conf, too many connections, a start or shutdown."""

    code = "R202"

    def __init__(self, *, detail: str, cure: str) -> None:
        super().__init__(problem="PostgreSQL refuses the connection", detail=detail, cure=cure)


class StreamEnded(SourceUnavailable):
    """PostgreSQL ended the stream, with a reason of its own."""

    code = "R203"

    def __init__(self, *, detail: str) -> None:
        super().__init__(problem="PostgreSQL ended the stream", detail=detail, cure="`run` connects again")


class SlotWaits(SourceUnavailable):
    """A new slot is not ready yet: it waits for the transactions that were open before it."""

    code = "R302"

    def __init__(self, *, slot: str, waits: str, cure: str) -> None:
        super().__init__(problem=f"replication slot {slot} is being made", detail=waits, cure=cure)


class StreamStuck(SourceUnavailable):
    """The stream ends again and again without progress."""

    code = "R204"

    def __init__(self, *, lsn: str, times: int, seconds: float, last: SourceUnavailable) -> None:
        problem = f"no progress for {seconds:.0f} s: the stream has ended {times} times at {lsn}, the last time with"
        super().__init__(problem=problem, detail=last.problem, cure=last.cure)


class SlotUndecodable(SourceUnavailable):
    """PostgreSQL or wal2json can't decode a change that the slot has to read. Retried: nothing is passed over."""

    code = "R205"

    def __init__(self, *, slot: str, lsn: str, detail: str) -> None:
        super().__init__(
            problem=f"PostgreSQL can't decode slot {slot} at LSN {lsn}",
            detail=detail,
            # Never pg_replication_slot_advance: it reads the same WAL, which may be damaged or gone.
            cure=f"`run` tries again and keeps everything until it can. To get past it, stop `run`, then"
            f" {command('drop-slot')} and {command('init --accept-gap')}: the backfill command that it prints brings"
            " what was skipped",
        )


class SourceStandby(SourceUnavailable):
    """The server is a standby. Retried until it is promoted, or the DSN leads to the primary."""

    code = "R206"

    def __init__(self) -> None:
        detail = "the server is a standby, and the slot is read from the primary"
        ReplicatorError.__init__(
            self,
            detail,
            "`run` waits until it is promoted, or REPLICATOR_POSTGRES_DSN leads to the primary. With all hosts and"
            " target_session_attrs=primary in it, it always does",
            detail=detail,
        )


class SlotInUse(SourceError):
    """Another process reads the slot. Retried until it is free: this process is the standby."""

    code = "R301"

    def __init__(self, *, slot: str, pid: object) -> None:
        super().__init__(
            f"replication slot {slot} is held by process {pid}",
            "`run` waits as the standby: nothing to do if another replicator is meant to run. To drop the slot or to"
            " accept a gap, stop that process first",
        )


class SlotMissing(SourceError):
    """There is a checkpoint, but no slot."""

    code = "R303"

    def __init__(self, *, slot: str, checkpoint: str, since: str) -> None:
        super().__init__(
            f"replication slot {slot} does not exist, but the checkpoint says that it was read up to {checkpoint}."
            f" Everything committed from {since} until there is a new slot will be missing in the sinks",
            f"{command('init --accept-gap')} makes the slot and prints the backfill command for what is missing",
        )


class SlotLost(SourceError):
    """What the slot still needed is gone from PostgreSQL. `reason` is PostgreSQL's word for why, if it has one."""

    code = "R304"

    def __init__(self, *, slot: str, reason: str | None, checkpoint: str, since: str) -> None:
        what, cure = {
            "idle_timeout": ("nobody read it for idle_replication_slot_timeout", "Raise that setting"),
            "rows_removed": ("a standby removed rows that it needed", "Set hot_standby_feedback = on there"),
            "wal_level_insufficient": ("wal_level was lowered", "Set wal_level = logical"),
        }.get(reason or "", ("PostgreSQL has removed WAL that it still needed", "Raise max_slot_wal_keep_size"))
        super().__init__(
            f"replication slot {slot} is lost (wal_status lost): {what}. It was read up to {checkpoint}. Everything"
            f" committed from {since} until there is a new slot will be missing in the sinks",
            f"{cure}, then run {command('drop-slot')}, then {command('init --accept-gap')}, which makes a new slot and"
            " prints the backfill command for what is missing",
        )


class SlotInvalid(SourceError):
    """The slot is of another kind, or belongs to another database."""

    code = "R305"

    def __init__(self, *, slot: str, problem: str) -> None:
        cure = "Drop it, or name another one in REPLICATOR_SLOT"
        super().__init__(f"replication slot {slot} can't be used: {problem}", cure)


class StreamGap(SourceError):
    """The slot does not continue where the checkpoint ends."""

    code = "R306"

    def __init__(self, *, slot: str, problem: str, since: str) -> None:
        super().__init__(
            f"replication slot {slot} is not continuous with the checkpoint: {problem}. What was committed since"
            f" {since} may be missing in the sinks",
            f"If that is understood, {command('init --accept-gap')} begins where the slot is and prints the backfill"
            " command for what is missing",
        )


class SinkLeftOut(SourceError):
    """A sink is back that was left out of REPLICATOR_SINKS. The slot no longer has what went by."""

    code = "R307"

    def __init__(self, *, sink: str, at: str, others: str) -> None:
        super().__init__(
            f"sink {sink} was left out after {at}, the others went on to {others}. It lacks what was committed in"
            " between; the others lack nothing",
            f"{command('init --accept-gap')} lets it begin at {others}, and prints the backfill command for it alone."
            f" Or leave it out. Next time, use {command(f'pause {sink}')}: a paused sink misses nothing",
        )


class SourceUnusable(SourceError):
    """PostgreSQL can't be replicated from until an operator has changed something: wal_level, rights, tables."""

    code = "R207"

    def __init__(self, *, problem: str, cure: str) -> None:
        super().__init__(f"PostgreSQL can't be replicated from: {problem}", cure, detail=problem)


class TablesUnfit(SourceError):
    """Events can't be made of the tables as they are. Nothing is read; looked at again until an operator has mended it.

    `untold`: meanwhile the WAL does not tell which rows are deleted.
    """

    code = "R401"

    def __init__(self, *, problem: str, cure: str, untold: bool = False) -> None:
        kept = "Nothing is read, PostgreSQL keeps what is committed, and no event is lost"
        if untold:
            kept = (
                "Nothing is read, and PostgreSQL keeps what is committed, but not which rows are deleted until this is"
                " corrected: the sinks keep those, and a dead letter will say so"
            )
        on = "Once the tables fit, the replicator continues by itself"
        restart = "" if "restart" in cure else "; a changed declaration or setting needs a restart"
        self._cure = f"{cure}. {on}{restart}"
        super().__init__(f"{problem}. {kept}", self._cure, detail=problem)

    def before_the_slot(self) -> TablesUnfit:
        """The same of a first start: a slot would keep WAL, perhaps until the disk is full, for what can't be read."""
        made = "No slot is made until this is mended: PostgreSQL keeps no WAL for it, and a backfill brings older rows"
        ReplicatorError.__init__(self, f"{self.detail}. {made}", self._cure, detail=self.detail)
        return self


class TablesUnsettled(SourceError):
    """Something may be changing the tables: until that is known nothing more is confirmed."""

    code = "R402"

    def __init__(self, *, holder: str) -> None:
        super().__init__(f"verification waits for {holder}", "Nothing is confirmed until then (see pg_stat_activity)")


class TablesChanged(SourceError):
    """The tables are no longer what this stream assumes. The stream begins again after the checkpoint."""

    code = "R403"

    def __init__(self, *, what: str) -> None:
        super().__init__(f"the tables have changed ({what}). The stream begins again after the checkpoint", detail=what)


class TimelineChanged(SourceError):
    """PostgreSQL was failed over. What came past the checkpoint may not be there any more, so it is given up."""

    code = "R208"

    def __init__(self, *, timeline: int) -> None:
        super().__init__(f"PostgreSQL is on timeline {timeline} now: the stream begins again after the checkpoint")


class SinkResumed(SourceError):
    """A resumed sink gets what it lacks: the stream begins again after the checkpoint, which waited for it."""

    code = "R213"

    def __init__(self, *, sink: str) -> None:
        super().__init__(f"sink {sink} is resumed: the stream begins again at its position. Others skip what they have")


class DecodeError(SourceError):
    """A message of the stream is not what wal2json sends."""

    code = "R209"

    def __init__(self, *, lsn: str, problem: str) -> None:
        cure = "If the plugin or its options were changed, change them back; otherwise please report this as a bug"
        super().__init__(f"a message from wal2json at LSN {lsn} can't be understood: {problem}", cure)


class SinkError(ReplicatorError):
    """A sink failed."""

    code = "R500"

    def __init__(self, sink: str | None, problem: str, cure: str = "", *, detail: str = "") -> None:
        super().__init__(problem, cure, detail=detail)
        self.sink = sink


class SinkUnavailable(SinkError):
    """The destination can't take events now. Retried until it does, with full jitter.

    `retry_after`: seconds that the destination asked to be left alone, None if it did not.
    """

    code = "R501"

    def __init__(self, *, sink: str, detail: str, retry_after: float | None = None) -> None:
        problem = f"sink {sink} did not take the batch: {detail}"
        super().__init__(sink, problem, "The replicator retries until it does", detail=detail)
        self.retry_after = retry_after


class SinkMisconfigured(SinkError):
    """The destination turns the replicator away, whatever the events are. Retried slowly and loudly."""

    code = "R502"

    def __init__(self, *, sink: str, detail: str, cure: str) -> None:
        problem = f"sink {sink} turns the replicator away: {detail}. The events are kept and retried slowly"
        super().__init__(sink, problem, cure, detail=detail)


class DeadLettersFull(SinkError):
    """There are more dead letters than may be kept.

    Of rows `sink` is None.

    Retried slowly and loudly: an operator has to look at them.
    """

    code = "R510"

    def __init__(self, *, sink: str | None, stored: int, count: int, limit: int) -> None:
        which = f"--sink {sink}" if sink else "--stage row"
        owner = f"sink {sink} has" if sink else "rows that could not be made into events:"
        super().__init__(
            sink,
            f"{owner} {stored} dead letters; {count} more would pass the limit of {limit}. They wait, and nothing is"
            " confirmed past them",
            f"{command(f'dead-letters list {which}')} says why they were refused. Then"
            f" {command(f'dead-letters replay {which}')} delivers them, or {command(f'dead-letters drop {which}')}"
            " forgets them",
        )


class SinkUnusable(SinkError):
    """No event can be written until an operator has changed something. A lane retries slowly and loudly."""

    code = "R505"

    def __init__(self, *, sink: str, detail: str, cure: str) -> None:
        super().__init__(sink, f"sink {sink} can't be written to: {detail}", cure, detail=detail)


class SinkEmptied(SinkUnusable):
    """What was written is gone. Only `look` raises it: events are written all the same."""

    code = "R506"

    def __init__(self, *, sink: str, detail: str, cure: str) -> None:
        SinkError.__init__(self, sink, f"sink {sink} has lost what it had: {detail}", cure, detail=detail)


class SinkBroken(SinkError):
    """A sink failed in an unexpected way (a bug, no file descriptor left). A lane retries slowly and loudly."""

    code = "R507"

    def __init__(self, *, sink: str, detail: str) -> None:
        problem = f"sink {sink} failed in an unexpected way: {detail}. The events are kept and retried slowly"
        super().__init__(sink, problem, "Please report it, with the traceback in the log", detail=detail)


class BatchRefused(SinkError):
    """The destination refuses a write, perhaps because of an event in it. The lane finds out (`delivery/writer.py`).

    `detail` is for the log: no row values. `reason` is for the dead letter, and may have the destination's own words,
    which may quote the event (`cited`); None: the detail.
    """

    code = "R508"

    def __init__(self, *, sink: str, detail: str, reason: str | None = None) -> None:
        cure = f"{command('dead-letters list')} says which events, and why"
        super().__init__(sink, f"sink {sink} refuses events: {detail}", cure, detail=detail)
        self.reason = reason or detail


class BatchTooLarge(BatchRefused):
    """The write is too large for the destination, or for something before it: the lane makes its writes smaller."""

    code = "R509"


class SinkRefusesAll(SinkError):
    """The destination takes nothing at all, so no event is at fault. A lane keeps all of them and asks slowly."""

    code = "R503"

    def __init__(self, *, sink: str, detail: str) -> None:
        problem = f"sink {sink} refuses everything: {detail}. All events are kept and retried slowly"
        settings = f"REPLICATOR_{sink.partition('/')[0].upper()}_…"
        cure = f"Check that the settings {settings} are right, and why the destination refuses events"
        super().__init__(sink, problem, cure, detail=detail)


class SinkContradicts(SinkError):
    """The destination takes events that it has refused, so its refusals prove nothing. A lane asks again."""

    code = "R504"

    def __init__(self, *, sink: str, detail: str) -> None:
        problem = f"sink {sink} refuses events and takes some of them when asked again: {detail}"
        super().__init__(sink, problem, "The events are kept and retried. Check whether all its servers behave alike")


class CheckpointError(ReplicatorError):
    """The checkpoint database failed."""

    code = "R600"


class CheckpointUnavailable(CheckpointError):
    """The checkpoint database can't save anything. Retried until it does; nothing is confirmed before."""

    code = "R601"

    def __init__(self, *, detail: str) -> None:
        super().__init__(
            f"the checkpoint database fails: {detail}",
            "Nothing is confirmed to PostgreSQL until it does. Check that the database in REPLICATOR_CHECKPOINT_URL is"
            " reachable, writable and has room",
        )


class CheckpointMissing(CheckpointError):
    """There is no checkpoint, but the slot was read before."""

    code = "R602"

    def __init__(self, *, slot: str, confirmed: str, database: str = "") -> None:
        self.facts = {"slot": slot, "confirmed": confirmed}
        super().__init__(
            f"the checkpoint database{database and f' {database}'} has nothing of replication slot {slot}, but the slot"
            f" was read before, up to {confirmed}",
            "If REPLICATOR_CHECKPOINT_URL, or the state directory, names another database than before, change it back."
            f" If the checkpoint is lost, {command('init --accept-gap')} begins at the slot's position: these sinks"
            " lack nothing if the slot was only read for them",
        )


class CheckpointBackward(CheckpointError):
    """A checkpoint is older than the stored one."""

    code = "R603"

    def __init__(self, *, slot: str, stored: str, offered: str) -> None:
        super().__init__(
            f"the checkpoint of slot {slot} would go back from {stored} to {offered}",
            "Another replicator uses the same slot and checkpoint database. Make sure that only one is active, then"
            " start this one again",
        )
        self.stored = stored


class Overtaken(CheckpointError):
    """Another replicator moved the checkpoint while this one was cut off. The program starts again, as the standby."""

    code = "R604"

    def __init__(self, *, checkpoint: str, stored: str) -> None:
        cure = "This one starts again, as the standby. Check that the other one runs"
        super().__init__(f"another replicator went on from {checkpoint} to {stored} while this one was cut off", cure)


class CheckpointUnusable(CheckpointError):
    """The checkpoint database can't be used until an operator has changed something."""

    code = "R605"

    def __init__(self, *, problem: str, cure: str) -> None:
        super().__init__(f"the checkpoint database can't be used: {problem}", cure)


class CheckpointAbsent(CheckpointUnusable):
    """There is no checkpoint database yet, or it has no tables: `init` makes them."""

    code = "R606"


class CheckpointLost(CheckpointUnusable):
    """The checkpoint database has lost what was saved: it was restored, or failed over to a server that was behind."""

    code = "R609"

    def __init__(self, *, slot: str, stored: str, known: str) -> None:
        super().__init__(
            problem=f"it has lost what was saved: the checkpoint of slot {slot} is {stored}, and was at {known}. It was"
            " restored from a backup, or failed over to a server that was behind",
            cure="Start the replicator again: it says what may be missing since then, and what brings it",
        )


class ClusterFailed(ReplicatorError):
    """Spark does not start, has ended, or gave up a task that died or hung."""

    code = "R700"


class NodeDiffers(ReplicatorError):
    """A node of a Spark cluster has other settings, another program or another database than the driver."""

    code = "R701"

    def __init__(self, *, problem: str, expected: str) -> None:
        super().__init__(f"a node of the cluster differs from the driver: {problem}", f"It needs {expected}")
