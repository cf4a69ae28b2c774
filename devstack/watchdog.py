"""Ends the servers of a stack and removes its folder if the program that owns them dies first.

`process` registers each server here. A death signal (PR_SET_PDEATHSIG) would not do: it is bound to the thread that
started the child, and tests start servers from threads. As a program this file needs only the standard library. It
runs until its standard input ends, which happens however the owner dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

END_SECONDS = 5.0  # for a server to end before it gets SIGKILL
POLL_SECONDS = 0.02


class Watchdog:
    """The owner's side: registers processes with the watchdog program."""

    def __init__(self, folder: Path) -> None:
        # Its own session: Ctrl-C in the owner's terminal must not end it before its work is done.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True
        )

    def watch(self, pid: int, end_signal: signal.Signals) -> None:
        """End this process and its children if the owner dies."""
        self._tell(f"+ {pid} {end_signal.value}")

    def forget(self, pid: int) -> None:
        """Forget this process: it has ended."""
        self._tell(f"- {pid}")

    def close(self) -> None:
        """End what still runs and remove the folder. Returns when that is done."""
        self._process.communicate()

    def _tell(self, line: str) -> None:
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            raise RuntimeError("the stack is closed")
        pipe.write(f"{line}\n".encode())
        pipe.flush()


def tree(pid: int) -> list[int]:
    """A process and its descendants, parents first: a paused parent starts no more children."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):  # it has ended; its children have another parent now
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found.extend(int(child) for child in children.read_text().split())
    return found


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Signal these processes, as far as they still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended; its new parent may never collect it


def end(watched: dict[int, signal.Signals]) -> None:
    """End these processes and their descendants, with SIGKILL if they don't end in time."""
    trees = {pid: tree(pid) for pid in watched}
    for pid, number in watched.items():
        send(number, [pid])
        send(signal.SIGCONT, trees[pid])
    deadline = time.monotonic() + END_SECONDS
    everyone = [pid for members in trees.values() for pid in members]
    while any(map(_exists, everyone)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    send(signal.SIGKILL, filter(_exists, everyone))


def main() -> None:
    """Read process ids from standard input; when it ends, end these processes and remove the folder."""
    watched: dict[int, signal.Signals] = {}
    for line in sys.stdin:
        sign, pid, *number = line.split()
        if sign == "+":
            watched[int(pid)] = signal.Signals(int(number[0]))
        else:
            watched.pop(int(pid), None)
    end(watched)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
