"""The source against a real PostgreSQL: what is confirmed is exactly what was given, and how a stream ends."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

import psycopg
import pytest
import pytest_asyncio

from devstack import DevStack
from replicator.contracts.enricher import Shortcut
from replicator.contracts.errors import SlotInUse, SourceUnavailable, SourceUnusable
from replicator.contracts.events import Event, Lsn, Row, parse_lsn
from replicator.contracts.sink import Carrier
from replicator.source import stream
from replicator.source.stream import Source
from tests.support import environment as ground

TABLES = (("public", "content"), ("public", "engagement_events"))
INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, %s, 'play')"


class Client:
    """Writes to the source database and looks at its slot."""

    def __init__(self, dsn: str, slot: str) -> None:
        self.dsn = dsn
        self.slot = slot
        self.connection = psycopg.connect(dsn, autocommit=True)

    def insert(self, user_id: int) -> None:
        """One event, committed."""
        self.connection.execute(INSERT, [user_id])

    def confirmed(self) -> Lsn:
        """What PostgreSQL takes for flushed."""
        query = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s"
        [(text,)] = self.connection.execute(query, [self.slot]).fetchall()
        return parse_lsn(text)

    def readers(self) -> list[int]:
        """Processes that read the slot."""
        query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s AND active_pid IS NOT NULL"
        return [pid for (pid,) in self.connection.execute(query, [self.slot])]

    def cut_off(self) -> None:
        """End the process that reads the slot."""
        self.connection.execute("SELECT pg_terminate_backend(%s)", self.readers())

    def plugins_named(self) -> bool:
        """Whether this PostgreSQL loads only plugins that it was told of (15.19, 16.15, 17.11, 18.6 and later)."""
        query = "SELECT count(*) FROM pg_settings WHERE name = 'output_plugin_libraries'"
        return self.connection.execute(query).fetchone() == (1,)

    def allowing(self, plugins: str) -> str:
        """A DSN whose connections may use these plugins alone, where the server asks."""
        return f"{self.dsn}?options=-c%20output_plugin_libraries%3D{plugins}" if self.plugins_named() else self.dsn

    async def until_confirmed(self, lsn: Lsn) -> None:
        """Wait for PostgreSQL to have read our feedback."""
        async with asyncio.timeout(10):
            while self.confirmed() != lsn:  # noqa: ASYNC110  the server has no event for it
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def client(database: str) -> AsyncIterator[Client]:
    """A writer, and the name of a slot of this test's own."""
    made = Client(database, f"source_{uuid.uuid4().hex[:12]}")
    yield made
    made.connection.close()


@pytest_asyncio.fixture
async def source(client: Client) -> AsyncIterator[Source]:
    """A source whose slot was just made and whose stream runs from there."""
    made = Source(client.dsn, client.slot)
    await made.connect()
    await made.create_slot()
    await made.start(client.confirmed(), TABLES)
    yield made
    made.close()


async def test_postgresql_gets_memory_for_decoding(client: Client) -> None:
    """The session that decodes has what the setting says, in place of the server's own."""
    source = Source(client.dsn, client.slot, decoding_memory_mb=256)
    await source.connect()
    try:
        assert await source._ask("SHOW logical_decoding_work_mem") == [("256MB",)]  # noqa: SLF001  only it sees its session
    finally:
        source.close()


async def test_postgresql_shows_who_carries_the_writes(client: Client) -> None:
    """Beside the slot's name."""
    source = Source(client.dsn, client.slot, carrier=Carrier(name="Spark at local[2]"))
    await source.connect()
    try:
        assert await source._ask("SHOW application_name") == [(f"replicator {client.slot} on Spark at local[2]",)]  # noqa: SLF001  as above
    finally:
        source.close()


async def read_users(source: Source, *wanted: int) -> Lsn:
    """Read until the events of these users, in this order, have come; the end of the last one's transaction."""
    users: list[int] = []
    async with asyncio.timeout(10):
        while True:
            chunk = await source.read()
            users += [_user(row) for row in chunk.rows]
            if len(users) >= len(wanted) and chunk.mark.end_lsn > chunk.mark.position.commit_lsn:
                assert list(wanted) == users
                return chunk.mark.end_lsn


