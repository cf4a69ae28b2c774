"""`make spark-demo SECONDS=5`: a standalone cluster beside the stream, and the sinks are PostgreSQL's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.program import ROOT, assert_clean
from tests.support.spark import PYTHON

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-spark: make spark-setup"),
]


def test_the_demo() -> None:
    """It ends by itself with exit code 0, after every field of every event was compared."""
    command = [sys.executable, "-W", "error", "-m", "devstack.spark_demo", "--seconds", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert_clean(done.stdout + done.stderr)
    assert "every sink has every event, each field right" in done.stdout
