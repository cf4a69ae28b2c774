"""The demo as a stranger runs it: it ends by itself, and its summary is what its exit code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_ends_by_itself_and_the_sinks_agree() -> None:
    """Exit code 0, and the same number of events in PostgreSQL and in every sink, not none."""
    command = [sys.executable, "-W", "error", "-m", "devstack.demo", "--seconds", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (0, "") == (done.returncode, done.stderr), done.stdout
    counts = dict(re.findall(r"^│ (PostgreSQL|ClickHouse|Redis|API) +│ +(\d+) │", done.stdout, re.MULTILINE))
    assert {"PostgreSQL", "ClickHouse", "Redis", "API"} == counts.keys(), done.stdout
    assert {counts["PostgreSQL"]} == set(counts.values())
    assert int(counts["PostgreSQL"]) > 0
