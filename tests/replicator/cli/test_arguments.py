"""Arguments without servers: times, spans, names, and the one shape of what is said about a wrong one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from replicator.cli.arguments import USUAL_SINKS, duration, event_id, letter_id, moment, sinks_of, time_range
from replicator.cli.backfill import progress
from replicator.cli.main import main
from replicator.contracts.errors import SettingsError
from replicator.contracts.fields import BIGINT, TEXT, UUID
from replicator.delivery.backfill import BackfillProgress

NINE = datetime(2026, 1, 8, 9, tzinfo=UTC)
BACKFILL = ["backfill", "--start", "2026-01-08T09:00:00", "--end", "2026-01-08T10:00:00"]


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-08T09:00:00",
        "2026-01-08T09:00:00Z",
        "2026-01-08T10:00:00+01:00",
        "2026-01-08 09:00",
        "20260108T090000Z",
        "2026-01-08T09:00:00.000000",
    ],
)
def test_times_are_iso_8601_and_without_a_zone_utc(text: str) -> None:
    """Every form of the same moment."""
    assert NINE == moment(text)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86_400)])
def test_the_last_span_ends_now(text: str, seconds: int) -> None:
    """`--last 2h` is the two hours before the end of this second: an event of this very moment belongs to it."""
    before = datetime.now(UTC)
    when = time_range(None, None, duration(text))
    assert timedelta(seconds=seconds) == when.end - when.start
    assert before < when.end <= datetime.now(UTC) + timedelta(seconds=1)
    assert when.end.microsecond == 0


@pytest.mark.parametrize(
    ("configured", "chosen"),
    [("clickhouse,redis,http", ["clickhouse", "redis"]), ("http,redis", ["redis"]), ("clickhouse", ["clickhouse"])],
)
def test_the_usual_sinks_are_those_that_the_replicator_has(
    configured: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was left out has its default address, where somebody else's may be."""
    monkeypatch.setenv("REPLICATOR_SINKS", configured)
    assert chosen == sinks_of(None, USUAL_SINKS)


