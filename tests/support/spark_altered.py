"""The program on Spark, altered in memory: the driver dies at a named place, or the rule is broken on purpose.

    python -m tests.support.spark_altered --die carried --after 4711 -- stream --master local[3]

It is `tests/prove/failpoints.py` for a driver, whose sinks' sockets are on the nodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

import msgspec
import psycopg

from replicator_spark.backfill import crew
from replicator_spark.stream import desk, hands
from replicator_spark.stream.carrier import Carrier
from replicator_spark.stream.desk import Desk
from replicator_spark.stream.wire import Errand, Report
from tests.prove.failpoints import Death, alter, checkpoint_before_sink, run_altered

IMPATIENT_SECONDS = 8.0
PLACES = ("received", "enriched", "given", "carried", "after-save", "after-confirm")
"""On the way from the slot to the confirmation. Given: a task has the events; carried: its answer is there."""


class DriversDeath(Death):
    """Also where the cluster works for it."""

    def alter(self) -> None:
        """Install the places."""
        super().alter()
        alter(Desk, "_call", self._call)

    def _call(self, original: Callable[[Desk, Errand, float], Report]) -> Callable[[Desk, Errand, float], Report]:
        def call(at: Desk, errand: Errand, patience_seconds: float) -> Report:
            self._pass("given")
            report = original(at, errand, patience_seconds)
            self._pass("carried")
            return report

        return call


def contents_on_the_nodes() -> None:
    """A node looks the content up that an event goes out with."""
    alter(desk, "work", lambda _: looking_up)


def looking_up(packed: bytes) -> bytes:
    """A task that does so."""
    errand = msgspec.msgpack.decode(packed, type=Errand)
    with psycopg.connect(os.environ["REPLICATOR_POSTGRES_DSN"]) as connection:
        found = connection.execute("SELECT content_id, content_type FROM content").fetchall()
    types = {content: msgspec.json.encode(kind) for content, kind in found}
    for event in (event for events in errand.writes for event in events):
        today = b'"content_type":' + types.get(event.key, b"null")
        event.json = re.sub(rb'"content_type":("[^"]*"|null)', today, event.json)
    return hands.work(msgspec.msgpack.encode(errand))


def impatient() -> None:
    """No breach: it just gives a task up earlier, for tests that can't wait."""
    alter(Carrier, "patience_seconds", lambda _: IMPATIENT_SECONDS)
    alter(crew, "STALLED_SECONDS", lambda _: 2 * IMPATIENT_SECONDS)


BREACHES: Mapping[str, Callable[[], None]] = {
    "checkpoint-before-sink": checkpoint_before_sink,
    "contents-on-the-nodes": contents_on_the_nodes,
    "impatient": impatient,
}


if __name__ == "__main__":
    run_altered("replicator_spark", PLACES, DriversDeath, BREACHES)
