"""A sink whose writes a cluster carries out, without Spark: the cluster is made up, and runs the nodes' code."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest

from enrichment import EVENT
from replicator.contracts.errors import (
    BatchRefused,
    BatchTooLarge,
    ClusterFailed,
    NodeDiffers,
    SinkBroken,
    SinkEmptied,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    SinkUnusable,
)
from replicator.contracts.events import Event, RowChange
from replicator.contracts.settings import load
from replicator.contracts.sink import Mode, Sink, SinkContext
from replicator.delivery.queue import weigh
from replicator_spark.nodes import Meant
from replicator_spark.session import PATIENCE_SECONDS, State
from replicator_spark.stream import carrier, desk, hands
from replicator_spark.stream.carrier import cut, on_cluster
from replicator_spark.stream.desk import Desk
from sinks.http.settings import HttpSettings
from sinks.testing import Destination, MemorySink, SinkConformance, decode

DEADLINE_SECONDS = 10.0
HERE = Meant(version="", key=b"", digests={}, source="")


class MadeUpCluster:
    """Calls what it is given in a thread of this process."""

    master = "local[4]"

    def __init__(self, cores: int = 4) -> None:
        self.now: State | Exception = State(executors=1, cores=cores)
        self.calls = 0
        self.patience_seconds = 0.0
        self.cancelled = threading.Event()
        self.failure: Exception | None = None

    def state(self) -> State:
        """As a test says."""
        if isinstance(self.now, Exception):
            raise self.now
        return self.now

    def call(self, function: Callable[[bytes], bytes], packed: bytes, patience_seconds: float) -> bytes:
        """One task; without executors it waits until it is cancelled."""
        self.calls += 1
        self.patience_seconds = patience_seconds
        if isinstance(self.now, State) and not self.now.executors:
            self.cancelled.clear()
            assert self.cancelled.wait(DEADLINE_SECONDS)
            raise ClusterFailed("Spark gave a task up (SparkException)")
        if self.failure:
            raise self.failure
        return function(packed)

    def cancel(self) -> None:
        """All calls."""
        self.cancelled.set()


class Nodes:
    """The sinks of the nodes, by name: what one opens they all share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sinks: dict[str, MemorySink] = {}
        self.opened: list[Mode] = []
        """The modes in which sinks were opened there."""
        self.differs: NodeDiffers | None = None
        theirs = hands.Hands()
        monkeypatch.setattr(hands, "_hands", lambda: theirs)
        monkeypatch.setattr(hands, "create_sinks", lambda names, _: [self._open(names[0])])
        monkeypatch.setattr(hands, "meant_by_sink", self._meant)
        monkeypatch.setattr(carrier, "meant_by_sink", lambda *_: HERE)

    def _meant(self, *_: object) -> Meant:
        if self.differs:
            raise self.differs
        return HERE

    def _open(self, name: str) -> Sink:
        sink = self.sinks[name]

        async def opened(_: object, mode: Mode) -> None:
            self.opened.append(mode)

        sink.open = opened  # type: ignore[assignment]
        return sink


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """A cluster's."""
    return Nodes(monkeypatch)


@pytest.fixture
def cluster() -> MadeUpCluster:
    """Of four cores."""
    return MadeUpCluster()


class Driver(MemorySink):
    """The driver's own sink: it remembers what others wrote for it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.noticed: list[int] = []

    async def carried(self, events: Sequence[Event]) -> None:
        """Notice."""
        self.noticed += [event.id for event in events]


def made(cluster: Any, nodes: Nodes, *, name: str = "memory", own: Sink | None = None, **options: Any) -> Sink:
    """A sink of the driver's on this cluster, and that of the nodes."""
    nodes.sinks[name] = MemorySink(name=name, **options)
    return on_cluster(own or Driver(name=name, max_repeats=options.get("max_repeats")), Desk(cluster, [name]))


def events(*numbers: int, key: int = 1) -> list[Event]:
    """Of one content."""
    return [
        Event(commit_lsn=2**63, ordinal=number, id=number, key=key, ts_us=number or None, json=b"{}")
        for number in numbers
    ]


