"""A running replicator's status as Prometheus metrics. Nothing on the way of an event knows of Prometheus.

The names, types and meanings here make the table in docs/reference/metrics.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from replicator import __version__
from replicator.contracts.events import Lsn, parse_lsn
from replicator.delivery.lane import LATENCY_BUCKETS_SECONDS, Lane
from replicator.operations.status.form import ReplicatorStatus, SinkStatus, Status
from replicator.operations.watchdog import Watchdog

Family = type[CounterMetricFamily] | type[GaugeMetricFamily]
COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily


def _position(lsn: str | None) -> Lsn | None:
    return None if lsn is None else parse_lsn(lsn)


def _moment(seconds_ago: float | None) -> float | None:
    return None if seconds_ago is None else time.time() - seconds_ago


def _share(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole


# A value that is None is unknown: the metric is absent then.
OF_STATUS: dict[str, tuple[Family, str, Callable[[Status], float | None]]] = {
    "ready": (GAUGE, "0 while anything is wrong; a standby with nothing wrong has 1", lambda now: now.ready),
    "unready_reasons": (GAUGE, "the number of reasons in /readyz", lambda now: len(now.reasons)),
    "standby": (GAUGE, "1 while it waits as the standby", lambda now: bool(now.standby)),
    "lag_bytes": (GAUGE, "WAL that is written and not confirmed", lambda now: now.slot.lag_bytes),
    "wal_kept_bytes": (GAUGE, "WAL that PostgreSQL keeps for the slot, in whole files", lambda now: now.wal.kept_bytes),
    "wal_limit_bytes": (
        GAUGE,
        "the most WAL that may be kept before the slot is in danger; absent without max_slot_wal_keep_size",
        lambda now: now.wal.limit_bytes,
    ),
    "wal_kept_ratio": (
        GAUGE,
        "kept WAL divided by the limit; absent without a limit",
        lambda now: _share(now.wal.kept_bytes, now.wal.limit_bytes),
    ),
    "wal_lost_in_seconds": (
        GAUGE,
        "seconds until the slot is in danger at the current growth; 0 if it is, absent while the WAL does not grow",
        lambda now: now.wal.lost_in_seconds,
    ),
    "server_position_bytes": (GAUGE, "the end of PostgreSQL's WAL", lambda now: _position(now.slot.server_lsn)),
    "checkpoint_position_bytes": (
        GAUGE,
        "saved position up to which every sink has everything",
        lambda now: _position(now.checkpoint.end_lsn),
    ),
    "checkpoint_saved_timestamp_seconds": (
        GAUGE,
        "when the checkpoint was saved last",
        lambda now: _moment(now.checkpoint.saved_seconds_ago),
    ),
    "notifications_waiting": (
        GAUGE,
        "notifications that are not taken yet; absent without REPLICATOR_NOTIFY_URL",
        lambda now: now.notifications.waiting if now.notifications else None,
    ),
    "notifications_lost": (
        COUNTER,
        "notifications that were refused, or were the oldest of too many; absent likewise",
        lambda now: now.notifications.lost if now.notifications else None,
    ),
    "dead_letters_limit": (
        GAUGE,
        "the most dead letters that are kept of one sink, and of rows",
        lambda now: now.dead_letters.limit if now.dead_letters else None,
    ),
}
OF_PROCESS: dict[str, tuple[Family, str, Callable[[ReplicatorStatus], float | None]]] = {
    "connected": (GAUGE, "1 while the stream runs", lambda it: it.connected),
    "confirmed_position_bytes": (
        GAUGE,
        "position confirmed to PostgreSQL, which may forget everything up to it",
        lambda it: parse_lsn(it.confirmed_lsn),
    ),
    "verified_position_bytes": (
        GAUGE,
        "position up to which the tables were seen to be what the stream assumes; nothing is confirmed past it",
        lambda it: parse_lsn(it.verified_lsn),
    ),
    "held_bytes": (GAUGE, "memory of waiting events", lambda it: it.held_bytes),
    "reading_stopped": (
        GAUGE,
        "1 while the memory limit stops reading for a third of the time or more",
        lambda it: it.reading_stopped,
    ),
    "carrier_executors": (
        GAUGE,
        "executors of the Spark cluster that does the writes; absent without Spark",
        lambda it: it.carrier.executors if it.carrier else None,
    ),
    "carrier_cores": (
        GAUGE,
        "their cores: how many writes run at once; absent likewise",
        lambda it: it.carrier.cores if it.carrier else None,
    ),
    "rows": (COUNTER, "rows read from the slot", lambda it: it.rows),
    "refused_rows": (COUNTER, "rows that could not be made into events", lambda it: it.refused_rows),
}
OF_SINK: dict[str, tuple[Family, str, Callable[[SinkStatus], float | None]]] = {
    "events": (COUNTER, "events written, dead letters included", lambda sink: sink.events),
    "writes": (COUNTER, "writes that succeeded", lambda sink: sink.writes),
    "retries": (COUNTER, "tries that failed", lambda sink: sink.retries),
    "dead_letters": (COUNTER, "events that the sink refused for good", lambda sink: sink.dead_letters),
    "position_bytes": (GAUGE, "position up to which every event is written", lambda sink: _position(sink.end_lsn)),
    "waiting_events": (GAUGE, "events queued or in flight", lambda sink: sink.waiting),
    "lag_seconds": (
        GAUGE,
        "the age of the oldest event that the sink lacks; 0 if it has everything",
        lambda sink: sink.lag_seconds,
    ),
    "lag_bytes": (GAUGE, "WAL from the sink's position to the end of PostgreSQL's", lambda sink: sink.lag_bytes),
    "paused": (GAUGE, "1 while the sink is paused: PostgreSQL keeps the WAL for it", lambda sink: bool(sink.paused)),
    "troubled": (GAUGE, "1 while the sink takes nothing", lambda sink: bool(sink.trouble)),
}


class Metrics(Collector):
    """What Prometheus asks for, as of now."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def collect(self) -> Iterator[Metric]:
        """Every metric of docs/reference/metrics.md that is not the process's own; each has the slot's name."""
        now = self._watchdog.status()
        slot = now.slot.name
        info = GAUGE("replicator_info", "1, with the program's version", labels=["slot", "version"])
        yield _metric(info, [([slot, __version__], 1)])
        for name, (family, text, of_status) in OF_STATUS.items():
            yield _metric(family(f"replicator_{name}", text, labels=["slot"]), [([slot], of_status(now))])
        if now.replicator:
            yield from _of_process(now.replicator, slot)
        for name, (family, text, of_sink) in OF_SINK.items():
            metric = family(f"replicator_sink_{name}", text, labels=["slot", "sink"])
            yield _metric(metric, (([slot, sink], of_sink(at)) for sink, at in now.sinks.items()))
        yield _letters(now)
        yield _latency(self._watchdog.pipeline.fan_out.every, slot)


