"""Sole owner of the replication connection: START_REPLICATION, messages in, status updates out.

Speaks the streaming replication protocol over libpq (psycopg.pq) itself, so that the flushed position is only ever
what `send_feedback` was given: psycopg2's replication cursor moves it on its own on a keepalive (see
`pq_read_replication_message` in psycopg2's pqpath.c). `wal2json.py` decodes the messages, `slot.py` looks at the slot,
`pipeline.py` decides what is confirmed. Protocol: PostgreSQL's documentation, "Streaming Replication Protocol".

It is read in stretches: everything that the socket holds, up to `CHUNK_EVENTS`, before the sinks get their turn. Small
stretches cost more (100 messages: twice the CPU a row); larger ones hold up the sinks' answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import LiteralString

import psycopg
from psycopg import errors, generators, pq, sql
from psycopg.rows import TupleRow

from replicator.contracts.enricher import Shortcut
from replicator.contracts.errors import DecodeError, SlotWaits, SourceStandby, SourceUnavailable
from replicator.contracts.events import Lsn, format_lsn
from replicator.contracts.sink import Carrier
from replicator.source import slot as slots
from replicator.source.breaks import Breaks, end_of_stream
from replicator.source.connection import ANSWER_TIMEOUT_SECONDS, Connection, Dsn, answering, connect
from replicator.source.refusals import unconnected
from replicator.source.server import (
    Identity,
    Insistence,
    application_name,
    parse_history,
    refuses_everybody,
    shuts_down,
)
from replicator.source.wal2json import OPTIONS, PLUGIN, DecodedChunk, StreamDecoder, listed

CHUNK_EVENTS = 2_000
"""Events finished before the sinks get their turn on the loop: some 6 ms of work."""
CHUNK_ROWS = 500
"""Decoded rows wait in memory for each other, and cost more the more of them there are: some 4 ms of work."""
CHUNK_BYTES = 1_000_000
"""The same bound for wide rows; one row may be larger."""
CHUNK_MESSAGES = 5_000
"""The same bound for transactions without rows in the slot's tables."""

NAP_SECONDS = 0.0005
"""Pause when the socket is empty: fewer wake-ups on both sides (measured over TCP: 65,000 → 105,000 commits/s)."""

LEAST_PATIENCE_SECONDS = 3.0
"""Until it is known. Some providers have 5 s."""

GOODBYE_TIMEOUT_SECONDS = 5.0
"""How long PostgreSQL may take to answer the end of the stream, which proves that it read our last feedback."""

FAILOVER_SERVER = 170_000
"""PostgreSQL 17, the first that can keep a copy of a slot on its standbys (`failover`)."""

_XLOG_DATA, _KEEPALIVE = b"wk"
_XLOG_DATA_HEADER = 25  # 'w', start, end, time
_KEEPALIVE_BODY = struct.Struct("!QqB")  # after 'k': the WAL's end, time, whether to answer
_FEEDBACK = struct.Struct("!cQQQqB")  # 'r', written, flushed, applied, µs since 2000-01-01, reply requested
_EPOCH_2000_SECONDS = 946_684_800


_LOOK = """
SELECT pg_is_in_recovery(), coalesce(nullif(setting::float8, 0), 'infinity') / 1000
FROM pg_settings WHERE name = 'wal_sender_timeout'
"""
_WAS_READ = "SELECT 1 FROM pg_stat_replication_slots WHERE slot_name = {slot} AND total_txns > 0"
_CREATE = "SELECT pg_create_logical_replication_slot({slot}, {plugin})"
_CREATE_FAILOVER = "SELECT pg_create_logical_replication_slot({slot}, {plugin}, failover => true)"
_COPY = "SELECT pg_copy_logical_replication_slot({slot}, {copy}, true)"
_ALTER_FAILOVER = "ALTER_REPLICATION_SLOT {name} (FAILOVER true)"
_DROP = "SELECT pg_drop_replication_slot({slot})"
_DECODING_MEMORY = sql.SQL("SET logical_decoding_work_mem = {}")
_NOTICE_OUR_END = "SET client_connection_check_interval = '2s'"
"""While it waits, PostgreSQL would not see that its client was killed, and an orphan would hold the unfinished slot."""


def _no_shortcut() -> None:
    """Every row stays a row."""


