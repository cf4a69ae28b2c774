"""The stream decoder: positions, transaction ends, and what must not pass for either."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.contracts.errors import DecodeError
from replicator.contracts.events import Event, Lsn, Position, parse_lsn
from replicator.source.wal2json import StreamDecoder

COMMITTED = "2026-01-08 14:21:52.5+00"


def begin(lsn: str, end: str) -> bytes:
    """`B` of a transaction, as wal2json 2.5 prints it."""
    return json.dumps(
        {"action": "B", "timestamp": COMMITTED, "lsn": lsn, "nextlsn": end}, separators=(",", ":")
    ).encode()


def commit(lsn: str, end: str) -> bytes:
    """`C` of a transaction."""
    return begin(lsn, end).replace(b'"B"', b'"C"')


def row(action: str = "I", value: object = 1) -> bytes:
    """A row of a table with one column."""
    columns = [{"name": "id", "value": value}]
    told = {
        "action": action,
        "timestamp": COMMITTED,
        "lsn": "0/1",
        "schema": "public",
        "table": "t",
        "columns": columns,
    }
    return json.dumps(told, separators=(",", ":")).encode()


def fed(*payloads: bytes) -> StreamDecoder:
    """A decoder that was given these messages."""
    decoder = StreamDecoder()
    for payload in payloads:
        decoder.feed(payload)
    return decoder


def test_rows_are_numbered_within_their_transaction() -> None:
    """A row's position is its transaction's commit LSN (known from `B`) and its ordinal."""
    decoder = fed(begin("0/10", "0/18"), row(), row("U"), commit("0/10", "0/18"), begin("1/0", "1/8"), row("T"))
    chunk = decoder.take()
    assert [(r.action, r.commit_lsn, r.ordinal) for r in chunk.rows] == [
        ("I", 0x10, 1),
        ("U", 0x10, 2),
        ("T", 1 << 32, 1),
    ]
    assert chunk.mark.position == Position(1 << 32, 1)


def test_the_end_is_that_of_the_last_complete_transaction() -> None:
    """An open transaction does not move the end; it goes on in the next chunk with the next ordinal."""
    decoder = fed(begin("0/10", "0/18"), row(), commit("0/10", "0/18"), begin("0/20", "0/28"), row())
    assert decoder.take().mark.end_lsn == 0x18
    decoder.feed(row())
    decoder.feed(commit("0/20", "0/28"))
    chunk = decoder.take()
    assert (chunk.mark.end_lsn, chunk.mark.position) == (0x28, Position(0x20, 2))


def test_empty_transactions_move_the_end() -> None:
    """`B`, `C` of transactions that touched none of our tables are a place to stand."""
    chunk = fed(begin("0/10", "0/18"), commit("0/10", "0/18"), begin("0/20", "0/28"), commit("0/20", "0/28")).take()
    assert (chunk.rows, chunk.mark.end_lsn, chunk.mark.position) == ([], 0x28, Position(0, 0))


def test_a_keepalive_moves_the_end_only_between_transactions() -> None:
    """Inside a transaction the server's position says nothing about what is complete."""
    decoder = fed(begin("0/10", "0/18"), row())
    decoder.keepalive(0x50)
    assert decoder.take().mark.end_lsn == 0
    decoder.feed(commit("0/10", "0/18"))
    decoder.keepalive(0x60)
    assert decoder.take().mark.end_lsn == 0x60


def test_a_keepalive_never_moves_the_end_back() -> None:
    """Keepalives may tell an older position than the last commit's end."""
    decoder = fed(begin("0/10", "0/18"), commit("0/10", "0/18"))
    decoder.keepalive(0x12)
    assert decoder.take().mark.end_lsn == 0x18


def test_the_commit_time_is_the_newest_transactions() -> None:
    """Unix seconds; known from `B`, so also inside a transaction."""
    assert fed().take().mark.committed_at == 0.0
    assert fed(begin("0/10", "0/18"), row()).take().mark.committed_at == 1767882112.5


def test_logical_messages_are_passed_over() -> None:
    """Somebody's pg_logical_emit_message is neither a row nor a transaction's end."""
    message = b'{"action":"M","timestamp":null,"lsn":"0/5","transactional":false,"prefix":"x","content":"hello"}'
    chunk = fed(message, begin("0/10", "0/18"), message, row(), commit("0/10", "0/18")).take()
    assert [r.ordinal for r in chunk.rows] == [1]


def shortcut(payload: memoryview | bytes, commit_lsn: Lsn, ordinal: int) -> Event | None:
    """Takes everything that is not too large for it."""
    return Event(commit_lsn, ordinal, 1, 1, 0, b"{}") if len(payload) <= len(row()) else None


