"""Where to begin, with a slot and a store that do what the test says: `run`, `init` and `check` all ask here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from replicator.contracts.errors import (
    CheckpointBackward,
    CheckpointMissing,
    SinkLeftOut,
    SlotInUse,
    SlotLost,
    SlotMissing,
    SourceUnavailable,
    StreamGap,
    TablesUnfit,
)
from replicator.contracts.events import Checkpoint, Position, SinkPosition
from replicator.contracts.sink import SinkContext
from replicator.source.server import Identity
from replicator.source.slot import SlotState
from replicator.source.takeover import Beginning
from sinks.testing import MemorySink
from sinks.testing.memory import NUMBERED
from tests.support.fakes import HERE
from tests.support.fakes import STATE as STATE_AT_100

STATE = structs.replace(STATE_AT_100, server_time=1767864112.0)
AT_100 = SinkPosition(position=Position(90, 3), end_lsn=100)
STORED = Checkpoint(
    slot="s", system_identifier="7", timeline=1, end_lsn=100, sinks={"redis": AT_100}, committed_at=1767861112.0
)


class Slot:
    """A source that has, or makes, one slot."""

    def __init__(
        self, state: SlotState | None, *, read: bool = False, identity: Identity = HERE, **branches: int
    ) -> None:
        self.state = state
        self.identity = identity
        self.ends = {int(timeline.lstrip("_")): lsn for timeline, lsn in branches.items()}
        self.created = False
        self.read = read

    async def was_read(self) -> bool:
        """As the statistics say."""
        return self.read

    async def connect(self) -> tuple[Identity, SlotState | None]:
        """Look."""
        return self.identity, self.state

    async def branches(self, timeline: int) -> dict[int, int]:
        """Of the server's own timeline."""
        assert self.identity.timeline == timeline
        return self.ends

    async def create_slot(self, _waits: object) -> SlotState:
        """Make it."""
        self.created, self.state = True, STATE
        return STATE


class Store:
    """One checkpoint."""

    def __init__(self, stored: Checkpoint | None, failure: Exception | None = None) -> None:
        self.stored = stored
        self.failure = failure
        self.calls: list[str] = []
        self.tasks: dict[str, str | None] = {}

    def load(self, _slot: str) -> Checkpoint | None:
        """What there is."""
        return self.stored

    def save(self, checkpoint: Checkpoint) -> None:
        """As the pipeline does."""
        self.calls.append("save")
        if self.failure:
            raise self.failure
        self.stored = checkpoint

    def save_progress(self, _slot: str, task: str, progress: str | None) -> None:
        """Beside the checkpoint."""
        self.tasks[task] = progress

    def load_progress(self, _slot: str, task: str) -> str | None:
        """What was saved."""
        return self.tasks.get(task)

    def replace(self, checkpoint: Checkpoint) -> None:
        """As after an accepted gap."""
        self.calls.append("replace")
        self.stored = checkpoint


def beginning(slot: Slot, store: Store, *sinks: MemorySink) -> Beginning:
    """For these sinks."""
    source: Any = slot
    stores: Any = store
    return Beginning(source, stores, "s", sinks or (MemorySink(name="redis"),))


async def test_what_is_missing_is_made() -> None:
    """A new slot and a first checkpoint at its beginning, saved as any other: it never replaces one."""
    slot, store = Slot(None), Store(None)
    taken = await beginning(slot, store).take()
    assert (True, False, []) == (taken.created_slot, taken.resumed, taken.gap)
    assert (taken.checkpoint, ["save"]) == (store.stored, store.calls)
    assert (100, {}) == (taken.checkpoint.end_lsn, taken.checkpoint.sinks)


async def test_no_slot_is_made_for_tables_that_do_not_fit() -> None:
    """It would keep WAL for what can't be read. One that is there is taken, and keeps it: nothing is lost."""

    async def unfit() -> None:
        raise TablesUnfit(problem="t is a view", cure="x")

    store = Store(None)
    with pytest.raises(TablesUnfit, match=r"T is a view\. No slot is made until this is mended.*backfill"):
        await beginning(Slot(None), store).take(fit=unfit)
    assert [] == store.calls
    assert not (await beginning(Slot(STATE), store).take(fit=unfit)).created_slot


async def test_a_checkpoint_is_resumed_without_the_sinks_that_are_left_out() -> None:
    """What an old sink lacks holds nothing up; nothing is stored."""
    behind = SinkPosition(position=Position(1, 1), end_lsn=2)
    store = Store(structs.replace(STORED, sinks={"redis": AT_100, "http": behind}))
    taken = await beginning(Slot(STATE), store).take(accept_gap=True)
    assert (True, {"redis": AT_100}, [], ()) == (taken.resumed, taken.checkpoint.sinks, store.calls, taken.gap)