def _user(row: Row) -> int:
    [user] = [column.value for column in row.columns if column.name == "user_id"]
    return int(user)


async def keepalive(source: Source, after: Lsn = 0) -> Lsn:
    """Ask for keepalives until one has brought the stream past this position; where it is then."""
    async with asyncio.timeout(10):
        while True:
            source.send_feedback(ask=True)
            end_lsn = (await source.read()).mark.end_lsn
            if end_lsn > after:
                return end_lsn


async def _read_for_ever(source: Source) -> None:
    while True:
        await source.read()


async def test_the_slot_moves_to_what_was_given_and_never_by_itself(source: Source, client: Client) -> None:
    """Neither rows that were read nor keepalives with an answer move it; a position moves it exactly there."""
    before = client.confirmed()
    client.insert(1)
    end_lsn = await read_users(source, 1)
    idle_lsn = end_lsn
    for _ in range(3):
        client.connection.execute("SELECT pg_logical_emit_message(false, 'test', 'WAL that is not ours')")
        idle_lsn = await keepalive(source, after=idle_lsn)
    assert before == client.confirmed()
    source.send_feedback(end_lsn)
    await client.until_confirmed(end_lsn)
    client.connection.execute("SELECT pg_logical_emit_message(false, 'test', 'and more of it')")
    await keepalive(source, after=idle_lsn)
    assert end_lsn == client.confirmed()


async def test_silence_is_counted_from_the_last_message(source: Source, client: Client) -> None:
    """From the stream's beginning until something comes; none without a connection."""
    await asyncio.sleep(0.2)
    assert 0.2 <= source.silent_seconds < 10
    silent = source.silent_seconds
    client.insert(1)
    await read_users(source, 1)
    assert source.silent_seconds < silent
    source.close()
    assert source.silent_seconds == 0.0


async def test_a_position_that_can_not_be_is_an_error(source: Source, client: Client) -> None:
    """One that goes back, and one that was never received."""
    client.insert(1)
    end_lsn = await read_users(source, 1)
    source.send_feedback(end_lsn)
    for impossible in (end_lsn - 1, end_lsn + 1_000_000_000):
        with pytest.raises(ValueError, match="outside what can be"):
            source.send_feedback(impossible)
    assert end_lsn == source.confirmed


async def test_the_last_feedback_is_read_before_the_goodbye_returns(source: Source, client: Client) -> None:
    """`finish` is why a restart after SIGTERM repeats nothing."""
    client.insert(1)
    end_lsn = await read_users(source, 1)
    source.send_feedback(end_lsn)
    await source.finish()
    assert end_lsn == client.confirmed()
    assert not source.connected


async def test_an_older_transaction_that_commits_later_is_sent_again(source: Source, client: Client) -> None:
    """Two interleaved, a keepalive between their commits, all of it confirmed, and then the stream is cut off."""
    with psycopg.connect(client.dsn) as older:
        older.execute(INSERT, [1])
        client.insert(2)
        await read_users(source, 2)
        confirmed = await keepalive(source)
        source.send_feedback(confirmed)
        await client.until_confirmed(confirmed)
        older.execute(INSERT, [3])
    await read_users(source, 1, 3)
    client.cut_off()
    with pytest.raises(SourceUnavailable):
        await read_users(source, 0)
    await source.connect()
    await source.start(confirmed, TABLES)
    await read_users(source, 1, 3)


async def test_a_stream_that_is_cut_off_is_unavailable(source: Source, client: Client) -> None:
    """The reader waits and is told why; afterwards there is no connection, and feedback has no effect."""
    await keepalive(source)
    reading = asyncio.create_task(_read_for_ever(source))
    await asyncio.sleep(0.05)
    client.cut_off()
    with pytest.raises(SourceUnavailable, match="terminating connection"):
        await asyncio.wait_for(reading, 10)
    assert not source.connected
    source.send_feedback()


