"""`status` where something does not answer: what is unknown is called so, what is known is not understated."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec import inspect, structs

from replicator import __version__
from replicator.contracts.errors import PROGRAM, CheckpointError, CheckpointUnavailable, SourceUnavailable
from replicator.contracts.events import Checkpoint, LetterCounts, Pause
from replicator.contracts.settings import CoreSettings
from replicator.contracts.sink import Carrier
from replicator.operations.status import collect as collects
from replicator.operations.status import wal
from replicator.operations.status.form import (
    DeadLetterStatus,
    NotificationStatus,
    ReplicatorStatus,
    SinkStatus,
    Status,
    WalStatus,
)
from replicator.operations.status.parts import of_checkpoint, of_sink, of_slot
from replicator.operations.status.text import as_json, as_text, outlook
from replicator.operations.status.wal import WalForecast
from replicator.source import slot as slots
from tests.support.fakes import AT_200, STATE
from tests.support.fakes import CHECKPOINT as STORED

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "status.md"

CHECKPOINT = structs.replace(STORED, updated_at=time.time() + 600)
"""Saved just now, however long these tests take."""

READ = structs.replace(STATE, active_pid=4711)
"""A slot that a process reads."""


class FakeStore:
    """A checkpoint database that holds this, or that fails."""

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        letters: LetterCounts = LetterCounts(),  # noqa: B008  frozen
        error: CheckpointError | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._letters = letters
        self._error = error

    def load_progress(self, _: str, task: str) -> str | None:
        """The sink `later` is paused."""
        return '{"until": 4102444800}' if task == "paused: later" else None

    def load(self, _: str) -> Checkpoint | None:
        """The checkpoint."""
        if self._error:
            raise self._error
        return self._checkpoint

    def count_dead_letters(self, _: str) -> LetterCounts:
        """How many there are."""
        return self._letters


Collect = Callable[..., Awaitable[Status]]


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Collect:
    """`status` over a slot and a checkpoint database of the test's; the replicator is asked at this address, if any."""

    async def collected(
        state: slots.SlotState | SourceUnavailable | None, store: FakeStore, address: str = ""
    ) -> Status:
        async def look(*_: object) -> slots.SlotState | None:
            if isinstance(state, SourceUnavailable):
                raise state
            return state

        monkeypatch.setattr(slots, "look", look)
        monkeypatch.setattr(collects, "LOOKS_APART_SECONDS", 0)
        settings = CoreSettings.model_validate({"slot": "s", "admin_listen": address})
        return await collects.collect(settings, ["redis"], store)  # type: ignore[arg-type]  # as much of one as it needs

    return collected


def live(slot: str = "s", *reasons: str) -> Status:
    """What a replicator says of itself at /status."""
    sink = structs.replace(
        of_sink(AT_200, STATE, 1.5), events=7, writes=2, retries=1, dead_letters=0, waiting=3, trouble="away"
    )
    return Status(
        reasons=[*reasons],
        replicator=ReplicatorStatus(
            version=__version__,
            connected=True,
            confirmed_lsn="0/C8",
            verified_lsn="0/C8",
            verified_seconds_ago=0.5,
            rows=9,
            refused_rows=1,
            ignored_rows={"update": 1},
            held_bytes=300,
            reading_stopped=False,
        ),
        slot=of_slot(slot, READ),
        checkpoint=of_checkpoint(CHECKPOINT, STATE),
        sinks={"redis": sink},
        dead_letters=DeadLetterStatus(rows=1, sinks={"redis": 2}, limit=100),
    )