@pytest.mark.parametrize("state", [None, structs.replace(STATE, wal_status="lost")], ids=["missing", "lost"])
async def test_no_slot_is_made_over_a_gap(state: SlotState | None) -> None:
    """Nobody has accepted it: nothing is made and nothing stored. A lost slot can't be accepted: it has to go first."""
    slot, store = Slot(state), Store(STORED)
    with pytest.raises((SlotMissing, SlotLost)):
        await beginning(slot, store).take(accept_gap=state is not None)
    assert (False, []) == (slot.created, store.calls)


async def test_an_accepted_gap_replaces_the_checkpoint_and_says_what_to_bring() -> None:
    """A command for sinks that repeats can't harm, another one for those that see them again."""
    slot, store = Slot(None), Store(STORED)
    taken = await beginning(slot, store, MemorySink(name="redis"), MemorySink(name="http", max_repeats=100)).take(
        accept_gap=True
    )
    assert (True, ["replace"], {}) == (slot.created, store.calls, taken.checkpoint.sinks)
    first, redis, http, _ = taken.gap
    assert "from 0/64 (system 7, timeline 1)" in first
    assert " backfill --start 2026-01-08T07:31:52Z --end 2026-01-08T09:21:54Z --sinks redis" in redis
    assert " --start 0001-01-01 --end 2026-01-08T09:21:54Z --sinks http   # it is unknown since when" in http
    assert http.endswith(", it gets again what it has of that time, under the same id")


def of_streams(*names: str) -> list[MemorySink]:
    """Redis for each of them."""
    contexts = [SinkContext(replace(NUMBERED, name=name), f" --stream {name}") for name in names]
    return [MemorySink(name="redis", context=context) for context in contexts]


async def test_the_commands_for_a_gap_name_the_stream_where_there_are_several() -> None:
    """Each works on one: after a gap, and after a failover that lost commits."""
    sinks, at = of_streams("rides", "sales"), "--start 2026-01-08T07:31:52Z --end 2026-01-08T09:21:54Z"
    stored = structs.replace(STORED, sinks={sink.name: AT_100 for sink in sinks})
    gap = (await beginning(Slot(None), Store(stored), *sinks).take(accept_gap=True)).gap
    for name in ("rides", "sales"):
        assert f" backfill {at} --sinks redis/{name} --stream {name}" in "\n".join(gap)
    failed_over = Slot(structs.replace(STATE, confirmed_lsn=90), identity=SECOND, _1=99)
    lost = (await beginning(failed_over, Store(stored), *sinks).take(accept_gap=True)).gap
    for name in ("rides", "sales"):
        assert f" reconcile {at} --repair --delete-extra --stream {name}\n" in "\n".join(lost)
        assert f" rebuild-redis --from-empty --stream {name}\n" in "\n".join(lost)


@pytest.mark.parametrize("dated", [True, False])
async def test_a_sink_that_was_left_out_comes_back_alone(dated: bool) -> None:
    """It begins where the slot is, with a command for what it lacks; the others keep their places."""
    redis, http = STORED.sinks["redis"], SinkPosition(position=Position(1, 1), end_lsn=2)
    stored = structs.replace(STORED, sinks={"redis": redis, "http": http})
    sinks, store = (MemorySink(name="redis"), MemorySink(name="http", max_repeats=100)), Store(stored)
    if dated:
        store.tasks["left out: http"] = str(stored.committed_at - 3_600)
    with pytest.raises(SinkLeftOut, match=r"Sink http was left out after 0/2, the others went on to 0/64\."):
        await beginning(Slot(STATE), store, *sinks).take()
    taken = await beginning(Slot(STATE), store, *sinks).take(accept_gap=True)
    told = "\n".join(taken.gap)
    assert "sink http begins after 0/64" in told
    since = "2026-01-08T06:31:52Z" if dated else "0001-01-01"
    assert f"--start {since} --end 2026-01-08T09:21:54Z --sinks http" in told
    assert 1 == told.count("backfill")
    assert "redis" not in told
    after = {"redis": redis, "http": SinkPosition(position=Position(1, 1), end_lsn=stored.end_lsn)}
    assert (after, True) == (taken.checkpoint.sinks, taken.resumed)
    assert (after, ["save"]) == (store.stored and store.stored.sinks, store.calls)
    again = await beginning(Slot(STATE), store, *sinks).take()
    assert after == again.checkpoint.sinks