class Source:
    """One connection at a time to one slot. All methods belong to the event loop's thread."""

    def __init__(
        self,
        dsn: Dsn,
        slot: str,
        *,
        failover: bool = True,
        decoding_memory_mb: int | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self.carrier = carrier
        """Who carries the writes out, if it is not this process; PostgreSQL shows it beside the stream."""
        self._dsn = dsn
        self._decoding_memory_mb = decoding_memory_mb
        self._slot = slot
        self._failover = failover
        self._connection: Connection | None = None
        self._pgconn: pq.abc.PGconn | None = None
        self._decoder = StreamDecoder()
        self._shortcut: Callable[[], Shortcut | None] = _no_shortcut
        self.breaks = Breaks()
        self.patience_seconds = LEAST_PATIENCE_SECONDS
        """How long PostgreSQL waits for feedback before it ends the stream: wal_sender_timeout."""
        self._received: Lsn = 0
        self._flushed: Lsn = 0
        self._heard_at = 0.0  # time.monotonic()
        self._insistence = Insistence()
        self._wake = asyncio.Event()
        self._watched: int | None = None  # the file descriptor that the loop watches for us

    @property
    def connected(self) -> bool:
        """Whether the stream is running."""
        return self._pgconn is not None

    @property
    def confirmed(self) -> Lsn:
        """The flushed position that PostgreSQL was sent last."""
        return self._flushed

    @property
    def received(self) -> Lsn:
        """Everything up to here was read, in this stream or before the checkpoint; never goes back."""
        return self._received

    @property
    def silent_seconds(self) -> float:
        """How long ago a message of the stream, a keepalive included, was last read; 0.0 while not connected."""
        return time.monotonic() - self._heard_at if self.connected else 0.0

    async def connect(self) -> tuple[Identity, slots.SlotState | None]:
        """Open the connection and look at the slot. Raises SourceUnavailable, SourceUnusable."""
        self.close()
        async with answering(self._slot, None):  # the connection has its own time-out
            name = application_name(self._slot) + (f" on {self.carrier.name}" if self.carrier else "")
            self._connection = await connect(self._dsn, name, replication="database")
            if self._decoding_memory_mb is not None:
                await self._connection.execute(_DECODING_MEMORY.format(sql.Literal(f"{self._decoding_memory_mb}MB")))
        [row] = await self._ask("IDENTIFY_SYSTEM")
        [(is_standby, self.patience_seconds)] = await self._ask(_LOOK)
        if is_standby:  # it may lack the slot, or have it and not give it away: neither says anything of a gap
            raise SourceStandby
        return Identity(system_identifier=str(row[0]), timeline=int(row[1])), await self._inspect()

    async def branches(self, timeline: int) -> Mapping[int, Lsn]:
        """Where the server left earlier timelines for this one, its own. Empty if it can't say. Raises as `connect`."""
        async with answering(self._slot):
            query = sql.SQL("TIMELINE_HISTORY {}").format(timeline)
            # The first timeline has no history; a copy of the server may lack the file, or have an edited one.
            with contextlib.suppress(errors.UndefinedFile, ValueError, IndexError):
                [(_, content)] = await (await self._connected().execute(query)).fetchall()
                return parse_history(content if isinstance(content, str) else bytes(content).decode(errors="replace"))
            return {}

    async def was_read(self) -> bool:
        """Whether transactions were decoded from the slot, as far as the statistics know. Raises as `connect`."""
        return bool(await self._ask(_WAS_READ))

    async def create_slot(self, waits: Callable[[SlotWaits], None] = lambda _: None) -> slots.SlotState | None:
        """Make the slot, once the transactions that run have ended, and look at it. Raises as `connect`.

        `waits` is told for which of them. PostgreSQL gives up when this process is gone.
        """
        connection = self._connected()
        with contextlib.suppress(psycopg.Error):  # not every operating system can
            await connection.execute(_NOTICE_OUR_END)
        watching = asyncio.create_task(slots.watch_making(self._dsn, self._slot, connection.info.backend_pid, waits))
        knows_failover = connection.info.server_version >= FAILOVER_SERVER
        try:
            await self._ask(_CREATE_FAILOVER if knows_failover and self._failover else _CREATE, None)
        finally:
            watching.cancel()
        return await self._inspect()

    async def keep_on_standbys(self) -> bool:
        """Let standbys keep a copy of a slot that was made without, if nobody reads it; whether that was done."""
        state = await self._inspect()
        wanted = self._failover and state is not None and state.failover is False and state.active_pid is None
        if wanted:
            await self._ask(_ALTER_FAILOVER)
        return wanted

    async def drop_slot(self) -> None:
        """Drop the slot; PostgreSQL may then remove its WAL. Raises SlotInUse, and as `connect`."""
        await self._ask(_DROP)

    async def copy(self, slot: str) -> slots.SlotState | None:
        """Make this slot a copy of that one, which others may read, until the connection ends; how that one is.

        None: there is no such slot. Raises as `connect`.
        """
        async with answering(slot, connection=self._connection):
            state = await slots.inspect(self._connected(), slot)
            if state is not None:
                names = {"slot": sql.Literal(slot), "copy": sql.Literal(self._slot)}
                await self._connected().execute(sql.SQL(_COPY).format(**names))
        return state

    async def _inspect(self) -> slots.SlotState | None:
        async with answering(self._slot, connection=self._connection):
            return await slots.inspect(self._connected(), self._slot)

    async def _ask(self, query: LiteralString, seconds: float | None = ANSWER_TIMEOUT_SECONDS) -> list[TupleRow]:
        async with answering(self._slot, seconds, self._connection):
            literals = {"slot": sql.Literal(self._slot), "plugin": sql.Literal(PLUGIN)}
            composed = sql.SQL(query).format(**literals, name=sql.Identifier(self._slot))
            with contextlib.suppress(errors.DuplicateObject):  # another one made it first; `verify` says if it fits
                cursor = await self._connected().execute(composed)
                return await cursor.fetchall() if cursor.description else []
            return []

    async def start(
        self, end_lsn: Lsn, tables: Iterable[tuple[str, str]], shortcut: Callable[[], Shortcut | None] = _no_shortcut
    ) -> None:
        """Begin the stream of these tables, each its schema and its name, after `end_lsn`, the checkpoint's.

        `shortcut` is asked for at the beginning of each stretch: the one before it has been enriched by then.
        Raises SlotInUse, SourceUnavailable, SourceUnusable.
        """
        connection = self._connected()
        pgconn = connection.pgconn
        async with answering(self._slot, connection=connection):
            pgconn.send_query(self._start_command(end_lsn, listed(tables)).as_bytes(connection))
            result, *_ = await connection.wait(generators.execute(pgconn))
            if result.status != pq.ExecStatus.COPY_BOTH:
                raise errors.error_from_result(result)
        pgconn.nonblocking = 1
        self._decoder = StreamDecoder()
        self._shortcut = shortcut
        self._pgconn = pgconn
        self._heard_at = time.monotonic()
        self._flushed = end_lsn
        self._received = max(self._received, end_lsn)

    def _start_command(self, lsn: Lsn, tables: str) -> sql.Composed:
        options = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), _quoted(value))
            for name, value in {**OPTIONS, "add-tables": tables}.items()
        )
        start = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} ({})")
        return start.format(sql.Identifier(self._slot), sql.SQL(format_lsn(lsn)), options)

    async def read(self) -> DecodedChunk:
        """The next chunk of the stream; waits until there is something. Raises SourceUnavailable, DecodeError.

        Cancelling it loses nothing: what was read stays for the next call.
        """
        try:
            napped = False
            while not self._read_available():
                if napped:
                    await self._readable()
                await asyncio.sleep(NAP_SECONDS)
                napped = True
        except (psycopg.OperationalError, SourceUnavailable) as exc:
            self.close()
            raise self.breaks.broke(unconnected(exc) if isinstance(exc, psycopg.Error) else exc) from exc
        self._heard_at = time.monotonic()
        chunk = self._decoder.take()
        self.breaks.moved(chunk.mark)
        self._received = max(self._received, chunk.mark.end_lsn)
        return chunk

    def _read_available(self) -> int:
        """Take what libpq and the socket hold, up to a chunk's bounds; how many messages it was."""
        pgconn, decoder = self._running(), self._decoder
        decoder.shortcut = self._shortcut()
        get, feed, events, rows = pgconn.get_copy_data, decoder.feed, decoder.events, decoder.rows
        messages = 0
        while (
            messages < CHUNK_MESSAGES
            and len(events) < CHUNK_EVENTS
            and len(rows) < CHUNK_ROWS
            and decoder.size < CHUNK_BYTES
        ):
            length, data = get(1)
            if length == 0:
                pgconn.consume_input()
                length, data = get(1)
                if length == 0:
                    break
            if length < 0:
                raise end_of_stream(pgconn.get_result(), self._slot, format_lsn(self._received))
            messages += 1
            if data[0] == _XLOG_DATA and length >= _XLOG_DATA_HEADER:
                feed(data[_XLOG_DATA_HEADER:])
            elif data[0] == _KEEPALIVE and length >= _KEEPALIVE_BODY.size + 1:
                self._keepalive(data)
            else:
                raise self._unreadable(data)
        return messages

    def _unreadable(self, data: memoryview) -> DecodeError:
        problem = f"{len(data)} bytes of kind {chr(data[0])!r} are no message of the replication protocol"
        return DecodeError(lsn=format_lsn(self._received), problem=problem)

    def _keepalive(self, data: memoryview) -> None:
        wal_end, _, reply_requested = _KEEPALIVE_BODY.unpack_from(data, 1)
        self._decoder.keepalive(wal_end)
        if reply_requested:
            self.send_feedback()
            if self._insistence.asked(wal_end):
                raise shuts_down()

    async def _readable(self) -> None:
        self._watched = self._running().socket
        self._wake.clear()
        asyncio.get_running_loop().add_reader(self._watched, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            self._unwatch()

    def _unwatch(self) -> None:
        # Before the descriptor is closed: a moment later its number can be another connection's.
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None

    def send_feedback(self, flush_lsn: Lsn | None = None, *, ask: bool = False) -> None:
        """Send a status update: alive, and everything up to `flush_lsn` (default: as before) is flushed.

        Only `Pipeline.commit` gives a position. Does nothing while disconnected: the stream begins after the
        checkpoint again, which covers it. `ask` for a keepalive in return: on an idle database nothing else says how
        far the server is. Raises ValueError for a position that goes back or was never received.
        """
        flushed = self._flushed if flush_lsn is None else flush_lsn
        if not self._flushed <= flushed <= self._received:
            known = f"{format_lsn(self._flushed)} to {format_lsn(self._received)}"
            raise ValueError(f"flushed position {format_lsn(flushed)} is outside what can be: {known}")
        if self._pgconn is None:
            return
        self._flushed = flushed
        now_us = int((time.time() - _EPOCH_2000_SECONDS) * 1_000_000)
        try:
            self._pgconn.put_copy_data(_FEEDBACK.pack(b"r", self._received, flushed, flushed, now_us, ask))
            self._pgconn.flush()  # what the socket doesn't take now goes with the next consume_input
        except psycopg.OperationalError:
            # The reader meets and reports it. It has to be woken: libpq has closed the socket that it may wait for.
            self._wake.set()

    async def finish(self) -> bool:
        """End the stream in order; whether PostgreSQL has read the last feedback. Otherwise it is away, or too slow."""
        told = False
        with contextlib.suppress(TimeoutError, psycopg.OperationalError, SourceUnavailable):
            async with asyncio.timeout(GOODBYE_TIMEOUT_SECONDS):
                await self._say_goodbye(self._running())
                told = True
        self.close()
        return told

    async def _say_goodbye(self, pgconn: pq.abc.PGconn) -> None:
        pgconn.put_copy_end()
        pgconn.flush()
        while True:
            length, _ = pgconn.get_copy_data(1)
            if length < 0:
                return
            if length == 0:
                await self._readable()
                pgconn.consume_input()

    async def is_refused(self) -> bool:
        """Whether the server of the stream lets nobody else in: it shuts down."""
        return self._pgconn is not None and await refuses_everybody(self._dsn, self._pgconn)

    def let_go(self) -> None:
        """End the stream although it is well. Nothing is confirmed by it; the reader connects again."""
        self.close()
        self._wake.set()

    def close(self) -> None:
        """Drop the connection."""
        self._unwatch()
        self._pgconn = None
        if self._connection is not None:
            self._connection.pgconn.finish()  # all that its own close() does, which is a coroutine
            self._connection = None

    def _connected(self) -> Connection:
        if self._connection is None:
            raise SourceUnavailable(detail="not connected")
        return self._connection

    def _running(self) -> pq.abc.PGconn:
        if self._pgconn is None:
            raise SourceUnavailable(detail="the connection was lost")
        return self._pgconn


def _quoted(text: str) -> sql.SQL:
    """As a literal of the replication protocol, which knows no `E'…'`: a backslash stands for itself."""
    return sql.SQL("'" + text.replace("'", "''") + "'")
