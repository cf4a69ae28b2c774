"""An address to which a network drops everything: a host that is switched off, a route that leads nowhere."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

FILLING = 3
"""A queue for one connection holds two, as Linux counts; what comes then is not answered."""


@contextmanager
def blackhole() -> Iterator[int]:
    """A port of 127.0.0.1 where nobody answers."""
    with ExitStack() as opened:
        silent = opened.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(FILLING):
            client = opened.enter_context(socket.socket())
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(silent.getsockname())
        yield silent.getsockname()[1]
