"""`python backfill.py --start ... --end ...`: the same as `replicator backfill`; see replicator/cli/backfill.py."""

import sys

from replicator.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["backfill", *sys.argv[1:]]))
