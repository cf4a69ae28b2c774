"""Talks to the servers that are our own programs (`api_server`, `clickhouse_server`) over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from devstack.process import DevStackError

TIMEOUT_SECONDS = 60.0
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_opener = build_opener(ProxyHandler({}))  # no proxy for the loopback interface, whatever the environment says


def fetch(url: str, body: bytes | None = None, headers: Mapping[str, str] = NO_HEADERS) -> bytes:
    """GET, or POST `body`; returns the answer. Raises DevStackError if it isn't 2xx, OSError if there is none."""
    request = Request(url, data=body, headers=dict(headers))  # noqa: S310  our own http:// URLs
    try:
        with _opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            return bytes(response.read())
    except HTTPError as exc:
        with exc:
            raise DevStackError(f"{exc.code}: {exc.read().decode(errors='replace').strip()}") from None