def _metric(
    metric: CounterMetricFamily | GaugeMetricFamily, values: Iterable[tuple[list[str], float | None]]
) -> Metric:
    for labels, value in values:
        if value is not None:
            metric.add_metric(labels, value)
    return metric


def _of_process(live: ReplicatorStatus, slot: str) -> Iterator[Metric]:
    for name, (family, text, of_process) in OF_PROCESS.items():
        yield _metric(family(f"replicator_{name}", text, labels=["slot"]), [([slot], of_process(live))])
    text = "rows that make no event: update, delete, truncate"
    ignored = COUNTER("replicator_ignored_rows", text, labels=["slot", "action"])
    yield _metric(ignored, (([slot, action], count) for action, count in live.ignored_rows.items()))


def _letters(now: Status) -> Metric:
    text = "dead letters that are kept; at stage row (the row could not be made into an event) the sink is empty"
    letters, slot = GAUGE("replicator_dead_letters", text, labels=["slot", "sink", "stage"]), now.slot.name
    if kept := now.dead_letters:
        of_sinks = (([slot, sink, "event"], kept.sinks.get(sink, 0)) for sink in now.sinks)
        _metric(letters, [([slot, "", "row"], kept.rows), *of_sinks])
    return letters


def _latency(lanes: Iterable[Lane], slot: str) -> Metric:
    text = "seconds from commit to written, by batch"
    histogram = HistogramMetricFamily("replicator_sink_latency_seconds", text, labels=["slot", "sink"])
    ends = [*(str(end) for end in LATENCY_BUCKETS_SECONDS), "+Inf"]
    for lane in lanes:
        counts = accumulate(lane.stats.latency_counts)
        buckets = [(end, float(count)) for end, count in zip(ends, counts, strict=True)]
        histogram.add_metric([slot, lane.name], buckets, lane.stats.latency_sum_seconds)
    return histogram
