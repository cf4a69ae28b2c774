"""The form of the log: one line a record, for people or for programs. And what may be printed at all."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from types import TracebackType
from typing import Literal

from replicator.contracts.errors import ReplicatorError, SinkError

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


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        code = code_of(record)
        record.coded = f"{code} " if code else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the library's name
        # A line that is indented can't be taken for one of the log.
        record.message = "\n".join(map(printable, re.split(r"\n(?= )", record.message)))
        return super().formatMessage(record)

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802  likewise
        return printable(super().formatException(ei), keep="\n")


class _Json(logging.Formatter):
    def __init__(self, slot: str) -> None:
        super().__init__()
        self._slot = slot

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        line |= self._fields(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
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


_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def configure_logging(level: str, form: Literal["text", "json"], slot: str = "") -> None:
    """Log to standard error, times in UTC. `level` is ours: below WARNING, libraries log URLs and bodies."""
    formatter = _Json(slot) if form == "json" else _Text("%(asctime)s %(levelname)-7s %(coded)s%(name)s: %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # They log each failed attempt; the lane logs the problem once. clickhouse_connect sets urllib3's level later.
    for chatty in ("urllib3.connectionpool", "clickhouse_connect"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for ours in ("replicator", "enrichment", "sinks", "checkpoint_store"):
        logging.getLogger(ours).setLevel(level.upper())
