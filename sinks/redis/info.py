"""Reads from Redis's INFO whether it keeps what is written, for `RedisSink.check`; pure."""

from __future__ import annotations

from collections.abc import Mapping

from replicator.contracts.events import Finding

VERSION_MIN = (6, 0)  # the commands are older; from here on every right is checked before a script begins

Info = Mapping[str, str | float]


def findings(info: Info) -> list[Finding]:
    """A line each for version, eviction and persistence."""
    return [_version(info), _eviction(info), _persistence(info)]


def _version(info: Info) -> Finding:
    version = str(info.get("redis_version", "unknown"))
    parts = version.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < VERSION_MIN:
        wanted = ".".join(map(str, VERSION_MIN))
        return Finding(False, f"Redis is version {version}", f"Upgrade it to {wanted} or newer")
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
