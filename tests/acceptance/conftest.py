"""Fixtures of the acceptance tests: the real program on a clean stack, logged in as a plain role; see `program.py`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.codes import UNCODED
from tests.support.program import Program


@pytest.fixture
def program(environment: dict[str, str], database: str, tmp_path: Path) -> Iterator[Program]:
    """A replicator, not started; its log is shown on failure."""
    program = Program(environment, database, tmp_path / "replicator.log")
    yield program
    program.end()
    print(program.log)  # noqa: T201  pytest shows it when the test has failed
    assert [] == UNCODED.findall(program.log), "each has a code, by which a person finds it in docs/reference/faults.md"


@pytest.fixture
def chance() -> random.Random:
    """A generator whose seed is shown when the test fails."""
    seed = random.randrange(10**9)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test has failed
    return random.Random(seed)  # noqa: S311


@pytest.fixture
def quick(program: Program) -> Program:
    """The program, with pauses that fit a test: real ones differ only in how long they are."""
    program.environment |= {
        "REPLICATOR_RETRY_MAX_SECONDS": "0.5",
        "REPLICATOR_HTTP_BATCH_SIZE": "500",
        "REPLICATOR_HTTP_TIMEOUT_SECONDS": "2",
        "REPLICATOR_CLICKHOUSE_LINGER_SECONDS": "0.2",
        "REPLICATOR_FEEDBACK_INTERVAL_SECONDS": "0.2",
    }
    return program