class Breaking:
    """A connection of libpq that breaks after so many messages that are no keepalives."""

    def __init__(self, pgconn: Any, messages: int) -> None:
        self._pgconn = pgconn
        self._left = messages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pgconn, name)

    def get_copy_data(self, wait: int) -> tuple[int, memoryview]:
        """The next message."""
        if not self._left:
            raise psycopg.OperationalError("the connection broke")
        length, data = self._pgconn.get_copy_data(wait)
        self._left -= data[:1] == b"w"
        return length, data


async def test_events_of_a_stretch_that_breaks_come_again(source: Source, client: Client) -> None:
    """What was made of its first rows is given up with them: each comes once, with the same position."""

    def shortcut() -> Shortcut:
        return lambda payload, commit_lsn, ordinal: Event(commit_lsn, ordinal, len(payload), 1, 0, b"")

    confirmed = client.confirmed()
    client.connection.execute(f"{INSERT}, (1, 2, 'play'), (1, 3, 'play')", [1])
    source._pgconn = cast("Any", Breaking(source._pgconn, 3))  # noqa: SLF001  `B` and two rows: no server breaks so exactly
    source._shortcut = shortcut  # noqa: SLF001
    with pytest.raises(SourceUnavailable, match="the connection broke"):
        await asyncio.wait_for(_read_for_ever(source), 10)
    assert [1, 2] == [event.ordinal for event in source._decoder.events]  # noqa: SLF001
    await source.connect()
    await source.start(confirmed, TABLES, shortcut)
    events: list[Event] = []
    async with asyncio.timeout(10):
        while len(events) < 3:
            chunk = await source.read()
            assert [] == chunk.rows
            events += chunk.events
    assert [1, 2, 3] == [event.ordinal for event in events]


async def test_a_socket_that_libpq_has_closed_wakes_the_reader(source: Source) -> None:
    """As when sending feedback meets a dead connection: a closed descriptor never becomes readable."""
    await keepalive(source)
    reading = asyncio.create_task(_read_for_ever(source))
    await asyncio.sleep(0.05)
    assert source._connection is not None  # noqa: SLF001  libpq's own doing can't be had on demand
    source._connection.pgconn.finish()  # noqa: SLF001
    source.send_feedback()
    with pytest.raises(SourceUnavailable):
        await asyncio.wait_for(reading, 10)