class TestConformance(SinkConformance):
    """What every sink must do holds over a cluster."""

    @pytest.fixture
    def destination(self, nodes: Nodes) -> Destination:
        """The memory of the nodes."""
        return Memory(nodes)


class Memory(Destination):
    """What the nodes' sink has."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(EVENT)
        self._nodes = nodes
        self._there = nodes.sinks["memory"] = MemorySink(unfit=[100])
        self._own = Driver()
        self._cluster = MadeUpCluster()

    def follow(self) -> None:
        """The nodes' sink as well."""
        super().follow()
        assert self.refused
        self._there = self._nodes.sinks["memory"] = MemorySink(context=self.context, unfit=[self.refused.id])

    @property
    def context(self) -> SinkContext:
        """On Spark a slot has one stream."""
        return SinkContext(self.stream)

    def sink(self) -> Sink:
        """The driver's."""
        self._own = Driver(context=self.context)
        return on_cluster(self._own, Desk(self._cluster, ["memory"]))  # type: ignore[arg-type]  # it is made up

    def read(self) -> Iterable[dict[str, Any]]:
        """By id."""
        return [decode(event.json) for event in self._there.events.values() if not event.deleted]

    @contextmanager
    def outage(self) -> Iterator[None]:
        """For the node, and for what the driver checks."""
        self._there.down = self._own.down = True
        yield
        self._there.down = self._own.down = False

    def refusal(self, event: Event) -> AbstractContextManager[None]:
        """The node's sink refuses it."""

        @contextmanager
        def refusing() -> Iterator[None]:
            self._there.refused = {event.id}
            yield
            self._there.refused = set()

        return refusing()


