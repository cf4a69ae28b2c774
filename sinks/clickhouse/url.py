"""What REPLICATOR_CLICKHOUSE_URL says, and which URLs are unusable; `clickhouse.py` connects with it."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Address(NamedTuple):
    """What REPLICATOR_CLICKHOUSE_URL says."""

    scheme: str
    """`http`, `https` or `chdb`."""
    host: str
    """Empty for chdb."""
    port: int
    user: str
    password: str
    directory: str
    """Where the embedded engine keeps its data; empty for a server."""
    database: str

    def __str__(self) -> str:
        """Without user and password: fit for messages."""
        return f"chdb://{self.directory}" if self.scheme == "chdb" else f"{self.scheme}://{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """`http(s)://user:password@host:port/database` or `chdb:///directory/database`. Raises ValueError, free of secrets.

    The database is the last component in both: `chdb:///var/lib/replicator/clickhouse/engagement` is the database
    `engagement` in the directory `/var/lib/replicator/clickhouse`.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or {"http": 8123, "https": 8443}.get(parts.scheme, 0)
    except ValueError:
        raise ValueError("host or port can't be read") from None  # Python's own message quotes the URL
    directory, _, database = (unquote(part) for part in parts.path.rpartition("/"))
    if parts.scheme not in ("http", "https", "chdb"):
        raise ValueError("it begins with something else")
    if not database.replace("_", "").replace("-", "").isalnum():
        raise ValueError("the database at its end is missing or has other than letters, digits, _ and -")
    if parts.query or parts.fragment:
        raise ValueError("it has a ? or # part")
    if parts.scheme == "chdb" and (parts.netloc or not directory):
        raise ValueError("the embedded engine needs an absolute directory with a database in it")
    if parts.scheme != "chdb" and (not host or directory):
        raise ValueError("a server's URL has a host, and nothing but the database behind it")
    user, password = unquote(parts.username or "default"), unquote(parts.password or "")
    return Address(parts.scheme, host, port, user, password, directory, database)
