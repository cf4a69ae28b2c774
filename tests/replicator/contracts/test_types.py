"""The text that a declaration's function gives is one that PostgreSQL would write, or the row is a dead letter."""

from __future__ import annotations

import pytest

from replicator import BYTEA, DATE, TEXT, TIMESTAMP, TIMESTAMPTZ, UUID, Type

RIGHT = [
    (DATE, "2026-01-08"),
    (DATE, "2024-02-29"),
    (DATE, "10000-02-29"),
    (DATE, "0001-02-29 BC"),
    (DATE, "infinity"),
    (TIMESTAMPTZ, "2026-01-08 14:21:52.5+00"),
    (TIMESTAMPTZ, "-infinity"),
    (TIMESTAMP, "2026-01-08 00:00:00"),
    (TIMESTAMP, "0044-03-15 23:59:59.123456 BC"),
    (UUID, "0190aa26-9a3b-7c1e-8f00-1234567890ab"),
    (BYTEA, ""),
    (BYTEA, "00ff"),
    (TEXT, "anything"),
]
WRONG = [
    (DATE, ""),
    (DATE, "2026-02-30"),
    (DATE, "2025-02-29"),
    (DATE, "0000-01-01"),
    (DATE, "08.01.2026"),
    (DATE, "2026-01-08\n"),
    (DATE, "2026-01-08 00:00:00"),
    (TIMESTAMPTZ, "2026-01-08T14:21:52Z"),
    (TIMESTAMPTZ, "2026-01-08 14:21:52"),
    (TIMESTAMPTZ, "2026-01-08 14:21:52+02"),
    (TIMESTAMPTZ, "2026-01-08 24:21:52+00"),
    (TIMESTAMP, "2026-01-08 14:21:52.1234567"),
    (UUID, "0190AA26-9A3B-7C1E-8F00-1234567890AB"),
    (UUID, "0190aa269a3b7c1e8f001234567890ab"),
    (BYTEA, "\\x00"),
    (BYTEA, "0"),
    (TEXT, 7),
]


@pytest.mark.parametrize(("kind", "text"), RIGHT)
def test_texts_that_are_right(kind: Type, text: object) -> None:
    """As PostgreSQL writes them, also where NULL is one."""
    assert kind.made(text)
    assert kind.nullable().made(text)


@pytest.mark.parametrize(("kind", "text"), WRONG)
def test_texts_that_are_wrong(kind: Type, text: object) -> None:
    """A destination would refuse them, or each would take them for something else."""
    assert not kind.made(text)
    assert not kind.nullable().made(text)
    assert kind.nullable().made(None)
    assert not kind.made(None)
