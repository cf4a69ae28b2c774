"""The event and its metrics: exact bytes, exact numbers, every shape of row and timestamp. No server needed."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from enrichment import Tables
from enrichment.contract import engagement_pct, engagement_seconds
from enrichment.events.codec import RowReader, codec_of, stored_row
from enrichment.events.draft import Content, RowUnusable
from examples.orders.orders_stream import STREAM as ORDERS
from replicator.contracts.events import Column, Event, Position, Row, RowChange, change
from replicator.contracts.fields import INT64_MAX, INT64_MIN
from tests.support.rows import CODEC, EVENT_TABLES

WIDE = Context(prec=60, rounding=ROUND_HALF_UP)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
INT64 = st.integers(INT64_MIN, INT64_MAX)
ROW: dict[str, Any] = {
    "id": 17,
    "content_id": 1,
    "user_id": 999,
    "event_type": "play",
    "event_ts": "2026-01-08 14:21:52.123456+00",
    "duration_ms": 7000,
    "device": "web",
    "raw_payload": None,
}
VIDEO: Content = ("video", 300)


def _row(values: dict[str, Any]) -> Row:
    columns = [Column(name, value) for name, value in values.items()]
    return Row("I", "public", "engagement_events", columns, commit_lsn=5, ordinal=2)


def _event(content: Content = VIDEO, reader: RowReader | None = None, **values: Any) -> Event:
    draft = (reader or RowReader(CODEC)).read(_row(ROW | values))
    events: list[Event] = []
    CODEC.build_events([draft], {draft[CODEC.draft_ons[0]]: content}, events)
    return events[0]


def _fields(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(event.json, parse_float=Decimal)
    return fields


def _text(moment: datetime, digits: int) -> str:
    """As PostgreSQL writes it with that many digits after the point."""
    fraction = f".{moment.microsecond:06}"[: digits + 1] if digits else ""
    return moment.isoformat(sep=" ")[:19] + fraction + "+00"


def test_the_event_byte_for_byte() -> None:
    """The contract's fields in its order, compact; identity and position beside it."""
    expected = (
        b'{"event_id":17,"content_id":1,"user_id":999,"event_type":"play","event_ts":"2026-01-08T14:21:52.123456Z",'
        b'"duration_ms":7000,"device":"web","content_type":"video","length_seconds":300,"engagement_seconds":7.0,'
        b'"engagement_pct":0.02}'
    )
    assert Event(5, 2, 17, 1, 1_767_882_112_123_456, expected) == _event()


def test_nulls_and_a_missing_content() -> None:
    """A left join: what is not there is null, and everything that would be computed from it."""
    fields = _fields(_event(EVENT_TABLES.joins[0].missing, duration_ms=None, device=None))
    assert list(fields.values())[5:] == [None] * 6
    assert len(fields) == 11