async def answering(body: bytes) -> TestServer:
    """A server whose /status is this."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    app = web.Application()
    app.router.add_get("/status", answer)
    server = TestServer(app)
    await server.start_server()
    return server


# --- ready or not


async def test_ready(collect: Collect) -> None:
    """Nothing is wrong: the first line says so, and programs see it."""
    server = await answering(msgspec.json.encode(live()))
    found = await collect(READ, FakeStore(CHECKPOINT), f"{server.host}:{server.port}")
    await server.close()
    assert (True, []) == (found.ready, found.reasons)
    assert as_text(found).startswith(
        "replicator   ready\nslot         s: read by process 4711, WAL reserved, PostgreSQL 16.4\n"
    )


def test_who_carries_the_writes() -> None:
    """If it is not the process itself, it is said."""
    found = live()
    assert found.replicator
    carried = structs.replace(found.replicator, carrier=Carrier(name="Spark at local[2]", executors=1, cores=2))
    told = as_text(structs.replace(found, replicator=carried))
    line = "  writes     are carried out by Spark at local[2] (1 executor, 2 cores)\n"
    assert told.startswith(f"replicator   ready\n{line}slot         s:")


async def test_what_a_replicator_says_is_its_status(collect: Collect) -> None:
    """Its reasons, its process and its counters; the lag in bytes is that of the slot as it is now."""
    server = await answering(msgspec.json.encode(live("s", "sink redis is away")))
    later = structs.replace(READ, server_lsn=5_000)
    found = await collect(later, FakeStore(CHECKPOINT), f"{server.host}:{server.port}")
    await server.close()
    assert (False, ["sink redis is away"]) == (found.ready, found.reasons)
    assert live().replicator == found.replicator
    assert structs.replace(live().sinks["redis"], lag_bytes=4_800) == found.sinks["redis"]
    assert as_text(found).startswith("replicator   NOT READY: sink redis is away\n")
    lines = "sink         redis: 4.8 kB and 1.5 s behind, 3 events waiting\n  at         0/C8 (row 0/BE#3)\n"
    assert f"{lines}  trouble    away\n" in as_text(found)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "is not a replicator of version"),
        (b'{"slot": "s", "ready": true}', "is not a replicator of version"),
        (msgspec.json.encode(live("another")), "the replicator of another slot, another, answers at"),
    ],
)
async def test_another_program_is_not_taken_for_the_replicator(collect: Collect, body: bytes, words: str) -> None:
    """The address may belong to anything: its lag is not ours."""
    server = await answering(body)
    address = f"{server.host}:{server.port}"
    found = await collect(READ, FakeStore(CHECKPOINT), address)
    await server.close()
    [reason] = found.reasons
    assert words in reason
    assert f"REPLICATOR_ADMIN_LISTEN ({address})" in reason
    assert (False, None, None) == (found.ready, found.replicator, found.sinks["redis"].events)


async def test_a_replicator_that_can_not_be_asked_is_not_called_down(collect: Collect) -> None:
    """Without an address slot and checkpoint tell: a process reads and saves, or none does."""
    found = await collect(READ, FakeStore(CHECKPOINT))
    assert found.ready
    assert as_text(found).startswith("replicator   not asked: REPLICATOR_ADMIN_LISTEN is off\n")
    found = await collect(STATE, FakeStore(CHECKPOINT))
    assert (False, ["no process reads replication slot s"]) == (found.ready, found.reasons)
    stale = structs.replace(CHECKPOINT, updated_at=time.time() - 61)
    found = await collect(READ, FakeStore(stale))
    assert ["the checkpoint was saved 61 s ago, while 800 bytes of WAL wait"] == found.reasons
    assert (await collect(structs.replace(READ, server_lsn=200), FakeStore(stale))).ready  # idle


async def test_another_checkpoint_database_is_not_ready(collect: Collect) -> None:
    """None, or an older one, of a slot that is being read: its dead letters are not the reader's either."""
    server = await answering(msgspec.json.encode(live()))
    for address in ("", f"{server.host}:{server.port}"):
        for state, stored in ((READ, None), (structs.replace(READ, confirmed_lsn=CHECKPOINT.end_lsn + 1), CHECKPOINT)):
            [reason] = (await collect(state, FakeStore(stored), address)).reasons
            assert "process 4711 reads replication slot s, and the checkpoint database does not follow" in reason
    assert (await collect(READ, FakeStore(CHECKPOINT), address)).ready
    await server.close()


