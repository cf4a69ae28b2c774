"""What has arrived in the three sinks, and what PostgreSQL says should have arrived, in the same form.

Numbers are exact (fractions as Decimal), timestamps are text. `program.py` runs the program under test.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import psycopg
import redis

from devstack import DevStack
from devstack.clickhouse import DATABASE
from devstack.control import fetch

EXPECTED_SQL = (Path(__file__).parents[0] / "expected.sql").read_text(encoding="utf-8")

CONTENT_WAS = "public.content AS c USING (content_id)", "content_was AS c ON c.event_id = e.id"

FIELDS = (
    "event_id", "content_id", "user_id", "event_type", "event_ts", "duration_ms", "device",
    "content_type", "length_seconds", "engagement_seconds", "engagement_pct",
)  # fmt: skip

Event: TypeAlias = dict[str, Any]

_decode = msgspec.json.Decoder(float_hook=Decimal).decode

_CLICKHOUSE = f"""
SELECT {", ".join(FIELDS)} FROM {{database}}.events_enriched FINAL ORDER BY event_id
SETTINGS date_time_output_format = 'iso', output_format_json_quote_64bit_integers = 0,
         output_format_json_quote_decimals = 0
FORMAT JSONEachRow
"""  # noqa: S608  our own constants


def expected(dsn: str, *, content_at_commit: bool = False) -> list[Event]:
    """Every event of the source tables as PostgreSQL computes it, by id.

    Its content is today's, or what the table `content_was` has of the event.
    """
    events = EXPECTED_SQL.replace(*CONTENT_WAS) if content_at_commit else EXPECTED_SQL
    query = f"SELECT row_to_json(expected)::text FROM ({events}) AS expected ORDER BY event_id"  # noqa: S608
    with psycopg.connect(dsn, options="-c TimeZone=UTC -c DateStyle=ISO") as connection:
        return [_decode(text) for (text,) in connection.execute(query)]


class Destinations:
    """The sinks of a stack: what a replicator writes there without a database, a prefix and an API of its own."""

    def __init__(
        self, stack: DevStack, *, database: str = DATABASE, prefix: str = "", api_url: str | None = None
    ) -> None:
        self._stack = stack
        self._database = database
        self._prefix = prefix
        self._api_url = api_url
        self.redis = redis.Redis.from_url(stack.redis.url, decode_responses=True)

    def api(self) -> list[Event]:
        """What the API accepted, in order, repeats included."""
        events: list[Event] = _decode(fetch(self._api_url or self._stack.api.url))
        return events

    def api_text(self) -> str:
        """The same, byte for byte as it was sent."""
        return fetch(self._stack.api.url).decode()

    def clickhouse(self) -> list[Event]:
        """What ClickHouse has, by id, under FINAL."""
        query = _CLICKHOUSE.format(database=self._database)
        return [_decode(line) for line in self._stack.clickhouse.query(query).splitlines()]

    def counts(self) -> dict[int, int]:
        """Redis: content → its number of events."""
        return {content: int(text) for content, text in self._by_content(f"{self._prefix}content:count:").items()}

    def last(self) -> dict[int, Event]:
        """Redis: content → its newest event."""
        return {content: _decode(text) for content, text in self._by_content(f"{self._prefix}content:last:").items()}

    def top(self) -> dict[int, int]:
        """Redis: content → events in the last ten minutes."""
        pairs: list[tuple[str, float]] = self.redis.zrange(f"{self._prefix}top:content:10m", 0, -1, withscores=True)  # type: ignore[assignment]  # the stub has a wider type
        return {int(content): int(score) for content, score in pairs}

    def _by_content(self, prefix: str) -> dict[int, str]:
        keys = list(self.redis.scan_iter(f"{prefix}*", count=1000))
        values = self.redis.mget(keys) if keys else []
        return {int(key.removeprefix(prefix)): str(text) for key, text in zip(keys, values, strict=True)}
