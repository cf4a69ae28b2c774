"""What the environment sets: every setting there is, what nothing reads, what can't be used, and what may be shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from urllib.parse import urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from checkpoint_store import SqlCheckpointStore
from enrichment import EnrichmentSettings
from replicator.contracts.errors import SettingsError
from replicator.contracts.settings import (
    CoreSettings,
    Settings,
    examine,
    given,
    split,
    variable,
    variables,
)
from sinks import settings_classes, sink_class

NOT_A_SETTING = {"REPLICATOR_PROGRAM"}
"""How the container is called from outside; contracts/errors.py reads it."""


def is_address(setting: str) -> bool:
    """Whether a secret of that name may be shown in part: where it leads (`masked`). Others are secret as a whole."""
    return setting.endswith(("_url", "_dsn"))


def all_settings(first: Sequence[str] = ()) -> Iterator[type[Settings]]:
    """Every settings class, those of sinks that are not configured included. A sink is imported when it is its turn."""
    yield from (CoreSettings, EnrichmentSettings)
    yield from settings_classes(first)


def named_sinks() -> tuple[str, ...]:
    """Those of REPLICATOR_SINKS, if it can be read and is set."""
    with suppress(SettingsError):
        if value := given("sinks"):
            return split(value.text)
    return ()


def unknown_settings(sinks: Sequence[str] = ()) -> Iterator[str]:
    """A message for each variable with our prefix that nothing reads; sinks that are not named are asked last."""
    names = {name for name in variables() if name.startswith(variable(""))} - NOT_A_SETTING - set(_kubernetes())
    known: set[str] = set()
    for settings_class in all_settings(sinks):
        fields = {variable(field) for field in settings_class.model_fields}
        names -= fields | {f"{name}_FILE" for name in fields}
        if not names:  # the others need not be imported, which is slow
            return
        known |= fields
    for name in sorted(names):
        close = get_close_matches(name, known, n=1)
        yield f"{name} is not a setting{f'; did you mean {close[0]}?' if close else ''}"


def _kubernetes() -> Iterator[str]:
    """What Kubernetes sets in every pod for a service whose name begins with `replicator`."""
    names = variables()
    for service in (name.removesuffix("_SERVICE_HOST") for name in names if name.endswith("_SERVICE_HOST")):
        of_service = re.compile(f"{re.escape(service)}_(SERVICE_(HOST|PORT)|PORT)(_.*)?")
        yield from filter(of_service.fullmatch, names)


def unusable_parts() -> Iterator[SettingsError]:
    """What only the parts can tell: whether the sinks have what they need, and the checkpoint database a driver."""
    for name in named_sinks():
        try:
            yield from examine(sink_class(name).settings_class)[1]
        except SettingsError as error:
            yield error
    try:
        if url := given("checkpoint_url"):
            SqlCheckpointStore(url.text)
    except SettingsError as error:
        yield error


def masked(secret: str) -> str:
    """Where a connection string leads, without what may be secret in it: password, path over HTTP, query."""
    if not re.match("[a-z][a-z0-9+.-]*://", secret, re.IGNORECASE):
        return _masked_keywords(secret)
    try:
        url = urlsplit(secret)
    except ValueError:
        return "***"
    if secret.count("@") != url.netloc.count("@"):  # a password ended too early; the rest looks like a host or a path
        return "***"
    user, at, host = url.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    query = "?***" if url.query else ""
    if url.scheme.startswith("http"):  # tokens come as user names and in paths
        return f"{url.scheme}://{'***@' if at else ''}{host}{'/***' if url.path.strip('/') else url.path}{query}"
    return f"{url.scheme}://{name}{':***' if colon else ''}{at}{host}{url.path}{query}"


def _masked_keywords(conninfo: str) -> str:
    try:
        parts = conninfo_to_dict(conninfo)
    except ProgrammingError:
        return "***"
    return " ".join(f"{key}={parts[key]}" for key in ("host", "port", "dbname", "user") if key in parts) or "***"
