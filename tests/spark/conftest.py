"""Fixtures of the tests on Spark: the real program, its writes carried out by a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.spark import SparkProgram


@pytest.fixture
def spark(environment: dict[str, str], database: str, tmp_path: Path) -> Iterator[SparkProgram]:
    """The replicator on three cores of this machine, unless its options name a cluster; its log is shown on failure."""
    program = SparkProgram(environment, database, tmp_path / "replicator.log")
    yield program
    program.end()
    print(program.log)  # noqa: T201  pytest shows it when the test has failed