@pytest.mark.parametrize(
    ("text", "ts_us", "written"),
    [
        ("2026-01-08 14:21:52+00", 1_767_882_112_000_000, "2026-01-08T14:21:52.000000Z"),
        ("2026-01-08 14:21:52.1+00", 1_767_882_112_100_000, "2026-01-08T14:21:52.100000Z"),
        ("2026-01-08 14:21:52.12+00", 1_767_882_112_120_000, "2026-01-08T14:21:52.120000Z"),
        ("2026-01-08 14:21:52.123+00", 1_767_882_112_123_000, "2026-01-08T14:21:52.123000Z"),
        ("2026-01-08 14:21:52.1234+00", 1_767_882_112_123_400, "2026-01-08T14:21:52.123400Z"),
        ("2026-01-08 14:21:52.12345+00", 1_767_882_112_123_450, "2026-01-08T14:21:52.123450Z"),
        ("2026-01-08 14:21:52.000001+00", 1_767_882_112_000_001, "2026-01-08T14:21:52.000001Z"),
        ("1970-01-01 00:00:00+00", 0, "1970-01-01T00:00:00.000000Z"),
        ("1969-12-31 23:59:59.999999+00", -1, "1969-12-31T23:59:59.999999Z"),
        ("0001-01-01 00:00:00+00", -62_135_596_800_000_000, "0001-01-01T00:00:00.000000Z"),
        ("0044-03-15 12:00:00.5+00", -60_772_247_999_500_000, "0044-03-15T12:00:00.500000Z"),
        ("9999-12-31 23:59:59.999999+00", 253_402_300_799_999_999, "9999-12-31T23:59:59.999999Z"),
        ("2024-02-29 00:00:00+00", 1_709_164_800_000_000, "2024-02-29T00:00:00.000000Z"),
        ("infinity", None, "infinity"),
        ("-infinity", None, "-infinity"),
        ("12026-01-08 14:21:52.5+00", None, "12026-01-08 14:21:52.5+00"),
        ("294276-12-31 23:59:59.999999+00", None, "294276-12-31 23:59:59.999999+00"),
        ("0044-03-15 12:00:00+00 BC", None, "0044-03-15 12:00:00+00 BC"),
        ("4714-11-24 00:00:00+00 BC", None, "4714-11-24 00:00:00+00 BC"),
    ],
)
def test_every_shape_of_timestamp(text: str, ts_us: int | None, written: str) -> None:
    """Six digits and a Z for what the years 1 to 9999 hold; PostgreSQL's own text for the rest."""
    event = _event(event_ts=text)
    assert ts_us == event.ts_us
    assert written == _fields(event)["event_ts"]


@given(moment=st.datetimes(timezones=st.just(UTC)), digits=st.integers(0, 6))
def test_timestamps_are_exact(moment: datetime, digits: int) -> None:
    """Any moment, with any number of digits: the microseconds and the text tell that very moment."""
    moment = moment.replace(microsecond=moment.microsecond // 10 ** (6 - digits) * 10 ** (6 - digits))
    event = _event(event_ts=_text(moment, digits))
    assert (moment - EPOCH) // timedelta(microseconds=1) == event.ts_us
    assert _text(moment, 6).replace(" ", "T").replace("+00", "Z") == _fields(event)["event_ts"]


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-08 14:21:52",
        "2026-01-08 14:21:52+01",
        "2026-01-08 14:21:52-05:30",
        "01/08/2026 14:21:52 UTC",
        "today",
        "",
        None,
        1_767_882_112,
        True,
    ],
)
def test_a_timestamp_without_utc_is_refused(text: object) -> None:
    """A session with another TimeZone or DateStyle, or a column without zone, must not pass for UTC."""
    with pytest.raises(RowUnusable, match=r"engagement_events\.event_ts is (NULL, )?not a timestamp with time zone"):
        _event(event_ts=text)


@given(duration_ms=INT64)
@example(0).via("no sign on zero")
@example(-1).via("smallest")
@example(10**15 - 1).via("last float")
@example(10**15).via("first text")
@example(-(10**15)).via("first negative text")
@example(2**53 + 1).via("no float")
@example(INT64_MIN).via("least")
def test_engagement_seconds_are_exact(duration_ms: int) -> None:
    """The decimal in the JSON is the duration, shifted by three digits: nothing lost at any size."""
    written = msgspec.json.encode(engagement_seconds(duration_ms)).decode()
    assert WIDE.scaleb(Decimal(duration_ms), -3) == Decimal(written)
    assert (duration_ms < 0) == written.startswith("-")
    assert "e" not in written.lower()


@given(duration_ms=INT64 | st.integers(-(10**6), 10**6), length=INT64 | st.integers(-400, 400))
@example(-1, 300).via("no sign on zero")
@example(1500, 300).via("a tie")
@example(-1500, 300).via("a negative tie")
@example(INT64_MIN, 1).via("largest quotient")
@example(INT64_MIN, -1).via("largest quotient, positive")
def test_engagement_pct_is_rounded_half_away_from_zero(duration_ms: int, length: int) -> None:
    """Against the definition, in exact fractions; a length of 0 has none."""
    pct = engagement_pct(duration_ms, length)
    if length == 0:
        assert pct is None
        return
    exact = Fraction(duration_ms, 10 * length)  # hundredths
    hundredths = int(abs(exact) + Fraction(1, 2)) * (-1 if exact < 0 else 1)
    written = msgspec.json.encode(pct).decode()
    assert WIDE.scaleb(Decimal(hundredths), -2) == Decimal(written)
    assert (hundredths < 0) == written.startswith("-")


