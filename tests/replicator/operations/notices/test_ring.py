"""The ring of notices: a trouble is one notice from its beginning to its end, and no flood of them grows."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from msgspec import structs

from replicator.operations.notices import ring
from replicator.operations.notices.ring import KEPT, Notices, Reason

AWAY = Reason("sink", "http", "sink http did not take the batch: it is away. Start it.", "Start it.")


@pytest.fixture
def notices() -> Iterator[Notices]:
    """They hear the log."""
    notices = Notices()
    logging.getLogger().addHandler(notices.handler)
    yield notices
    logging.getLogger().removeHandler(notices.handler)


def test_a_trouble_is_one_notice(notices: Notices) -> None:
    """However often it is said, in whatever words; it ends when it is said no more."""
    notices.see([AWAY])
    notices.see([AWAY._replace(text="sink http has not answered for 12 s", cure="")])
    [notice] = notices.ring
    assert ("sink", "http", "sink http has not answered for 12 s", "") == structs.astuple(notice)[:4]


def test_what_has_become_worse_is_not_over(notices: Notices) -> None:
    """That WAL runs out is no longer said once the slot is in danger, and nobody is to read that it is over."""
    runs_out = Reason("wal runs out", "s", "PostgreSQL keeps 90 MB of WAL for the slot, and at most 100 MB.")
    lost = Reason("wal", "s", "the slot's WAL is lost.")
    for reasons, over in (([runs_out], False), ([lost], False), ([], True)):
        notices.see(reasons)
        assert over == bool(notices.ring[0].ended_at)


def test_problem_and_cure_are_told_apart(notices: Notices) -> None:
    """Each has its place on the page."""
    notices.see([AWAY])
    [notice] = notices.ring
    assert ("sink http did not take the batch: it is away.", "Start it.") == (notice.text, notice.cure)
    assert notice.ended_at is None
    notices.see([])
    assert notice.ended_at is not None
    notices.see([AWAY])
    assert [notice.ended_at is None for notice in notices.ring] == [False, True]


def test_the_ring_has_a_bound(notices: Notices) -> None:
    """The newest stay, and what lasts can still end."""
    notices.see([AWAY])
    for number in range(KEPT):
        notices.note("warning", "replicator", f"table_{number} is gone")
    assert [f"table_{number} is gone" for number in range(KEPT)] == [notice.text for notice in notices.ring]
    notices.see([])
    assert not notices.lasting


def test_a_warning_that_counts_is_one_notice(notices: Notices, monkeypatch: pytest.MonkeyPatch) -> None:
    """All night, beside another one: what began the night is still there. Later it is a new one."""
    now = [1_000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    notices.see([AWAY])
    for number in range(2 * KEPT):
        now[0] += 30
        notices.note("warning", "replicator", f"reading has stopped: {64_000_000 + number} bytes wait")
        notices.note("warning", "replicator", f"some {number} events are too large")
    texts = [AWAY.problem, "reading has stopped: 64000099 bytes wait", "some 99 events are too large"]
    assert texts == [notice.text for notice in notices.ring]
    assert (1_030.0, 4_000.0) == (notices.ring[1].began_at, notices.ring[1].ended_at)
    now[0] += ring.SAME_SECONDS
    notices.note("warning", "replicator", "reading has stopped: 64000099 bytes wait")
    assert 4 == len(notices.ring)


def test_warnings_of_the_log_are_notices(notices: Notices) -> None:
    """What just happened has no other place; what is told otherwise is not told twice."""
    logging.getLogger("enrichment.streams.enricher").warning("%s was truncated", "public.engagement_events")
    logging.getLogger("enrichment.streams.enricher").warning("%s was truncated", "public.engagement_events")
    logging.getLogger("sinks.redis.sink").error("it was emptied\nTraceback", extra={"sink": "redis"})
    logging.getLogger("replicator.delivery.retry").error("sink http is away")
    logging.getLogger("replicator.delivery.dead_letters").error("dead letter")
    logging.getLogger("replicator.pipeline").info("reading")
    logging.getLogger("urllib3").warning("somebody else's")
    assert [("enrichment", "public.engagement_events was truncated"), ("redis", "it was emptied")] == [
        (notice.subject, notice.text) for notice in notices.ring
    ]
    assert all(notice.ended_at for notice in notices.ring)


def test_a_line_that_can_not_be_made_ends_nothing(
    notices: Notices, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever logs, the stream perhaps, goes on."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    record = logging.LogRecord("sinks.redis.sink", logging.WARNING, __file__, 1, "%d rows", ("many",), None)
    notices.handler.handle(record)
    assert not notices.ring
    assert "Logging error" in capsys.readouterr().err
