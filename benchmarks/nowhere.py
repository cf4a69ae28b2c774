"""`python -m benchmarks.nowhere`: `replicator run` whose sinks keep nothing, so that reading and enriching are left."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from replicator.cli.arguments import load_app
from replicator.cli.stream import begin, replicate
from replicator.contracts.events import Event, Refusal


async def main() -> int:
    """Until SIGTERM."""
    stopping = begin()
    app = load_app()
    for sink in app.sinks:
        sink.write = _write  # type: ignore[method-assign]  # all else of it stays
    return await replicate(app, stopping)


async def _write(events: Sequence[Event]) -> Sequence[Refusal]:  # noqa: ARG001  it is a method of that form
    return []  # none is refused


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
