"""`dead-letters list` and `drop`: which ones, and in which form, from a checkpoint database of the test's own."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from checkpoint_store import SqlCheckpointStore
from replicator.cli.main import main
from replicator.contracts.events import DeadLetter, Position

REASON = "422 Unprocessable Entity"
HOSTILE = "400 \x1b[2J\r\n2026 forged"


def letter(number: int, sink: str | None = "http", reason: str = REASON, payload: object = None) -> DeadLetter:
    """Of user 42 if its number is even."""
    user = 42 if number % 2 == 0 else 421
    values = {"event_id": number, "user_id": user, "device": None}
    row = {"columns": [{"name": name, "value": value} for name, value in values.items()]}
    body = json.dumps(payload or (row if sink is None else values)).encode()
    return DeadLetter(sink=sink, position=Position(number, 1), event_id=number, reason=reason, payload=body)


@pytest.fixture(autouse=True)
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqlCheckpointStore]:
    """Six letters: of two sinks, of a row, and one that holds what nobody expects."""
    url = f"sqlite:///{tmp_path}/checkpoint.db"
    monkeypatch.setenv("REPLICATOR_CHECKPOINT_URL", url)
    monkeypatch.chdir(tmp_path)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with closing(SqlCheckpointStore(url)) as store:
        store.create()
        letters = [letter(1), letter(2), letter(3, "redis", HOSTILE), letter(4, None, "no type"), letter(5), letter(6)]
        store.add_dead_letters("engagement_slot", letters)
        yield store
    for number, handler in signals.items():
        signal.signal(number, handler)


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The JSON form."""
    assert 0 == main(["dead-letters", "list", "--json", *arguments])
    found: dict[str, list[dict[str, Any]]] = json.loads(capsys.readouterr().out)
    [letters] = found.values()
    return letters


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        ([], [1, 2, 3, 4, 5, 6]),
        (["--where", "user_id=42"], [2, 4, 6]),
        (["--where", "user_id=42", "--sink", "http"], [2, 6]),
        (["--where", "user_id=42", "--where", "event_id=4"], [4]),
        (["--where", "user_id=4"], []),
        (["--limit", "2"], [1, 2]),
        (["--last", "1h"], [1, 2, 3, 4, 5, 6]),
        (["--stage", "row"], [4]),
    ],
)
def test_which_are_shown(arguments: list[str], ids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """By sink, stage, field, time; values are compared whole."""
    assert ids == [shown["id"] for shown in listed(capsys, *arguments)]


def test_a_summary_counts_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """The most frequent first, on one line each whatever a reason holds."""
    summary = listed(capsys, "--summary")
    assert [(4, "http", REASON), (1, "redis", HOSTILE), (1, None, "no type")] == [
        (line["count"], line["sink"], line["reason"]) for line in summary
    ]
    assert 0 == main(["dead-letters", "list", "--summary"])
    lines = capsys.readouterr().out.splitlines()
    assert 3 == len(lines)
    assert lines[1].endswith("400 \\x1b[2J\\r\\n2026 forged")


def test_no_letter_writes_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is two lines."""
    assert 0 == main(["dead-letters", "list"])
    out = capsys.readouterr().out
    assert 12 == len(out.splitlines())
    assert out.replace("\n", "").isprintable()


def test_one_persons_letters_are_dropped(stored: SqlCheckpointStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every stage; one that can't be searched is named, so that nobody takes it for done."""
    stored.add_dead_letters("engagement_slot", [letter(8, payload=["no event"])])
    assert 0 == main(["dead-letters", "drop", "--where", "user_id=42", "--yes"])
    out, err = capsys.readouterr()
    assert "dropped 3 dead letters\n" == out
    assert "dead letter 7 can't be searched: look at it with --id 7" in err
    assert [1, 3, 5, 7] == [left.id for left in stored.dead_letters("engagement_slot")]


def test_a_condition_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    """Never taken for all of them."""
    assert 2 == main(["dead-letters", "drop", "--where", "user_id", "--yes"])
    assert "--where is unusable: 'user_id' has no =" in capsys.readouterr().err


def test_a_span_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """What it takes is a sentence."""
    assert 2 == main(["dead-letters", "list", "--last", "abc"])
    words = "'abc' is not a span of time. It takes the time in which they were refused, until now, such as 30m or 1d."
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["drop", "--yes"]])
def test_a_field_that_there_is_not(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It would look as if nobody's letters were there."""
    assert 2 == main(["dead-letters", *command, "--where", "user=42"])
    out, err = capsys.readouterr()
    assert not out
    assert "--where is unusable: no dead letter has a field 'user'. It takes one of event_id, content_id, " in err
    assert "perhaps you mean user_id" in err


def test_none_matches(stored: SqlCheckpointStore, capsys: pytest.CaptureFixture[str]) -> None:
    """That is not the same as none."""
    assert 0 == main(["dead-letters", "list", "--where", "user_id=4"])
    assert "none of 6 dead letters matches\n" == capsys.readouterr().err
    stored.drop_dead_letters("engagement_slot", range(1, 7))
    assert 0 == main(["dead-letters", "list", "--where", "user_id=4"])
    assert "no dead letters\n" == capsys.readouterr().err


def test_a_row_is_found_by_the_events_names(
    stored: SqlCheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its columns may have other names: of the one that `event_id` is made of, or those in REPLICATOR_COLUMNS."""
    monkeypatch.setenv("REPLICATOR_COLUMNS", "user_id=uid")
    row = {"columns": [{"name": "id", "value": 9}, {"name": "uid", "value": 7}]}
    stored.add_dead_letters("engagement_slot", [letter(9, None, payload=row)])
    for condition in ("user_id=7", "uid=7", "event_id=9", "id=9"):
        assert [7] == [shown["id"] for shown in listed(capsys, "--where", condition)]


def test_letters_of_several_streams(
    stored: SqlCheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are listed with the settings of `run`; a sink is called after its stream, too."""
    Path("orders.py").write_text(
        "from replicator import *\n"
        "ORDERS = Stream('orders', 'shop.orders', (Field('id', BIGINT, role=Role.IDENTITY),"
        " Field('k', BIGINT, role=Role.KEY), Field('at', TIMESTAMPTZ, role=Role.TIME)))\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("REPLICATOR_STREAM", "orders:ORDERS,enrichment.contract:EVENT")
    stored.add_dead_letters("engagement_slot", [letter(7, "redis/orders")])
    assert [1, 2, 3, 4, 5, 6, 7] == [one["id"] for one in listed(capsys)]
    assert [7] == [one["id"] for one in listed(capsys, "--sink", "redis/orders")]
    assert [3] == [one["id"] for one in listed(capsys, "--sink", "redis")], "its former name"
    assert 2 == main(["dead-letters", "list", "--sink", "clickhouse"])
    assert "'clickhouse' is not the name of a sink. It takes one of clickhouse/orders" in capsys.readouterr().err
