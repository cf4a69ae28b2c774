"""Everything that makes events of a stream's tables. `contract.py` declares the engagement stream.

`replicator` drives the enricher, the histories and the ledger by the protocols in `replicator/contracts/`.
"""

from enrichment.contract import EVENT
from enrichment.enricher import EngagementEnricher, create_enricher
from enrichment.history import BEGINNING, END, EngagementHistory, Slice
from enrichment.ledger import EngagementLedger
from enrichment.tables.declared import EnrichmentSettings, Tables, configured

__all__ = [
    "BEGINNING",
    "END",
    "EVENT",
    "EngagementEnricher",
    "EngagementHistory",
    "EngagementLedger",
    "EnrichmentSettings",
    "Slice",
    "Tables",
    "configured",
    "create_enricher",
]
