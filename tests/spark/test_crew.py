"""The driver's side on a cluster that is made up: turns, dead letters, places, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from checkpoint_store import SqlCheckpointStore
from enrichment import EnrichmentSettings, Slice, tables_of
from replicator.app import App
from replicator.contracts.errors import ClusterFailed, ReplicatorError
from replicator.contracts.events import DeadLetter
from replicator.contracts.settings import CoreSettings, load
from replicator.delivery.backfill import BackfillProgress
from replicator_spark import session
from replicator_spark.backfill import crew as at
from replicator_spark.backfill.crew import Crew
from replicator_spark.backfill.plan import Plan, Share, begun
from replicator_spark.backfill.turn import Order, Turn, Written
from replicator_spark.nodes import Meant
from replicator_spark.session import State

NINE = datetime(2026, 1, 8, 9, tzinfo=UTC)
ORDER = Order(
    meant=Meant(version="", key=b"", digests={}, source=""), sinks=["redis"], since=0, page_rows=10, rate=None
)
TASK = "spark backfill"


class MadeUpCluster:
    """Each slice has 20 events and takes two turns."""

    cores = 2

    def __init__(self, turn: Callable[[Share], Turn] | None = None) -> None:
        self.shares: list[Share] = []
        self.rates: set[float | None] = set()
        self.executors = 1
        self.hung = self.looks = 0
        self._turn = turn or two_turns
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def state(self) -> State:
        """As a test says."""
        self.looks += 1
        return State(self.executors, self.cores)

    def settled(self) -> int:
        """No more come."""
        self._wait()
        return self.cores

    def cancel(self) -> None:
        """All calls."""
        self._cancelled.set()

    def _wait(self) -> None:
        """Without an executor, or in a process that has hung, until it is cancelled."""
        if self.executors and not self.hung:
            return
        self.hung -= 1
        assert self._cancelled.wait(10)
        self._cancelled.clear()
        raise ClusterFailed("Spark gave a task up (SparkException)")

    def call(self, function: partial[Turn], share: Share) -> Turn:
        """One turn."""
        [order] = function.args
        with self._lock:
            self.rates.add(order.rate)
            self.shares.append(share)
        self._wait()
        return self._turn(share)


def two_turns(share: Share) -> Turn:
    """Half a slice."""
    reached = structs.replace(share.reached, place=f"{share.reached.place}+", events=share.reached.events + 10)
    written = {"redis": Written(events=10, new=9)}
    return Turn(node="n", reached=reached, done=reached.events == 20, sinks=written)


@pytest.fixture
def app(tmp_path: Path) -> App:
    """The driver's, with nothing but a checkpoint database."""
    store = SqlCheckpointStore(f"sqlite:///{tmp_path}/checkpoint.db")
    store.create()
    settings = load(CoreSettings, slot="s", retry_max_seconds=0.01, dead_letters_max=2)
    nothing: Any = None
    return App(settings=settings, streams=tables_of(load(EnrichmentSettings)), enricher=nothing, sinks=[], store=store)


def _plan(slices: int) -> Plan:
    parts = [Slice(start=NINE, end=NINE.replace(hour=10), place=str(number)) for number in range(slices)]
    return begun(parts, 20 * slices)


def _crew(app: App, cluster: Any, plan: Plan, order: Order = ORDER) -> Crew:
    return Crew(app, cluster, plan, order, task=TASK)


def _letter(event_id: int) -> DeadLetter:
    return DeadLetter(sink="redis", origin="backfill", position=None, event_id=event_id, reason="no", payload=b"{}")


async def test_every_slice_is_worked_off_turn_by_turn(app: App) -> None:
    """Each turn begins where the last one ended; in the end nothing is left to resume."""
    cluster, plan = MadeUpCluster(), _plan(5)
    crew = _crew(app, cluster, plan)
    assert await crew.run()
    assert sorted(f"{number}{turn}" for number in range(5) for turn in ("", "+")) == sorted(
        share.reached.place for share in cluster.shares
    )
    assert (100, 100) == (plan.written.events, plan.total)
    assert Written(events=100, new=90) == crew.sinks["redis"]
    assert app.store.load_progress("s", TASK) is None