@pytest.mark.parametrize(
    ("columns", "different"), [("device=dev,id=number", False), ("id=number", True), ("", True), (None, False)]
)
async def test_its_columns_have_other_names(
    collect: Collect, monkeypatch: pytest.MonkeyPatch, columns: str | None, different: bool
) -> None:
    """In whatever order they are written; a replicator of an earlier release does not say."""
    monkeypatch.setenv("REPLICATOR_COLUMNS", "id=number, device=dev")
    running = live()
    assert running.replicator
    told = {} if columns is None else {"REPLICATOR_COLUMNS": columns}
    running = structs.replace(running, replicator=structs.replace(running.replicator, settings=told))
    server = await answering(msgspec.json.encode(running))
    found = await collect(READ, FakeStore(CHECKPOINT), f"{server.host}:{server.port}")
    await server.close()
    assert different == (f"REPLICATOR_COLUMNS is {columns!r} in the running replicator" in " ".join(found.reasons))


async def test_a_sink_that_the_replicator_does_not_have(collect: Collect) -> None:
    """It gets nothing."""
    server = await answering(msgspec.json.encode(structs.replace(live(), sinks={"http": SinkStatus()})))
    [reason] = (await collect(READ, FakeStore(CHECKPOINT), f"{server.host}:{server.port}")).reasons
    assert "the running replicator does not write to sink redis" in reason
    await server.close()


async def test_the_same_trouble_with_other_commands_is_told_once(collect: Collect) -> None:
    """The replicator was started as `.venv/bin/python -m replicator`: its cure has that in front."""
    lost = structs.replace(READ, wal_status="lost")
    theirs = ". ".join(wal.danger(lost)).replace(PROGRAM, ".venv/bin/python -m replicator")
    server = await answering(msgspec.json.encode(live("s", theirs)))
    found = await collect(lost, FakeStore(CHECKPOINT), f"{server.host}:{server.port}")
    await server.close()
    assert [theirs] == found.reasons


@pytest.mark.parametrize("wal_status", ["unreserved", "lost"])
async def test_a_slot_in_danger_is_not_ready(collect: Collect, wal_status: str) -> None:
    """Whatever the replicator says."""
    found = await collect(structs.replace(READ, wal_status=wal_status), FakeStore(CHECKPOINT))
    [reason] = found.reasons
    assert f"WAL is {wal_status}" in reason


async def test_every_reason_has_a_line(collect: Collect) -> None:
    """PostgreSQL and the checkpoint database are away; each is said once."""
    store = FakeStore(error=CheckpointUnavailable(detail="disk full"))
    found = await collect(SourceUnavailable(detail="down"), store)
    assert not found.ready
    text = as_text(found)
    assert [1, 1] == [text.count(words) for words in ("is not reachable: down", "disk full")]
    assert text.startswith("replicator   NOT READY: PostgreSQL is not reachable: down")
    assert "\n             The checkpoint database fails: disk full" in text
    assert "\nslot         s: unknown\ncheckpoint   unknown\n" in text


def test_a_slow_sink_is_named() -> None:
    """Reading has stopped, nothing is in trouble: ready, with the sink that holds it up and what waits for it."""
    now = live()
    slow = structs.replace(now.sinks["redis"], trouble="", waiting=2_400, lag_seconds=1.512)
    healthy = structs.replace(slow, waiting=1)
    assert now.replicator
    stopped = structs.replace(now.replicator, reading_stopped=True, held_bytes=1_000_000)
    now = structs.replace(now, replicator=stopped, sinks={"clickhouse": healthy, "redis": slow})
    text = as_text(now)
    assert text.startswith("replicator   ready\n  reading stopped: 1.0 MB wait for sink redis\nslot ")
    assert "1.5 s behind, 1 event waiting\n" in text
    assert "1.5 s behind, 2400 events waiting\n" in text
    assert "reading stopped" not in as_text(live())
    assert max(map(len, text.splitlines())) < 80, "a terminal does not wrap it"


# --- the parts