async def test_waiting_for_an_idle_server_costs_nothing(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is looked at when something comes, not over and over."""
    await keepalive(source)
    looks = 0
    look = source._read_available  # noqa: SLF001  a spin is not visible from outside, but for the heat

    def counted() -> int:
        nonlocal looks
        looks += 1
        return look()

    monkeypatch.setattr(source, "_read_available", counted)
    reading = asyncio.create_task(_read_for_ever(source))
    await asyncio.sleep(0.5)
    reading.cancel()
    await asyncio.wait([reading])
    assert looks < 50


async def test_a_slot_has_one_reader(source: Source, client: Client) -> None:
    """The second one is told who has it, and gets it when that one is gone."""
    standby = Source(client.dsn, client.slot)
    try:
        await standby.connect()
        with pytest.raises(SlotInUse, match=f"held by process {client.readers()[0]}"):
            await standby.start(client.confirmed(), TABLES)
        with pytest.raises(SlotInUse):
            await standby.drop_slot()
        await source.finish()
        await standby.connect()
        await standby.start(client.confirmed(), TABLES)
        assert standby.connected
    finally:
        standby.close()


async def test_a_slot_that_vanished_is_looked_for_again(client: Client) -> None:
    """The next look says that it is missing, with the cure; the stream alone can't know why."""
    source = Source(client.dsn, client.slot)
    try:
        _, state = await source.connect()
        assert state is None
        with pytest.raises(SourceUnavailable, match="does not exist"):
            await source.start(0, TABLES)
    finally:
        source.close()


async def test_a_missing_plugin_names_its_package(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is not there: trying again is no cure."""
    monkeypatch.setattr(stream, "PLUGIN", "no_such_plugin")
    source = Source(client.allowing("no_such_plugin"), client.slot)
    try:
        await source.connect()
        with pytest.raises(SourceUnusable, match="Install wal2json"):
            await source.create_slot()
    finally:
        source.close()


async def test_a_plugin_that_was_not_named_names_the_setting(client: Client) -> None:
    """A PostgreSQL that loads only the plugins in output_plugin_libraries: the cure keeps those that are there."""
    if not client.plugins_named():
        pytest.skip("this PostgreSQL loads any plugin")
    source = Source(client.allowing("pgoutput"), client.slot)
    try:
        await source.connect()
        with pytest.raises(SourceUnusable, match="libraries = 'pgoutput', 'wal2json'; SELECT pg_reload"):
            await source.create_slot()
    finally:
        source.close()


async def test_a_list_of_plugins_that_may_not_be_looked_at(stack: DevStack, client: Client) -> None:
    """A plain role sees none of it: the cure begins with the default, and says to look."""
    if not client.plugins_named():
        pytest.skip("this PostgreSQL loads any plugin")
    client.connection.execute("ALTER SYSTEM SET output_plugin_libraries = 'pgoutput'")
    client.connection.execute("SELECT pg_reload_conf()")
    source = Source(ground.plain_role(stack, client.dsn), client.slot)
    try:
        await source.connect()
        with pytest.raises(SourceUnusable, match=r"'pgoutput', 'test_decoding', 'wal2json'; .*a superuser sees in"):
            await source.create_slot()
    finally:
        source.close()
        client.connection.execute("ALTER SYSTEM RESET output_plugin_libraries")
        client.connection.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize("ahead", [0, 3600, -3600])
async def test_a_clock_that_is_wrong_is_seen(client: Client, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Each look compares ours with the server's; how long its answer takes is no difference."""
    source, now = Source(client.dsn, client.slot), time.time
    try:
        await source.connect()
        monkeypatch.setattr("replicator.source.slot.time.time", lambda: now() + ahead)
        state = await source.create_slot()
    finally:
        source.close()
    assert state is not None
    assert state.clock_ahead_seconds == pytest.approx(ahead, abs=5)
    assert ahead or not state.clock_ahead_seconds


async def test_a_new_slot_that_waits_can_be_given_up(client: Client) -> None:
    """It waits for the transactions that run; a stop meanwhile leaves neither slot nor connection behind."""
    source = Source(client.dsn, client.slot)
    with psycopg.connect(client.dsn) as running:
        running.execute(INSERT, [1])
        await source.connect()
        making = asyncio.create_task(source.create_slot())
        async with asyncio.timeout(10):
            while not client.readers():  # noqa: ASYNC110  the server has no event for it
                await asyncio.sleep(0.01)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        source.close()
        query = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
        async with asyncio.timeout(10):
            while client.connection.execute(query, [client.slot]).fetchall() != [(0,)]:  # noqa: ASYNC110  nor for this
                await asyncio.sleep(0.01)


async def test_a_connection_lost_while_the_slot_is_made_is_unavailable(client: Client) -> None:
    """PostgreSQL restarts just then: tried again, not the end of the program."""
    source = Source(client.dsn, client.slot)
    with psycopg.connect(client.dsn) as running:
        running.execute(INSERT, [1])
        await source.connect()
        making = asyncio.create_task(source.create_slot())
        async with asyncio.timeout(10):
            while not client.readers():  # noqa: ASYNC110  the server has no event for it
                await asyncio.sleep(0.01)
        client.cut_off()
        with pytest.raises(SourceUnavailable):
            await making
    source.close()


@pytest.mark.parametrize("wrong", [{"user": "nobody", "password": "wrong!"}, {"port": 1}, {"dbname": "no_such"}])
async def test_a_server_that_turns_us_away_is_unavailable(client: Client, wrong: dict[str, str | int]) -> None:
    """Said in one line, without the password."""
    source = Source(psycopg.conninfo.make_conninfo(client.dsn, **wrong), client.slot)
    with pytest.raises(SourceUnavailable) as caught:
        await source.connect()
    assert "\n" not in str(caught.value)
    assert "wrong!" not in str(caught.value)
    source.close()
