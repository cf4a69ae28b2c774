"""Is the stream continuous with the checkpoint? Every way in which it is not has an error with its cure."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from msgspec import structs

from replicator.contracts.errors import SlotInvalid, SlotLost, SlotMissing, SourceError, StreamGap
from replicator.contracts.events import Position, SinkPosition
from replicator.source import slot as slots
from tests.support.fakes import AT_200, CHECKPOINT, HERE, STATE


def test_a_slot_behind_its_checkpoint_is_continuous() -> None:
    """PostgreSQL writes a slot's position lazily: after its crash it may have gone back."""
    slots.verify("s", STATE, HERE, CHECKPOINT)


async def test_standbys_that_are_away(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the stream has to wait for; a server before 17 gets the setting from the test."""
    name = database.rpartition("/")[2]
    for old, new in (
        ("current_setting('synchronized_standby_slots', true)", "' standby1,gone'"),
        ("to_jsonb(s) ->> 'failover' = 'true'", "true"),
    ):
        assert old in slots._INSPECT  # noqa: SLF001
        monkeypatch.setattr(slots, "_INSPECT", slots._INSPECT.replace(old, new))  # noqa: SLF001
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [name])
        found = await slots.look(database, name, "test")
        assert found
        assert "standby1, gone" == found.away


def test_a_new_slot_needs_no_checkpoint() -> None:
    """It begins where it was made."""
    slots.verify("s", STATE, HERE, None)
    slots.verify("s", None, HERE, None)


@pytest.mark.parametrize(
    ("state", "identity", "error", "told"),
    [
        (None, {}, SlotMissing, "init --accept-gap"),
        ({"wal_status": "lost"}, {}, SlotLost, "max_slot_wal_keep_size"),
        ({"wal_status": "lost", "invalidation_reason": "wal_removed"}, {}, SlotLost, "max_slot_wal_keep_size"),
        ({"wal_status": "lost", "invalidation_reason": "idle_timeout"}, {}, SlotLost, "idle_replication_slot_timeout"),
        ({"wal_status": "lost", "invalidation_reason": "rows_removed"}, {}, SlotLost, "hot_standby_feedback"),
        ({"wal_status": "lost", "invalidation_reason": "wal_level_insufficient"}, {}, SlotLost, "wal_level = logical"),
        ({"restart_lsn": None}, {}, SlotLost, "backfill"),
        ({"plugin": "pgoutput"}, {}, SlotInvalid, "pgoutput"),
        ({"database": "other"}, {}, SlotInvalid, "database other"),
        ({"plugin": None, "database": None}, {}, SlotInvalid, "a physical slot"),
        ({"two_phase": True}, {}, SlotInvalid, "two_phase"),
        ({"confirmed_lsn": 201}, {}, StreamGap, "0/C9"),
        ({"server_lsn": 199}, {}, StreamGap, "older backup"),
        ({}, {"system_identifier": "8"}, StreamGap, "system 8"),
        ({}, {"timeline": 2}, StreamGap, "timeline 2, which does not continue the checkpoint's, 1"),
        ({}, {"timeline": 3, "branches": {2: 200}}, StreamGap, "timeline 3, which does not continue"),
        ({}, {"timeline": 2, "branches": {1: 199}}, StreamGap, "left the checkpoint's, 1, at 0/C7, before the 0/C8"),
        ({}, {"timeline": 2, "branches": {1: 190}}, StreamGap, "at 0/BE, before the 0/C8"),
        ({"confirmed_lsn": 201}, {"timeline": 2, "branches": {1: 200}}, StreamGap, "confirmed up to 0/C9"),
        (None, {"timeline": 2, "branches": {1: 200}}, SlotMissing, "does not exist"),
    ],
)
def test_a_gap_is_an_error_that_names_it(
    state: dict[str, Any] | None, identity: dict[str, Any], error: type[SourceError], told: str
) -> None:
    """What may be missing, and what to do."""
    changed = None if state is None else structs.replace(STATE, **state)
    with pytest.raises(error, match=told):
        slots.verify("s", changed, structs.replace(HERE, **identity), CHECKPOINT)


@pytest.mark.parametrize(
    ("timeline", "branches"),
    [(2, {1: 200}), (2, {1: 201}), (3, {1: 200, 2: 300})],
    ids=["at its end", "behind it", "two failovers"],
)
def test_a_promoted_standby_that_has_all_that_was_read_is_continuous(timeline: int, branches: dict[int, int]) -> None:
    """It left the old timeline at the checkpoint or later: both have the same history up to there."""
    slots.verify("s", STATE, structs.replace(HERE, timeline=timeline, branches=branches), CHECKPOINT)


@pytest.mark.parametrize(
    "redis",
    [
        SinkPosition(position=Position(250, 1), end_lsn=200),
        SinkPosition(position=Position(230, 1), end_lsn=200),
        SinkPosition(position=Position(190, 3), end_lsn=260),
    ],
    ids=["inside a transaction", "at the branch", "past it"],
)
def test_a_fast_sink_may_have_what_a_failover_lost(redis: SinkPosition) -> None:
    """The slowest one is before the branch; the fast one would take what is new there for what it has."""
    checkpoint = structs.replace(CHECKPOINT, sinks={"http": AT_200, "redis": redis})
    slots.verify("s", STATE, structs.replace(HERE, timeline=2, branches={1: 300}), checkpoint)
    with pytest.raises(StreamGap, match="left the checkpoint's, 1, at 0/E6, before the"):
        slots.verify("s", STATE, structs.replace(HERE, timeline=2, branches={1: 230}), checkpoint)


def test_a_checkpoint_that_moved_while_we_looked_is_no_gap() -> None:
    """Whoever reads the slot goes on between the look at the server and that at the checkpoint: `check`, a standby."""
    slots.verify("s", structs.replace(STATE, active_pid=1, server_lsn=199), HERE, CHECKPOINT)


@pytest.mark.parametrize(
    ("others", "names", "expected"),
    [
        ({"redis": AT_200}, {"redis", "http"}, ["http"]),
        ({"redis": AT_200}, {"redis"}, []),
        ({"redis": SinkPosition(position=Position(95, 1), end_lsn=200)}, {"redis", "http"}, []),
        ({"redis": SinkPosition(position=Position(100, 1), end_lsn=200)}, {"redis", "http"}, ["http"]),
        # The row that went by is in the position of a sink that is not configured any more, or not yet past it.
        ({"redis": SinkPosition(position=Position(0, 0), end_lsn=200), "old": AT_200}, {"redis", "http"}, ["http"]),
        ({"old": structs.replace(AT_200, end_lsn=150)}, {"redis", "http"}, ["http"]),
    ],
    ids=[
        "rows went by",
        "not configured",
        "none went by",
        "the first row after",
        "an old sink saw it",
        "a lagging one",
    ],
)
def test_a_sink_that_was_left_out(others: dict[str, SinkPosition], names: set[str], expected: list[str]) -> None:
    """It lacks what went by while it was not in REPLICATOR_SINKS: the stream can't give it that."""
    behind = SinkPosition(position=Position(90, 1), end_lsn=100)
    checkpoint = structs.replace(CHECKPOINT, sinks={"http": behind, **others})
    assert expected == slots.left_out(checkpoint, names)


def test_lag_counts_from_the_confirmed_position() -> None:
    """Retained WAL counts whole files from the restart position on, which is older."""
    file = 16 * 1024**2
    assert (STATE.lag_bytes, STATE.retained_bytes) == (900, file)
    assert 3 * file == structs.replace(STATE, restart_lsn=file - 1, server_lsn=2 * file).retained_bytes
    assert 0 == structs.replace(STATE, restart_lsn=None).retained_bytes
