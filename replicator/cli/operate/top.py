"""`top`: how it goes, again and again, on the terminal. `picture.py` draws."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, TypeAlias
from urllib.parse import urlsplit

import typer

from replicator.cli.inspect import NOT_READY
from replicator.contracts.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from replicator.operations.status.collect import History
    from replicator.operations.status.form import Status

LOOK_SECONDS = 1.0


def address(text: str) -> str:
    """What `--url` takes."""
    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise typer.BadParameter("it is not an http:// or https:// address with a host")
    return text.rstrip("/")


Url: TypeAlias = Annotated[
    str | None,
    typer.Option(
        parser=address,
        metavar="URL",
        help="the admin address of a replicator, such as http://10.0.0.7:8080; without it REPLICATOR_ADMIN_LISTEN",
    ),
]


async def top(url: Url = None) -> int:
    """Show rates and lags, once a second, until Ctrl-C.

    It only asks the running replicator. Without a terminal it prints them once and ends.
    """
    from rich.console import Console
    from rich.live import Live

    console = _terminal()
    looks = Looks(url or _own_address(), again=console is not None)
    if console:
        with suppress(asyncio.CancelledError), Live(console=console, auto_refresh=False) as live:  # the last one stays
            while True:
                live.update(await looks.picture(), refresh=True)
                await asyncio.sleep(LOOK_SECONDS)
        return 0
    shown = await looks.picture()
    Console(file=sys.stdout, width=80, color_system=None, force_terminal=False).print(shown)
    return 0 if looks.status and not looks.silent and looks.status.ready else NOT_READY


def _own_address() -> str:
    from replicator.contracts.settings import CoreSettings, load

    listen = load(CoreSettings).admin_listen
    if not listen:
        problem = "it is empty, so the replicator can't be asked"
        raise SettingsError(name="REPLICATOR_ADMIN_LISTEN", problem=problem, expected="host:port; or use --url")
    return f"http://{listen}"


class Looks:
    """Looks at one replicator, which may come and go."""

    def __init__(self, address: str, *, again: bool) -> None:
        self.status: Status | None = None
        """What it said last."""
        self.silent = ""
        """Why nothing newer is known; empty while it answers."""
        self._history: History
        self._address = address
        self._again = "; trying again" if again else ""

    async def picture(self) -> RenderableType:
        """As it is now; the last one, and that it is old, while nobody answers. Never raises for that."""
        from rich.text import Text

        from replicator.cli.operate.picture import picture
        from replicator.operations.status.collect import ask_address, ask_history

        status, why = await ask_address(self._address)
        if status:
            self.status, self._history, self.silent = status, await ask_history(self._address), ""
        else:
            self.silent = f"{why}{self._again}"
        return picture(self.status, self._history, silent=self.silent) if self.status else Text(self.silent)


def _terminal() -> Console | None:
    """Where a picture can be drawn over the one before; None: a pipe, a file, a terminal that can't."""
    from rich.console import Console

    out = sys.__stdout__  # ours escapes what moves the cursor
    console = Console(file=out, highlight=False)
    draws = console.is_terminal and not console.is_dumb_terminal and os.environ.get("TERM") != "dumb"
    return console if out and draws else None