@pytest.mark.parametrize(
    ("committed_at", "updated_at", "start"),
    [
        (STORED.committed_at + 2e8, STORED.committed_at + 2e8, "0001-01-01"),
        (STORED.committed_at + 7_200, STORED.committed_at, "2026-01-08T07:31:52Z"),
    ],
)
async def test_a_clock_that_was_ahead_dates_no_gap(committed_at: float, updated_at: float, start: str) -> None:
    """PostgreSQL's clock, or everybody's, was ahead at the last commit: the commands bring what is missing."""
    stored = structs.replace(STORED, committed_at=committed_at, updated_at=updated_at)
    slot = Slot(structs.replace(STATE, confirmed_lsn=101))
    told = "\n".join((await beginning(slot, Store(stored), MemorySink(name="redis")).take(accept_gap=True)).gap)
    assert f" backfill --start {start} --end 2026-01-08T09:21:54Z --sinks redis" in told


async def test_the_time_since_when_a_sink_is_left_out_is_kept() -> None:
    """Before the others go on; once they have, it stays."""
    store = Store(structs.replace(STORED, sinks={"redis": AT_100, "http": AT_100}, end_lsn=AT_100.end_lsn))
    await beginning(Slot(STATE), store).take()
    since = str(STORED.committed_at)
    assert {"left out: http": since} == store.tasks
    assert store.stored
    store.stored = structs.replace(store.stored, end_lsn=AT_100.end_lsn + 1, committed_at=STORED.committed_at + 9)
    await beginning(Slot(STATE), store).take()
    assert {"left out: http": since} == store.tasks


async def test_a_sink_that_was_left_out_and_lacks_nothing_goes_on() -> None:
    """Only other transactions went by: it is as far as the others."""
    stored = structs.replace(STORED, sinks={"redis": AT_100, "http": structs.replace(AT_100, end_lsn=99)})
    sinks = MemorySink(name="redis"), MemorySink(name="http")
    begin = beginning(Slot(STATE), Store(stored), *sinks)
    assert AT_100.position.commit_lsn < 99
    starts = begin.starts((await begin.take()).checkpoint)
    assert stored.end_lsn == starts["http"].end_lsn


async def test_a_slot_that_was_just_made_dates_the_checkpoint() -> None:
    """Until the first commit: older rows are not the slot's to bring, so a gap begins here."""
    taken = await beginning(Slot(None), Store(None), MemorySink(name="redis")).take()
    assert STATE.server_time == taken.checkpoint.committed_at


async def test_the_checkpoint_of_a_running_replicator_is_not_replaced() -> None:
    """Whoever reads the slot would go on with the old one."""
    state = structs.replace(STATE, active_pid=4711, confirmed_lsn=200)
    store = Store(STORED)
    with pytest.raises(SlotInUse, match="4711"):
        await beginning(Slot(state), store).take(accept_gap=True)
    assert [] == store.calls


async def test_of_two_that_start_on_a_new_slot_the_slower_one_tries_again() -> None:
    """The other one's first checkpoint is on disk already, and further."""
    store = Store(None, CheckpointBackward(slot="s", stored="0/65", offered="0/64"))
    with pytest.raises(SourceUnavailable, match="took the slot first"):
        await beginning(Slot(STATE), store).take()


async def test_an_empty_checkpoint_beside_a_slot_that_was_read_is_a_question() -> None:
    """Perhaps it is another database than before: nothing begins before an operator has said so."""
    slot, store = Slot(STATE, read=True), Store(None)
    with pytest.raises(CheckpointMissing, match="init --accept-gap"):
        await beginning(slot, store).take()
    assert [] == store.calls
    taken = await beginning(slot, store).take(accept_gap=True)
    assert (["replace"], 100) == (store.calls, taken.checkpoint.end_lsn)
    assert "after 0/64" in taken.gap[0]


async def test_a_standby_does_not_take_a_slot_that_was_read_just_now_for_a_lost_checkpoint() -> None:
    """The other one saves its first checkpoint before it reads: who sees that it has read sees its checkpoint, too."""
    store = Store(None)

    class Taken(Slot):
        async def was_read(self) -> bool:
            """Since this moment."""
            store.stored = STORED
            return True

    assert (await beginning(Taken(STATE), store).take()).resumed


async def test_a_slot_that_nobody_has_read_needs_no_checkpoint() -> None:
    """It was made by hand, or its maker died before the first checkpoint."""
    store = Store(None)
    taken = await beginning(Slot(STATE), store).take()
    assert (["save"], False, 100) == (store.calls, taken.created_slot, taken.checkpoint.end_lsn)