@pytest.mark.parametrize(("command", "choice"), [("backfill", "http"), ("reconcile", "clickhouse, redis")])
def test_without_a_usual_sink_one_has_to_be_named(
    command: str, choice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An API gets a backfill only if it is named."""
    monkeypatch.setenv("REPLICATOR_SINKS", "http")
    assert 2 == main([command, "--last", "1h"])
    said = capsys.readouterr().err
    assert "--sinks is unusable: it is missing, and REPLICATOR_SINKS has neither clickhouse nor redis" in said
    assert f", its default. It takes one or more of {choice}, separated by commas." in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["backfill"], "--start is unusable: it is missing. It takes a time in ISO 8601"),
        (BACKFILL[:3], "--end is unusable: it is missing. It takes a time"),
        (BACKFILL[:2], "--start is unusable: Option '--start' requires an argument. It takes the first moment"),
        ([*BACKFILL[:2], "yesterday", *BACKFILL[3:]], "--start is unusable: 'yesterday' is not a time. It takes"),
        ([*BACKFILL[:2], "2026-13-01", *BACKFILL[3:]], "--start is unusable: '2026-13-01' is not a time"),
        ([*BACKFILL[:2], "0001-01-01T00:00:00+14:00"], "is not a time"),
        ([*BACKFILL[:4], "2026-01-08T09:00:00Z"], "2026-01-08T09:00:00Z is not before --end 2026-01-08T09:00:00Z"),
        ([*BACKFILL[:4], "2026-01-08T09:30:00+01:00"], "is not before --end 2026-01-08T08:30:00Z"),
        ([*BACKFILL, "--last", "2h"], "--last is unusable: --start or --end is given too. It takes either"),
        (["backfill", "--last", "soon"], "--last is unusable: 'soon' is not a span of time. It takes"),
        (["backfill", "--last", "999999d"], "--last is unusable: '999999d' is not a span of time"),
        (["backfill", "--last", "0h"], "--last is unusable: '0h' is not a span of time"),
        ([*BACKFILL, "--sinks", "kafka"], "--sinks is unusable: 'kafka' is not the name of a sink. It takes one or mo"),
        ([*BACKFILL, "--sinks", ""], "--sinks is unusable: '' is not the name of a sink. It takes one or more of"),
        ([*BACKFILL, "--batch-size", "0"], "--batch-size is unusable: '0' is not a whole number from 1 to 1000000."),
        ([*BACKFILL, "--rate", "fast"], "--rate is unusable: 'fast' is not a whole number from 1"),
        ([*BACKFILL, "--res"], "No such option: --res. Did you mean --resume"),
        ([*BACKFILL, "2026"], "Got unexpected extra argument(s) (2026). See replicator backfill --help"),
        (["reconcile", "--last", "1d", "--sinks", "http"], "--sinks is unusable: what sink http has can't be"),
        (["reconcile", "--last", "1d", "--delete-extra"], "--delete-extra is unusable: --repair is missing"),
        (["rebuild-redis", "--resume", "--from-empty"], "--resume is unusable: --from-empty starts over"),
        (["replicate"], "No such command 'replicate'. See replicator --help"),
        (["stauts"], "No such command 'stauts'. Did you mean 'status'? See replicator --help"),
        (["--bogus"], "No such option: --bogus. See replicator --help"),
        (["init", "--acept-gap"], "No such option: --acept-gap. Did you mean --accept-gap? See replicator init --help"),
        (["status", "--json=1"], "Option '--json' does not take a value. See replicator"),
        (["sql"], "NAME is unusable: it is missing. It takes roles, source-schema, slot-lag or clickhouse"),
        (["sql", "slotlag"], "NAME is unusable: 'slotlag' is not one of 'roles', 'source-schema', 'slot-lag', 'cli"),
        (["dead-letters"], "Missing command, one of list, replay, drop. See replicator dead-letters --help"),
        (["dead-letters", "lst"], "No such command 'lst'. Did you mean 'list'? See replicator dead-letters --help"),
        (["dead-letters", "list", "--id", "9" * 30], "is not a whole number from 1 to 9223372036854775807."),
        (["dead-letters", "list", "--id", "x"], "--id is unusable: 'x' is not a whole number"),
        (
            ["dead-letters", "drop", "--yes", "--sink", ""],  # of an empty variable: else it would mean all
            "--sink is unusable: '' is not the name of a sink. It takes one of clickhouse, redis, http",
        ),
        (["dead-letters", "list", "--sink", "redis,http"], "--sink is unusable: 'redis,http' is not the name of a si"),
        (
            ["dead-letters", "list", "--sink", "bogus"],
            "--sink is unusable: 'bogus' is not the name of a sink. It takes",
        ),
        (["dead-letters", "list", "--stage", "x"], "--stage is unusable: 'x' is not one of 'row', 'event'. It takes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the argument and what it takes; nothing was read or written."""
    assert 2 == main(arguments)
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert err.startswith("replicator: ")
    assert message in err


def test_dead_letters_have_large_numbers() -> None:
    """The database never gives a number again."""
    assert 2**40 == letter_id(str(2**40))


def test_an_id_is_of_the_kind_of_the_identity() -> None:
    """A uuid in any form that PostgreSQL takes; a text as it stands."""
    assert "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11" == event_id("{A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11}", UUID)
    assert -7 == event_id("-7", BIGINT)
    assert " {A" == event_id(" {A", TEXT)
    for given, wanted in (("nonsense", UUID), ("", UUID), ("x", BIGINT), (str(2**63), BIGINT)):
        with pytest.raises(SettingsError, match=f"'{given}' is not an event's id"):
            event_id(given, wanted)


def test_progress_says_how_far_it_is() -> None:
    """Speed and the rest of the time are those of this run; what a run before did only counts."""
    first, now = (BackfillProgress(place="", events=events, total=1100) for events in (100, 600))
    assert "backfill: 600 of 1100 events (54 %), 50/s, 10 s left" == progress(first, now, 10)
    assert "backfill: 100 of 1100 events (9 %), 0/s, no progress yet" == progress(first, first, 10)
