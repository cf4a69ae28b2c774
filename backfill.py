"""`python backfill.py --start ... --end ...`: a stretch of history through the same enrichment into the same sinks."""

import sys

from replicator.cli.backfill import main

if __name__ == "__main__":
    sys.exit(main())
