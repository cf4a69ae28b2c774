"""`status` where something does not answer: what is unknown is called so, what is known is not understated."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec import structs

from replicator.contracts.errors import CheckpointError, CheckpointUnavailable, SourceUnavailable
from replicator.contracts.events import Checkpoint, LetterCounts
from replicator.contracts.settings import CoreSettings
from replicator.operations import status
from replicator.source import slot as slots
from tests.support.fakes import CHECKPOINT, STATE


class FakeStore:
    """A checkpoint database that holds this, or that fails."""

    def __init__(self, checkpoint: Checkpoint | None = None, error: CheckpointError | None = None) -> None:
        self._checkpoint = checkpoint
        self._error = error

    def load(self, _: str) -> Checkpoint | None:
        """The checkpoint."""
        if self._error:
            raise self._error
        return self._checkpoint

    def count_dead_letters(self, _: str) -> LetterCounts:
        """There are none."""
        return LetterCounts()


Collect = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Collect:
    """`status` over a slot and a checkpoint database of the test's; nobody asks a replicator."""

    async def collected(state: slots.SlotState | SourceUnavailable | None, store: FakeStore) -> dict[str, Any]:
        async def look(*_: object) -> slots.SlotState | None:
            if isinstance(state, SourceUnavailable):
                raise state
            return state

        monkeypatch.setattr(slots, "look", look)
        settings = CoreSettings.model_validate({"slot": "s", "admin_listen": ""})
        return await status.collect(settings, ["redis"], store)  # type: ignore[arg-type]  # as much of one as it needs

    return collected


async def test_an_unknown_lag_is_not_none(collect: Collect) -> None:
    """PostgreSQL does not answer: how far a sink is behind is unknown, in bytes and in seconds."""
    found = await collect(SourceUnavailable(detail="down"), FakeStore(CHECKPOINT))
    assert (None, None) == (found["sinks"]["redis"]["lag_bytes"], found["sinks"]["redis"]["lag_seconds"])
    assert '"lag_seconds": null' in status.as_json(found)
    assert "an unknown amount and an unknown time behind" in status.as_text(found)


@pytest.mark.parametrize(("committed_ago", "expected"), [(500, 500), (None, 100)])
async def test_lag_begins_at_the_newest_commit_that_all_have(
    collect: Collect, committed_ago: float | None, expected: float
) -> None:
    """Not when the checkpoint was saved, unless nothing has been committed since the slot was made."""
    now = time.time()
    committed_at = now - committed_ago if committed_ago else 0.0
    checkpoint = structs.replace(CHECKPOINT, committed_at=committed_at, updated_at=now - 100)
    found = await collect(STATE, FakeStore(checkpoint))
    assert expected <= found["sinks"]["redis"]["lag_seconds"] < expected + 50


async def test_a_sink_that_has_everything_has_no_lag(collect: Collect) -> None:
    """However long ago the last commit was."""
    found = await collect(structs.replace(STATE, server_lsn=200), FakeStore(CHECKPOINT))
    assert (0, 0.0) == (found["sinks"]["redis"]["lag_bytes"], found["sinks"]["redis"]["lag_seconds"])


async def test_a_checkpoint_is_saved(collect: Collect) -> None:
    """On an idle database its position moves seldom; the age is that of the last save."""
    found = await collect(STATE, FakeStore(structs.replace(CHECKPOINT, updated_at=time.time() - 100)))
    assert 100 <= found["checkpoint"]["saved_seconds_ago"] < 150
    assert f"0/C8, saved {found['checkpoint']['saved_seconds_ago']} s ago" in status.as_text(found)


@pytest.mark.parametrize(
    ("checkpoint", "cure"),
    [(None, "`python -m replicator init`"), (CHECKPOINT, "`python -m replicator init --accept-gap`")],
)
async def test_the_cure_of_a_missing_slot(collect: Collect, checkpoint: Checkpoint | None, cure: str) -> None:
    """With a checkpoint there is a gap, which plain `init` refuses to make a slot over."""
    found = await collect(None, FakeStore(checkpoint))
    assert "does not exist" in found["slot"]["error"]
    assert cure in found["slot"]["error"]
    assert cure in status.as_text(found)


@pytest.mark.parametrize(
    ("wal_status", "safe_wal_size", "told"),
    [
        ("reserved", None, "no limit (max_slot_wal_keep_size)"),
        ("reserved", 5_000_000, "safe for 5.0 MB more"),
        ("lost", None, "no longer safe"),
    ],
)
async def test_how_long_the_wal_is_safe(
    collect: Collect, wal_status: str, safe_wal_size: int | None, told: str
) -> None:
    """No number means no limit, unless the slot is lost already."""
    state = structs.replace(STATE, wal_status=wal_status, safe_wal_size=safe_wal_size)
    assert f"WAL kept   950 bytes, {told}" in status.as_text(await collect(state, FakeStore(CHECKPOINT)))


async def test_dead_letters_that_can_not_be_counted_are_unknown(collect: Collect) -> None:
    """Not none; where the database answers, there are none."""
    found = await collect(STATE, FakeStore(error=CheckpointUnavailable(detail="down")))
    assert found["dead_letters"] is None
    assert "dead letters unknown (at most" in status.as_text(found)
    assert "dead letters none (at most" in status.as_text(await collect(STATE, FakeStore()))


async def test_a_replicator_that_can_not_be_asked_is_not_called_down(collect: Collect) -> None:
    """Without an address nobody knows whether it is ready."""
    found = await collect(STATE, FakeStore(CHECKPOINT))
    assert {"ready": None, "reasons": ["not asked: REPLICATOR_ADMIN_LISTEN is off"]} == found["replicator"]
    assert status.as_text(found).startswith("replicator   not asked: REPLICATOR_ADMIN_LISTEN is off\n")
