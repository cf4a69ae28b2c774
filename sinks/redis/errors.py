"""The meaning of an error of redis-py: what happened, and what to do about it. Pure; `client.py` raises it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from redis import exceptions
from redis.exceptions import RedisError

from replicator.contracts.errors import (
    SinkEmptied,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    SinkUnusable,
    cited,
    command,
)

TURNED_AWAY = frozenset({"DENIED", "NOAUTH", "NOPERM", "WRONGPASS"})
TURNED_AWAY_WORDINGS = ("The user executing the script can't", "unauthenticated")
"""Without a code: Redis 7 on a right that is missing in a script, and on a long command before a password."""
_TURNED_AWAY_CLASSES = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)

DETAIL_LENGTH = 200
"""What a message quotes of an answer, at most."""

COMMANDS = (
    "+eval +evalsha +multi +exec +select +ping +info +get +mget +set +setex +setrange +getrange +append +strlen +mset"
    " +del +unlink +rename +expire +zadd +zrange +zrem +zcard +scan"
)
"""All that the sink sends, also within scripts. SCAN is for `rebuild-redis`, and for `reconcile` where rows go."""
OF_ROWS = " +hmget +hset +incrby +zincrby +zunionstore +zremrangebyscore"
"""What a stream needs as well whose rows change, or whose identities are no numbers."""
CERTIFICATE_CURE = (
    "Check that the certificate is in date and names the host in REPLICATOR_REDIS_URL, and that the URL's ssl_ca_certs "
    "holds the authority that signed it, if that is a private one"
)
DATABASE_CURE = "Set the database number in REPLICATOR_REDIS_URL to one that Redis has"
CLUSTER_CURE = "A write changes many keys at once, which Redis Cluster can't do: use a Redis without cluster mode"
PATTERNS = ("content:*", "top:content:*", "engagement:seen:*")
"""Of the engagement stream's keys; `keys.naming` gives another stream's."""
OTHER_CURE = "It takes Redis 6.0 or newer, or a server that runs the same Lua scripts"

_KNOWN: tuple[tuple[str, type[SinkMisconfigured | SinkUnusable], str | None], ...] = (
    ("CERTIFICATE_VERIFY_FAILED", SinkMisconfigured, CERTIFICATE_CURE),
    ("db index is out of range", SinkMisconfigured, DATABASE_CURE),
    ("CROSSSLOT", SinkUnusable, CLUSTER_CURE),
    ("WRONGTYPE", SinkUnusable, None),
    ("unknown command", SinkUnusable, OTHER_CURE),
)
"""A code or a wording that stays true until somebody helps; None: `foreign_cure`."""
_ELSEWHERE = re.compile(r"\b(ASK|MOVED) \d+ ")
"""What a cluster's node says of a key of another one: the words alone may be anybody's."""


def sink_error(
    sink: str,
    exc: RedisError | OSError,
    secrets: Iterable[str] = (),
    rights: str = "",
    named: Callable[[str], str] = str,
) -> SinkError:
    """What to raise for `exc`, of keys that are called so. What is not known to be for ever is tried again."""
    detail = _detail(exc, secrets)
    words = _words(exc)
    if isinstance(exc, _TURNED_AWAY_CLASSES) or words & TURNED_AWAY or any(w in detail for w in TURNED_AWAY_WORDINGS):
        return SinkMisconfigured(sink=sink, detail=detail, cure=turned_away_cure(rights))
    if _ELSEWHERE.search(detail):
        return SinkUnusable(sink=sink, detail=detail, cure=CLUSTER_CURE)
    for known, error, cure in _KNOWN:
        if known in (words if known.isupper() else detail.lower()):
            return error(sink=sink, detail=detail, cure=cure or foreign_cure(named))
    return SinkUnavailable(sink=sink, detail=detail)


def turned_away_cure(rights: str = "") -> str:
    """How to let the sink in: the least rights that work."""
    return (
        "Check user and password in REPLICATOR_REDIS_URL, and that the user has what the sink needs: ACL SETUSER name "
        f"{rights or rights_on(str)}"
    )


def rights_on(named: Callable[[str], str]) -> str:
    """For keys that are called so."""
    return " ".join([*(f"~{named(pattern)}" for pattern in PATTERNS), COMMANDS])


def foreign_cure(named: Callable[[str], str]) -> str:
    """A key that is called so is of another type, or has another kind of value."""
    *some, last = map(named, PATTERNS)
    return (
        f"Another program uses a key {', '.join(some)} or {last}: rename or delete it, or give the replicator a "
        "REPLICATOR_REDIS_PREFIX, or a database of its own in REPLICATOR_REDIS_URL"
    )


def foreign_error(sink: str, owner: str, ours: str, key: str) -> SinkError:
    """The keys are another source's."""
    return SinkUnusable(
        sink=sink,
        detail=f"its keys belong to {cited(owner, most=DETAIL_LENGTH)}, and these events come from {ours}: their "
        "counts would mix",
        cure="Give each its own REPLICATOR_REDIS_PREFIX, or its own database number in REPLICATOR_REDIS_URL. If it is "
        f"the same database, moved (an upgrade, a restore, another name): redis-cli DEL {key}, and it is adopted",
    )


