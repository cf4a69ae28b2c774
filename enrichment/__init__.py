"""Everything that knows what an engagement event is; `replicator` drives it as a `protocols.Enricher`.

Another table's pipeline is another package like this one: a module with a `create_enricher`.
"""

from __future__ import annotations

from enrichment.enricher import EngagementEnricher, EnrichmentSettings
from replicator.protocols import Enricher
from replicator.settings import load

__all__ = ["EngagementEnricher", "EnrichmentSettings", "create_enricher"]


def create_enricher(dsn: str) -> Enricher:
    """The enricher for the database at `dsn`, with its settings from the environment. Raises SettingsError."""
    return EngagementEnricher(dsn, load(EnrichmentSettings))
