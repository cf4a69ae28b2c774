"""The framing of the replication stream: a message that is cut off or of an unknown kind is never passed over."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq

from replicator.contracts.enricher import Shortcut
from replicator.contracts.errors import DecodeError, SourceUnavailable
from replicator.contracts.events import Event
from replicator.source import stream
from replicator.source.stream import Source

HEADER = b"w" + struct.pack("!QQq", 1, 2, 3)
KEEPALIVE = b"k" + struct.pack("!QqB", 0x50, 3, 0)
BEGIN = b'{"action":"B","timestamp":"2026-01-08 14:21:52+00","lsn":"0/10","nextlsn":"0/18"}'
ROW = b'{"action":"I","schema":"public","table":"t","columns":[]}'
COMMIT = BEGIN.replace(b'"B"', b'"C"')


class Connection:
    """What `Source` uses of libpq's connection: messages, then nothing."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = list(messages)
        self.sent: list[bytes] = []

    def get_copy_data(self, _: int) -> tuple[int, memoryview]:
        """The next message."""
        message = self._messages.pop(0) if self._messages else b""
        return len(message), memoryview(message)

    def consume_input(self) -> None:
        """There is no more."""

    def put_copy_data(self, data: bytes) -> None:
        """A status update."""
        self.sent.append(data)

    def flush(self) -> None:
        """All is sent."""


def take(*messages: bytes) -> tuple[Source, Connection]:
    """A source that has taken these messages."""
    source, connection = Source("", "slot"), Connection(*messages)
    source._pgconn = connection  # type: ignore[assignment]  # noqa: SLF001  a server never sends such messages
    source._read_available()  # noqa: SLF001
    return source, connection


def end_lsn(source: Source) -> int:
    """How far the source has come."""
    return source._decoder.take().mark.end_lsn  # noqa: SLF001


def test_whole_messages_are_taken() -> None:
    """A transaction, a keepalive after it, and one that wants an answer."""
    source, connection = take(HEADER + BEGIN, HEADER + COMMIT, KEEPALIVE, KEEPALIVE[:-1] + b"\1")
    assert 0x50 == end_lsn(source)
    assert [b"r"] == [sent[:1] for sent in connection.sent]


@pytest.mark.parametrize(
    ("bound", "most", "expected"),
    [
        ("CHUNK_EVENTS", 2, [([1, 2], []), ([], [3, 4, 5, 6])]),
        ("CHUNK_ROWS", 2, [([1, 2], [3, 4]), ([], [5, 6]), ([], [])]),  # the last one has the commit
        ("CHUNK_BYTES", 4 * len(ROW), [([1, 2], [3, 4]), ([], [5, 6])]),
        ("CHUNK_MESSAGES", 5, [([1, 2], [3, 4]), ([], [5, 6])]),
    ],
)
def test_a_stretch_ends_at_its_bounds(
    monkeypatch: pytest.MonkeyPatch, bound: str, most: int, expected: list[tuple[list[int], list[int]]]
) -> None:
    """What is behind the bound is for the next stretch, which asks for a new shortcut."""
    monkeypatch.setattr(stream, bound, most)
    asked: list[int] = []

    def shortcut() -> Shortcut:
        asked.append(1)
        return lambda _, commit_lsn, ordinal: Event(commit_lsn, ordinal, 1, 1, 0, b"") if ordinal < 3 else None

    source = Source("", "slot")
    source._pgconn = Connection(*(HEADER + payload for payload in (BEGIN, *[ROW] * 6, COMMIT)))  # type: ignore[assignment]  # noqa: SLF001
    source._shortcut = shortcut  # noqa: SLF001
    stretches = []
    while source._read_available():  # noqa: SLF001
        events, rows, _ = source._decoder.take()  # noqa: SLF001
        stretches.append(([event.ordinal for event in events], [row.ordinal for row in rows]))
    assert expected == stretches
    assert len(asked) == len(stretches) + 1


@pytest.mark.parametrize("size", range(1, len(KEEPALIVE)))
def test_a_keepalive_that_is_cut_off(size: int) -> None:
    """It says how much there was."""
    with pytest.raises(DecodeError, match=rf"at LSN 0/0 .*: {size} bytes of kind 'k' are no message"):
        take(KEEPALIVE[:size])


@pytest.mark.parametrize("size", range(1, len(HEADER + BEGIN)))
def test_wal_data_that_is_cut_off(size: int) -> None:
    """In the header or in the payload; an undecoded `B` is decoded by its first row."""
    with pytest.raises(DecodeError):
        take((HEADER + BEGIN)[:size], HEADER + ROW)


def test_the_end_of_the_stream_is_retried_whatever_encoding_its_reason_has() -> None:
    """A German server that shuts down is no reason to stop."""

    class Ended(Connection):
        def get_copy_data(self, _: int) -> tuple[int, memoryview]:
            return -1, memoryview(b"")

        def get_result(self) -> SimpleNamespace:
            said = {pq.DiagnosticField.MESSAGE_PRIMARY: "Abbruch auf Anweisung für".encode("latin-1")}
            return SimpleNamespace(error_field=said.get)

    source = Source("", "slot")
    source._pgconn = Ended()  # type: ignore[assignment]  # noqa: SLF001  a server never sends such messages
    with pytest.raises(SourceUnavailable, match="Abbruch"):
        source._read_available()  # noqa: SLF001


@given(st.integers(0, 255).filter(lambda kind: kind not in b"wk"), st.binary(max_size=60))
def test_an_unknown_kind(kind: int, rest: bytes) -> None:
    """Not passed over: what it carries is unknown."""
    with pytest.raises(DecodeError, match="are no message of the replication protocol"):
        take(bytes([kind]) + rest)


@given(st.lists(st.binary(min_size=1, max_size=40) | st.just(HEADER + BEGIN) | st.just(HEADER + COMMIT)))
def test_any_messages(messages: list[bytes]) -> None:
    """Taken, or a DecodeError; never another exception."""
    try:
        end_lsn(take(*messages)[0])
    except DecodeError:
        return
