"""Damaged and hostile messages: the decoder gives what the json module reads in them, or a DecodeError.

The seeds, `wal2json_seeds.jsonl`, are PostgreSQL's own; tests/replicator/source/test_wal2json_types.py prints them.
REPLICATOR_FUZZ_SECONDS is how long the byte fuzzer runs, REPLICATOR_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.contracts.errors import DecodeError
from replicator.contracts.events import Column, Position, Row, decode_row, parse_lsn
from replicator.source.wal2json import ACTION_AT, StreamDecoder
from tests.support.damage import mutate

SEEDS = (Path(__file__).parent / "wal2json_seeds.jsonl").read_bytes().splitlines()
ROWS = [seed for seed in SEEDS if seed[ACTION_AT] in b"IUDT"]
BEGIN = b'{"action":"B","timestamp":"2026-01-08 14:21:52.5+00","lsn":"0/10","nextlsn":"0/18"}'
COMMIT = BEGIN.replace(b'"B"', b'"C"')

FUZZ_SECONDS = float(os.environ.get("REPLICATOR_FUZZ_SECONDS", "5"))
LONGEST_INT = 4_300


def independent(message: bytes) -> Row:
    """The row in a message, read by the json module."""

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    def whole(text: str) -> int | Decimal:
        return int(text) if len(text.removeprefix("-")) <= LONGEST_INT else Decimal(text)

    def fraction(text: str) -> Decimal | str:
        try:
            return Decimal(text)
        except ArithmeticError:
            return text  # an exponent that Decimal does not have

    # Of fields that are not ours the decoder sees only where they end: they may be other than UTF-8.
    text = message.decode(errors="replace")
    told: dict[str, Any] = json.loads(text, parse_int=whole, parse_float=fraction, parse_constant=refused)
    columns, identity = (
        [Column(column["name"], column.get("value")) for column in told.get(name, [])]
        for name in ("columns", "identity")
    )
    return Row(told["action"], told["schema"], told["table"], columns, identity, commit_lsn=0x10, ordinal=1)


def decoded(message: bytes) -> Row | None:
    """The row that a transaction with this message brings; None when it is refused, or passed over as a message."""
    decoder = StreamDecoder()
    try:
        for payload in (BEGIN, message, COMMIT):
            decoder.feed(payload)
        chunk = decoder.take()
    except DecodeError:
        return None
    assert 0x18 == chunk.mark.end_lsn
    assert len(chunk.rows) <= 1
    return chunk.rows[0] if chunk.rows else None


def assert_right(message: bytes) -> bool:
    """What is decoded is what the json module reads; whether anything was decoded."""
    row = decoded(message)
    if row is None:
        return False
    assert repr(independent(message)) == repr(row), message  # 1 and true and 1.0 are equal, but not so written
    return True


@pytest.mark.parametrize("seed", ROWS, ids=range(len(ROWS)))
def test_every_seed_is_decoded(seed: bytes) -> None:
    """As the json module reads it."""
    assert assert_right(seed)


def test_a_damaged_message_is_never_a_wrong_value() -> None:
    """As many as there is time for; the seed and the message bring it again."""
    seed = int(os.environ.get("REPLICATOR_FUZZ_SEED", random.randrange(10**9)))  # noqa: S311  not a secret
    print(f"REPLICATOR_FUZZ_SEED={seed}")  # noqa: T201  pytest shows it when the test has failed
    chance = random.Random(seed)  # noqa: S311
    tried = right = 0
    end = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end:
        for _ in range(100):
            right += assert_right(mutate(chance, chance.choice(SEEDS), SEEDS))
            tried += 1
    print(f"{tried} messages, {right} of them still rows")  # noqa: T201
    assert right
    assert right < tried


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
COLUMNS = st.lists(st.fixed_dictionaries({"name": st.text(max_size=8)}, optional={"value": VALUES}), max_size=6)


@given(
    told=st.fixed_dictionaries(
        {"schema": st.text(max_size=8), "table": st.text(max_size=8)},
        optional={"columns": COLUMNS, "identity": COLUMNS, "lsn": VALUES, "extra": VALUES},
    ),
    action=st.sampled_from("IUDT"),
    ascii_only=st.booleans(),
)
def test_any_row_is_decoded_as_it_is(told: dict[str, Any], action: str, *, ascii_only: bool) -> None:
    """Any names and values, escaped or in UTF-8; only a surrogate that stands alone is no text."""
    message = json.dumps({"action": action, **told}, separators=(",", ":"), ensure_ascii=ascii_only).encode(
        "utf-8", "surrogatepass"
    )
    assert assert_right(message) == all(ord(letter) not in range(0xD800, 0xE000) for letter in _letters(told))


def _letters(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(_letters(part) for pair in value.items() for part in pair)
    return "".join(map(_letters, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9" * 4_300, int("9" * 4_300)),
        ("9" * 4_301, Decimal("9" * 4_301)),
        ("-" + "9" * 131_072, Decimal("-" + "9" * 131_072)),
        ("0." + "1" * 16_383, Decimal("0." + "1" * 16_383)),
        ("1e400", Decimal("1e400")),
        ("18446744073709551616", 2**64),
    ],
    ids=range(6),
)
def test_numbers_of_any_length(text: str, value: Decimal | int) -> None:
    """What `numeric` can hold, in the column and, kept as a dead letter's row, once more."""
    message = b'{"action":"I","schema":"s","table":"t","columns":[{"name":"b","value":1.5},{"name":"n","value":@}]}'
    row = decoded(message.replace(b"@", text.encode()))
    assert row is not None
    assert [Decimal("1.5"), value] == [column.value for column in row.columns]
    assert type(value) is type(row.columns[1].value)


