"""The replicator within another program: the one of docs/streams/library.md, and several in this process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from devstack.process import wait_until
from enrichment import EVENT
from replicator import Event, Refusal, Replicator, ReplicatorError, Settings, Sink, SinkContext, SinkUnavailable
from tests.support.environment import ROLE
from tests.support.program import ROOT

ORDERS = ROOT / "examples/orders"
NEW = "INSERT INTO shop.orders (customer_id, total, lines) VALUES (1, %s, '[]')"
PLAYED = """INSERT INTO engagement_events (id, content_id, user_id, event_type)
            SELECT n, 1, n, 'play' FROM generate_series(%s::int, %s) n"""
CONFIRMED = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
ACTIVE = "SELECT active FROM pg_replication_slots WHERE slot_name = 'embedded'"


class Embedded:
    """The page's program, as it stands there."""

    def __init__(self, folder: Path, dsn: str) -> None:
        page = (ROOT / "docs/streams/library.md").read_text(encoding="utf-8")
        program, _ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        (folder / "embedded.py").write_text(program, encoding="utf-8")
        shutil.copy(ORDERS / "orders_stream.py", folder)
        outside = {name: value for name, value in os.environ.items() if not name.startswith("REPLICATOR_")}
        ours = {"REPLICATOR_POSTGRES_DSN": dsn, "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(ROOT)}
        self._environment, self._folder = {**outside, **ours}, folder
        self.printed, self.said = folder / "printed", folder / "said"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """`python embedded.py >> printed`, from a new line on: a kill may have cut one off."""
        with self.printed.open("ab") as out, self.said.open("ab") as err:
            out.write(b"\n")
            out.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "embedded.py"],
                cwd=self._folder,
                env=self._environment,
                stdout=out,
                stderr=err,
            )

    def end(self, number: int) -> None:
        """With this signal."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Of the program, beside it."""
        ours = {"STREAM": "orders_stream:STREAM", "SLOT": "embedded", "SINKS": "stdout", "ADMIN_LISTEN": ""}
        environment = self._environment | {f"REPLICATOR_{name}": value for name, value in ours.items()}
        command = [sys.executable, "-m", "replicator", *arguments]
        return subprocess.run(
            command, cwd=self._folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    def totals(self) -> list[int]:
        """Of the orders that it has printed, without repeats."""
        lines = (line for line in self.printed.read_bytes().split(b"\n") if line.endswith(b"}"))
        return sorted({int(json.loads(line)["total"]) for line in lines})


@pytest.fixture
def embedded(tmp_path: Path, plain_dsn: str, source: psycopg.Connection) -> Iterator[Embedded]:
    """With the example's tables."""
    source.execute((ORDERS / "schema.sql").read_bytes())
    role = sql.Identifier(ROLE)
    source.execute(sql.SQL("GRANT USAGE ON SCHEMA shop TO {}").format(role))
    source.execute(sql.SQL("GRANT SELECT ON shop.orders, shop.customers TO {}").format(role))
    made = Embedded(tmp_path, plain_dsn)
    source.execute("INSERT INTO shop.customers VALUES (1, 'one', 'DE', 19)")
    yield made
    made.end(signal.SIGKILL)
    print(made.said.read_text(encoding="utf-8"))  # noqa: T201  shown when the test fails


def is_true(source: psycopg.Connection, query: str, *values: str) -> bool:
    """What one row says."""
    return bool((source.execute(query.encode(), values).fetchone() or [False])[0])


def end_of_wal(source: psycopg.Connection) -> str:
    """What is committed now is before it."""
    return str(source.execute("SELECT pg_current_wal_flush_lsn()::text").fetchall()[0][0])


def test_the_ten_lines(embedded: Embedded, source: psycopg.Connection) -> None:
    """Killed and started again it has lost nothing; interrupted it saves what it has. Commands work beside it."""
    embedded.start()
    wait_until(lambda: is_true(source, ACTIVE), "the stream")
    for total in range(300):
        source.execute(NEW, [total])
        if total == 100:
            wait_until(lambda: len(embedded.totals()) > 20, "orders to be printed")
            embedded.end(signal.SIGKILL)
        if total == 200:
            embedded.start()
    wait_until(lambda: list(range(300)) == embedded.totals(), "every order to be printed")
    found = embedded.command("status", "--json")
    assert (0, "") == (found.returncode, found.stderr)
    assert json.loads(found.stdout)["slot"]["active_pid"]
    end = end_of_wal(source)
    embedded.end(signal.SIGINT)
    assert is_true(source, CONFIRMED, end, "embedded")
    assert embedded.said.read_text(encoding="utf-8").rstrip().endswith("KeyboardInterrupt")


@dataclass
class Kept:
    """What a program gives its sink."""

    ids: list[int] = field(default_factory=list)
    is_full: bool = False


class Keeper(Sink):
    """Keeps ids."""

    name, max_events = "keeper", 100

    def __init__(self, settings: Settings, context: SinkContext, kept: Kept) -> None:
        super().__init__(settings, context)
        self._kept = kept

    async def write(self, events: Sequence[Event]) -> Sequence[Refusal]:
        """In what the program gave it."""
        if self._kept.is_full:
            raise SinkUnavailable(sink=self.name, detail="it is full")
        self._kept.ids += [int(event.id) for event in events]
        return []


def keeper(kept: Kept) -> Callable[..., Keeper]:
    """As the page says."""
    return partial(Keeper, kept=kept)


async def until(condition: Callable[[], bool]) -> None:
    """Beside whatever runs in this loop."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  a database and a list say nothing by themselves
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(replicator: Replicator) -> AsyncIterator[asyncio.Task[None]]:
    """Ready."""
    task = asyncio.create_task(replicator.run())
    await until(lambda: replicator.status().ready or task.done())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("empty_directory")
async def test_two_in_one_process(plain_dsn: str, source: psycopg.Connection) -> None:
    """Each with a slot of its own; one is stopped, the other cancelled, and both have saved where they are."""
    kept, others = Kept(), Kept()
    checkpoint, slots = "sqlite:///checkpoint.db", [f"library_{n}_{os.getpid()}" for n in (1, 2)]
    first = Replicator(EVENT, keeper(kept), postgres_dsn=plain_dsn, slot=slots[0], checkpoint_url=checkpoint)
    second = Replicator(EVENT, keeper(others), postgres_dsn=plain_dsn, slot=slots[1], checkpoint_url=checkpoint)
    async with running(first) as one, running(second) as two:
        await asyncio.to_thread(source.execute, PLAYED, [1, 1_000])
        await until(lambda: len(kept.ids) >= 1_000)
        assert [1_000] == [sink.events for sink in first.status().sinks.values()]
        first.stop()
        await one
        assert not first.status().ready
        await asyncio.to_thread(source.execute, PLAYED, [1_001, 1_500])
        await until(lambda: len(others.ids) >= 1_500)
        end = end_of_wal(source)
        two.cancel()
        with pytest.raises(asyncio.CancelledError):
            await two
        assert is_true(source, CONFIRMED, end, slots[1])
        assert not is_true(source, CONFIRMED, end, slots[0])
    assert list(range(1, 1_001)) == sorted(kept.ids)
    again = Replicator(EVENT, keeper(kept), postgres_dsn=plain_dsn, slot=slots[0], checkpoint_url=checkpoint)
    async with running(again):
        await until(lambda: len(kept.ids) >= 1_500)
    assert list(range(1, 1_501)) == sorted(kept.ids)


@pytest.mark.usefixtures("empty_directory")
async def test_what_a_sink_lacks_is_not_green(plain_dsn: str, source: psycopg.Connection) -> None:
    """A sink that turns it away is a reason; what it could not write when it was cancelled is not confirmed."""
    kept = Kept()
    made = Replicator(EVENT, keeper(kept), postgres_dsn=plain_dsn, slot=f"library_{os.getpid()}")
    async with running(made) as task:
        kept.is_full = True
        await asyncio.to_thread(source.execute, PLAYED, [1, 10])
        end = end_of_wal(source)
        await until(lambda: bool(made.status().sinks["keeper"].trouble))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not is_true(source, CONFIRMED, end, f"library_{os.getpid()}")


@pytest.mark.usefixtures("empty_directory")
def test_its_errors_are_the_products(plain_dsn: str) -> None:
    """Of `run`, not of the interpreter; and the loop can end at once."""
    made = Replicator(
        EVENT, keeper(Kept()), postgres_dsn=plain_dsn, slot=f"library_{os.getpid()}", checkpoint_url="sqlite:////"
    )
    began = time.monotonic()
    with pytest.raises(ReplicatorError, match="The checkpoint database can't be used"):
        asyncio.run(made.run())
    assert time.monotonic() - began < 20
