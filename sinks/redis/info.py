"""Interprets Redis's INFO: will it keep what is written? Pure; for `RedisSink.check`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from replicator.contracts.errors import command
from replicator.contracts.events import Finding

Info = Mapping[str, str | float]

NOEVICTION_CURE = (
    "CONFIG SET maxmemory-policy noeviction (and in redis.conf): a full Redis then makes the replicator wait"
)
UNKNOWN_CURE = (
    "Let the replicator's user ask (ACL SETUSER name +info). Where it can't be let, make sure that maxmemory-policy is"
    " noeviction: keys that are gone make counts too small, and nobody is told"
)
APPENDFSYNC_CURE = (
    "Fine if you run {repair} after a crash of Redis; with CONFIG SET appendfsync always (and in redis.conf) it loses "
    "nothing"
)


def findings(info: Info | None, appendfsync: str, stream_option: str = "") -> list[Finding]:
    """A line each for version, eviction and persistence; None where INFO is denied, empty where CONFIG is."""
    if info is None:
        unknown = "version, eviction and persistence are unknown. Keys that it evicts, and a restart, go unnoticed"
        return [Finding(True, f"Redis denies INFO: {unknown}", UNKNOWN_CURE)]
    version, policy = info.get("redis_version", "unknown"), info.get("maxmemory_policy")
    # The commands are older than 6.0, but since then Redis checks every right before a script begins.
    old = re.match(r"[0-5]\.", str(version))
    # Any policy but noeviction deletes seen bits, counts and buckets one by one.
    evicts = bool(info.get("maxmemory", 1)) and policy != "noeviction"
    if policy is None or "evicted_keys" not in info:  # a service's INFO, or a proxy's
        eviction = Finding(True, "Redis does not say whether it evicts keys: it goes unnoticed", UNKNOWN_CURE)
    elif evicts:
        eviction = Finding(
            False, f"Redis evicts keys when its memory is full (maxmemory-policy {policy})", NOEVICTION_CURE
        )
    else:
        eviction = Finding(True, "Redis evicts no keys")
    return [
        Finding(not old, f"Redis is version {version}", "Upgrade it to 6.0 or newer" if old else ""),
        eviction,
        _persistence(appendfsync if info.get("aof_enabled") else None, stream_option),
    ]


def _persistence(appendfsync: str | None, stream_option: str) -> Finding:
    """None: there is no append-only file."""
    if appendfsync is None:
        lost = "after a crash of Redis, a backfill brings back what it lost"
        return Finding(True, f"Redis keeps no append-only file: {lost}")
    if appendfsync == "always":
        return Finding(True, "Redis keeps an append-only file, and answers once it is on the disk")
    when = f"appendfsync {appendfsync}" if appendfsync else "appendfsync unknown, CONFIG is denied"
    lost = "a crash of Redis may lose its latest writes"
    cure = APPENDFSYNC_CURE.format(repair=command(f"reconcile --start ... --end ... --repair{stream_option}"))
    return Finding(True, f"Redis keeps an append-only file ({when}): {lost}", cure)
