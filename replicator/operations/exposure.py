"""`check`'s advice about secrets that other people on the network could read. `check.py` asks for it.

Advice, and no failure: a private network may be guarded otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import SplitResult, parse_qs, urlsplit

from pydantic import SecretStr

from replicator.contracts.events import Finding
from replicator.contracts.settings import CoreSettings, variable
from replicator.contracts.sink import Sink

VERIFIED = "sslmode=verify-full with sslrootcert, and require_auth=scram-sha-256"
SAFE = {"http": "https", "redis": "rediss"}
"""Schemes that send everything in clear, and those that do not."""


def secrets_in_clear(settings: CoreSettings, sinks: Sequence[Sink]) -> Iterator[Finding]:
    """A line for each address that a secret goes to unencrypted, or that nobody has to prove to be."""
    for sink in sinks:
        secrets = {name: value for name, value in sink.settings if isinstance(value, SecretStr)}
        for name, secret in secrets.items():
            url = _parsed(secret)
            if url.scheme in SAFE and not is_here(url.hostname) and (url.password or len(secrets) > 1):
                cure = f"Use {SAFE[url.scheme]}:// in {variable(name)}"
                yield Finding(True, f"sink {sink.name}: a secret goes to {url.hostname} unencrypted", cure)
            yield from _postgres(f"sink {sink.name}", secret, variable(name))
    for name in ("notify_url", "heartbeat_url"):
        url = _parsed(getattr(settings, name) or SecretStr(""))
        if url.scheme == "http" and not is_here(url.hostname):
            yield Finding(True, f"{variable(name)}: it goes to {url.hostname} unencrypted", "Use https:// in it")
    yield from _postgres("the checkpoint database", settings.checkpoint_url, variable("checkpoint_url"))


def _postgres(who: str, secret: SecretStr, setting: str) -> Iterator[Finding]:
    """The same of a URL, if it is one of PostgreSQL."""
    url = _parsed(secret)
    [mode] = parse_qs(url.query).get("sslmode", ["prefer"])[-1:]
    if url.scheme.startswith("postgres"):
        yield from unverified(who, url.hostname, mode, setting)


def unverified(who: str, host: str | None, sslmode: str, setting: str) -> Iterator[Finding]:
    """That a server does not have to prove who it is before it gets the password."""
    if sslmode != "verify-full" and not is_here(host):
        what = f"{who} at {host}: with sslmode={sslmode} an impostor would get the password"
        yield Finding(True, what, f"Set {VERIFIED} in {setting}")


def is_here(host: str | None) -> bool:
    """Whether it is this machine: nobody else hears what is said to it."""
    if not host or host.lower() == "localhost" or host.startswith(("/", "@")):
        return True
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return False


def _parsed(secret: SecretStr) -> SplitResult:
    try:
        return urlsplit(secret.get_secret_value())
    except ValueError:
        return urlsplit("")
