"""A running replicator's status as Prometheus metrics. Nothing on the way of an event knows of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from replicator.contracts.events import parse_lsn
from replicator.delivery.lane import LATENCY_BUCKETS_SECONDS, Lane
from replicator.operations.status import Status
from replicator.operations.watchdog import ACTIONS, Watchdog

Family = type[CounterMetricFamily] | type[GaugeMetricFamily]
COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily

OF_PROCESS: dict[str, tuple[Family, str, Callable[[Watchdog, Status], float | None]]] = {
    "ready": (GAUGE, "0 while anything is wrong", lambda _, now: now.ready),
    "standby": (GAUGE, "1 while another process reads the slot", lambda _, now: bool(now.standby)),
    "lag_bytes": (GAUGE, "WAL written and not confirmed", lambda _, now: now.slot.lag_bytes),
    "retained_wal_bytes": (GAUGE, "WAL kept for the slot", lambda _, now: now.slot.retained_bytes),
    "safe_wal_bytes": (GAUGE, "WAL until the slot is in danger", lambda _, now: now.slot.safe_wal_bytes),
    "checkpoint_lsn": (GAUGE, "Durable position, a number", lambda _, now: parse_lsn(now.checkpoint.end_lsn or "0/0")),
    "confirmed_lsn": (GAUGE, "Confirmed to PostgreSQL, a number", lambda it, _: it.pipeline.source.confirmed),
    "connected": (GAUGE, "1 while the stream runs", lambda it, _: it.pipeline.source.connected),
    "held_bytes": (GAUGE, "Memory of events that wait", lambda it, _: it.pipeline.fan_out.held_bytes),
    "reading_stopped": (
        GAUGE,
        "1 while the memory limit stops reading",
        lambda it, _: it.pipeline.fan_out.reading_stopped,
    ),
    "rows": (COUNTER, "Rows read from the slot", lambda it, _: it.pipeline.rows),
    "enrichment_dead_letters": (COUNTER, "Rows that no event could be made of", lambda it, _: it.pipeline.dead_letters),
}
OF_SINK: dict[str, tuple[Family, str, Callable[[Watchdog, Lane], float]]] = {
    "events": (COUNTER, "Events written, dead letters included", lambda _, lane: lane.stats.events),
    "writes": (COUNTER, "Writes that succeeded", lambda _, lane: lane.stats.writes),
    "retries": (COUNTER, "Writes that had to be tried again", lambda _, lane: lane.trouble.failures),
    "dead_letters": (COUNTER, "Events that the sink refused for good", lambda _, lane: lane.stats.dead_letters),
    "written_lsn": (GAUGE, "Every event up to here is written", lambda _, lane: lane.mark.end_lsn),
    "waiting": (GAUGE, "Events queued or in flight", lambda _, lane: lane.waiting),
    "lag_seconds": (GAUGE, "Age of what the sink lacks", lambda it, lane: it.lag_seconds(lane)),
    "troubled": (GAUGE, "1 while the sink takes nothing", lambda _, lane: bool(lane.trouble)),
}


class Metrics(Collector):
    """What Prometheus asks for, as of now."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def collect(self) -> Iterator[Metric]:
        """Every metric of docs/reference/metrics.md that is not the process's own."""
        it, now = self._watchdog, self._watchdog.status()
        lanes, kept = it.pipeline.fan_out.lanes, it.pipeline.letters.stored
        for name, (family, text, value) in OF_PROCESS.items():
            yield _metric(family(f"replicator_{name}", text, labels=[]), [([], value(it, now))])
        for name, (family, text, of_lane) in OF_SINK.items():
            metric = family(f"replicator_sink_{name}", text, labels=["sink"])
            yield _metric(metric, (([lane.name], of_lane(it, lane)) for lane in lanes))
        ignored = COUNTER("replicator_ignored_rows", "Rows that make no event", labels=["action"])
        yield _metric(ignored, (([ACTIONS[action]], count) for action, count in it.pipeline.enricher.ignored.items()))
        letters = GAUGE("replicator_dead_letters", "Dead letters that are kept", labels=["sink", "stage"])
        of_sinks = (([lane.name, "event"], kept.sinks.get(lane.name, 0)) for lane in lanes)
        yield _metric(letters, [(["", "row"], kept.rows), *of_sinks])
        yield _latency(lanes)


def _metric(
    metric: CounterMetricFamily | GaugeMetricFamily, values: Iterable[tuple[list[str], float | None]]
) -> Metric:
    for labels, value in values:
        if value is not None:
            metric.add_metric(labels, value)
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
