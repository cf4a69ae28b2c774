"""Reads /metrics as Prometheus does, and makes the table of docs/reference/metrics.md.

`python -m tests.support.metrics` writes that table into the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from replicator.contracts.sink import Carrier
from replicator.delivery.lane import LaneStats
from replicator.operations.metrics import Metrics
from replicator.operations.status.form import (
    CheckpointStatus,
    DeadLetterStatus,
    NotificationStatus,
    ReplicatorStatus,
    SinkStatus,
    SlotStatus,
    Status,
    WalStatus,
)

STATUS = Status(
    reasons=["something is wrong", "something else is"],
    standby="process 7 reads the slot",
    replicator=ReplicatorStatus(
        version="1",
        connected=True,
        confirmed_lsn="0/C8",
        verified_lsn="0/D8",
        verified_seconds_ago=0.5,
        rows=9,
        refused_rows=1,
        ignored_rows={"update": 2},
        held_bytes=300,
        reading_stopped=True,
        carrier=Carrier(name="Spark at local[4]", executors=2, cores=4),
    ),
    slot=SlotStatus(name="s", server_lsn="1/0", lag_bytes=60),
    wal=WalStatus(kept_bytes=50, limit_bytes=200, lost_in_seconds=3_600.0),
    checkpoint=CheckpointStatus(end_lsn="0/C0", saved_seconds_ago=0.0),
    sinks={
        "http": SinkStatus(
            trouble="away",
            paused="until somebody resumes it",
            end_lsn="0/C4",
            lag_bytes=40,
            lag_seconds=1.5,
            events=8,
            writes=2,
            retries=3,
            dead_letters=1,
            waiting=6,
        )
    },
    dead_letters=DeadLetterStatus(rows=4, sinks={"http": 5}, limit=100),
    notifications=NotificationStatus(waiting=6, lost=7),
)
"""One in which every metric has a value."""

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
HEAD = "| metric | type, labels | meaning |\n|---|---|---|\n"


def value(text: str, name: str, **labels: str) -> float | None:
    """The value of our metric with these labels, and perhaps more; None if there is none."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    ours = (sample for sample in samples if sample.name == f"replicator_{name}")
    return next((sample.value for sample in ours if labels.items() <= sample.labels.items()), None)


def of_status(status: Status) -> list[Metric]:
    """What a replicator with this status, and a lane that has written, shows."""
    stats = LaneStats()
    stats.latency_counts[3], stats.latency_sum_seconds = 2, 0.06
    lanes = [SimpleNamespace(name="http", stats=stats)]
    pipeline = SimpleNamespace(fan_out=SimpleNamespace(lanes=lanes, every=lanes))
    return [*Metrics(SimpleNamespace(status=lambda: status, pipeline=pipeline)).collect()]  # type: ignore[arg-type]  # as much as it needs


def table(families: Iterable[Metric]) -> str:
    """A line a metric."""
    return HEAD + "".join(map(_line, families))


def _line(family: Metric) -> str:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = " and ".join(f"`{label}`" for label in family.samples[0].labels if label not in ("slot", "le"))
    return f"| `{name}` | {family.type}{labels and f', by {labels}'} | {family.documentation} |\n"


def written(page: str) -> str:
    """The page's own table."""
    [found] = re.findall(rf"^{re.escape(HEAD)}(?:\|.*\n)*", page, re.MULTILINE)
    return str(found)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(written(text), table(of_status(STATUS))), encoding="utf-8")
