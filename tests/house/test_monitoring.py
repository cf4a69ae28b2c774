"""Alerts and dashboard without a replicator: `tests/acceptance/test_monitoring.py` has one that runs."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from devstack.process import find_program

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text(encoding="utf-8"))
GRID_WIDTH = 24


def _yaml(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def _alerts() -> list[dict[str, Any]]:
    return [rule for group in _yaml("alerts.yaml")["groups"] for rule in group["rules"]]


def _promtool(*arguments: str) -> str:
    done = subprocess.run(
        [find_program("promtool", "prometheus"), *arguments], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alerts_fire_and_are_silent() -> None:
    """When they should, and only then."""
    assert "SUCCESS" in _promtool("test", "rules", "alerts_test.yaml")


def test_every_alert_is_played_both_ways() -> None:
    """Each is seen to fire, and seen to be silent."""
    played = [case for test in _yaml("alerts_test.yaml")["tests"] for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in _alerts()}
    assert names
    assert names == {case["alertname"] for case in played if case["exp_alerts"]}
    assert names == {case["alertname"] for case in played if not case["exp_alerts"]}


def test_the_configuration_is_valid() -> None:
    """Of the Prometheus in docker-compose.yml, alerts included."""
    assert "FAILED" not in _promtool("check", "config", "--lint=all", "--lint-fatal", "prometheus.yaml")


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_alert_has_its_runbook() -> None:
    """The page and the heading exist, and no heading is of an alert that is not there."""
    links = {alert["annotations"]["runbook_url"] for alert in _alerts()}
    page, *others = {link.partition("#")[0] for link in links}
    assert not others
    anchors = _anchors(ROOT / page)
    assert {link.partition("#")[2] for link in links} == {
        anchor for anchor in anchors if anchor.startswith("replicator")
    }


def test_every_alert_says_how_bad_it_is() -> None:
    """And what is wrong, in a line."""
    assert {"critical", "warning"} == {alert["labels"]["severity"] for alert in _alerts()}
    assert not [alert for alert in _alerts() if {"summary", "description"} - alert["annotations"].keys()]


def test_the_dashboard_is_one() -> None:
    """What Grafana needs of each panel; no two of them overlap, and all fit into its grid."""
    panels = DASHBOARD["panels"]
    assert len(panels) == len({panel["id"] for panel in panels})
    for panel in panels:
        assert {"type", "title", "gridPos", "datasource", "targets", "fieldConfig"} <= panel.keys()
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= GRID_WIDTH
    cells = [(panel["gridPos"], panel["title"]) for panel in panels]
    assert not [(one[1], other[1]) for one, other in combinations(cells, 2) if _overlap(one[0], other[0])]


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in ("xw", "yh"))


def test_the_dashboard_knows_no_address() -> None:
    """It takes any Prometheus, and every slot."""
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert {"datasource", "slot"} == variables.keys()
    sources = [target["datasource"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert not [source for source in sources if source != {"type": "prometheus", "uid": "${datasource}"}]
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert not [query for query in queries if 'slot=~"$slot"' not in query]
