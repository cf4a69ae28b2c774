"""Interprets Redis's INFO: will it keep what is written? Pure; for `RedisSink.check`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from replicator.contracts.events import Finding

Info = Mapping[str, str | float]

NOEVICTION_CURE = (
    "CONFIG SET maxmemory-policy noeviction (and in redis.conf): a full Redis then makes the replicator wait"
)


def findings(info: Info | None) -> list[Finding]:
    """A line each for version, eviction and persistence; None where INFO is denied."""
    if info is None:
        return [Finding(True, "Redis: version, eviction and persistence are unknown, INFO is denied")]
    version, policy = info.get("redis_version", "unknown"), info.get("maxmemory_policy", "noeviction")
    # The commands are older than 6.0, but since then Redis checks every right before a script begins.
    old = re.match(r"[0-5]\.", str(version))
    # Any policy but noeviction deletes seen bits, counts and buckets one by one.
    evicts = info.get("maxmemory", 0) and policy != "noeviction"
    does = f"throws keys away when its memory is full (maxmemory-policy {policy})" if evicts else "throws no keys away"
    keeps = "an" if info.get("aof_enabled") else "no"
    after = "" if info.get("aof_enabled") else ": after a crash of Redis, a backfill brings back what it lost"
    return [
        Finding(not old, f"Redis is version {version}", "Upgrade it to 6.0 or newer" if old else ""),
        Finding(not evicts, f"Redis {does}", NOEVICTION_CURE if evicts else ""),
        Finding(True, f"Redis keeps {keeps} append-only file{after}"),
    ]
