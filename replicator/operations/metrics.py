"""A running replicator's status as Prometheus metrics. Nothing on the way of an event knows of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from replicator.contracts.events import Stage, parse_lsn
from replicator.delivery.lane import LATENCY_BUCKETS_SECONDS, Lane
from replicator.operations.status import DeadLetterStatus, ReplicatorStatus, SinkStatus, Status
from replicator.operations.watchdog import Monitor

SINK_COUNTERS = {
    "events": "Events written, dead letters included",
    "writes": "Writes that succeeded",
    "retries": "Writes that had to be tried again",
    "dead_letters": "Events that the sink refused for good",
}
"""By the field of SinkStatus."""
SINK_GAUGES: dict[str, tuple[str, Callable[[SinkStatus], float]]] = {
    "written_lsn": ("Every event up to here is written", lambda sink: parse_lsn(sink.end_lsn or "0/0")),
    "waiting": ("Events queued or in flight", lambda sink: sink.waiting or 0),
    "lag_seconds": ("Age of what the sink lacks", lambda sink: sink.lag_seconds or 0.0),
    "troubled": ("1 while the sink takes nothing", lambda sink: int(bool(sink.trouble))),
}


class _Metrics(Collector):
    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        status = self._monitor.status()
        for name, text, value in _gauges(status):
            if value is not None:
                yield GaugeMetricFamily(f"replicator_{name}", text, value)
        if status.replicator:
            yield from _counters(status.replicator)
        if status.dead_letters:
            yield _dead_letters(status.dead_letters, status.sinks)
        for name, text in SINK_COUNTERS.items():
            counter = CounterMetricFamily(f"replicator_sink_{name}", text, labels=["sink"])
            yield _filled(counter, {sink: getattr(at, name) for sink, at in status.sinks.items()})
        for name, (text, of_sink) in SINK_GAUGES.items():
            gauge = GaugeMetricFamily(f"replicator_sink_{name}", text, labels=["sink"])
            yield _filled(gauge, {sink: of_sink(at) for sink, at in status.sinks.items()})
        yield _latency(self._monitor.pipeline.fan_out.lanes)


def create_registry(monitor: Monitor) -> CollectorRegistry:
    """Metrics of the replicator and of its process."""
    registry = CollectorRegistry()
    registry.register(_Metrics(monitor))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _gauges(status: Status) -> Iterator[tuple[str, str, float | None]]:
    yield "ready", "What /readyz says", int(status.ready)
    yield "checkpoint_lsn", "Durable position, as a number", parse_lsn(status.checkpoint.end_lsn or "0/0")
    yield "lag_bytes", "WAL written and not confirmed", status.slot.lag_bytes
    yield "retained_wal_bytes", "WAL kept for the slot", status.slot.retained_bytes
    yield "safe_wal_bytes", "WAL until the slot is in danger", status.slot.safe_wal_bytes
    if process := status.replicator:
        yield "connected", "1 while the stream runs", int(process.connected)
        yield "held_bytes", "Memory of events that wait", process.held_bytes
        yield "reading_stopped", "1 at the memory limit", int(process.reading_stopped)
        yield "confirmed_lsn", "Confirmed to PostgreSQL, as a number", parse_lsn(process.confirmed_lsn)


def _counters(process: ReplicatorStatus) -> Iterator[Metric]:
    refused = "Rows that no event could be made of"
    yield CounterMetricFamily("replicator_rows", "Rows read from the slot", process.rows)
    yield CounterMetricFamily("replicator_enrichment_dead_letters", refused, process.refused_rows)
    ignored = CounterMetricFamily("replicator_ignored_rows", "Rows that make no event", labels=["action"])
    yield _filled(ignored, process.ignored_rows)


def _dead_letters(letters: DeadLetterStatus, sinks: Iterable[str]) -> Metric:
    kept = GaugeMetricFamily("replicator_dead_letters", "Dead letters that are kept", labels=["sink", "stage"])
    kept.add_metric(["", Stage.ROW], letters.rows)
    for sink in sinks:
        kept.add_metric([sink, Stage.EVENT], letters.sinks.get(sink, 0))
    return kept


def _filled(metric: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        metric.add_metric([label], value)
    return metric


def _latency(lanes: Iterable[Lane]) -> Metric:
    text = "Seconds from commit to written, by batch"
    histogram = HistogramMetricFamily("replicator_sink_latency_seconds", text, labels=["sink"])
    ends = [*(str(end) for end in LATENCY_BUCKETS_SECONDS), "+Inf"]
    for lane in lanes:
        counts = accumulate(lane.stats.latency_counts)
        buckets = [(end, float(count)) for end, count in zip(ends, counts, strict=True)]
        histogram.add_metric([lane.name], buckets, lane.stats.latency_sum_seconds)
    return histogram