async def test_new_nodes_get_turns(app: App) -> None:
    """Cores that come while it runs are used: here no turn ends until six run."""
    at_once = threading.Barrier(6)

    def turn(share: Share) -> Turn:
        cluster.cores = 4
        if not share.reached.events:
            at_once.wait(20)
        return two_turns(share)

    cluster = MadeUpCluster(turn)
    cluster.cores = 1
    assert await _crew(app, cluster, _plan(6)).run()
    assert 12 == len(cluster.shares)


async def test_the_rate_is_that_of_all_turns_together(app: App) -> None:
    """Two cores, half of it each; a single slice has all of it."""
    for slices, rate in ((5, 500.0), (1, 1000.0)):
        cluster = MadeUpCluster()
        await _crew(app, cluster, _plan(slices), structs.replace(ORDER, rate=1000.0)).run()
        assert {rate} == cluster.rates


async def test_stopped_and_continued(app: App) -> None:
    """After `stop` no turn begins; what is kept says where each slice is, and the rest is done from there."""
    crews: list[Crew] = []

    def turn(share: Share) -> Turn:
        crews[0].stop()
        return two_turns(share)

    cluster = MadeUpCluster(turn)
    cluster.cores = 1
    crews.append(_crew(app, cluster, _plan(3), structs.replace(ORDER, rate=1000.0)))  # then nothing waits for a core
    assert not await crews[0].run()
    assert 1 == len(cluster.shares)
    plan = msgspec.json.decode(app.store.load_progress("s", TASK) or "", type=Plan)
    assert ["0+", "1", "2"] == [share.reached.place for share in plan.shares]
    rest = MadeUpCluster()
    assert await _crew(app, rest, plan).run()
    assert 5 == len(rest.shares)


async def test_a_letter_is_kept_once_and_before_the_place(app: App) -> None:
    """A turn that is given again, because the driver died in between, brings the same letters."""
    letters = [_letter(1), _letter(2)]
    places: list[str | None] = []

    def turn(share: Share) -> Turn:
        places.append(app.store.load_progress("s", TASK))
        return structs.replace(two_turns(share), letters=letters)

    crew = _crew(app, MadeUpCluster(turn), _plan(1))
    assert await crew.run()
    assert 2 == app.store.count_dead_letters("s").sinks["redis"]
    assert places[0] is None
    assert "0+" in (places[1] or "")


