"""`/healthz`, `/readyz`, `/status` and `/metrics` on REPLICATOR_ADMIN_LISTEN. No authentication: keep it on loopback.

What is shown comes from `pipeline.py` and `monitor.py`; nothing is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from replicator.contracts.errors import SettingsError
from replicator.contracts.events import Stage, format_lsn
from replicator.delivery.lane import LATENCY_BUCKETS_SECONDS, Lane
from replicator.operations.watchdog import Monitor

ACTIONS = {"U": "update", "D": "delete", "T": "truncate"}


def lag_seconds(monitor: Monitor, lane: Lane) -> float:
    """How long ago the oldest event that the sink lacks was committed; 0.0 when it has all that was read.

    While reading has stopped, what a sink lacks that has all of it is unknown: then the age of the newest it has.
    """
    if lane.waiting or not monitor.pipeline.fan_out.full:
        return lane.lag_seconds()
    return max(0.0, time.time() - lane.progress.committed_at)


def status(monitor: Monitor) -> dict[str, object]:
    """Everything an operator asks first, as JSON values."""
    pipeline, reasons = monitor.pipeline, monitor.reasons()
    return {
        "slot": monitor.name,
        "ready": not reasons,
        "reasons": reasons,
        "connected": pipeline.source.connected,
        "lag_bytes": monitor.lag_bytes(),
        "confirmed_lsn": format_lsn(pipeline.source.confirmed),
        "rows": pipeline.rows,
        "held_bytes": pipeline.fan_out.held_bytes,
        "reading_stopped": pipeline.fan_out.full,
        "dead_letters": pipeline.letters.stored,
        "sinks": {lane.name: _lane_status(monitor, lane) for lane in pipeline.fan_out.lanes},
    }


def _lane_status(monitor: Monitor, lane: Lane) -> dict[str, object]:
    return {
        "written_lsn": format_lsn(lane.done.end_lsn),
        "events": lane.progress.events,
        "waiting": lane.waiting,
        "retries": lane.progress.retries,
        "dead_letters": lane.progress.dead_letters,
        "lag_seconds": round(lag_seconds(monitor, lane), 3),
        "trouble": lane.trouble,
    }


class _Metrics(Collector):
    """Reads the counters that the lanes keep; nothing on the hot path knows of Prometheus."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        yield from self._pipeline()
        yield from self._slot()
        yield from self._lanes()

    def _pipeline(self) -> Iterator[Metric]:
        pipeline = self._monitor.pipeline
        checkpoint = pipeline.checkpoint.end_lsn if pipeline.checkpoint else 0
        yield CounterMetricFamily("replicator_rows", "Rows read from the slot", pipeline.rows)
        yield CounterMetricFamily(
            "replicator_enrichment_dead_letters", "Rows that no event could be made of", pipeline.dead_letters
        )
        yield self._dead_letters()
        ignored = CounterMetricFamily("replicator_ignored_rows", "Rows that make no event", labels=["action"])
        for action, count in pipeline.enricher.ignored.items():
            ignored.add_metric([ACTIONS[action]], count)
        yield ignored
        yield GaugeMetricFamily("replicator_connected", "1 while the stream runs", int(pipeline.source.connected))
        yield GaugeMetricFamily("replicator_ready", "What /readyz says", int(not self._monitor.reasons()))
        yield GaugeMetricFamily("replicator_held_bytes", "Memory of events that wait", pipeline.fan_out.held_bytes)
        yield GaugeMetricFamily("replicator_reading_stopped", "1 at the memory limit", int(pipeline.fan_out.full))
        yield GaugeMetricFamily("replicator_checkpoint_lsn", "Durable position, as a number", checkpoint)
        yield GaugeMetricFamily("replicator_confirmed_lsn", "Confirmed to PostgreSQL", pipeline.source.confirmed)

    def _dead_letters(self) -> Metric:
        stored = GaugeMetricFamily("replicator_dead_letters", "Dead letters that are kept", labels=["sink", "stage"])
        pipeline = self._monitor.pipeline
        counts = pipeline.letters.stored
        stored.add_metric(["", Stage.ROW], counts.rows)
        for lane in pipeline.fan_out.lanes:
            stored.add_metric([lane.name, Stage.EVENT], counts.sinks.get(lane.name, 0))
        return stored

    def _slot(self) -> Iterator[Metric]:
        slot = self._monitor.slot
        if slot is None:
            return
        yield GaugeMetricFamily("replicator_lag_bytes", "WAL written and not confirmed", slot.lag_bytes)
        yield GaugeMetricFamily("replicator_retained_wal_bytes", "WAL kept for the slot", slot.retained_bytes)
        if slot.safe_wal_size is not None:
            yield GaugeMetricFamily("replicator_safe_wal_bytes", "WAL until the slot is in danger", slot.safe_wal_size)

    def _lanes(self) -> Iterator[Metric]:
        counters = {
            "events": "Events written, dead letters included",
            "writes": "Writes that succeeded",
            "retries": "Writes that had to be tried again",
            "dead_letters": "Events that the sink refused for good",
        }
        lanes = self._monitor.pipeline.fan_out.lanes
        for name, text in counters.items():
            counter = CounterMetricFamily(f"replicator_sink_{name}", text, labels=["sink"])
            for lane in lanes:
                counter.add_metric([lane.name], getattr(lane.progress, name))
            yield counter
        gauges: dict[str, tuple[str, list[float]]] = {
            "waiting": ("Events queued or in flight", [lane.waiting for lane in lanes]),
            "written_lsn": ("Every event up to here is written", [lane.done.end_lsn for lane in lanes]),
            "lag_seconds": ("Age of what the sink lacks", [lag_seconds(self._monitor, lane) for lane in lanes]),
            "troubled": ("1 while the sink takes nothing", [int(bool(lane.trouble)) for lane in lanes]),
        }
        for name, (text, values) in gauges.items():
            gauge = GaugeMetricFamily(f"replicator_sink_{name}", text, labels=["sink"])
            for lane, value in zip(lanes, values, strict=True):
                gauge.add_metric([lane.name], value)
            yield gauge
        yield self._latency(lanes)

    def _latency(self, lanes: list[Lane]) -> Metric:
        text = "Seconds from commit to written, by batch"
        histogram = HistogramMetricFamily("replicator_sink_latency_seconds", text, labels=["sink"])
        ends = [*(str(end) for end in LATENCY_BUCKETS_SECONDS), "+Inf"]
        for lane in lanes:
            counts = accumulate(lane.progress.latency_counts)
            buckets = [(end, float(count)) for end, count in zip(ends, counts, strict=True)]
            histogram.add_metric([lane.name], buckets, lane.progress.latency_sum_seconds)
        return histogram


class Admin:
    """The HTTP server; `start` and `stop` belong to the event loop that runs the pipeline."""

    def __init__(self, monitor: Monitor, listen: str) -> None:
        self._monitor = monitor
        self._listen = listen
        self._registry = CollectorRegistry()
        self._registry.register(_Metrics(monitor))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen; nothing to do when the setting is empty. Raises SettingsError when the address can't be had."""
        if not self._listen:
            return
        app = web.Application()
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/status", self._status),
                web.get("/metrics", self._metrics),
            ]
        )
        host, _, port = self._listen.rpartition(":")
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        except (OSError, OverflowError) as exc:
            await self.stop()
            problem = f"{self._listen} can't be listened on ({exc})"
            raise SettingsError(name="REPLICATOR_ADMIN_LISTEN", problem=problem, expected="a free host:port") from exc

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # answered by the loop that runs the pipeline: it lives

    async def _readyz(self, _: web.Request) -> web.Response:
        reasons = self._monitor.reasons()
        return web.Response(text="\n".join(reasons or ["ready"]) + "\n", status=503 if reasons else 200)

    async def _status(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(status(self._monitor)), content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        body = exposition.generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": exposition.CONTENT_TYPE_LATEST})
