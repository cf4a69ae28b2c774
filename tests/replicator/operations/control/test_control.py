"""The socket: who has it, who may open it, what comes over it; and what is not done."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from replicator.contracts.errors import CheckpointUnavailable, ReplicatorError
from replicator.contracts.events import Checkpoint, Pause
from replicator.delivery.retry import cancel
from replicator.operations.control import server
from replicator.operations.control.address import Answer, Deed, Request
from replicator.operations.control.client import ask, watch
from replicator.operations.control.pauses import Pauses
from replicator.operations.control.server import Control
from replicator.operations.follow.tail import Seen
from replicator.operations.status.form import CheckpointStatus, SlotStatus, Status, WalStatus

if TYPE_CHECKING:
    from replicator.contracts.stores import CheckpointStore

PAUSE = Request(do="pause", sink="http")
CHECKPOINT = Checkpoint(slot="s", system_identifier="7", timeline=1, end_lsn=1, sinks={})


async def name_it(request: Request) -> Answer:
    """Say what came."""
    return Answer(done=True, lines=[request.sink])


async def show(_: str) -> AsyncGenerator[Seen, None]:
    """That something goes through."""
    while True:
        yield Seen(skipped=1)
        await asyncio.sleep(0.01)


async def answered(path: Path, expected: str = "") -> Answer:
    """The first answer; with `expected`, the first that is this."""
    async with asyncio.timeout(10):
        while (answer := await ask(path, PAUSE)) is None or (expected and answer.lines != [expected]):  # noqa: ASYNC110  asked over a socket
            await asyncio.sleep(0.005)
    return answer


@asynccontextmanager
async def listening(path: Path, answer: str = "") -> AsyncIterator[None]:
    """A replicator that answers."""

    async def act(request: Request) -> Answer:
        return Answer(done=True, lines=[answer or request.sink])

    task = asyncio.create_task(Control(path, act, show).run())
    await answered(path)
    yield
    await cancel([task])


async def test_it_answers_and_leaves_nothing(tmp_path: Path) -> None:
    """A socket of its user alone, in a folder that is made if need be."""
    path = tmp_path / "state" / "s.sock"
    assert await ask(path, PAUSE) is None
    async with listening(path):
        assert Answer(done=True, lines=["http"]) == await ask(path, PAUSE)
        assert 0o600 == path.stat().st_mode & 0o777
    assert await ask(path, PAUSE) is None
    assert not path.exists()


async def test_nobody_connects_before_it_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask is: until then it does not listen."""
    path, close = tmp_path / "s.sock", Path.chmod

    def chmod(closed: Path, mode: int) -> None:
        with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
            early.connect(str(closed))
        close(closed, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    async with listening(path):
        assert 0o600 == path.stat().st_mode & 0o777


async def test_a_socket_that_was_left_is_replaced(tmp_path: Path) -> None:
    """By a process that was killed; nobody listens on it."""
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert await ask(path, PAUSE) is None
    async with listening(path):
        assert await ask(path, PAUSE)


async def test_a_standby_takes_over_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two on one machine the first one has it, as long as it lives."""
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.01)
    path = tmp_path / "s.sock"
    async with listening(path, "first"):
        second = asyncio.create_task(Control(path, name_it, show).run())
        for _ in range(5):
            await asyncio.sleep(0.01)
            assert Answer(done=True, lines=["first"]) == await ask(path, PAUSE)
    await answered(path, "http")
    await cancel([second])


async def test_a_socket_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says who may open it."""

    async def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(asyncio, "open_unix_connection", refused)
    with pytest.raises(ReplicatorError, match=r"may not be opened\. Run this command as the user"):
        await ask(tmp_path / "s.sock", PAUSE)


@pytest.mark.parametrize("sent", [b"", b"\n", b"{}\n", b'{"do": "drop", "sink": "x"}\n', b"x" * 100_000])
async def test_nonsense_ends_nothing(tmp_path: Path, sent: bytes) -> None:
    """It is answered, or the connection is closed."""
    path = tmp_path / "s.sock"
    async with listening(path), asyncio.timeout(10):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(sent)
        writer.write_eof()
        said = await reader.read()
        assert not said or b"has another version" in said
        writer.close()
        assert await ask(path, PAUSE)


async def test_whoever_looks_on_keeps_nobody_out(tmp_path: Path) -> None:
    """However many views there are, a pause gets through."""
    path = tmp_path / "s.sock"
    many = [Request(do="tail", sink="http")] * 40
    task = asyncio.create_task(Control(path, name_it, show).run())
    await answered(path)
    views = [watch(path, request) for request in many]
    assert [Seen(skipped=1)] * 40 == [await anext(view) for view in views]
    assert await ask(path, PAUSE)
    await asyncio.gather(*(view.aclose() for view in views))
    await cancel([task])


class FakePipeline:
    """With two sinks; it does what it is told, or can't."""

    def __init__(self) -> None:
        self.pauses: dict[str, Pause] = {}
        self.fan_out = SimpleNamespace(lanes=[], every=[])
        self.trouble = SimpleNamespace(message="starting", standby=False)
        self.checkpoint: Checkpoint | None = None
        self.full = False
        self.resumed: list[str] = []

    async def pause(self, sink: str, pause: Pause) -> None:
        """Keep it."""
        if self.full:
            raise CheckpointUnavailable(detail="the disk is full")
        await asyncio.sleep(0.05)  # it is kept on disk
        self.pauses[sink] = pause

    async def resume(self, sink: str) -> None:
        """Remember it."""
        self.resumed.append(sink)


class FakeStore:
    """What is on disk by task."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.checkpoint: Checkpoint | None = None

    def load(self, _: str) -> Checkpoint | None:
        """Of any slot."""
        return self.checkpoint

    def load_progress(self, _: str, task: str) -> str | None:
        """Of any slot."""
        return self.kept.get(task)


def pauses(**wal: Any) -> tuple[Pauses, Any]:
    """Those of a replicator whose WAL is like this."""
    safe = wal.pop("safe_wal_bytes", None)
    status = Status(
        reasons=[],
        replicator=None,
        slot=SlotStatus(name="s", safe_wal_bytes=safe),
        wal=WalStatus(kept_bytes=1, **wal),
        checkpoint=CheckpointStatus(),
        sinks={},
        dead_letters=None,
    )
    watchdog: Any = SimpleNamespace(standby="", pipeline=FakePipeline(), status=lambda: status)
    watchdog.store = store = FakeStore()
    settings: Any = SimpleNamespace(slot="s", sinks=("redis", "http"))
    return Pauses(watchdog, settings, cast("CheckpointStore", store)), watchdog


async def test_a_standby_pauses_nothing() -> None:
    """The one that reads the slot would not hear of it."""
    made, watchdog = pauses()
    watchdog.standby = "slot s is held by process 7"
    answer = await made.act(PAUSE)
    assert not answer.done
    assert "this replicator is the standby, slot s is held by process 7" == answer.lines[0]
    assert {} == watchdog.pipeline.pauses


@pytest.mark.parametrize("deed", ["pause", "resume", "retry", "tail"])
async def test_one_that_has_lost_the_slot_does_nothing(deed: Deed) -> None:
    """Another replicator reads, and would not hear of it."""
    made, watchdog = pauses()
    watchdog.pipeline.trouble = SimpleNamespace(message="slot s is held by process 7", standby=True)
    answer = await made.act(Request(do=deed, sink="http"))
    assert not answer.done
    assert "this replicator no longer reads: slot s is held by process 7" == answer.lines[0]
    assert {} == watchdog.pipeline.pauses


@pytest.mark.parametrize("deed", ["pause", "resume", "retry", "tail"])
async def test_what_is_meant_for_another_cluster_is_refused(deed: Deed) -> None:
    """Two replicators whose slots have the same name, and one directory for their sockets; also before it reads."""
    made, watchdog = pauses()
    watchdog.pipeline.checkpoint = CHECKPOINT
    request = Request(do=deed, sink="http", system_identifier="8")
    answers = [await made.act(request)]
    watchdog.pipeline.checkpoint, watchdog.store.checkpoint = None, CHECKPOINT
    answers.append(await made.act(request))
    for answer in answers:
        assert not answer.done
        assert "of the PostgreSQL cluster 7, and these settings mean that of 8" in answer.lines[0]
        assert "Give each replicator its own RUNTIME_DIRECTORY" in answer.lines[1]
    assert {} == watchdog.pipeline.pauses
    assert (await made.act(Request(do="pause", sink="http", system_identifier="7"))).done


async def test_two_pauses_at_once_leave_one_sink() -> None:
    """Each looks at the sinks only when the other is done."""
    made, watchdog = pauses()
    asked = (made.act(Request(do="pause", sink=sink)) for sink in ("redis", "http"))
    assert [True, False] == [answer.done for answer in await asyncio.gather(*asked)]
    assert ["redis"] == [*watchdog.pipeline.pauses]


async def test_what_is_on_disk_counts_before_the_pipeline_has_read_it() -> None:
    """While PostgreSQL is down at the start: a pause of before can be ended, and one sink is left."""
    made, watchdog = pauses()
    assert ["sink http is not paused"] == (await made.act(Request(do="resume", sink="http"))).lines
    watchdog.store.kept["paused: http"] = '{"until":null}'
    assert not (await made.act(Request(do="pause", sink="redis"))).done
    assert {} == watchdog.pipeline.pauses
    assert (await made.act(Request(do="resume", sink="http"))).done
    assert ["http"] == watchdog.pipeline.resumed


@pytest.mark.parametrize(
    ("seconds", "wal", "expected"),
    [
        (None, {}, "without a reader it fills the disk"),
        (None, {"written_bytes_per_second": 1_000.0}, "growing by 1.0 kB/s"),
        (None, {"safe_wal_bytes": 5_000_000, "limit_bytes": 10_000_000}, "how fast it grows is not known yet"),
        (60.0, {"safe_wal_bytes": 36_000_000, "written_bytes_per_second": 1_000.0}, "lost in 10 hours, growing by"),
        (7200.0, {"safe_wal_bytes": 3_000_000, "written_bytes_per_second": 1_000.0}, "WARNING: sink http is"),
        (None, {"safe_wal_bytes": 3_000_000, "written_bytes_per_second": 1_000.0}, "WARNING: sink http is"),
    ],
)
async def test_a_pause_says_how_long_it_goes_well(seconds: float | None, wal: dict[str, Any], expected: str) -> None:
    """At the rate of the moment."""
    made, watchdog = pauses(**wal)
    answer = await made.act(Request(do="pause", sink="http", seconds=seconds))
    assert answer.done
    assert expected in "\n".join(answer.lines)
    assert ("WARNING" in "\n".join(answer.lines)) == ("WARNING" in expected)
    assert ["http"] == [*watchdog.pipeline.pauses]


async def test_a_pause_that_is_not_kept_is_told(tmp_path: Path) -> None:
    """Over the socket, as any other answer."""
    made, watchdog = pauses()
    watchdog.pipeline.full = True
    path = tmp_path / "s.sock"
    task = asyncio.create_task(Control(path, made.act, show).run())
    answer = await answered(path)
    await cancel([task])
    assert not answer.done
    assert "nothing was changed" == answer.lines[-1]
