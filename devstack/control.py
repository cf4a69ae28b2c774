"""Talks to the servers that are our own programs (`api_server`, `clickhouse_server`) over their HTTP endpoints."""

from __future__ import annotations

from urllib.request import ProxyHandler, Request, build_opener

TIMEOUT_SECONDS = 60.0

_opener = build_opener(ProxyHandler({}))  # the loopback interface needs no proxy, whatever the environment says


def fetch(url: str, body: bytes | None = None) -> bytes:
    """The answer to a GET, or to a POST of `body`. Raises URLError when there is none or it isn't 2xx."""
    with _opener.open(Request(url, data=body), timeout=TIMEOUT_SECONDS) as response:  # noqa: S310  our own http:// URLs
        return bytes(response.read())
