"""Whom HTTPS connections trust: the file of authorities may be replaced while the program runs."""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from pathlib import Path

import aiohttp


def following(context: ssl.SSLContext, ca_file: Path | None) -> list[aiohttp.TraceConfig]:
    """For a session with this context: each new connection also trusts the authorities that the file has by then.

    Nobody is removed: whoever was trusted when the program started stays so until it ends.
    """
    file = ca_file or os.environ.get("SSL_CERT_FILE")
    seen = _version(file)

    async def look(*_: object) -> None:
        nonlocal seen
        if (now := _version(file)) != seen and file:
            with suppress(OSError):  # an SSLError too: it is being written, or gone
                context.load_verify_locations(file)
                seen = now

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_start.append(look)
    return [trace]


def _version(file: Path | str | None) -> tuple[int, ...]:
    with suppress(OSError):
        if file:
            stat = Path(file).stat()
            return stat.st_mtime_ns, stat.st_ino, stat.st_size
    return ()
