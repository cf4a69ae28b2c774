"""`python -m replicator_spark`, and the file that spark-submit is given: the commands that run on a cluster."""

from __future__ import annotations

import sys

import typer

from replicator.cli.main import DONE, PLAIN, main
from replicator_spark import backfill

app = typer.Typer(name="python -m replicator_spark", pretty_exceptions_enable=False, **PLAIN)
EXAMPLE = "python -m replicator_spark backfill --last 30d \\\n             --master spark://spark-master:7077"


@app.callback()
def _root() -> None:
    """Run parts of the replicator on a Spark cluster: the same code, the same sinks, on many cores.

    Settings are the replicator's environment variables, on the driver and on every node.
    """


app.command(
    "backfill",
    help=backfill.MANUAL,
    epilog=f"\b\nExample: {EXAMPLE}\nExit codes: {DONE}.",
    context_settings={"terminal_width": 80},
)(backfill.backfill)

if __name__ == "__main__":
    sys.exit(main(program=app))
