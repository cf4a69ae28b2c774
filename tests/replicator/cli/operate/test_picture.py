"""What `top` draws fits into 80 columns, says what is wrong first, and shows nothing that moves the cursor."""

from __future__ import annotations

import io

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
from replicator.operations.status.text import as_text

STATUS = Status(
    reasons=[],
    replicator=None,
    slot=SlotStatus(
        name="engagement_slot",
        server_version="17.2",
        active_pid=7,
        wal_status="reserved",
        confirmed_lsn="0/10",
        server_lsn="0/3049",
        lag_bytes=12_345,
        retained_bytes=48_000_000,
        safe_wal_bytes=952_000_000,
    ),
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
    assert set(as_text(STATUS).splitlines()).issuperset(text.splitlines()[-6:-2])
    assert "WAL kept   48.0 MB, safe for 952.0 MB more\n  forecast   lost in 2 hours, growing by " in text
    assert "100,002: `" in text


def test_what_is_wrong_comes_first() -> None:
    """As long as it may be, and whatever a server has put into it."""
    wrong = structs.replace(STATUS, reasons=["sink http did not take the batch: \x1b[2J" + "long words " * 20])
    text = shown(wrong, silent="no answer at http://x")
    assert text.startswith(
        "no answer at http://x\nengagement_slot  NOT READY\n  sink http did not take the batch: \\x1b[2J"
    )


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
    assert "slot         s: unknown\ncheckpoint   none yet\n" in text


def test_the_line_of_a_sink() -> None:
    """The newest values, the largest as a full bar; blank where nothing is known."""
    assert " " * POINTS == line([])
    assert line([None, 0.0, 5.0, 10.0]).endswith("  ▁▅█")
    assert "▁" * POINTS == line([0.0] * 400)
    assert POINTS == len(line([float(number) for number in range(400)]))
