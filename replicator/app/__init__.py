"""The composition root: settings → enricher, sinks, checkpoint store, source. Nothing else knows all of them."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from pydantic import SecretStr

from checkpoint_store import SqlCheckpointStore
from enrichment import EnrichmentSettings, TableLedger, Tables, create_enricher, tables_of, the_one
from replicator import __version__
from replicator.app.environment import is_address, masked, unknown_settings
from replicator.contracts.closing import Closing, close_all, release
from replicator.contracts.enricher import Enricher, History
from replicator.contracts.errors import (
    CheckpointMissing,
    SinkBroken,
    SinkError,
    SinkMisconfigured,
    SinkRefusesAll,
    SinkUnavailable,
    SourceError,
    SourceUnavailable,
)
from replicator.contracts.settings import (
    CoreSettings,
    Settings,
    decisive,
    fresh,
    load,
    state_directory,
)
from replicator.contracts.sink import Carrier, Sink, SinkContext
from replicator.contracts.stores import CheckpointStore
from replicator.operations.logs import configure_logging
from replicator.source.stream import Source
from sinks import Wanted, create_sinks

Choice: TypeAlias = Callable[[Sequence[Tables]], Sequence[Tables]]
"""Of the slot's streams, those that a command works on. Raises SettingsError."""

log = logging.getLogger(__name__)


class App(NamedTuple):
    """Everything that a command works with. Nothing is connected yet."""

    settings: CoreSettings
    streams: Sequence[Tables]
    """Those that it works on: the slot's, or the one that a command was given."""
    enricher: Enricher
    sinks: list[Sink]
    store: CheckpointStore
    carrier: Carrier | None = None
    """Who carries the sinks' writes out, if it is not this process."""
    decisive: Mapping[str, str] = {}
    """See `contracts.settings.decisive`."""

    @classmethod
    def load(cls, sinks: Sequence[str] | None = None, choose: Choice | None = None) -> App:
        """The program's: from the environment, with these sinks or the configured ones. Raises SettingsError."""
        settings = load(CoreSettings)
        configure_logging(settings.log_level, settings.log_format, settings.slot)
        for message in unknown_settings(settings.sinks if sinks is None else sinks):
            log.warning("%s", message, extra={"code": "R104"})
        wanted = settings.sinks if sinks is None else sinks
        app = cls.make(settings, load(EnrichmentSettings), wanted, {}, choose)
        return app if sinks is None else app._replace(settings=settings)

    @classmethod
    def make(
        cls,
        settings: CoreSettings,
        declared: EnrichmentSettings,
        sinks: Sequence[Wanted],
        known: Mapping[str, Any],
        choose: Choice | None = None,
    ) -> App:
        """With these sinks; their settings are `known`, or else of the environment. Raises SettingsError.

        `choose` gives those of the slot's streams that the app works on; without it they are all.
        """
        streams = choose(tables_of(declared)) if choose else tables_of(declared)
        if "checkpoint_url" not in settings.model_fields_set:
            with suppress(OSError):  # opening the database fails, too, and says where
                state_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        enricher = create_enricher(partial(_dsn, settings), declared)
        made = list(make_sinks(sinks, streams, enricher, known))
        return cls(
            settings=settings.model_copy(update={"sinks": tuple(sink.name for sink in made)}),
            streams=streams,
            enricher=enricher,
            sinks=made,
            store=SqlCheckpointStore(_checkpoint_url(settings), partial(_checkpoint_url, settings)),
            decisive=decisive(**known),
        )

    @property
    def tables(self) -> Tables:
        """Of the only stream. Raises SettingsError where there are several."""
        return the_one(self.streams)

    def dsn(self) -> str:
        """The connection string as it is now, password included."""
        return _dsn(self.settings)

    def settings_classes(self) -> list[type[Settings]]:
        """Those of what runs; other sinks' files need not be readable, and their packages not complete."""
        return [CoreSettings, EnrichmentSettings, *(type(sink.settings) for sink in self.sinks)]

    def source(self) -> Source:
        """A source for the slot."""
        settings = self.settings
        return Source(
            self.dsn,
            settings.slot,
            failover=settings.failover_slot,
            decoding_memory_mb=settings.decoding_memory_mb,
            carrier=self.carrier,
        )

    @asynccontextmanager
    async def closing(self, *readers: History | TableLedger) -> AsyncIterator[None]:
        """Release all connections at the end, those of readers of the tables, too: they don't try again."""
        try:
            yield
        except CheckpointMissing as exc:
            database = masked(self.settings.checkpoint_url.get_secret_value())
            raise CheckpointMissing(**exc.facts, database=database) from exc
        except (SinkUnavailable, SinkMisconfigured, SinkBroken, SinkRefusesAll) as exc:
            # Only lanes keep events and try again, as the messages say, and they never raise it.
            cure = "" if isinstance(exc, SinkUnavailable) else exc.cure
            raise SinkError(exc.sink, f"sink {exc.sink} failed: {exc.detail}", cure) from exc
        except SourceUnavailable as exc:
            if not readers:
                raise
            raise SourceError(f"reading from PostgreSQL failed: {exc.detail}") from exc
        finally:
            await self._close(*readers)

    async def _close(self, *readers: History | TableLedger) -> None:
        """Close everything. The command's result is there: no failure changes it, none keeps the others open."""
        closing: dict[str, Closing] = {f"sink {sink.name}": sink.close for sink in self.sinks}
        closing["what reads PostgreSQL"] = partial(close_all, *readers, self.enricher)
        closing["the checkpoint database"] = partial(asyncio.to_thread, self.store.close)
        await release(closing)

    def introduce(self) -> Iterator[str]:
        """The first lines of the log: what runs, from where to where. No secrets."""
        yield f"engagement-replicator {__version__}, Python {platform.python_version()}"
        yield f"source {masked(self.dsn())}, slot {self.settings.slot}"
        yield f"checkpoint {masked(self.settings.checkpoint_url.get_secret_value())}"
        yield f"sinks {', '.join(map(_address, self.sinks))}"
        if self.carrier:
            yield f"writes are carried out by {self.carrier.name}"
        listen = self.settings.admin_listen
        yield f"admin http://{listen}" if listen else "admin endpoints are off"


def make_sinks(
    wanted: Sequence[Wanted], streams: Sequence[Tables], enricher: Enricher, known: Mapping[str, Any]
) -> Iterator[Sink]:
    """One of each for each stream. Raises SettingsError."""
    for tables in streams:
        yield from create_sinks(wanted, SinkContext(tables.stream, tables.stream_option, enricher.origin), known)


def _dsn(settings: CoreSettings) -> str:
    return fresh(settings).postgres_dsn.get_secret_value()


def _checkpoint_url(settings: CoreSettings) -> str:
    return fresh(settings).checkpoint_url.get_secret_value()


def _address(sink: Sink) -> str:
    values = [getattr(sink.settings, name) for name in type(sink.settings).model_fields if is_address(name)]
    secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
    return " ".join([sink.name, *map(masked, secrets)])