async def test_a_look_changes_nothing() -> None:
    """`check` sees what there is, and whether it fits."""
    slot, store = Slot(None), Store(STORED)
    found = await beginning(slot, store).look()
    with pytest.raises(SlotMissing):
        found.verify()
    assert (False, [], STORED) == (slot.created, store.calls, found.stored)


SECOND = structs.replace(HERE, timeline=2)


async def test_on_a_promoted_standby_the_checkpoint_is_of_its_timeline(caplog: pytest.LogCaptureFixture) -> None:
    """The history is shared up to the checkpoint: it goes on, says so, and the next save has the new number."""
    caplog.set_level("INFO")
    store = Store(STORED)
    taken = await beginning(Slot(STATE, identity=SECOND, _1=100), store).take()
    assert (True, 2, 100, []) == (taken.resumed, taken.checkpoint.timeline, taken.checkpoint.end_lsn, store.calls)
    assert "timeline 2 of PostgreSQL continues 1 from 0/64" in caplog.text


async def test_a_failover_that_lost_commits_is_told_as_that() -> None:
    """The slot brings all that PostgreSQL has. What it no longer has is in the sinks: no backfill mends that."""
    slot, store = Slot(structs.replace(STATE, confirmed_lsn=90), identity=SECOND, _1=99), Store(STORED)
    with pytest.raises(StreamGap, match="no longer in PostgreSQL"):
        await beginning(slot, store).take()
    taken = await beginning(slot, store).take(accept_gap=True)
    told = "\n".join(taken.gap)
    assert "(system 7, timeline 1) to 0/5A (system 7, timeline 2); the sinks may have events that" in told
    assert " reconcile --start 2026-01-08T07:31:52Z --end 2026-01-08T09:21:54Z --repair --delete-extra" in told
    assert " rebuild-redis --from-empty" in told
    assert " backfill " not in told
    slot, store = Slot(structs.replace(STATE, confirmed_lsn=90), identity=SECOND, _1=99), Store(STORED)
    store.stored = structs.replace(STORED, committed_at=0.0)
    undated = "\n".join((await beginning(slot, store).take(accept_gap=True)).gap)
    assert " reconcile --start 0001-01-01 --end 2026-01-08T09:21:54Z --repair --delete-extra" in undated


RESTORED = (
    ("an older backup", structs.replace(STATE, server_lsn=99), HERE),
    ("a timeline that does not continue", STATE, structs.replace(HERE, timeline=3)),
    ("another cluster", STATE, structs.replace(HERE, system_identifier="8")),
)


@pytest.mark.parametrize(("what", "state", "identity"), RESTORED)
async def test_a_restore_that_lost_commits_is_told_as_that(what: str, state: SlotState, identity: Identity) -> None:
    """A backfill brings what is new in PostgreSQL; what it has no more is in the sinks, and its ids come again."""
    taken = await beginning(Slot(state, identity=identity), Store(STORED)).take(accept_gap=True)
    told = "\n".join(taken.gap)
    assert ("another cluster" == what) == ("has all that the former one had (pg_upgrade), nothing is lost" in told)
    assert "the sinks may have events that PostgreSQL lost in the failover or restore" in told
    assert " --repair --delete-extra\n  " in told
    assert " rebuild-redis --from-empty" in told
    assert "if PostgreSQL was restored to an earlier time, give that time" in told
    assert " backfill --start 2026-01-08T07:31:52Z" in told


async def test_what_was_lost_begins_when_the_server_left_its_archive() -> None:
    """PostgreSQL says of when its last restored commit was: what the sinks have since then is compared, too."""
    restored = structs.replace(STATE, confirmed_lsn=90, recovered_at=STORED.committed_at - 7200)
    taken = await beginning(Slot(restored, identity=SECOND, _1=99), Store(STORED)).take(accept_gap=True)
    assert " reconcile --start 2026-01-08T05:31:52Z --end 2026-01-08T09:21:54Z --repair" in "\n".join(taken.gap)


async def test_a_failover_that_lost_commits_and_has_a_later_slot_needs_a_backfill_too() -> None:
    """The slot was made by hand on the new primary: what was committed there before does not come through it."""
    slot, store = Slot(structs.replace(STATE, confirmed_lsn=101), identity=SECOND, _1=99), Store(STORED)
    taken = await beginning(slot, store).take(accept_gap=True)
    told = "\n".join(taken.gap)
    assert " reconcile --start" in told
    assert " backfill --start 2026-01-08T07:31:52Z" in told