def form_error(sink: str, found: str, ours: str, stream_option: str) -> SinkError:
    """The keys are made for other rows. A replicator that runs may still count as they do: so it begins anew first."""
    return SinkUnusable(
        sink=sink,
        detail=f"its keys were made for {cited(found, most=DETAIL_LENGTH)}, and the stream is now declared with {ours}:"
        " neither counts right beside the other",
        cure="Restart the replicator with this declaration, then run "
        f"{command(f'rebuild-redis --from-empty{stream_option}')}; or declare updates, deletes and the types of "
        "identity and key as they were",
    )


def lost_error(sink: str, address: str, stream_option: str) -> SinkError:
    """Keys are gone."""
    return SinkEmptied(
        sink=sink,
        detail=f"Redis at {address} was emptied, or came back without its keys: counts began again at 0, and what was "
        "counted before is missing",
        cure=f"Run {command(f'rebuild-redis{stream_option}')} while the replicator runs: it rebuilds all keys. "
        "If a rebuild is running, wait for its end",
    )


def evicted_error(sink: str, address: str, stream_option: str) -> SinkError:
    """Keys were thrown away, ours or others'."""
    return SinkEmptied(
        sink=sink,
        detail=f"Redis at {address} has evicted keys to make room, and counts that were among them are wrong",
        cure="Let it have room, and CONFIG SET maxmemory-policy noeviction (and in redis.conf). Then run "
        f"{command(f'rebuild-redis --from-empty{stream_option}')}, which counts what is in PostgreSQL now",
    )


def is_read_only(exc: RedisError | OSError) -> bool:
    """Whether we are connected to a replica: another connection may find the primary."""
    return "READONLY" in _words(exc)


def _words(exc: RedisError | OSError) -> set[str]:
    """Words in capitals. Redis's code is the first of them, unless an old Redis passes on what failed in a script."""
    return set(re.findall(r"\b[A-Z_]{3,}\b", f"{_code(exc)} {exc}"))


def _code(exc: RedisError | OSError) -> str:
    return getattr(exc, "status_code", None) or ""


def _detail(exc: RedisError | OSError, secrets: Iterable[str]) -> str:
    """Redis's message, without the place in the script, and without the arguments that some messages repeat.

    Whatever stands between here and Redis may have written it: no control characters, no secret of ours, not too long.
    """
    text = str(exc).partition(" script: ")[0].partition(", with args beginning")[0]
    begun = re.sub(r"^Command # \d+ \(.*\) of pipeline caused error: [(\"']*", "", text, flags=re.DOTALL)
    if begun != text:
        text = re.sub(r"[\"'],?\)$", "", begun)  # redis-py puts the message in as a tuple
    return cited(f"{_code(exc)} {text}".strip().rstrip("."), secrets, DETAIL_LENGTH) or type(exc).__name__
