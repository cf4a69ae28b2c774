"""Tells systemd how it goes (sd_notify): that it is ready, that its event loop lives, in a line what it does.

Without NOTIFY_SOCKET, which systemd sets for `Type=notify`, nobody is told.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from replicator.operations.logs import printable

TELL_SECONDS = 1.0
STATUS_CHARACTERS = 200
"""`systemctl status` shows one line."""


def tell(*lines: str) -> None:
    """Send these to the service manager; nothing to do where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        connection.send("\n".join(lines).encode())


async def keep_told(state: Callable[[], str], is_up: Callable[[], bool]) -> None:
    """Say that the loop lives, and its state in a line, until cancelled; ready is who is up once.

    The service manager's own watchdog ends a process whose loop hangs. Trouble with a server is no reason to: it is
    the same after a restart.
    """
    ready = False
    while os.environ.get("NOTIFY_SOCKET"):
        lines = ["WATCHDOG=1", f"STATUS={printable(state())[:STATUS_CHARACTERS]}"]
        if not ready and is_up():
            ready = True
            lines.append("READY=1")
        tell(*lines)
        await asyncio.sleep(TELL_SECONDS)
