"""A stream that ends again and again at the same place is told from one that goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from psycopg import pq

from replicator.contracts.errors import SlotUndecodable, SourceUnavailable, StreamStuck
from replicator.contracts.events import Mark, Position
from replicator.source.breaks import Breaks, end_of_stream

LOST = SourceUnavailable(detail="lost")


def _ended(**fields: str) -> SourceUnavailable:
    said = {name.upper(): value.encode("latin-1", errors="replace") for name, value in fields.items()}
    result: Any = SimpleNamespace(error_field=lambda field: said.get(pq.DiagnosticField(field).name))
    return end_of_stream(result, "s", "0/64")


def test_no_progress_is_told_from_the_third_time_on() -> None:
    """What a new stream repeats is no progress; the smallest step further is."""
    breaks = Breaks()
    for mark in (Mark(Position(200, 5), 100), Mark(Position(200, 3), 100), Mark(Position(200, 5), 90)):
        assert not breaks.stuck
        breaks.moved(mark)
        error = breaks.broke(LOST)
    assert isinstance(error, StreamStuck)
    assert str(error).startswith("No progress for 0 s: the stream has ended 3 times at 0/C8, the last time with:")
    assert breaks.stuck == str(error)
    breaks.moved(Mark(Position(200, 6), 100))
    assert not breaks.stuck
    assert LOST is breaks.broke(LOST)


def test_what_can_not_be_decoded_is_told_the_second_time() -> None:
    """PostgreSQL itself says that it is the place."""
    undecodable = SlotUndecodable(slot="s", lsn="0/64", detail="out of memory")
    breaks = Breaks()
    assert undecodable is breaks.broke(undecodable)
    assert "can't decode slot s at LSN 0/64: out of memory" in str(breaks.broke(undecodable))
    assert breaks.stuck


def test_an_error_keeps_all_that_postgresql_says() -> None:
    """SQLSTATE, detail and the LSN of its context, in whatever language; the cure is the way past it."""
    error = _ended(
        severity_nonlocalized="ERROR",
        sqlstate="54000",
        message_primary="mémoire épuisée",
        message_detail="Cannot enlarge string buffer",
        context="slot « s », plugin de sortie « wal2json », callback change, LSN associé 0/1B89F68",
    )
    assert isinstance(error, SlotUndecodable)
    assert "at LSN 0/1B89F68: m" in str(error)
    assert "Cannot enlarge string buffer (SQLSTATE 54000)" in str(error)
    assert " drop-slot" in error.cure
    assert "init --accept-gap" in error.cure


@pytest.mark.parametrize(("severity", "sqlstate"), [("FATAL", "57P01"), ("FATAL", "25P04"), ("ERROR", "57014")])
def test_an_end_that_is_not_about_what_is_decoded(severity: str, sqlstate: str) -> None:
    """A shutdown, a time-out, a query that was cancelled: the stream begins again."""
    error = _ended(severity_nonlocalized=severity, sqlstate=sqlstate, message_primary="terminating connection")
    assert not isinstance(error, SlotUndecodable)
    assert str(error).startswith("PostgreSQL ended the stream: terminating connection")
