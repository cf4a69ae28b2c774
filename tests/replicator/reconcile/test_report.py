"""What the report says, and its JSON form, field by field: programs rely on it."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from replicator.reconcile.report import ReconcileReport, SinkReport, Tally, WrongCount


def test_a_tally_names_the_first_and_counts_all() -> None:
    """Twenty are named."""
    tally = Tally()
    assert "0" == str(tally)
    tally.add([3, 4])
    assert "2: 3, 4" == str(tally)
    tally.add(range(100, 120))
    assert str(tally).startswith("22: 3, 4, 100, ")
    assert str(tally).endswith(", 117 and 2 more")


def test_a_count_says_what_it_should_be() -> None:
    """A number, or from what to what while events come."""
    assert "1 has 12 instead of 13" == str(WrongCount(1, 12, 13, 13))
    assert "1 has 12 instead of 13 to 15" == str(WrongCount(1, 12, 13, 15))


def sink_report() -> SinkReport:
    """With one of every kind of thing."""
    report = SinkReport("example", 10, 9)
    report.add("missing", [7])
    report.add("extra")
    report.add("counts_too_high", [WrongCount(1, 5, 3, 4)])
    report.left.add([7])
    report.hints.append("do something")
    return report


def test_lines() -> None:
    """A repair that changed nothing has left everything; one that did says what is left."""
    report = sink_report()
    lines = [
        "10 events in PostgreSQL, 9 in example",
        "missing 1: 7",
        "extra 0",
        "counts too high 1: 1 has 5 instead of 3 to 4",
        "do something",
    ]
    assert lines == list(report.lines())
    assert 1 == report.differences
    assert 2 == msgspec.structs.replace(report, deletes=True).differences
    report.left = Tally()
    assert "left after the repair 0" in list(report.lines())
    assert ["10 events in PostgreSQL, 11 in example (more were added meanwhile)"] == list(
        SinkReport("example", 10, 11).lines()
    )


@pytest.mark.parametrize(("outcome", "code"), [("equal", 0), ("repaired", 0), ("different", 3)])
def test_exit_code(outcome: str, code: int) -> None:
    """3: different."""
    report = msgspec.convert(
        {"outcome": outcome, "start": "2026-01-08T09:00:00Z", "end": "2026-01-08T10:00:00Z", "seconds": 1.0,
         "doubt": "", "sinks": []},
        ReconcileReport,
    )  # fmt: skip
    assert code == report.exit_code


def test_json_form() -> None:
    """Exactly this."""
    start, end = datetime(2026, 1, 8, 9, tzinfo=UTC), datetime(2026, 1, 8, 10, 0, 0, 5, tzinfo=UTC)
    counter = SinkReport("counter", found={"not_counted": Tally(), "counts_too_low": Tally()})
    report = ReconcileReport(
        outcome="different",
        start=start,
        end=end,
        seconds=1.5,
        doubt="no replicator runs",
        sinks=[sink_report(), counter],
    )
    assert {
        "outcome": "different",
        "start": "2026-01-08T09:00:00Z",
        "end": "2026-01-08T10:00:00.000005Z",
        "seconds": 1.5,
        "doubt": "no replicator runs",
        "sinks": [
            {
                "sink": "example",
                "source_events": 10,
                "sink_events": 9,
                "found": {
                    "missing": {"count": 1, "first": [7]},
                    "extra": {"count": 0, "first": []},
                    "counts_too_high": {"count": 1, "first": [{"key": 1, "found": 5, "least": 3, "most": 4}]},
                },
                "left": {"count": 1, "first": [7]},
                "hints": ["do something"],
                "deletes": False,
            },
            {
                "sink": "counter",
                "source_events": None,
                "sink_events": None,
                "found": {"not_counted": {"count": 0, "first": []}, "counts_too_low": {"count": 0, "first": []}},
                "left": {"count": 0, "first": []},
                "hints": [],
                "deletes": False,
            },
        ],
    } == msgspec.json.decode(msgspec.json.encode(report))