@pytest.mark.parametrize(
    "value",
    [b"[" * 100_000, b'{"a":' * 100_000, b"1e99999999999999999999", b"0" + b"9" * 5_000, b'"\\ud800"', b"NaN", b"1."],
    ids=lambda value: str(value[:20]),
)
def test_what_is_no_value(value: bytes) -> None:
    """Too deep, too large an exponent, half a surrogate, not JSON: a DecodeError; elsewhere a ValueError."""
    message = b'{"action":"I","schema":"s","table":"t","columns":[{"name":"n","value":' + value + b"}]}"
    assert decoded(message) is None
    with pytest.raises(ValueError, match=r"."):
        decode_row(message)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "1/",
        "/1",
        "1/100000000",
        "100000000/1",
        "-1/5",
        " 1/2",
        "1/2 ",
        "1_0/2",
        "0x1/2",
        "1/2/3",
        "\u0661/\u0662",
        "g/1",
    ],
)
def test_what_is_no_lsn(text: str) -> None:
    """Whatever else int() would take."""
    with pytest.raises(ValueError, match=r".|^$"):
        parse_lsn(text)


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"action":"M","schema":"s","table":"t","columns":[{"name":"n","value":1}]}',  # an insert, one letter changed
        b'{"action":"I","action":"D","schema":"s","table":"t"}',
        b'{"action":"IX","schema":"s","table":"t"}',
        b'{"action":"Z","schema":"s","table":"t"}',
        b'{"extra_":["I"],"action":"D","schema":"s","table":"t"}',
    ],
)
def test_a_row_is_not_passed_over(damaged: bytes) -> None:
    """Neither as somebody's message nor under another action."""
    with pytest.raises(DecodeError):
        StreamDecoder_with(BEGIN, damaged)


def StreamDecoder_with(*payloads: bytes) -> StreamDecoder:  # noqa: N802  reads like the class
    """A decoder that was given these."""
    decoder = StreamDecoder()
    for payload in payloads:
        decoder.feed(payload)
    return decoder


# -- positions ---------------------------------------------------------------------------------------------------

LSNS = st.integers(0, 8)
STEPS = st.one_of(
    st.tuples(st.sampled_from("BC"), LSNS, LSNS),
    st.tuples(st.just("I"), LSNS, LSNS),
    st.tuples(st.just("M"), LSNS, LSNS),
    st.tuples(st.just("keepalive"), LSNS, LSNS),
    st.tuples(st.just("take"), LSNS, LSNS),
)


def step(decoder: StreamDecoder, kind: str, lsn: int, end: int) -> None:
    """One message."""
    if kind == "keepalive":
        decoder.keepalive(lsn)
    elif kind in "BC":
        marker = f'{{"action":"{kind}","timestamp":"2026-01-08 14:21:52+00","lsn":"0/{lsn:X}","nextlsn":"0/{end:X}"}}'
        decoder.feed(marker.encode())
    elif kind == "M":
        decoder.feed(b'{"action":"M","transactional":false,"prefix":"","content":""}')
    else:
        decoder.feed(b'{"action":"I","schema":"s","table":"t","columns":[]}')


@given(st.lists(STEPS, max_size=30))
def test_positions_never_go_back(steps: list[tuple[str, int, int]]) -> None:
    """Whatever comes: rows and ends go forward, or there is a DecodeError."""
    decoder, position, end_lsn = StreamDecoder(), Position(0, 0), 0
    try:
        for kind, lsn, end in [*steps, ("take", 0, 0)]:
            if kind != "take":
                step(decoder, kind, lsn, end)
                continue
            chunk = decoder.take()
            for row in chunk.rows:
                assert position < Position(row.commit_lsn, row.ordinal)
                position = Position(row.commit_lsn, row.ordinal)
            assert position == chunk.mark.position
            assert end_lsn <= chunk.mark.end_lsn
            end_lsn = chunk.mark.end_lsn
    except DecodeError:
        return


@pytest.mark.parametrize(
    "payloads",
    [
        (BEGIN, COMMIT.replace(b"0/18", b"0/8")),  # ends before it commits
        (BEGIN, ROWS[0], COMMIT.replace(b"0/10", b"0/11")),  # the commit of another transaction
        (BEGIN, COMMIT, None, BEGIN, COMMIT.replace(b"0/18", b"0/17")),  # ends before the last one
        (BEGIN, COMMIT, None, BEGIN, ROWS[0]),  # begins before the last one ended
        (BEGIN, ROWS[0], COMMIT.replace(b"52.5+00", b"52.5")),  # no UTC
        (BEGIN, ROWS[0], COMMIT.replace(b"52.5+00", b"52.5+01")),
    ],
)
def test_transactions_that_can_not_be(payloads: tuple[bytes | None, ...]) -> None:
    """Each is whole by itself; None is where the reader looks."""
    decoder = StreamDecoder()
    with pytest.raises(DecodeError):  # noqa: PT012  which of the steps meets it is the decoder's business
        for payload in payloads:
            decoder.take() if payload is None else decoder.feed(payload)
        decoder.take()
