"""Why the stream is not read with psycopg2: its cursor confirms positions that its user has not saved.

Both readers below follow the same transactions, each on a slot of its own, and both do what a careful program does:
they confirm a position only after they have saved everything up to it. psycopg2 then confirms more by itself: when a
keepalive arrives and `explicitly_flushed_lsn >= last_msg_data_start`, it takes the server's position as flushed
(`pq_read_replication_message` in psycopg2's pqpath.c). `docs/decisions.md` draws the conclusion.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import psycopg2.extras
import pytest

from devstack.process import wait_until
from replicator.contracts.events import Lsn, parse_lsn
from replicator.source.stream import Source
from tests.support.load import insert_many

TABLE = "public.engagement_events"


class Reader(ABC):
    """Reads a slot; confirms only in `save`."""

    def __init__(self, dsn: str, slot: str) -> None:
        self.dsn = dsn
        self.slot = slot
        self.received: list[str] = []
        """The `event_type` of every row received."""

    @abstractmethod
    def pump(self) -> None:
        """Send feedback, ask for a keepalive, and read what is there."""

    @abstractmethod
    def save(self) -> None:
        """Everything received is on disk now: confirm it to PostgreSQL."""

    @abstractmethod
    def close(self) -> None:
        """Drop the connection; may be called twice. Nothing more is confirmed."""

    def wait_for(self, last: str) -> None:
        """Read until a row of that type has arrived."""

        def arrived() -> bool:
            self.pump()
            return last in self.received

        wait_until(arrived, f"{self.slot} to receive {last}")


class Psycopg2Reader(Reader):
    """psycopg2's replication cursor, used as its documentation says."""

    def __init__(self, dsn: str, slot: str, *, markers: bool) -> None:
        super().__init__(dsn, slot)
        self._connection = psycopg2.connect(dsn, connection_factory=psycopg2.extras.LogicalReplicationConnection)
        self._cursor = self._connection.cursor()
        include = "true" if markers else "false"
        options = {"format-version": "2", "add-tables": TABLE, "include-transaction": include}
        self._cursor.start_replication(slot_name=slot, decode=True, options=options)
        self._last: Lsn = 0

    def pump(self) -> None:
        """`read_message` never waits."""
        self._cursor.send_feedback(reply=True, force=True)
        while (message := self._cursor.read_message()) is not None:
            self._last = max(self._last, message.data_start)
            change = json.loads(message.payload)
            if change["action"] == "I":
                columns = {column["name"]: column["value"] for column in change["columns"]}
                self.received.append(columns["event_type"])

    def save(self) -> None:
        """Up to the last message, as psycopg2's example does."""
        self._cursor.send_feedback(flush_lsn=self._last, force=True)

    def close(self) -> None:
        """Drop the connection."""
        self._connection.close()


class OurReader(Reader):
    """The replicator's own `Source`."""

    def __init__(self, dsn: str, slot: str) -> None:
        super().__init__(dsn, slot)
        self._runner = asyncio.Runner()
        self._source = Source(dsn, slot)
        self._runner.run(self._source.connect())
        self._runner.run(self._source.start(0, [("public", "engagement_events")]))

    def pump(self) -> None:
        """`read` waits for something: the keepalive comes."""
        self._source.send_feedback(ask=True)
        chunk = self._runner.run(self._source.read())
        self.received += [str(row.columns[3].value) for row in chunk.rows]

    def save(self) -> None:
        """Up to the end of the last transaction."""
        self._source.send_feedback(self._source.received)

    def close(self) -> None:
        """On return PostgreSQL has read the last feedback."""
        if self._source.connected:
            self._runner.run(self._source.finish())
        self._runner.close()

    def has_reached(self, lsn: Lsn) -> bool:
        """Whether the server has sent everything up to there."""
        return self._source.received >= lsn