async def test_letters_without_room_hold_the_slice(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """As in the product: nothing is kept as done past them, it says so, and a stop ends the waiting."""
    app.store.add_dead_letters("s", [_letter(-1)])
    crews: list[Crew] = []

    def turn(share: Share) -> Turn:
        crews[0].stop()
        return structs.replace(two_turns(share), letters=[_letter(1), _letter(2)])

    crews.append(_crew(app, MadeUpCluster(turn), _plan(1)))
    assert not await crews[0].run()
    assert "1 dead letters; 2 more would pass the limit of 2" in caplog.text
    assert app.store.load_progress("s", TASK) is None
    assert 1 == app.store.count_dead_letters("s").sinks["redis"]


async def test_a_failure_ends_it_after_the_other_turns(app: App) -> None:
    """What trying again can't help is raised with its cure; what others had done is kept."""
    others = threading.Event()

    def turn(share: Share) -> Turn:
        if share.reached.place == "0":
            others.wait(10)
            return structs.replace(two_turns(share), failure=("the table is gone", "Make it", "R507"))
        others.set()
        return two_turns(share)

    with pytest.raises(ReplicatorError, match=r"The table is gone\. Make it\.") as raised:
        await _crew(app, MadeUpCluster(turn), _plan(2)).run()
    assert "R507" == raised.value.code
    plan = msgspec.json.decode(app.store.load_progress("s", TASK) or "", type=Plan)
    assert BackfillProgress(place="0", events=0, total=40) == plan.shares[0].reached
    assert plan.shares[1].reached.events > 0


async def test_what_holds_a_slice_is_told(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """In the driver's log, with the node, although the node tries again by itself."""
    troubles = iter(["sink redis did not take the batch", ""])
    cluster = MadeUpCluster(lambda share: structs.replace(two_turns(share), trouble=next(troubles)))
    assert await _crew(app, cluster, _plan(1)).run()
    assert "slice 1 is held, on node n: sink redis did not take the batch" in caplog.text


# --- a cluster that stands still


async def test_turns_that_hang_are_given_again(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A turn ends by itself. Where none does, their processes have hung, and Spark ends them."""
    monkeypatch.setattr(at, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(at, "STALLED_SECONDS", 0.1)
    cluster = MadeUpCluster()
    cluster.hung = 1
    assert await _crew(app, cluster, _plan(1)).run()
    assert ["0", "0", "0+"] == [share.reached.place for share in cluster.shares]
    assert "no turn has ended for 0.1 s" in caplog.text


async def test_a_run_that_has_just_begun_has_not_hung(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a rate, cores are counted before the first turn begins."""
    monkeypatch.setattr(at, "LOOK_SECONDS", 0.01)
    counted = threading.Event()
    cluster = MadeUpCluster()

    def settled() -> int:
        assert counted.wait(10)
        return 2

    monkeypatch.setattr(cluster, "settled", settled)
    running = asyncio.create_task(_crew(app, cluster, _plan(1), structs.replace(ORDER, rate=1000.0)).run())
    await _until(lambda: cluster.looks > 3)
    counted.set()
    assert await running
    assert "have hung" not in caplog.text


async def test_what_waits_for_the_driver_has_not_hung(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no room for the dead letters of the only turn, for however long."""
    monkeypatch.setattr(at, "LOOK_SECONDS", 0.01)
    app.store.add_dead_letters("s", [_letter(-1)])
    cluster = MadeUpCluster(lambda share: structs.replace(two_turns(share), letters=[_letter(1), _letter(2)]))
    crew = _crew(app, cluster, _plan(1))
    running = asyncio.create_task(crew.run())
    await _until(lambda: "would pass the limit" in caplog.text)
    monkeypatch.setattr(at, "STALLED_SECONDS", 0.005)
    before = cluster.looks
    await _until(lambda: cluster.looks > before + 5)
    crew.stop()
    assert not await running
    assert "have hung" not in caplog.text


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("rate", [None, 1000.0])
async def test_a_stop_without_executors(app: App, monkeypatch: pytest.MonkeyPatch, rate: float | None) -> None:
    """It waits for none: nothing that runs has to end."""
    monkeypatch.setattr(at, "LOOK_SECONDS", 0.01)
    cluster = MadeUpCluster()
    cluster.executors = 0
    crew = _crew(app, cluster, _plan(1), structs.replace(ORDER, rate=rate))
    running = asyncio.create_task(crew.run())
    await _until(lambda: cluster.looks > 2)
    assert not running.done()
    crew.stop()
    assert not await running
    assert ["0"] == [share.reached.place for share in crew.plan.shares]


async def test_a_spark_that_does_not_answer(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may be stopped: the backfill ends, and is continued with another."""
    monkeypatch.setattr(session, "SILENT_SECONDS", 0.05)
    answer = threading.Event()
    cluster = MadeUpCluster()
    cluster.state = answer.wait  # type: ignore[assignment, method-assign]  # what it says does not matter
    with pytest.raises(ClusterFailed, match="does not answer"):
        await _crew(app, cluster, _plan(1)).run()
    answer.set()
