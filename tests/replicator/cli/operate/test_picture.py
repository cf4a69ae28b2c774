"""What `top` draws fits into 80 columns, says what is wrong first, and shows nothing that moves the cursor."""

from __future__ import annotations

import io

import pytest
from msgspec import structs
from rich.console import Console

from replicator.cli.operate.picture import POINTS, line, picture
from replicator.operations.status.collect import History, Hour
from replicator.operations.status.form import (
    CheckpointStatus,
    DeadLetterStatus,
    SinkStatus,
    SlotStatus,
    Status,
    WalStatus,
)

STATUS = Status(
    reasons=[],
    replicator=None,
    slot=SlotStatus(name="engagement_slot", active_pid=7, confirmed_lsn="0/10", lag_bytes=12_345),
    wal=WalStatus(kept_bytes=48_000_000, limit_bytes=1_000_000_000, lost_in_seconds=7_200.0),
    checkpoint=CheckpointStatus(end_lsn="0/20", lag_bytes=0),
    sinks={
        "clickhouse": SinkStatus(events=1_000, lag_seconds=0.82, lag_bytes=12_345, waiting=810),
        "http": SinkStatus(events=1_234_567_890, lag_seconds=360_000.0, lag_bytes=9 * 10**12, waiting=120_000),
    },
    dead_letters=DeadLetterStatus(rows=2, sinks={"http": 100_000}, limit=100_000),
)


def shown(status: Status, silent: str = "", **sinks: Hour) -> str:
    """On a terminal of 80 columns, without its colours."""
    out = io.StringIO()
    Console(file=out, width=80, color_system=None, force_terminal=True).print(
        picture(status, History(sinks), silent=silent)
    )
    assert not [line for line in out.getvalue().splitlines() if len(line) > 80]
    return out.getvalue()


def test_all_is_well() -> None:
    """One word, then a row a sink with its rate of the moment."""
    text = shown(STATUS, clickhouse=Hour(events_per_second_now=1_000.4, events_per_second=[1.0, 2.0]))
    assert text.startswith("engagement_slot  ready\n")
    clickhouse = next(line for line in text.splitlines() if line.startswith("clickhouse"))
    assert ["clickhouse", "1,000", "0.8", "s"] == clickhouse.split()[:4]
    assert clickhouse.rstrip().endswith("▅█")
    assert "48.0 MB of 1.0 GB, lost in 2 hours, growing by " in text
    assert "100,002: `" in text


def test_what_is_wrong_comes_first() -> None:
    """As long as it may be, and whatever a server has put into it."""
    wrong = structs.replace(STATUS, reasons=["sink http did not take the batch: \x1b[2J" + "long words " * 20])
    text = shown(wrong, silent="no answer at http://x")
    assert text.startswith(
        "no answer at http://x\nengagement_slot  NOT READY\n  sink http did not take the batch: \\x1b[2J"
    )


@pytest.mark.parametrize(
    ("wal", "words"),
    [
        (WalStatus(kept_bytes=5, limit_bytes=9), "5 bytes of 9 bytes\n"),
        (WalStatus(kept_bytes=5), "5 bytes, no limit (max_slot_wal_keep_size)\n"),
        (WalStatus(kept_bytes=12, limit_bytes=9, lost_in_seconds=0.0), "12 bytes of 9 bytes, no longer safe\n"),
        (WalStatus(lost_in_seconds=0.0), "an unknown amount, no longer safe\n"),
    ],
)
def test_how_long_the_wal_goes_well(wal: WalStatus, words: str) -> None:
    """Of a slot that is lost PostgreSQL says no limit: that is not what having none looks like."""
    assert f"\nWAL kept     {words}" in shown(structs.replace(STATUS, wal=wal))


def test_a_pause_and_a_trouble_that_begins_are_below() -> None:
    """They are no reason not to be ready."""
    sinks = {
        "http": SinkStatus(paused="sink http is paused until 04:00", paused_until="2026-01-08T04:00:00Z"),
        "redis": SinkStatus(trouble="it is away", trouble_seconds=4.0),
    }
    text = shown(structs.replace(STATUS, sinks=sinks))
    assert "\nsink http is paused until 04:00\n" in text
    assert "\nredis (4 s): it is away\n" in text


def test_nothing_is_known() -> None:
    """No number is made up."""
    nothing = structs.replace(
        STATUS,
        slot=SlotStatus(name="s"),
        wal=WalStatus(),
        checkpoint=CheckpointStatus(),
        sinks={"http": SinkStatus()},
        dead_letters=None,
    )
    text = shown(nothing)
    assert "nobody reads it, confirmed nothing, an unknown amount behind" in text
    assert "none yet" in text


def test_the_line_of_a_sink() -> None:
    """The newest values, the largest as a full bar; blank where nothing is known."""
    assert " " * POINTS == line([])
    assert line([None, 0.0, 5.0, 10.0]).endswith("  ▁▅█")
    assert "▁" * POINTS == line([0.0] * 400)
    assert POINTS == len(line([float(number) for number in range(400)]))
