"""CPU time and memory of a process, and a description of the machine. Linux only."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import psycopg

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_USER_TICKS_AT = 11  # utime and stime, counted after the program's name, which may contain spaces


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[_USER_TICKS_AT]) + int(fields[_USER_TICKS_AT + 1])) / _TICKS_PER_SECOND


def peak_memory_mb(pid: int) -> float:
    """The most resident memory since the process began."""
    return _status(pid, "VmHWM") / 1000


def _status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def facts(dsn: str) -> str:
    """Cores, Python and PostgreSQL, on one line."""
    with psycopg.connect(dsn) as connection:
        version = connection.info.parameter_status("server_version") or "?"
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    processor = model[1] if model else platform.machine()
    return f"{cores} cores ({processor}), Python {platform.python_version()}, PostgreSQL {version.split()[0]}"
