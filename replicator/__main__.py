"""`python -m replicator`: the command line is in `replicator/cli`."""

import sys

from replicator.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