@given(duration_ms=st.none() | INT64 | st.integers(0, 10**7), length=st.none() | INT64 | st.integers(-5, 400))
def test_the_short_cut_computes_the_same(duration_ms: int | None, length: int | None) -> None:
    """`build_events` does the ordinary case by itself: the same bytes as the functions that do them all."""
    fields = msgspec.json.decode(_event(("video", length), duration_ms=duration_ms).json, type=dict[str, msgspec.Raw])
    assert msgspec.json.encode(engagement_seconds(duration_ms)) == bytes(fields["engagement_seconds"])
    assert msgspec.json.encode(engagement_pct(duration_ms, length)) == bytes(fields["engagement_pct"])


@given(
    event_id=INT64, content_id=INT64, user_id=INT64, duration_ms=st.none() | INT64,
    event_type=st.text(), device=st.none() | st.text(),
)  # fmt: skip
def test_every_value_arrives_as_it_is(**values: Any) -> None:
    """Integers to 64 bits, quotes, control characters and all of Unicode."""
    values["id"] = values.pop("event_id")
    fields = _fields(_event(**values))
    expected = [values[name] for name in ("id", "content_id", "user_id", "event_type", "duration_ms", "device")]
    names = ("event_id", "content_id", "user_id", "event_type", "duration_ms", "device")
    assert expected == [fields[name] for name in names]


def test_unicode_is_not_escaped() -> None:
    """UTF-8 as it is, in the event type, the device and the content's type."""
    event = _event(("vidéo 映像", 1), event_type="▶ écouté", device="📱")
    assert all(text.encode() in event.json for text in ("vidéo 映像", "▶ écouté", "📱"))


def test_columns_move_between_two_rows() -> None:
    """One reader, a table that changes under it: added, reordered and dropped columns never give a wrong value."""
    reader = RowReader(CODEC)
    shapes = [
        list(ROW),
        ["added", *ROW],
        list(reversed(ROW)),
        [name for name in ROW if name != "raw_payload"],
        ["content_id", "id", *list(ROW)[2:]],
        [*ROW, "added"],
    ]
    expected = _event()
    for names in shapes:
        draft = reader.read(_row({name: ROW.get(name, 4711) for name in names}))
        events: list[Event] = []
        CODEC.build_events([draft], {1: VIDEO}, events)
        assert [expected] == events


@given(st.permutations(list(ROW)), st.permutations(list(ROW)))
def test_any_order_after_any_order(before: list[str], after: list[str]) -> None:
    """What the reader remembers of one row is never believed of the next."""
    reader = RowReader(CODEC)
    reader.read(_row({name: ROW[name] for name in before}))
    assert RowReader(CODEC).read(_row(ROW)) == reader.read(_row({name: ROW[name] for name in after}))


