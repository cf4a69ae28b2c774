"""The last notices: what was wrong, from when until when, and the cure. `watchdog.py` knows what is wrong now.

A notice without a length is a warning of the log: something happened that an operator should know of.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from msgspec import Struct

from replicator.operations.logs import code_of

KEPT = 50
"""Enough to see a bad night, few enough for one page."""
SAME_SECONDS = 90.0
"""A warning that comes again within it is still the same; the log repeats one every 30 s while its cause lasts."""
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
OURS = frozenset({"replicator", "enrichment", "sinks", "checkpoint_store"})
TOLD_OTHERWISE = frozenset({"replicator.delivery.retry", "replicator.delivery.dead_letters"})
"""Their warnings are reasons with a beginning and an end, or are counted."""

CODES = {
    "stream": "R210",
    "commits": "R211",
    "clocks": "R215",
    "standby": "R308",
    "slot": "R309",
    "stall": "R310",
    "look": "R311",
    "wal": "R312",
    "wal runs out": "R313",
    "tables": "R400",
    "catch-up": "R404",
    "sink": "R511",
    "pause": "R315",
    "dead letters": "R513",
    "checkpoint": "R607",
    "database": "R608",
}
"""Of reasons that are no errors, by kind; `contracts/errors.py` says what each is, and has those of errors."""


WORSE = {"wal runs out": "wal"}
"""A trouble that has become another kind is not over."""


class Reason(NamedTuple):
    """Something that is wrong now, or soon will be."""

    kind: str
    """`stream`, `tables`, `slot`, `wal`, `sink`, `checkpoint` …: with the subject it tells one trouble from another."""
    subject: str
    """The sink's name, or the slot's."""
    text: str
    """Problem and cure, as /readyz says them."""
    cure: str = ""
    """The end of the text; empty where that has none of its own."""
    error: str = ""
    """The code of the error that it is; empty when it is none."""

    @classmethod
    def cured(cls, kind: str, subject: str, problem: str, cure: str) -> Reason:
        """Of a problem, empty where there is none, and its cure."""
        return cls(kind, subject, f"{problem}. {cure}" if problem else "", cure)

    @property
    def key(self) -> tuple[str, str]:
        """Tells one trouble from another."""
        return self.kind, self.subject

    @property
    def code(self) -> str:
        """For whoever searches logs and docs/reference/faults.md."""
        return self.error or CODES[self.kind]

    @property
    def problem(self) -> str:
        """The text without the cure."""
        return self.text.removesuffix(self.cure).rstrip()


class Notice(Struct, kw_only=True):
    """One thing that was wrong, or still is."""

    kind: str
    subject: str
    text: str
    """The problem, as it was put last."""
    cure: str
    began_at: float
    """Unix time, seconds."""
    ended_at: float | None = None
    """None while it lasts; for a warning when it was given."""
    code: str = ""
    """As in the log; empty for a warning that has none."""


class Notices:
    """The newest, the latest last. Whoever knows what is wrong says all of it again and again to `see`."""

    def __init__(self) -> None:
        self.ring: deque[Notice] = deque(maxlen=KEPT)
        self.lasting: dict[tuple[str, str], Notice] = {}
        """By kind and subject."""
        self.handler = _Warnings(self)
        """For the root logger."""

    def see(self, reasons: Iterable[Reason]) -> None:
        """These are wrong now, and nothing else is."""
        now = time.time()
        found = {reason.key: reason for reason in reasons}
        kinds = {reason.kind for reason in found.values()}
        for key in self.lasting.keys() - found.keys():
            if WORSE.get(key[0]) not in kinds:
                self.lasting.pop(key).ended_at = now
        for key, reason in found.items():
            if key not in self.lasting:
                kind, subject = key
                self.lasting[key] = Notice(kind=kind, subject=subject, text="", cure="", began_at=now)
                self.ring.append(self.lasting[key])
            notice = self.lasting[key]
            notice.code, notice.text, notice.cure = reason.code, reason.problem, reason.cure

    def note(self, kind: str, subject: str, text: str, code: str = "") -> None:
        """It happened. What was said last or a moment ago, perhaps with other numbers, is not said again."""
        now = time.time()
        lately = [said for said in self.ring if said is self.ring[-1] or now - (said.ended_at or now) < SAME_SECONDS]
        key = (kind, subject, _without_numbers(text))
        for said in reversed(lately):
            if (said.kind, said.subject, _without_numbers(said.text)) == key:
                said.text, said.ended_at = text, now
                return
        notice = Notice(kind=kind, subject=subject, text=text, cure="", began_at=now, ended_at=now, code=code)
        self.ring.append(notice)


def _without_numbers(text: str) -> str:
    """A number in a name stays."""
    return _NUMBER.sub("0", text)


class _Warnings(logging.Handler):
    """Makes notices of the log's warnings: a truncated table, a new slot, a ClickHouse table that was emptied."""

    def __init__(self, notices: Notices) -> None:
        super().__init__(logging.WARNING)
        self._notices = notices

    def filter(self, record: logging.LogRecord) -> bool:
        """Ours, and not told otherwise."""
        return record.name.partition(".")[0] in OURS and record.name not in TOLD_OTHERWISE

    def emit(self, record: logging.LogRecord) -> None:
        """A traceback and frames stay in the log. As any handler, it never raises into what logs."""
        try:
            text = record.getMessage().partition("\n")[0]
            subject = getattr(record, "sink", None) or record.name.partition(".")[0]
            self._notices.note("warning", subject, text, code_of(record))
        except Exception:  # noqa: BLE001  whatever the arguments are
            self.handleError(record)
