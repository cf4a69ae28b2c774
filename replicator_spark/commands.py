"""The commands that run on a cluster."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from replicator.cli.main import DONE, PLAIN
from replicator.cli.main import main as run
from replicator_spark.backfill import command as backfill
from replicator_spark.stream import command as stream

app = typer.Typer(name="python -m replicator_spark", pretty_exceptions_enable=False, **PLAIN)
EXAMPLES = {
    "backfill": "python -m replicator_spark backfill --last 30d \\\n             --master spark://spark-master:7077",
    "stream": "python -m replicator_spark stream \\\n             --master spark://spark-master:7077",
}


@app.callback()
def _root() -> None:
    """Run parts of the replicator on a Spark cluster: the same code, the same sinks, on many cores.

    Settings are the replicator's environment variables, on the driver and on every node.
    """


for name, command, manual in (
    ("stream", stream.stream, stream.MANUAL),
    ("backfill", backfill.backfill, backfill.MANUAL),
):
    app.command(
        name,
        help=manual,
        epilog=f"\b\nExample: {EXAMPLES[name]}\nExit codes: {DONE}.",
        context_settings={"terminal_width": 80},
    )(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of them; its exit code."""
    return run(arguments, app)
