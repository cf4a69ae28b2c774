"""`python -m replicator`, and the command `replicator`: the command line is in `replicator/cli`."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

TYPE_CHECKING = False  # what is imported before the signals are handled takes time
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, commands: str = "replicator.cli.main") -> int:
    """Run one command; its exit code. A signal ends what has no better way to stop: the imports, and the very end."""
    _end_at_once()
    run = import_module(commands).main
    try:
        return int(run(arguments))
    finally:
        _end_at_once()


def _end_at_once() -> None:
    """Without a traceback. Not the system's own way: process 1 of a container would ignore it."""
    for number, unset in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is unset:  # in the background, SIGINT is ignored
            signal.signal(number, lambda number, _: os._exit(128 + number))


if __name__ == "__main__":
    sys.exit(main())