async def test_an_unknown_lag_is_not_none(collect: Collect) -> None:
    """PostgreSQL does not answer: how far a sink is behind is unknown, in bytes and in seconds."""
    found = await collect(SourceUnavailable(detail="down"), FakeStore(CHECKPOINT))
    assert (None, None) == (found.sinks["redis"].lag_bytes, found.sinks["redis"].lag_seconds)
    assert '"lag_seconds": null' in as_json(found)
    assert "an unknown amount and an unknown time behind" in as_text(found)


async def test_lag_begins_at_the_newest_commit_that_all_have(
    collect: Collect,
) -> None:
    """Not when the checkpoint was saved: other sinks renew it while one has never written."""
    checkpoint = structs.replace(CHECKPOINT, committed_at=time.time() - 500, updated_at=time.time())
    lag_seconds = (await collect(READ, FakeStore(checkpoint))).sinks["redis"].lag_seconds
    assert lag_seconds is not None
    assert 500 <= lag_seconds < 550
    unknown = structs.replace(checkpoint, committed_at=0.0)
    assert (await collect(READ, FakeStore(unknown))).sinks["redis"].lag_seconds is None


async def test_a_sink_that_has_everything_has_no_lag(collect: Collect) -> None:
    """However long ago the last commit was."""
    sink = (await collect(structs.replace(READ, server_lsn=200), FakeStore(CHECKPOINT))).sinks["redis"]
    assert (0, 0.0) == (sink.lag_bytes, sink.lag_seconds)


async def test_a_sink_without_a_position(collect: Collect) -> None:
    """A new one; nothing is made up."""
    found = await collect(READ, FakeStore(structs.replace(CHECKPOINT, sinks={})))
    assert SinkStatus() == found.sinks["redis"]
    assert "sink         redis: no position yet\n" in as_text(found)


async def test_a_checkpoint_is_saved(collect: Collect) -> None:
    """On an idle database its position moves seldom; the age is that of the last save."""
    found = await collect(READ, FakeStore(structs.replace(CHECKPOINT, updated_at=time.time() - 100)))
    assert found.checkpoint.saved_seconds_ago is not None
    assert 100 <= found.checkpoint.saved_seconds_ago < 150
    assert f"checkpoint   0/C8, saved {found.checkpoint.saved_seconds_ago} s ago" in as_text(found)
    assert "checkpoint   none yet" in as_text(await collect(READ, FakeStore()))


@pytest.mark.parametrize(
    ("checkpoint", "cure"),
    [(None, "`python -m replicator init`"), (CHECKPOINT, "`python -m replicator init --accept-gap`")],
)
async def test_the_cure_of_a_missing_slot(collect: Collect, checkpoint: Checkpoint | None, cure: str) -> None:
    """With a checkpoint there is a gap, which plain `init` refuses to make a slot over."""
    found = await collect(None, FakeStore(checkpoint))
    assert not found.ready
    assert "does not exist" in found.slot.trouble
    assert cure in found.slot.trouble
    assert cure in as_text(found)


@pytest.mark.parametrize(
    ("wal_status", "safe_wal_size", "words"),
    [
        ("reserved", None, "16.8 MB, no limit (max_slot_wal_keep_size)"),
        ("reserved", 5_000_000, "16.8 MB, safe for 5.0 MB more"),
        ("unreserved", -5_000_000, "16.8 MB, no longer safe"),
        ("lost", None, "not all that the slot needs"),
    ],
)
async def test_how_long_the_wal_is_safe(
    collect: Collect, wal_status: str, safe_wal_size: int | None, words: str
) -> None:
    """No number means no limit, unless the slot is lost already."""
    state = structs.replace(STATE, wal_status=wal_status, safe_wal_size=safe_wal_size)
    assert f"WAL kept   {words}" in as_text(await collect(state, FakeStore(CHECKPOINT)))


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (FakeStore(), "none (at most 100000 of each sink)"),
        (FakeStore(letters=LetterCounts(rows=3, sinks={"http": 2})), "2 of http, 3 rows (at most 100000 of each sink)"),
        (FakeStore(error=CheckpointUnavailable(detail="down")), "unknown"),
    ],
)
async def test_dead_letters(collect: Collect, store: FakeStore, words: str) -> None:
    """Those that can't be counted are unknown, not none."""
    found = await collect(READ, store)
    assert as_text(found).endswith(f"\ndead letters {words}")
    assert ("unknown" in words) == (found.dead_letters is None)


