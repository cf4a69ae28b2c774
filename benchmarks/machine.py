"""CPU time and memory of processes, what everybody else takes, and a description of the machine. Linux only."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import psycopg

from devstack.watchdog import tree

CORES = len(os.sched_getaffinity(0))
QUIET = 0.05  # of the machine, by others: then a round can begin
LOOK_SECONDS = 1.0

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_USER_TICKS_AT = 11  # utime, stime and those of ended children; after the program's name, which may contain spaces
_IDLE_AT = (3, 4)  # idle and iowait, of /proc/stat's first line
_BUSY_FIELDS = 8  # the rest are counted in them


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads."""
    return sum(_ticks(Path(f"/proc/{pid}/stat"))[:2]) / _TICKS_PER_SECOND


def main_thread_seconds(pid: int) -> float:
    """The same of its main thread alone."""
    return sum(_ticks(Path(f"/proc/{pid}/task/{pid}/stat"))[:2]) / _TICKS_PER_SECOND


def _ticks(stat: Path) -> list[int]:
    fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return [int(field) for field in fields[_USER_TICKS_AT : _USER_TICKS_AT + 4]]


class Spent(NamedTuple):
    """CPU time in a stretch of time."""

    ours: float
    """Seconds, of this process and all under it."""
    others: float
    """Of everybody else, as a share of the machine."""


class Meter:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._start = (*self._now(), time.monotonic())

    def read(self) -> Spent:
        """What was spent since then."""
        ours, busy, at = self._start
        ours_now, busy_now = self._now()
        spent = ours_now - ours
        others = (busy_now - busy - spent) / ((time.monotonic() - at) * CORES)
        return Spent(spent, max(0.0, others))

    @staticmethod
    def _now() -> tuple[float, float]:
        ours = 0
        for pid in tree(os.getpid()):
            with contextlib.suppress(OSError):  # it has just ended, and its parent counts it
                ours += sum(_ticks(Path(f"/proc/{pid}/stat")))
        fields = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1 : 1 + _BUSY_FIELDS]
        busy = sum(int(field) for at, field in enumerate(fields) if at not in _IDLE_AT)
        return ours / _TICKS_PER_SECOND, busy / _TICKS_PER_SECOND


def wait_until_quiet(patience_seconds: float) -> None:
    """Return when others leave the machine alone, or after that time: each result says what they took."""
    end = time.monotonic() + patience_seconds
    while time.monotonic() < end:
        meter = Meter()
        time.sleep(LOOK_SECONDS)
        if meter.read().others <= QUIET:
            return
    sys.stderr.write("the machine does not get quiet: see what others took\n")


def peak_memory_mb(pid: int) -> float:
    """The most resident memory since the process began."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) / 1000 if found else 0


def facts(dsn: str) -> str:
    """Cores, Python's build and PostgreSQL, on one line."""
    with psycopg.connect(dsn) as connection:
        version = connection.info.parameter_status("server_version") or "?"
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    processor = model[1] if model else platform.machine()
    optimized = "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))
    python = f"Python {platform.python_version()} built {'with' if optimized else 'without'} PGO"
    return f"{CORES} cores ({processor}), {python}, PostgreSQL {version.split()[0]}"
