"""What is in `deploy/` for systemd and Kubernetes is right by their own tools, and fits the program."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from replicator.contracts.settings import CoreSettings, Settings, variable
from sinks.clickhouse.sink import ClickHouseSettings
from sinks.http.settings import HttpSettings
from sinks.redis.settings import RedisSettings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/engagement-replicator.service"
KUBERNETES = "1.34"
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
MOST_EXPOSED = 20
"""Of 100, as `systemd-analyze security` counts; a service without any hardening has 96."""
CLASSES: list[type[Settings]] = [CoreSettings, ClickHouseSettings, RedisSettings, HttpSettings]
VARIABLES = {variable(name) for settings in CLASSES for name in settings.model_fields} | {"REPLICATOR_PROGRAM"}

manifests = pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)


def _unit(name: str) -> list[str]:
    """The values of a line of the unit."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)


def _analyze(*arguments: str, unit: Path) -> str:
    done = subprocess.run(["systemd-analyze", *arguments, str(unit)], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit, with a program and settings that are there."""
    text = UNIT.read_text(encoding="utf-8").replace("/opt/engagement-replicator/bin/replicator", sys.executable)
    unit = tmp_path / UNIT.name
    unit.write_text(text, encoding="utf-8")
    return unit


def test_systemd_understands_the_unit(installed: Path) -> None:
    """Every line of it."""
    said = _analyze("verify", "--man=no", unit=installed)
    assert not [line for line in said.splitlines() if UNIT.name in line], said


def test_the_unit_is_hardened(installed: Path) -> None:
    """By systemd's own count."""
    _analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager", unit=installed)


def test_the_process_has_metrics_under_the_unit() -> None:
    """Prometheus's client gives none of them without /proc/stat; ReplicatorRestarts would never fire."""
    assert not _unit("ProcSubset")


def test_the_unit_fits_the_program() -> None:
    """It has time to drain, its secrets have their settings, and unusable settings are not tried again and again."""
    drain = CoreSettings.model_fields["drain_timeout_seconds"].default
    assert int(_unit("TimeoutStopSec")[0]) > drain + 8 + 2
    names = [value.partition(":")[0] for value in _unit("LoadCredential")]
    assert [f"{variable(name)}_FILE=%d/{name}" for name in names] == _unit("Environment")
    assert ["2"] == _unit("RestartPreventExitStatus")
    assert [str(128 + signal.SIGTERM)] == _unit("SuccessExitStatus")
    settings = (ROOT / "deploy/systemd/settings").read_text(encoding="utf-8")
    assert not set(re.findall(r"^(\w+)=", settings, re.MULTILINE)) - VARIABLES


def _documents(manifest: Path) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(manifest.read_text(encoding="utf-8"))


def _pod(manifest: Path) -> dict[str, Any]:
    [deployment] = [document for document in _documents(manifest) if document["kind"] == "Deployment"]
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


@manifests
def test_kubernetes_understands_the_manifest(manifest: Path) -> None:
    """Against its own schema, which allows no unknown field."""
    for document in _documents(manifest):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@manifests
def test_the_pod_is_confined(manifest: Path) -> None:
    """As the image expects it: its user, a root that is only read, no right of its own."""
    pod = _pod(manifest)
    [container] = pod["containers"]
    dockerfile = (ROOT / "docker/replicator/Dockerfile").read_text(encoding="utf-8")
    assert f"USER {pod['securityContext']['runAsUser']}" in dockerfile
    assert pod["securityContext"]["runAsNonRoot"]
    assert "RuntimeDefault" == pod["securityContext"]["seccompProfile"]["type"]
    assert (False, False) == (pod["enableServiceLinks"], pod["automountServiceAccountToken"])
    confined = container["securityContext"]
    assert (False, True, ["ALL"]) == (
        confined["allowPrivilegeEscalation"],
        confined["readOnlyRootFilesystem"],
        confined["capabilities"]["drop"],
    )


@manifests
def test_the_pod_fits_the_program(manifest: Path) -> None:
    """Probes that suit it, settings that exist, secrets that are files, and time to drain."""
    pod = _pod(manifest)
    [container] = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > CoreSettings.model_fields["drain_timeout_seconds"].default + 8 + 2
    ready = "/standbyz" if manifest.stem == "standby-pair" else "/readyz"
    probes = (container["livenessProbe"], container["readinessProbe"])
    assert ("/healthz", ready) == tuple(probe["httpGet"]["path"] for probe in probes)
    [secrets] = [mount for mount in container["volumeMounts"] if mount["name"] == "secrets"]
    for entry in container["env"]:
        name = entry["name"].removesuffix("_FILE")
        assert name in VARIABLES
        if name.endswith(("_URL", "_DSN")) and entry["value"]:
            assert f"{secrets['mountPath']}/{name.removeprefix('REPLICATOR_').lower()}" == entry["value"]


@manifests
def test_a_pod_that_ends_can_be_made_to_wait(manifest: Path) -> None:
    """By the patch of the page: its commands need a container that runs, and no probe that ends it."""
    page = (ROOT / "docs/how-to/operate/kubernetes.md").read_text(encoding="utf-8")
    [patch] = re.findall(r"--patch='(.*?)'", page, re.DOTALL)
    [deployment] = [document for document in _documents(manifest) if document["kind"] == "Deployment"]
    for change in json.loads(patch):
        *way, last = (int(step) if step.isdigit() else step for step in change["path"].split("/")[1:])
        place: Any = deployment
        for step in way:
            place = place[step]
        if change["op"] == "add":
            place[last] = change["value"]
        else:
            del place[last]
    kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert ["sleep", "infinity"] == container["command"]
    assert not [name for name in container if name.endswith("Probe")]


def test_only_one_pod_has_the_checkpoint_on_a_volume() -> None:
    """The pair has a database for it; the single pod ends before the next one begins."""
    one, pair = MANIFESTS
    [deployment] = [document for document in _documents(one) if document["kind"] == "Deployment"]
    assert (1, "Recreate") == (deployment["spec"]["replicas"], deployment["spec"]["strategy"]["type"])
    [deployment] = [document for document in _documents(pair) if document["kind"] == "Deployment"]
    assert 2 == deployment["spec"]["replicas"]
    assert not [volume for volume in _pod(pair)["volumes"] if "persistentVolumeClaim" in volume]
