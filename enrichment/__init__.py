"""Everything that knows what an engagement event is. `contract.py` declares it.

`replicator` drives the enricher, the histories and the ledger by the protocols in `replicator/contracts/`.
"""

from enrichment.contract import EVENT, EnrichmentSettings
from enrichment.enricher import EngagementEnricher, create_enricher
from enrichment.history import BEGINNING, END, EngagementHistory, Slice
from enrichment.ledger import EngagementLedger

__all__ = [
    "BEGINNING",
    "END",
    "EVENT",
    "EngagementEnricher",
    "EngagementHistory",
    "EngagementLedger",
    "EnrichmentSettings",
    "Slice",
    "create_enricher",
]