# --- the forecast


def forecast(
    server: Callable[[float], int],
    restart: Callable[[float], int],
    last: float = 120,
    *,
    limit: int | None = 10**9,
    **others: object,
) -> WalStatus:
    """What is said after looks every 5 s, the server and what the slot needs being there."""
    sees, found = WalForecast(), WalStatus()
    for at in range(0, int(last) + 1, 5):
        safe = None if limit is None else limit - server(at) + restart(at)
        positions = {"server_lsn": server(at), "restart_lsn": restart(at), "safe_wal_size": safe}
        found = sees.see(structs.replace(READ, server_time=1_000.0 + at, **positions, **others))
    return found


def test_wal_that_grows_is_lost_in_a_time() -> None:
    """The slot stands still: as fast as the server writes."""
    found = forecast(lambda at: 10**6 + int(1_000 * at), lambda _: 10**6)
    assert (1_000.0, 1_000.0) == (found.written_bytes_per_second, found.growth_bytes_per_second)
    assert (10**9 - 120_000) / 1_000 == found.lost_in_seconds
    assert found.limit_bytes
    assert 10**9 <= found.limit_bytes <= 10**9 + STATE.segment_bytes


def test_a_slow_reader_loses_what_it_does_not_read() -> None:
    """Growth is what is written less what is let go."""
    found = forecast(lambda at: 10**6 + int(1_000 * at), lambda at: 10**6 + int(750 * at))
    assert (1_000.0, 250.0) == (found.written_bytes_per_second, found.growth_bytes_per_second)


