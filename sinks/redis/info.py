"""Interprets Redis's INFO: will it keep what is written? Pure; for `RedisSink.check`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from replicator.contracts.events import Finding

Info = Mapping[str, str | float]


def findings(info: Info | None) -> list[Finding]:
    """A line each for version, eviction and persistence; None where INFO is denied."""
    if info is None:
        return [Finding(True, "Redis: version, eviction and persistence are unknown, INFO is denied")]
    return [_version(str(info.get("redis_version", "unknown"))), _eviction(info), _persistence(info)]


def _version(version: str) -> Finding:
    """The commands are older than 6.0, but since then Redis checks every right before a script begins."""
    if re.match(r"[0-5]\.", version):
        return Finding(False, f"Redis is version {version}", "Upgrade it to 6.0 or newer")
    return Finding(True, f"Redis is version {version}")


def _eviction(info: Info) -> Finding:
    """With a memory limit and any policy but noeviction, seen bits, counts and buckets disappear one by one."""
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", 0) and policy != "noeviction":
        cure = "CONFIG SET maxmemory-policy noeviction (and in redis.conf): a full Redis then makes the replicator wait"
        return Finding(False, f"Redis throws keys away when its memory is full (maxmemory-policy {policy})", cure)
    return Finding(True, "Redis throws no keys away")


def _persistence(info: Info) -> Finding:
    if info.get("aof_enabled"):
        return Finding(True, "Redis keeps an append-only file")
    return Finding(True, "Redis keeps no append-only file: after a crash of Redis, a backfill brings back what it lost")
