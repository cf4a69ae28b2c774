"""The meaning of an error of redis-py: what happened, and what to do about it. Pure; `client.py` raises it."""

from __future__ import annotations

import re

from redis import exceptions
from redis.exceptions import RedisError

from replicator.contracts.errors import SinkError, SinkMisconfigured, SinkUnavailable, SinkUnusable

TRY_LATER = frozenset(
    {"BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "OOM", "READONLY", "TRYAGAIN"}
)
"""Redis's codes for: not now. READONLY is what a primary says that a failover has made a replica."""
TURNED_AWAY = frozenset({"DENIED", "NOAUTH", "NOPERM", "WRONGPASS"})
TURNED_AWAY_WORDINGS = ("The user executing the script can't", "unauthenticated")
"""Without a code: Redis 7 on a right that is missing in a script, and on a long command before a password."""
_TURNED_AWAY_CLASSES = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)
NO_SUCH_DATABASE = "DB index is out of range"
CLUSTER = frozenset({"ASK", "CROSSSLOT", "MOVED"})

TURNED_AWAY_CURE = (
    "Check user and password in REPLICATOR_REDIS_URL, and that the user has what the sink needs: "
    "ACL SETUSER name ~content:* ~top:content:* ~engagement:seen:* +@read +@write +@scripting +@transaction "
    "+@connection +info"
)
CERTIFICATE_CURE = (
    "Check that the certificate is in date and names the host in REPLICATOR_REDIS_URL, and that the URL's ssl_ca_certs "
    "holds the authority that signed it, if that is a private one"
)
DATABASE_CURE = "Set the database number in REPLICATOR_REDIS_URL to one that Redis has"
CLUSTER_CURE = "A write changes many keys at once, which Redis Cluster can't do: use a Redis without cluster mode"
FOREIGN_CURE = (
    "Another program uses a key content:*, top:content:* or engagement:seen:*: rename or delete it, or give the "
    "replicator a database of its own in REPLICATOR_REDIS_URL"
)
OTHER_CURE = "It takes Redis 6.0 or newer, or a server that runs the same Lua scripts"


def sink_error(sink: str, exc: RedisError) -> SinkError:
    """What to raise for `exc`."""
    detail = _detail(exc)
    words = _words(exc)
    if isinstance(exc, _TURNED_AWAY_CLASSES) or words & TURNED_AWAY or any(w in detail for w in TURNED_AWAY_WORDINGS):
        return SinkMisconfigured(sink=sink, detail=detail, cure=TURNED_AWAY_CURE)
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return SinkMisconfigured(sink=sink, detail=detail, cure=CERTIFICATE_CURE)
    if NO_SUCH_DATABASE in detail:
        return SinkMisconfigured(sink=sink, detail=detail, cure=DATABASE_CURE)
    if isinstance(exc, (exceptions.ConnectionError, exceptions.TimeoutError)) or words & TRY_LATER:
        return SinkUnavailable(sink=sink, detail=detail)
    cure = CLUSTER_CURE if words & CLUSTER else FOREIGN_CURE if "WRONGTYPE" in words else OTHER_CURE
    return SinkUnusable(sink=sink, detail=detail, cure=cure)


def is_read_only(exc: RedisError) -> bool:
    """Whether we are connected to a replica: another connection may find the primary."""
    return "READONLY" in _words(exc)


def _words(exc: RedisError) -> set[str]:
    """Words in capitals. Redis's code is the first of them, unless an old Redis passes on what failed in a script."""
    return set(re.findall(r"\b[A-Z_]{3,}\b", f"{exc.status_code or ''} {exc}"))


def _detail(exc: RedisError) -> str:
    """Redis's message, without the place in the script, and without the arguments that some messages repeat."""
    text = str(exc).partition(" script: ")[0].partition(", with args beginning")[0]
    text = re.sub(r"^Command # \d+ \(.*\) of pipeline caused error: [(\"']*", "", text, flags=re.DOTALL)
    code = f"{exc.status_code} " if exc.status_code else ""
    return (code + text).strip().rstrip(".") or type(exc).__name__
