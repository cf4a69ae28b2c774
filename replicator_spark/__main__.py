"""`python -m replicator_spark`, and the file that spark-submit is given: the commands are in `commands.py`."""

import sys

from replicator.__main__ import main

if __name__ == "__main__":
    sys.exit(main(commands="replicator_spark.commands"))
