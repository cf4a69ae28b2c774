"""`python -m devstack [services...]`: start servers, print their addresses, run until Ctrl-C. `stack` does it."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType

from devstack.process import DevStackError
from devstack.stack import DevStack


def main() -> int:
    """Run the stack in the foreground. Returns 1 if a server can't be started."""
    parser = argparse.ArgumentParser(prog="python -m devstack", description="Private servers until Ctrl-C.")
    parser.add_argument("services", nargs="*", metavar="service", help=f"any of: {' '.join(DevStack.SERVICES)} (all)")
    services = parser.parse_args().services or DevStack.SERVICES
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with DevStack(*services) as stack:
            _show(stack)
            signal.pause()
    except DevStackError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show(stack: DevStack) -> None:
    lines = [f"export {name}='{value}'\n" for name, value in stack.environment().items()]
    sys.stdout.write(f"# servers and logs in {stack.folder}; Ctrl-C ends them\n{''.join(lines)}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