def test_steps_are_no_growth() -> None:
    """WAL is let go every 15 s, and between two steps what is kept grows as fast as the server writes."""
    for last in range(35, 300, 5):
        found = forecast(lambda at: 10**6 + int(1_000 * at), lambda at: 10**6 + int(at // 15 * 15_000), last)
        assert (0, None) == (found.growth_bytes_per_second, found.lost_in_seconds), last


def test_catching_up_loses_nothing() -> None:
    """What is kept shrinks."""
    found = forecast(lambda at: 10**6 + int(1_000 * at), lambda at: 10**5 + int(3_000 * at))
    assert found.growth_bytes_per_second == pytest.approx(-2_000, rel=0.1)
    assert found.lost_in_seconds is None


def test_a_slot_that_nobody_reads_needs_two_looks() -> None:
    """Nothing lets its WAL go; a slot that is read needs some steps first."""
    grows = lambda at: 10**6 + int(1_000 * at)  # noqa: E731  a curve
    assert 1_000.0 == forecast(grows, lambda _: 10**6, 5, active_pid=None).growth_bytes_per_second
    assert forecast(grows, lambda _: 10**6, 25).growth_bytes_per_second is None


@pytest.mark.parametrize(
    ("wal_status", "limit", "seconds"), [("reserved", None, None), ("unreserved", 0, 0.0), ("lost", None, 0.0)]
)
def test_without_a_limit_and_past_it(wal_status: str, limit: int | None, seconds: float | None) -> None:
    """Without a limit nobody knows; past it, it is now."""
    found = forecast(lambda at: 10**6 + int(1_000 * at), lambda _: 10**6, limit=limit, wal_status=wal_status)
    assert seconds == found.lost_in_seconds
    assert (limit is None) == (found.limit_bytes is None)
    lost = structs.replace(READ, restart_lsn=None, wal_status="lost")
    assert WalStatus(lost_in_seconds=0.0) == WalForecast().see(lost)


def test_a_pause_and_a_trouble_have_lines_of_their_own() -> None:
    """A terminal of 80 columns wraps neither; what the first lines have said is not said again."""
    now = live("s", "sink http is away")
    sink = structs.replace(
        now.sinks["redis"], trouble_seconds=130.0, paused="sink redis is paused", paused_until="2026-01-08T10:00:00Z"
    )
    now = structs.replace(now, sinks={"redis": sink, "http": structs.replace(sink, trouble=now.reasons[0])})
    text = as_text(now)
    assert "\n  paused     until 2026-01-08T10:00:00Z\n  trouble    for 2 minutes: away\n" in text
    assert "\n  trouble    for 2 minutes\n" in text
    assert max(map(len, text.splitlines())) <= 80


async def test_an_age_that_is_a_bound_is_called_one(collect: Collect) -> None:
    """Of a paused sink, and of one that no replicator writes to: what it lacks may have been committed later."""
    now = live()
    redis = structs.replace(now.sinks["redis"], lag_seconds=1124.9)
    paused = structs.replace(redis, paused="sink redis is paused")
    text = as_text(structs.replace(now, sinks={"redis": redis, "http": paused}))
    assert " and 19 minutes behind" in text
    assert " and at most 19 minutes behind" in text
    checkpoint = structs.replace(CHECKPOINT, committed_at=time.time() - 500)
    assert " and at most 8 minutes behind" in as_text(await collect(READ, FakeStore(checkpoint)))


OUTLOOKS: Mapping[str, WalStatus] = {
    "not known yet": WalStatus(),
    "no longer safe": WalStatus(kept_bytes=9, limit_bytes=8, lost_in_seconds=0.0),
    "lost in 3 hours, growing by 1.0 MB/s": WalStatus(
        kept_bytes=1, limit_bytes=8, growth_bytes_per_second=1e6, lost_in_seconds=10_800.0
    ),
    "how fast it grows is not known yet": WalStatus(kept_bytes=1, limit_bytes=8),
    "safe: it does not grow": WalStatus(kept_bytes=1, limit_bytes=8, growth_bytes_per_second=-5.0),
    "no limit (max_slot_wal_keep_size); without a reader it fills the disk": WalStatus(kept_bytes=1),
    "no limit (max_slot_wal_keep_size); growing by 1.0 MB/s": WalStatus(kept_bytes=1, growth_bytes_per_second=1e6),
}


@pytest.mark.parametrize("said", OUTLOOKS)
def test_the_forecast_has_one_wording(said: str) -> None:
    """In whatever shows it: in the text, and as a warning, where it is about the slot."""
    wal_status = OUTLOOKS[said]
    assert said == outlook(wal_status)
    if wal_status.lost_in_seconds is not None:
        paused, _ = wal.loses_slot("http", Pause(until=time.time() + 20_000), wal_status)
        assert f"and the slot is {said} (max_slot_wal_keep_size)" in paused


def test_another_server_begins_a_new_forecast() -> None:
    """Its positions have nothing to do with those before."""
    sees = WalForecast()
    sees.see(structs.replace(STATE, server_time=10.0))
    found = sees.see(structs.replace(STATE, server_time=20.0, server_lsn=900))
    assert (None, None) == (found.written_bytes_per_second, found.growth_bytes_per_second)
    assert WalStatus() == sees.see(None)


async def test_status_looks_twice_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The WAL runs out while no replicator runs: `status` says when. One that runs knows better."""
    looks = iter(range(3))

    async def look(*_: object) -> slots.SlotState:
        seconds = next(looks)
        return structs.replace(
            STATE, server_time=100.0 + seconds, server_lsn=10**6 * (1 + seconds), safe_wal_size=10**10 - 10**6 * seconds
        )

    monkeypatch.setattr(slots, "look", look)
    settings = CoreSettings.model_validate({"slot": "s", "admin_listen": ""})
    monkeypatch.setattr(collects, "LOOKS_APART_SECONDS", 0)
    found = await collects.collect(settings, ["redis"], FakeStore(CHECKPOINT))  # type: ignore[arg-type]
    assert 10**6 == found.wal.growth_bytes_per_second
    assert "  forecast   lost in 3 hours, growing by 1.0 MB/s\n" in as_text(found)


async def test_a_replicator_that_runs_has_the_forecast(collect: Collect) -> None:
    """It has looked for minutes."""
    wal = WalStatus(kept_bytes=5, limit_bytes=9, lost_in_seconds=400.0, growth_bytes_per_second=0.01)
    server = await answering(msgspec.json.encode(structs.replace(live(), wal=wal)))
    found = await collect(READ, FakeStore(CHECKPOINT), f"{server.host}:{server.port}")
    await server.close()
    assert wal == found.wal


# --- the form


def _fields(of: inspect.Type, path: str = "") -> Iterator[str]:
    """Dotted names of every field; `*` stands for a sink's name."""
    if isinstance(of, inspect.UnionType):
        for each in of.types:
            if not isinstance(each, inspect.NoneType):
                yield from _fields(each, path)
    elif isinstance(of, inspect.DictType) and isinstance(of.value_type, inspect.StructType):
        yield from _fields(of.value_type, f"{path}.*")
    elif isinstance(of, inspect.StructType):
        for field in of.fields:
            yield from _fields(field.type, f"{path}.{field.encode_name}")
    else:
        yield path.removeprefix(".")


def test_the_json_form_is_the_one_in_the_reference() -> None:
    """Every field has its line in the document, and no line is about a field that there is not."""
    documented = re.findall(r"^\| `([^`]+)`", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    fields = [*dict.fromkeys(_fields(inspect.type_info(Status)))]
    assert fields == documented


async def test_what_is_printed_is_a_status(collect: Collect) -> None:
    """Nothing more, nothing less: a program that decodes it and writes it again has the same."""
    server = await answering(msgspec.json.encode(live("s", "sink redis is away")))
    found = await collect(READ, FakeStore(CHECKPOINT), f"{server.host}:{server.port}")
    await server.close()
    text = as_json(found)
    again = msgspec.json.decode(text, type=Status)
    assert found == again
    assert msgspec.json.decode(text) == msgspec.to_builtins(again)


@pytest.mark.parametrize(
    ("kept", "limit", "lost_in", "told"),
    [
        (50, None, None, False),
        (50, 100, None, False),
        (80, 100, None, True),
        (50, 100, 3_000.0, True),
        (50, 100, 7_300.0, False),
        (10, 100, 600.0, False),
        (99, 100, 0.0, True),
    ],
)
def test_wal_that_runs_out_is_a_warning(kept: int, limit: int | None, lost_in: float | None, *, told: bool) -> None:
    """Near its limit, or soon there; not for a burst while hardly any of it is used."""
    mega = 1_000_000
    found = wal.running_out(
        WalStatus(kept_bytes=kept * mega, limit_bytes=limit and limit * mega, lost_in_seconds=lost_in)
    )
    assert told == bool(found[0])
    if told:
        assert f"PostgreSQL keeps {kept}.0 MB of WAL for the slot, and at most 100.0 MB" in found[0]
        assert "max_slot_wal_keep_size" in found[1]


def test_that_nobody_is_told_is_shown() -> None:
    """A line only while it is so."""
    well = structs.replace(live(), notifications=NotificationStatus(sent=3))
    assert "notify" not in as_text(well)
    told = NotificationStatus(trouble="it answered 404", waiting=2, lost=1, heartbeat_trouble="gone")
    shown = as_text(structs.replace(live(), notifications=told))
    assert shown.endswith("notify       2 waiting, 1 lost: it answered 404\nheartbeat    gone")


@pytest.mark.parametrize(
    ("name", "where"),
    [("", "127.0.0.1:9: the replicator does not run there"), ("ours", "ours: the replicator does not run here")],
)
async def test_whoever_does_not_answer_is_named_without_a_secret(name: str, where: str) -> None:
    """An address of elsewhere is there, with or without a password in front of it."""
    found = await collects.ask_address("http://user:planted-secret@127.0.0.1:9", name)
    assert (None, f"no answer at {where}") == found