ERRORS = [
    SinkUnavailable(sink="memory", detail="away", retry_after=7.0),
    BatchRefused(sink="memory", detail="400", reason="400: not this one"),
    BatchTooLarge(sink="memory", detail="413"),
    SinkMisconfigured(sink="memory", detail="WRONGPASS", cure="See x"),
    SinkUnusable(sink="memory", detail="no table", cure="Run init"),
    SinkEmptied(sink="memory", detail="it is empty", cure="Run backfill"),
    SinkBroken(sink="memory", detail="KeyError"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_comes_back_as_what_it_was(cluster: MadeUpCluster, nodes: Nodes, error: SinkError) -> None:
    """With its words: the lane decides by them."""
    sink = made(cluster, nodes, steps=[error])
    with pytest.raises(type(error)) as caught:
        await sink.write(events(1))
    assert type(error) is type(caught.value)
    assert vars(error) == vars(caught.value)


async def test_a_bug_is_told_by_its_name(
    cluster: MadeUpCluster, nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """And by where it is, once. Its words may have a row in them."""
    sink = made(cluster, nodes, steps=[KeyError("row 42"), KeyError("row 42")])
    for _ in range(2):
        with pytest.raises(SinkBroken, match="unexpected way: KeyError"):
            await sink.write(events(1))
    assert 1 == caplog.text.count("in _take")
    assert "row 42" not in caplog.text


async def test_a_node_with_other_settings(cluster: MadeUpCluster, nodes: Nodes) -> None:
    """Nothing is written there."""
    sink = made(cluster, nodes)
    nodes.differs = NodeDiffers(problem="REPLICATOR_REDIS_URL has another value there", expected="the driver's")
    with pytest.raises(SinkUnusable, match="node of the cluster differs from the driver: REPLICATOR_REDIS_URL"):
        await sink.write(events(1))
    nodes.differs = None
    assert not await sink.write(events(1))
    assert [Mode.BACKFILL] == nodes.opened, "what goes by the clock is left to the driver's"


async def test_refusals_are_the_drivers_own_events(cluster: MadeUpCluster, nodes: Nodes) -> None:
    """And what was taken is noticed by the driver's sink."""
    own = Driver()
    sink = made(cluster, nodes, own=own, unfit=[2])
    given = events(1, 2, 3)
    [refusal] = await sink.write(given)
    assert refusal.event is given[1]
    assert [1, 3] == own.noticed


async def test_what_happened_to_a_row_reaches_the_node(cluster: MadeUpCluster, nodes: Nodes) -> None:
    """That it is gone, or was called otherwise; of a row that never changes nothing but itself."""
    sink = made(cluster, nodes)
    gone = RowChange(100, 1, 7, 70, None, b"{}", stream="orders", deleted=True)
    changed = RowChange(100, 2, 8, 70, 1, b"{}", stream="orders", was=9)
    [plain] = events(1)
    await sink.write([gone, changed, plain])
    there = nodes.sinks["memory"].events
    assert [gone, changed] == [there[7], there[8]]
    assert (plain.json, plain.version, False, None) == (there[1].json, there[1].version, there[1].deleted, there[1].was)


async def test_what_the_driver_knows_comes_first(cluster: MadeUpCluster, nodes: Nodes) -> None:
    """Such as that the keys in Redis are another source's."""
    own = Driver(steps=[SinkUnusable(sink="memory", detail="not ours", cure="")])
    sink = made(cluster, nodes, own=own)
    with pytest.raises(SinkUnusable, match="not ours"):
        await sink.write(events(1))
    assert 0 == cluster.calls


@pytest.mark.parametrize(
    ("error", "opened"),
    [
        (SinkMisconfigured(sink="memory", detail="WRONGPASS", cure=""), 2),  # the password was rotated
        (SinkUnusable(sink="memory", detail="a column is narrower", cure=""), 2),  # it was cut: look before the next
        (SinkUnavailable(sink="memory", detail="away"), 1),
        (BatchRefused(sink="memory", detail="400"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_when_sinks_are_opened_anew(cluster: MadeUpCluster, nodes: Nodes, error: SinkError, opened: int) -> None:
    """Where what they remember may be what is wrong, in every process."""
    sink = made(cluster, nodes, steps=[error])
    with pytest.raises(type(error)):
        await sink.write(events(1))
    for _ in range(2):
        assert not await sink.write(events(1))
    assert opened == len(nodes.opened)


async def test_a_task_has_longer_than_its_sinks_time_outs(cluster: MadeUpCluster, nodes: Nodes) -> None:
    """They end a write; after that its process must have hung."""
    sink = made(cluster, nodes, own=Driver(settings=load(HttpSettings, http_timeout_seconds=60.0)))
    await sink.write(events(1))
    assert PATIENCE_SECONDS + 4 * 60.0 == cluster.patience_seconds


async def test_what_was_new_is_counted_once(cluster: MadeUpCluster, nodes: Nodes) -> None:
    """However many writes a task had."""
    sink = made(cluster, nodes, concurrency=2)

    async def counts(batch: Sequence[Event]) -> None:
        there = nodes.sinks["memory"]
        there.new_events = (there.new_events or 0) + len(batch)

    nodes.sinks["memory"].steps = [counts, counts, counts]
    await asyncio.gather(sink.write(events(1, 2)), sink.write(events(3)))
    await sink.write(events(4))
    assert 4 == sink.new_events
    assert 2 == cluster.calls


async def test_a_huge_write_stays_here(cluster: MadeUpCluster, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spark could not send it."""
    monkeypatch.setattr(carrier, "CARRIED_BYTES", 500)
    own = Driver()
    sink = made(cluster, nodes, own=own)
    await sink.write(events(1))
    await sink.write(events(1, 2))
    assert 1 == cluster.calls
    assert [[], [], [1, 2]] == own.writes


class TestParts:
    """A large write is cut."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(carrier, "PART_EVENTS", 2)

    def test_a_content_stays_together_and_in_order(self) -> None:
        """Nothing is lost, and a repeat has the same parts."""
        given = [event for key in (5, -7, 6) for event in events(*range(key * 10, key * 10 + 3), key=key)]
        parts = cut(given)
        assert parts == cut(given)
        assert sorted(event.id for event in given) == sorted(event.id for part in parts for event in part)
        for key in (5, -7, 6):
            [found] = [[event for event in part if event.key == key] for part in parts if key in {e.key for e in part}]
            assert [event for event in given if event.key == key] == found

    async def test_the_parts_are_one_write(self, cluster: MadeUpCluster, nodes: Nodes) -> None:
        """Of tasks of their own. A refusal says nothing of a part that failed for another reason."""
        sink = made(cluster, nodes, concurrency=4, refused=[1])
        given = [*events(1, 2, key=1), *events(3, 4, key=2)]
        nodes.sinks["memory"].steps = [SinkUnavailable(sink="memory", detail="away")]
        with pytest.raises(SinkUnavailable):
            await sink.write(given)
        with pytest.raises(BatchRefused):
            await sink.write(given)
        nodes.sinks["memory"].refused = set()
        assert not await sink.write(given)
        assert {1, 2, 3, 4} == {*nodes.sinks["memory"].events}

    async def test_what_sees_repeats_gets_writes_whole(self, cluster: MadeUpCluster, nodes: Nodes) -> None:
        """Parts that were taken would come again with one that was refused."""
        sink = made(cluster, nodes, max_repeats=1000)
        await sink.write([*events(1, 2, key=1), *events(3, 4, key=2)])
        assert [[1, 2, 3, 4]] == nodes.sinks["memory"].writes


class TestDesk:
    """Which write gets a core."""

    async def test_small_writes_go_together(self, nodes: Nodes) -> None:
        """As many as wait for a core. Each has an answer of its own."""
        cluster = MadeUpCluster(cores=1)
        sink = made(cluster, nodes, concurrency=16, refused=[5], max_repeats=1000)
        first = asyncio.create_task(sink.write(events(100)))
        answers = await asyncio.gather(
            first, *(sink.write(events(number)) for number in range(8)), return_exceptions=True
        )
        assert [5] == [number - 1 for number, answer in enumerate(answers) if isinstance(answer, BatchRefused)]
        assert 2 >= cluster.calls

    async def test_a_task_is_no_larger_than_spark_sends(self, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
        """Writes that are small enough may not be so together."""
        writes = [events(number) for number in range(8)]
        monkeypatch.setattr(desk, "CARRIED_BYTES", 3 * weigh(writes[0]))
        cluster = MadeUpCluster(cores=1)
        sink = made(cluster, nodes, concurrency=16, max_repeats=1000)
        await asyncio.gather(*(sink.write(write) for write in writes))
        assert 3 == cluster.calls
        assert 8 == len(nodes.sinks["memory"].writes)

    async def test_a_sink_that_hangs_leaves_cores_to_the_others(self, nodes: Nodes) -> None:
        """One for each of them."""
        cluster = MadeUpCluster(cores=3)
        held = asyncio.Event()
        at = Desk(cluster, ["slow", "one", "two"])  # type: ignore[arg-type]  # it is made up
        for name in ("slow", "one", "two"):
            nodes.sinks[name] = MemorySink(name=name, steps=[held] * 20 if name == "slow" else ())
        slow, *others = (on_cluster(Driver(name=name, max_repeats=1000), at) for name in ("slow", "one", "two"))
        hanging = [
            asyncio.create_task(slow.write(events(*range(number * 1000, 1000 + number * 1000)))) for number in range(5)
        ]
        async with asyncio.timeout(DEADLINE_SECONDS):
            await begun(nodes.sinks["slow"])
            await asyncio.gather(*(sink.write(events(1)) for sink in others))
        assert not any(task.done() for task in hanging)
        release(held)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*hanging)

    def test_fewer_cores_than_sinks(self, caplog: pytest.LogCaptureFixture) -> None:
        """Then one that hangs may hold them all: it is said."""
        Desk(MadeUpCluster(cores=2), ["one", "two"])  # type: ignore[arg-type]  # it is made up
        assert "cores for" not in caplog.text
        Desk(MadeUpCluster(cores=2), ["one", "two", "three"])  # type: ignore[arg-type]  # likewise
        assert "Spark has 2 cores for 3 sinks" in caplog.text

    async def test_a_write_that_was_given_up_is_not_sent(self, nodes: Nodes) -> None:
        """When it still waits for a core."""
        cluster = MadeUpCluster(cores=1)
        held = asyncio.Event()
        sink = made(cluster, nodes, steps=[held])
        first = asyncio.create_task(sink.write(events(1)))
        await begun(nodes.sinks["memory"])
        given_up = asyncio.create_task(sink.write(events(2)))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        release(held)
        await first
        await sink.write(events(3))
        assert [[1], [3]] == nodes.sinks["memory"].writes


async def begun(sink: MemorySink) -> None:
    """A write has begun there. Its event is of the nodes' loop, and wakes nobody on this one."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not sink.called.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def release(held: asyncio.Event) -> None:
    """On the loop of the nodes, where somebody waits for it."""
    hands._hands()._loop.call_soon_threadsafe(held.set)  # noqa: SLF001  it is in this process


async def test_a_task_that_is_lost_is_a_write_that_failed(cluster: MadeUpCluster, nodes: Nodes) -> None:
    """The lane repeats it."""
    sink = made(cluster, nodes)
    cluster.failure = ClusterFailed("Spark gave a task up (ExecutorLostFailure)", "See the logs")
    with pytest.raises(SinkUnavailable, match=r"gave a task up \(ExecutorLostFailure\)\. See the logs\. The repl"):
        await sink.write(events(1))
    cluster.failure = None
    assert not await sink.write(events(1))


async def test_a_cluster_without_executors(
    cluster: MadeUpCluster, nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What waits there long is given up, and tried again; one without anything to do may well be empty."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(desk, "DESERTED_SECONDS", 0.02)
    monkeypatch.setattr(desk, "LOOK_SECONDS", 0.01)
    nodes.sinks["memory"] = MemorySink()
    at = Desk(cluster, ["memory"])  # type: ignore[arg-type]  # it is made up
    sink = on_cluster(Driver(), at)
    watching = asyncio.create_task(at.watch())
    cluster.now = State(executors=0, cores=2)
    for _ in range(2):
        with pytest.raises(SinkUnavailable, match="no executor of Spark takes the write: check that the cluster runs"):
            await sink.write(events(1))
    assert 2 == cluster.calls
    assert (0, 0) == (at.carrier.executors, at.carrier.cores), "what status and metrics say"
    cluster.now = State(executors=2, cores=2)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            with suppress(SinkUnavailable):
                await sink.write(events(1))
                break
            await asyncio.sleep(0.01)
    assert ("Spark at local[4]", 2, 2) == (at.carrier.name, at.carrier.executors, at.carrier.cores)
    watching.cancel()


@pytest.mark.parametrize("master", ["spark://h:7077", "yarn"])
async def test_a_master_that_forgot_the_application(
    cluster: MadeUpCluster, nodes: Nodes, monkeypatch: pytest.MonkeyPatch, master: str
) -> None:
    """A write gets no executor for minutes: on a standalone cluster it ends, for whoever starts it again.

    With nothing to write there may be none for as long as you like.
    """
    for name, seconds in (("DESERTED_SECONDS", 0.0), ("LOOK_SECONDS", 0.001), ("ABANDONED_SECONDS", 0.02)):
        monkeypatch.setattr(desk, name, seconds)
    nodes.sinks["memory"] = MemorySink()
    cluster.master, cluster.now = master, State(executors=0, cores=1)
    at = Desk(cluster, ["memory"])  # type: ignore[arg-type]  # it is made up
    sink = on_cluster(Driver(), at)
    watching = asyncio.create_task(at.watch())
    tries = 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not watching.done() and tries < 60:
            with suppress(SinkUnavailable):
                await asyncio.wait(
                    [watching, asyncio.create_task(sink.write(events(1)))], return_when=asyncio.FIRST_COMPLETED
                )
            tries += 1
    if master == "yarn":
        assert watching.cancel()
    else:
        with pytest.raises(ClusterFailed, match=r"no executor for 0\.02 s\. A restarted Master"):
            await watching
    cluster.cancel()


async def test_spark_ends(cluster: MadeUpCluster) -> None:
    """Whoever watches is told."""
    at = Desk(cluster, ["memory"])  # type: ignore[arg-type]  # it is made up
    cluster.now = ClusterFailed("Spark has ended the application")
    with pytest.raises(ClusterFailed):
        await at.watch()
