"""Everything that makes events of a stream's tables. `contract.py` declares the engagement stream.

`replicator` drives the enricher, the histories and the ledger by the protocols in `replicator/contracts/`.
"""

from enrichment.contract import EVENT
from enrichment.history.pages import BEGINNING, END, RangeHistory, Slice
from enrichment.ledger import TableLedger
from enrichment.streams.enricher import StreamEnricher
from enrichment.streams.several import SeveralStreams, create_enricher
from enrichment.tables.declared import EnrichmentSettings, Tables, configured, tables_of, the_one

__all__ = [
    "BEGINNING",
    "END",
    "EVENT",
    "EnrichmentSettings",
    "RangeHistory",
    "SeveralStreams",
    "Slice",
    "StreamEnricher",
    "TableLedger",
    "Tables",
    "configured",
    "create_enricher",
    "tables_of",
    "the_one",
]
