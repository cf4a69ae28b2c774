"""The metrics: by Prometheus's conventions, absent where unknown, and those of the reference page."""

from __future__ import annotations

import subprocess
import time

import pytest
from msgspec import structs
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from devstack.process import find_program
from replicator import __version__
from replicator.operations.status.form import CheckpointStatus, SlotStatus, Status, WalStatus
from tests.support.metrics import PAGE, STATUS, of_status, table, value, written

UNKNOWN = structs.replace(
    STATUS,
    reasons=[],
    standby="",
    replicator=None,
    slot=SlotStatus(name="s"),
    wal=WalStatus(),
    checkpoint=CheckpointStatus(),
    sinks={},
    dead_letters=None,
    notifications=None,
)


class Given(Collector):
    """Shows what it is given."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> list[Metric]:
        """As a replicator with this status."""
        return of_status(self._status)


def exposed(status: Status) -> str:
    """The answer of /metrics."""
    registry = CollectorRegistry()
    registry.register(Given(status))
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("info", {"slot": "s", "version": __version__}, 1),
        ("ready", {"slot": "s"}, 0),
        ("unready_reasons", {}, 2),
        ("standby", {}, 1),
        ("wal_kept_ratio", {}, 0.25),
        ("wal_lost_in_seconds", {}, 3_600),
        ("server_position_bytes", {}, 2**32),
        ("checkpoint_position_bytes", {}, 0xC0),
        ("verified_position_bytes", {}, 0xD8),
        ("dead_letters_limit", {}, 100),
        ("dead_letters", {"sink": "", "stage": "row"}, 4),
        ("dead_letters", {"sink": "http", "stage": "event"}, 5),
        ("carrier_executors", {}, 2),
        ("carrier_cores", {}, 4),
        ("ignored_rows_total", {"action": "update"}, 2),
        ("sink_retries_total", {"sink": "http", "slot": "s"}, 3),
        ("sink_position_bytes", {"sink": "http"}, 0xC4),
        ("sink_paused", {"sink": "http"}, 1),
        ("sink_troubled", {"sink": "http"}, 1),
        ("sink_waiting_events", {"sink": "http"}, 6),
        ("sink_latency_seconds_bucket", {"sink": "http", "le": "0.05"}, 2),
    ],
)
def test_values(name: str, labels: dict[str, str], expected: float | None) -> None:
    """Each is what the status says, with the slot's name."""
    assert expected == value(exposed(STATUS), name, **labels)


def test_when_the_checkpoint_was_saved() -> None:
    """Just now is now, and not the year 1970."""
    assert time.time() == pytest.approx(value(exposed(STATUS), "checkpoint_saved_timestamp_seconds"), abs=30)


def test_what_is_unknown_is_absent() -> None:
    """A zero would be a value: no WAL kept, no lag."""
    shown = {
        family.name: [sample.value for sample in family.samples] for family in of_status(UNKNOWN) if family.samples
    }
    always = {"info": [1], "ready": [1], "unready_reasons": [0], "standby": [0]}
    assert {f"replicator_{name}": values for name, values in always.items()} == {
        name: values for name, values in shown.items() if "latency" not in name
    }


def test_prometheus_has_nothing_to_say_against_them() -> None:
    """Names, units and suffixes are as its linter wants them."""
    command = [find_program("promtool", "prometheus"), "check", "metrics"]
    done = subprocess.run(command, input=exposed(STATUS), capture_output=True, text=True, check=False)
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


def test_every_metric_has_the_slot() -> None:
    """Two replicators on one machine are told apart."""
    samples = [sample for family in of_status(STATUS) for sample in family.samples]
    assert samples
    assert {"s"} == {sample.labels.get("slot") for sample in samples}


def test_the_reference_is_made_of_them() -> None:
    """If not: `python -m tests.support.metrics` writes it."""
    assert table(of_status(STATUS)) == written(PAGE.read_text(encoding="utf-8"))