@pytest.mark.parametrize("name", [field.column for field in EVENT_TABLES.own])
def test_a_dropped_or_renamed_column_is_refused(name: str) -> None:
    """The reason names the table, the column and what it has to be; the next whole row is read as ever."""
    reader = RowReader(CODEC)
    reader.read(_row(ROW))
    dropped = {column: value for column, value in ROW.items() if column != name}
    renamed = {column + "_old" * (column == name): value for column, value in ROW.items()}
    for row, missing in ((_row(dropped), name), (_row(renamed), name), (_row({}), "id")):
        with pytest.raises(RowUnusable, match=rf"public\.engagement_events has no column {missing}; expected \w"):
            reader.read(row)
    assert RowReader(CODEC).read(_row(ROW)) == reader.read(_row(ROW))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", None),
        ("id", "12.0"),
        ("id", True),
        ("id", Decimal("12.5")),
        ("id", INT64_MAX + 1),
        ("id", INT64_MIN - 1),
        ("content_id", None),
        ("content_id", INT64_MAX + 1),
        ("user_id", "a7d1"),
        ("user_id", INT64_MIN - 1),
        ("event_type", None),
        ("event_type", 3),
        ("event_ts", 3),
        ("duration_ms", "00:00:07"),
        ("duration_ms", Decimal("7000.5")),
        ("duration_ms", False),
        ("duration_ms", INT64_MAX + 1),
        ("duration_ms", INT64_MIN - 1),
        ("device", 5),
        ("device", True),
    ],
)
def test_a_wrong_type_is_refused(name: str, value: object) -> None:
    """The reason names table and column and quotes nothing. The row is kept, without what no event is made from."""
    told = ROW | {"raw_payload": '{"email": "a@example.com"}', "event_type": "play, top secret"}
    row = _row(told | {name: value})
    kept = [column for column in row.columns if column.name != "raw_payload"]
    with pytest.raises(RowUnusable) as refused:
        RowReader(CODEC).read(row)
    letter = CODEC.dead_letter(row, str(refused.value))
    null = "NULL, " if value is None else ""
    assert letter.reason.startswith(f"public.engagement_events.{name} is {null}not ")
    assert not [value for value in ("secret", "a7d1", "00:00:07", "web") if value in letter.reason]
    assert (letter.stage, letter.position) == ("row", (5, 2))
    assert (None if name == "id" else 17) == letter.event_id
    assert structs.replace(row, columns=kept) == stored_row(letter)


def test_a_negative_id_is_an_id() -> None:
    """Unusual, and exact: none of the three is mistaken for too large."""
    event = _event(id=INT64_MIN, content_id=-1, user_id=-5)
    assert (event.id, event.key) == (INT64_MIN, -1)


@pytest.mark.parametrize("text", ["2026-01-08 14:21:52.1+00", "2026-01-08 14:21:52+00", "infinity"])
def test_an_event_comes_back_from_its_dead_letter(text: str) -> None:
    """A replay sends the bytes that were refused, under the same identity."""
    event = _event(event_ts=text)
    letter = msgspec.structs.replace(CODEC.dead_letter(_row(ROW), "refused"), sink="clickhouse", payload=event.json)
    assert event == CODEC.stored_event(letter)


def test_a_change_comes_back_from_its_dead_letter() -> None:
    """With what happened to the row, however much its old row tells."""
    codec = codec_of(Tables(ORDERS))
    old = {"order_id": "a", "customer_id": 1, "ordered_at": "2026-01-08 14:21:52+00", "note": ',"_operation":"upsert"'}
    columns = [Column(name, value) for name, value in old.items()]
    gone = codec.deletion(Row("D", "shop", "orders", identity=columns, commit_lsn=5, ordinal=2))
    moved = RowChange(5, 3, "c", 1, 1_767_882_112_000_000, gone.json.replace(b'"a"', b'"c"'), "orders", was="b")
    for event in (gone, moved):
        letter = msgspec.structs.replace(CODEC.dead_letter(_row(ROW), ""), sink="http", payload=change(event))
        letter = msgspec.structs.replace(letter, position=Position(event.commit_lsn, event.ordinal))
        assert event == codec.stored_event(letter)


@pytest.mark.parametrize("payload", [b"", b"{}", b"[]", b'{"event_id":"1"}'])
def test_a_damaged_dead_letter_is_no_event(payload: bytes) -> None:
    """It is refused with a reason, not restored as something else."""
    letter = msgspec.structs.replace(CODEC.dead_letter(_row(ROW), "refused"), payload=payload)
    with pytest.raises(RowUnusable, match="payload is no event"):
        CODEC.stored_event(letter)
    with pytest.raises(RowUnusable, match="payload is no row"):
        stored_row(letter)
