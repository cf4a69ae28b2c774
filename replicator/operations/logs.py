"""The form of the log: one line a record, for people or for programs. And what may be printed at all."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from replicator.contracts.errors import ReplicatorError, SinkError, frames

FIELDS = ("slot", "sink", "lsn", "event_id", "code", "sinks")
"""Keys of a JSON line beside the message, where they are known."""

# Of a terminal they move the cursor, ring, turn the text around or begin a line that nobody logged.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text with control characters, and those that turn it around, escaped: servers and rows may hold any."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    """As JSON, too, would escape those that it allows as they are: what is printed with --json stays JSON."""
    return f"\\u{ord(character):04x}" if character >= "\x7f" else character.encode("unicode_escape").decode()


def code_of(record: logging.LogRecord) -> str:
    """The code of what the line tells; empty if it has none."""
    problems = (problem for problem in record.args or () if isinstance(problem, ReplicatorError))
    return str(getattr(record, "code", "")) or next((problem.code for problem in problems), "")


def _chain(exc: BaseException, *seen: BaseException) -> Iterator[BaseException]:
    """What led to it, and it; of a group each, before the group."""
    before = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    members = exc.exceptions if isinstance(exc, BaseExceptionGroup) else ()
    for other in (before, *members):
        if other is not None and other not in seen:
            yield from _chain(other, exc, *seen)
    yield exc


def _traceback(exc: BaseException) -> str:
    """As Python's, in short. The words of what is none of our errors are left out."""
    known = isinstance(exc, ReplicatorError)
    return f"Traceback (most recent call last):\n{frames(exc)}\n{type(exc).__name__}{f': {exc}' if known else ''}"


class _Record(logging.LogRecord):
    """Never has the words of an exception that is none of ours, of whichever logger it is: they may hold a secret.

    A sink of another package raises what it likes, and asyncio or a library logs it. The type, and where it was raised,
    stay.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.msg = str(self._safe(self.msg))  # an error may be the whole message
        self._words: dict[str, str] = {}
        if self.exc_info and (exc := self.exc_info[1]):
            found = list(_chain(exc))
            self.exc_text = printable("\n".join(map(_traceback, found)), keep="\n")
            for each in found:
                self._forget(each)
        if isinstance(self.args, Mapping):
            self.args = {name: self._safe(value) for name, value in self.args.items()}
        elif self.args:
            self.args = tuple(map(self._safe, self.args))

    def getMessage(self) -> str:  # noqa: N802  the library's name
        text = super().getMessage()
        for words, name in self._words.items():
            text = text.replace(words, name)
        return text

    def _safe(self, value: object) -> object:
        if isinstance(value, BaseException) and not isinstance(value, ReplicatorError):
            return type(value).__name__
        return value

    def _forget(self, exc: BaseException) -> None:
        """Whoever logs it may have put its words into the message."""
        if not isinstance(exc, ReplicatorError):
            with suppress(Exception):  # of its own
                for words in (repr(exc), str(exc)):
                    if len(words) > _SHORT:
                        self._words[words] = type(exc).__name__


_SHORT = 3
"""Words so short are a number or a key, and stand in a message for something else."""


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        code = code_of(record)
        record.coded = f"{code} " if code else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the library's name
        # A line that is indented can't be taken for one of the log.
        record.message = "\n".join(map(printable, re.split(r"\n(?= )", record.message)))
        return super().formatMessage(record)


class _Json(logging.Formatter):
    def __init__(self, slot: str) -> None:
        super().__init__()
        self._slot = slot

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        line |= self._fields(record)
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json.dumps(line)  # in ASCII, control characters escaped

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        room, _, of_room = record.name.partition(".")
        found = {"slot": self._slot, "sink": of_room.partition(".")[0] if room == "sinks" else ""}
        found["code"] = code_of(record)
        for problem in record.args or ():
            if isinstance(problem, SinkError) and problem.sink:
                found["sink"] = problem.sink
        found |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        return {name: value for name, value in found.items() if value}


def configure_logging(level: str, form: Literal["text", "json"], slot: str = "") -> None:
    """Log to standard error, times in UTC. `level` is ours: below WARNING, libraries log URLs and bodies."""
    formatter = _Json(slot) if form == "json" else _Text("%(asctime)s %(levelname)-7s %(coded)s%(name)s: %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.setLogRecordFactory(_Record)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _take_over()
    # They log each failed attempt; the lane logs the problem once. clickhouse_connect sets urllib3's level later.
    for chatty in ("urllib3.connectionpool", "clickhouse_connect"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for ours in ("replicator", "enrichment", "sinks", "checkpoint_store"):
        logging.getLogger(ours).setLevel(level.upper())


def _take_over() -> None:
    """What Python prints by itself goes into the log as well."""

    def warn(_message: object, kind: type[Warning], path: str, line: int, *_: object) -> None:
        logging.getLogger("py.warnings").warning("%s at %s, line %d", kind.__name__, path, line)

    def thread(found: threading.ExceptHookArgs) -> None:
        if not issubclass(found.exc_type, SystemExit):  # which ends a thread in order, as Python has it
            _log_lost("a thread has failed", found.exc_value)

    def ignored(found: Any) -> None:
        _log_lost("an error could not be raised", found.exc_value)

    warnings.showwarning = warn  # type: ignore[assignment]  # without what it names
    threading.excepthook = thread
    sys.unraisablehook = ignored


def _log_lost(said: str, exc: BaseException | None) -> None:
    logging.getLogger("replicator").error(said, exc_info=exc, extra={"code": ReplicatorError.code})