def test_inserts_take_the_shortcut_until_one_does_not() -> None:
    """From there on all wait as rows, whatever they are: order is kept. The next stretch takes it again."""
    decoder = StreamDecoder()
    decoder.shortcut = shortcut
    for payload in (begin("0/10", "0/18"), row(), row(), row(value=1000), row(), commit("0/10", "0/18")):
        decoder.feed(payload)
    assert decoder.size == 4 * len(row()) + 3
    chunk = decoder.take()
    assert [(0x10, 1), (0x10, 2)] == [(event.commit_lsn, event.ordinal) for event in chunk.events]
    assert [3, 4] == [row.ordinal for row in chunk.rows]
    assert Position(0x10, 4) == chunk.mark.position
    for payload in (begin("0/20", "0/28"), row(), row("U")):
        decoder.feed(payload)
    chunk = decoder.take()
    assert [(0x20, 1)] == [(event.commit_lsn, event.ordinal) for event in chunk.events]
    assert [("U", 2)] == [(row.action, row.ordinal) for row in chunk.rows]
    assert ([], [], 0) == (decoder.events, decoder.rows, decoder.size)


@pytest.mark.parametrize("action", ["U", "D", "T"])
def test_nothing_but_an_insert_takes_the_shortcut(action: str) -> None:
    """By the letter in its place, whatever the shortcut would say."""
    decoder = StreamDecoder()
    decoder.shortcut = shortcut
    decoder.feed(begin("0/10", "0/18"))
    decoder.feed(row(action))
    chunk = decoder.take()
    assert ([], [action]) == (chunk.events, [row.action for row in chunk.rows])


def test_no_shortcut_outside_a_transaction() -> None:
    """Its position would not be known."""
    decoder = StreamDecoder()
    decoder.shortcut = shortcut
    for payloads in ((row(),), (begin("0/10", "0/18"), commit("0/10", "0/18"), row())):
        with pytest.raises(DecodeError):  # noqa: PT012  the last one is refused
            for payload in payloads:
                decoder.feed(payload)
    assert [] == decoder.events


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**53 + 1, 10**30])
def test_integers_are_exact(value: int) -> None:
    """Beyond 2^53, where a float would lose the last digits."""
    assert fed(begin("0/10", "0/18"), row(value=value)).take().rows[0].columns[0].value == value


def test_numbers_of_any_length_are_exact_side_by_side() -> None:
    """Integers that are too long for msgspec must not spoil the fractions of the same row."""
    texts = ["1" * 5000, "-" + "2" * 5000 + ".5", "-" + "3" * 9000, "4", "0.25"]
    columns = ",".join(f'{{"name":"n","value":{text}}}' for text in texts)
    line = row().replace(b'{"name":"id","value":1}', columns.encode())
    [taken] = fed(begin("0/10", "0/18"), line).take().rows
    assert [Decimal(text) for text in texts] == [column.value for column in taken.columns]


def test_fractions_are_exact() -> None:
    """A numeric with more digits than a float has."""
    digits = "123456789012345678901234567890.123456789"
    payload = row(value="@").replace(b'"@"', digits.encode())
    assert str(fed(begin("0/10", "0/18"), payload).take().rows[0].columns[0].value) == digits


@pytest.mark.parametrize(
    "payloads",
    [
        (row(),),
        (commit("0/10", "0/18"),),
        (begin("0/10", "0/18"), begin("0/20", "0/28")),
        (begin("0/10", "0/18"), commit("0/10", "0/18"), row()),
        (begin("0/10", "0/18"), row()[:-5]),
        (begin("0/10", "0/18"), b'{"action":"X"}'),
        (begin("0/10", "0/18"), b""),
        (begin("nonsense", "0/18"), row()),
        (begin("0/20", "0/28"), row(), commit("0/20", "0/28"), begin("0/10", "0/18"), row()),
    ],
)
def test_what_can_not_be_is_an_error(payloads: tuple[bytes, ...]) -> None:
    """Rows outside transactions, broken JSON, unknown actions, transactions out of order: never a wrong value."""
    with pytest.raises(DecodeError):
        fed(*payloads).take()


def test_an_error_does_not_quote_the_row() -> None:
    """Messages carry LSNs, never values."""
    broken = row(value="secret").replace(b'"public"', b"secret")
    with pytest.raises(DecodeError) as caught:
        fed(begin("0/10", "0/18"), broken)
    assert "secret" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_decode_error(payload: bytes) -> None:
    """Never another exception."""
    decoder = fed(begin("0/10", "0/18"))
    for noise in (payload, b'{"action":"I"' + payload, b'{"action":"C"' + payload):
        try:
            decoder.feed(noise)
            decoder.take()
        except DecodeError:
            continue


@given(st.integers(0, 2**64 - 1))
def test_an_lsn_reads_as_postgresql_prints_it(lsn: int) -> None:
    """High and low half in hexadecimal, a slash between them."""
    assert parse_lsn(f"{lsn >> 32:X}/{lsn % 2**32:X}") == lsn
