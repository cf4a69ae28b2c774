"""The replicator within somebody else's asyncio program: what `from replicator import Replicator` gives.

It is put together as the program is (`App`), and takes over nothing of the process: no signals, no logging, no port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeVar

from msgspec import structs

from enrichment import EnrichmentSettings
from replicator.app import App
from replicator.app.running import Running
from replicator.contracts.errors import CheckpointUnavailable, Overtaken, SettingsError
from replicator.contracts.fields import Stream
from replicator.contracts.settings import CoreSettings, Settings, load, variable
from replicator.operations.status.form import Status
from sinks import Wanted, kind_of

OF_THE_PROGRAM: Mapping[str, Any] = {
    "admin_listen": "",
    "log_format": "text",
    "log_level": "info",
    "notify_url": None,
    "heartbeat_url": None,
}
"""Settings that mean nothing here: the program around it has its own logging, and its own ways to tell people."""
TAKEN: Mapping[str, tuple[tuple[type, ...], str]] = {
    "stream": ((str, Stream), "a Stream, or its name (module:NAME); or a list or tuple of them"),
    "sinks": ((str, type, partial), "a class of sinks, a partial of it, or a name; or a list or tuple of them"),
}
"""What the two arguments that are no settings take."""
T = TypeVar("T")

ENDED = "the replicator has stopped"


class Replicator:
    """Replicates the streams of one slot to these sinks. `run` once; `stop` and `status` in the thread of its loop."""

    def __init__(
        self, stream: str | Stream | Sequence[str | Stream], sinks: Wanted | Sequence[Wanted], **settings: Any
    ) -> None:
        """Put it together; nothing is connected yet. Raises SettingsError.

        A stream is a `Stream`, or a name as in REPLICATOR_STREAM. A sink is a class, a `functools.partial` of it, or a
        name as in REPLICATOR_SINKS. A setting is a keyword (`slot` is REPLICATOR_SLOT); the environment has the others.
        """
        try:
            self._app = _app(_listed("stream", stream), _listed("sinks", sinks), settings)
        except SettingsError as exc:
            names = {variable(name): name for name in ("stream", "sinks", *settings)}
            raise (exc.of_argument(names[exc.name]) if exc.name in names else exc) from exc.__cause__
        self._running = Running(self._app)
        self._begun = self._stopping = self._ended = False

    async def run(self) -> None:
        """Replicate until `stop`. Raises a ReplicatorError when that is over for another reason.

        When it is cancelled it stops as with `stop` first: the writes in flight end, and what is written is saved. A
        second time it ends at once.
        """
        if self._begun:
            raise RuntimeError("a Replicator runs once; make another one")
        self._begun = True
        work = asyncio.create_task(self._run())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self.stop()
            await work  # its failure comes first
            raise
        finally:
            self._ended = True

    async def _run(self) -> None:
        async with self._app.closing():
            with suppress(CheckpointUnavailable):  # which is tried again
                # Alone: in a database that can't be used, a second call would hold up the end of the loop for a minute.
                await asyncio.to_thread(self._app.store.create)
            try:
                await self._running.run({})
            except Overtaken:
                if not self._stopping:  # else it is over anyway
                    raise

    def stop(self) -> None:
        """Let `run` return: read no more, finish the writes in flight, save, tell PostgreSQL."""
        self._stopping = True
        self._running.pipeline.stop()

    def status(self) -> Status:
        """What `status --json` says, as of now. It is never ready before `run` reads, nor after its end."""
        found = self._running.watchdog.status()
        return structs.replace(found, reasons=[ENDED, *found.reasons]) if self._ended else found


def _listed(name: str, given: T | Sequence[T]) -> tuple[T, ...]:
    listed = tuple(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else (given,)
    kinds, expected = TAKEN[name]
    for one in listed:
        if not isinstance(one, kinds):
            problem = f"it has a value of type {type(one).__name__}"
            raise SettingsError(name=variable(name), problem=problem, expected=expected)
    return listed


def _app(streams: tuple[str | Stream, ...], sinks: tuple[Wanted, ...], settings: Mapping[str, Any]) -> App:
    core = load(CoreSettings, **{**settings, **OF_THE_PROGRAM, "sinks": tuple(map(kind_of, sinks))})
    declared = load(EnrichmentSettings, **{**settings, "stream": streams})
    shown = ",".join(one if isinstance(one, str) else one.name for one in streams)
    app = App.make(core, declared, sinks, {**settings, "stream": shown})
    for problem in _unknown(settings, app):
        raise problem
    return app


def _unknown(settings: Mapping[str, Any], app: App) -> Iterator[SettingsError]:
    """A misspelt one would have no effect."""
    classes: list[type[Settings]] = [CoreSettings, EnrichmentSettings, *(type(sink.settings) for sink in app.sinks)]
    known = {name for settings_class in classes for name in settings_class.model_fields} - OF_THE_PROGRAM.keys()
    for name in settings.keys() - known:
        close = get_close_matches(name, known, n=1)
        problem = f"nothing here reads it{f', perhaps you mean {close[0]}' if close else ''}"
        yield SettingsError(
            name=variable(name), problem=problem, expected="a setting of the replicator or of one of its sinks"
        )
