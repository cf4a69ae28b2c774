"""That driver and nodes mean the same: each node has settings of its own, and a forgotten one has a default.

A node compares what it has with what the driver has. No secret leaves the driver: a password is left out, and the rest
goes as a keyed digest.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qs, urlsplit

import msgspec
from pydantic import SecretStr

from enrichment import EnrichmentSettings
from enrichment.database import Database
from replicator import __version__
from replicator.contracts.errors import NodeDiffers, SettingsError, SourceUnusable
from replicator.contracts.settings import CoreSettings, Settings, load, variable
from replicator.contracts.sink import Sink
from replicator.source.connection import Dsn
from sinks import sink_class
from sinks.stdout.sink import StdoutSink

OF_A_NODE = {"postgres_dsn", "checkpoint_url", "admin_listen", "log_level", "log_format", "memory_limit_mb"}
"""What each node may have its own of. The nodes' DSN may lead to a standby; which cluster it is of is asked."""

ANOTHER = "has another value there, or leads to the machine itself (localhost, a Unix socket), which is another there"

CLUSTER = "SELECT system_identifier::text || ' ' || current_database() FROM pg_control_system()"

Digests: TypeAlias = dict[str, str]
"""By the setting's variable."""


class Meant(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver has."""

    version: str
    key: bytes
    digests: Digests
    source: str
    """Cluster and database; empty if the server does not say."""


async def meant(names: Sequence[str], dsn: Dsn, key: bytes) -> Meant:
    """As this process has it. Raises SourceUnavailable."""
    return Meant(version=__version__, key=key, digests=digests(names, key), source=await _source(dsn))


def meant_by_sink(name: str, key: bytes) -> Meant:
    """The same of one sink, for who does nothing but write to it. Raises SettingsError."""
    return Meant(version=__version__, key=key, digests=_digests([sink_class(name).settings_class], key), source="")


def compare(driver: Meant, here: Meant) -> None:
    """Raises NodeDiffers."""
    if here.version != driver.version:
        raise NodeDiffers(problem=f"it runs version {here.version}, not {driver.version}", expected="the same version")
    for name, digest in driver.digests.items():
        if here.digests.get(name) != digest:
            raise NodeDiffers(problem=f"{name} {ANOTHER}", expected="the driver's settings")
    if here.source and driver.source and here.source != driver.source:
        raise NodeDiffers(
            problem="REPLICATOR_POSTGRES_DSN leads to another database there",
            expected="the driver's database, or a standby of it",
        )


def digests(names: Sequence[str], key: bytes) -> Digests:
    """Of all settings that must be the same. Raises SettingsError."""
    of_sinks = (sink_class(name).settings_class for name in names)
    return _digests([CoreSettings, EnrichmentSettings, *of_sinks], key)


def _digests(classes: Sequence[type[Settings]], key: bytes) -> Digests:
    return {
        variable(field): _digest(value, key)
        for settings_class in classes
        for field, value in load(settings_class)
        if field not in OF_A_NODE and not isinstance(value, Path)
    }


def refuse_single(sinks: Sequence[Sink]) -> None:
    """What is one process's: its standard output, the embedded ClickHouse, several streams. Raises SettingsError."""
    if len({sink.stream.name for sink in sinks}) > 1:
        problem, expected = "nodes write one stream", "one stream, and a slot for each"
        raise SettingsError(name=variable("stream"), problem=problem, expected=expected)
    for sink in sinks:
        if isinstance(sink, StdoutSink):
            problem, expected = "stdout is one process's, and nodes are many", "other sinks"
            raise SettingsError(name=variable("sinks"), problem=problem, expected=expected)
        for field, value in sink.settings:
            if isinstance(value, SecretStr) and value.get_secret_value().startswith("chdb:"):
                expected = "the URL of a ClickHouse server, which all nodes reach"
                raise SettingsError(name=variable(field), problem="one process alone can use chdb", expected=expected)


def _digest(value: object, key: bytes) -> str:
    text = _without_password(value.get_secret_value()) if isinstance(value, SecretStr) else repr(value)
    return hashlib.blake2b(text.encode(), key=key, digest_size=16).hexdigest()


def _without_password(secret: str) -> str:
    """Where a URL leads; of another secret, that there is one: both sides may rotate it at their own time.

    Of its options only Redis's database says where it leads; others may be secrets. A URL that leads to the machine
    itself leads to another server on each.
    """
    try:
        url = urlsplit(secret)
        place = f"{url.scheme} {url.hostname} {url.port} {url.path} {parse_qs(url.query).get('db', '')}"
    except ValueError:
        return ""
    machine = platform.node() if _is_local(url.hostname) else ""
    return f"{place} {machine}" if "://" in secret else ""


def _is_local(host: str | None) -> bool:
    """Whether it is the machine itself; a Unix socket's URL has no host."""
    if host in {None, "localhost"}:
        return True
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return False


async def _source(dsn: Dsn) -> str:
    database = Database(dsn)
    try:
        [(text,)] = await database.rows(CLUSTER)
    except SourceUnusable:  # a service that denies the function
        return ""
    finally:
        await database.close()
    return str(text)
