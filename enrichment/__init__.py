"""Everything that knows what an engagement event is; `replicator` drives it as a `stream.Enricher`.

`contract.py` declares the event. Another table's pipeline is another package like this one.
"""

from __future__ import annotations

from datetime import datetime

from enrichment.codec import microseconds
from enrichment.contract import EVENT
from enrichment.enricher import EngagementEnricher, EnrichmentSettings
from enrichment.history import BEGINNING, END, EngagementHistory, Range
from enrichment.ledger import EngagementLedger
from replicator.contracts.settings import load
from replicator.contracts.stream import Enricher

__all__ = [
    "BEGINNING",
    "END",
    "EVENT",
    "EngagementEnricher",
    "EngagementHistory",
    "EngagementLedger",
    "EnrichmentSettings",
    "create_enricher",
    "create_history",
    "microseconds",
]


def create_enricher(dsn: str) -> Enricher:
    """The enricher for the database at `dsn`, with its settings from the environment. Raises SettingsError."""
    return EngagementEnricher(dsn, load(EnrichmentSettings))


def create_history(dsn: str, start: datetime, end: datetime) -> EngagementHistory:
    """The events with `start <= event_ts < end` in the database at `dsn`."""
    return EngagementHistory(dsn, Range(start, end))