def _pump_until(condition: Callable[[], bool], *readers: Reader) -> None:
    """Exchange feedback and keepalives until the condition holds, and once more with what was learned last."""

    def holds() -> bool:
        for reader in readers:
            reader.pump()
        return condition()

    wait_until(holds, "the keepalives to do their work")
    for reader in readers:
        reader.pump()


@pytest.fixture
def slots(database: str, source: psycopg.Connection) -> list[str]:
    """A slot for psycopg2 and one for us, made at the same point of the same stream."""
    names = [f"{database.rpartition('/')[2]}_{reader}" for reader in ("psycopg2", "ours")]
    for name in names:
        source.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [name])
    return names


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    """Closes readers, whatever happens."""
    with ExitStack() as stack:
        yield stack


def _confirmed(source: psycopg.Connection, slot: str) -> Lsn:
    query = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s"
    [lsn] = source.execute(query, [slot]).fetchone() or ("0/0",)
    return parse_lsn(lsn)


def _server_lsn(source: psycopg.Connection) -> Lsn:
    [lsn] = source.execute("SELECT pg_current_wal_lsn()").fetchone() or ("0/0",)
    return parse_lsn(lsn)


def _wait_until_free(source: psycopg.Connection, names: list[str]) -> None:
    query = "SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = ANY(%s)"
    wait_until(lambda: source.execute(query, [names]).fetchone() == (0,), "the slots to be free")


def test_a_transaction_that_nobody_saved_is_confirmed(
    database: str, source: psycopg.Connection, slots: list[str], closing: ExitStack
) -> None:
    """A transaction that began first and commits last: psycopg2 confirms it unsaved, and it never comes again.

    Without transaction markers its rows carry LSNs below the one that was confirmed for the transaction that overtook
    it, so psycopg2 takes them for flushed. `Source` leaves PostgreSQL at what was saved, and receives the rows again.
    """
    theirs, ours = Psycopg2Reader(database, slots[0], markers=False), OurReader(database, slots[1])
    for reader in (theirs, ours):
        closing.callback(reader.close)
    with psycopg.connect(database) as long:
        insert_many(long, 1, "long")
        insert_many(source, 1, "short")
        for reader in (theirs, ours):
            reader.wait_for("short")
            reader.save()
    committed = _server_lsn(source)  # `long` has been committed
    for reader in (theirs, ours):
        reader.wait_for("long")  # and is not saved
    _pump_until(lambda: _confirmed(source, slots[0]) >= committed and ours.has_reached(committed), theirs, ours)

    for reader in (theirs, ours):
        reader.close()
    assert _confirmed(source, slots[0]) >= committed > _confirmed(source, slots[1])

    _wait_until_free(source, slots)
    insert_many(source, 1, "after")
    again = (Psycopg2Reader(database, slots[0], markers=False), OurReader(database, slots[1]))
    for reader in again:
        closing.callback(reader.close)
        reader.wait_for("after")
    assert [["after"], ["long", "after"]] == [reader.received for reader in again]


def test_a_position_is_confirmed_before_anything_was_received(
    database: str, source: psycopg.Connection, slots: list[str], closing: ExitStack
) -> None:
    """Markers do not prevent this: psycopg2 has received nothing and saved nothing, 0 >= 0, and the slot moves.

    No row is lost by it. But a slot that is past the checkpoint is also what remains after someone else has read the
    slot or made it again, so a real gap could not be told from a normal restart.
    """
    theirs, ours = Psycopg2Reader(database, slots[0], markers=True), OurReader(database, slots[1])
    for reader in (theirs, ours):
        closing.callback(reader.close)
    before = [_confirmed(source, slot) for slot in slots]
    source.execute("SELECT pg_switch_wal()")  # WAL without a transaction
    server = _server_lsn(source)
    _pump_until(lambda: _confirmed(source, slots[0]) > before[0] and ours.has_reached(server), theirs, ours)

    for reader in (theirs, ours):
        reader.close()
    assert [[], []] == [theirs.received, ours.received]
    assert before[0] < _confirmed(source, slots[0])
    assert before[1] == _confirmed(source, slots[1])
