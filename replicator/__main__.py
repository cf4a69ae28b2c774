"""`python -m replicator`: the command line is in `replicator/cli`."""

import os

from replicator.cli.main import main

if __name__ == "__main__":
    os._exit(main())  # sys.exit would wait for the threads after all; everything is saved and printed
