"""The shortcut gives what the general way gives, byte for byte, or nothing. No server needed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from enrichment import EVENT, StreamEnricher, Tables
from enrichment.events.codec import RowReader
from enrichment.events.draft import RowUnusable
from enrichment.events.shortcut import MOST_LAYOUTS
from replicator.contracts.enricher import Shortcut
from replicator.contracts.errors import DecodeError
from replicator.contracts.events import Event, Row
from replicator.contracts.fields import INT64_MAX, INT64_MIN
from replicator.source.wal2json import DecodedChunk, StreamDecoder
from tests.support.damage import mutate
from tests.support.rows import CODEC, GOOD, NAMES, VALUES, columns_of, enricher, insert, rows

FUZZ_SECONDS = float(os.environ.get("REPLICATOR_FUZZ_SECONDS", "5"))
BEGIN = b'{"action":"B","timestamp":"2026-01-08 14:21:52.5+00","lsn":"0/5","nextlsn":"0/8"}'
TIME = "2026-01-08 14:21:52"


def message(row: Row) -> bytes:
    """As wal2json writes it."""
    columns, identity = (
        "[" + ",".join(f'{{"name":{json.dumps(column.name)},"value":{_value(column.value)}}}' for column in which) + "]"
        for which in (row.columns, row.identity)
    )
    names = f'"schema":{json.dumps(row.schema)},"table":{json.dumps(row.table)}'
    old = f',"identity":{identity}' if row.action != "I" else ""
    return f'{{"action":"{row.action}","timestamp":"{TIME}+00","lsn":"0/1",{names},"columns":{columns}{old}}}'.encode()


def _value(value: object) -> str:
    return str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)


def ordinary(**values: Any) -> bytes:
    """The message of an ordinary event."""
    return message(insert(**values))


async def taught(*shown: Row, made: StreamEnricher | None = None) -> StreamEnricher:
    """An enricher that has seen these rows, of content 1."""
    made = made or enricher()
    await made.enrich(shown or [insert()])
    return made


async def shortcut_after(*shown: Row) -> Shortcut:
    """The shortcut that an enricher has then."""
    shortcut = (await taught(*shown)).shortcut()
    assert shortcut is not None
    return shortcut


def general(payload: bytes) -> Event | None:
    """The event of a message by the general way, with content 1 known; None when there is none."""
    decoder = StreamDecoder()
    events: list[Event] = []
    try:
        decoder.feed(BEGIN)
        decoder.feed(payload)
        for row in decoder.take().rows:
            if (row.action, row.schema, row.table) == ("I", "public", "engagement_events"):
                CODEC.build_events([RowReader(CODEC).read(row)], {1: ("video", 300)}, events)
    except (DecodeError, RowUnusable, KeyError):
        return None
    return events[0] if events else None


def assert_agrees(shortcut: Shortcut, payload: bytes) -> bool:
    """Nothing, or the very event; whether it was one."""
    decoder = StreamDecoder()
    decoder.shortcut = shortcut
    with suppress(DecodeError):
        decoder.feed(BEGIN)
        decoder.feed(payload)
    for event in decoder.events:
        assert repr(general(payload)) == repr(event), payload  # 1 and true are equal, but not so written
    return bool(decoder.events)


async def test_an_ordinary_insert_takes_it() -> None:
    """Position, id, key, time and JSON are those of the general way, from bytes as well as from libpq's buffer."""
    shortcut = await shortcut_after()
    expected = general(ordinary())
    assert expected is not None
    assert expected == shortcut(ordinary(), 5, 1) == shortcut(memoryview(ordinary()), 5, 1)


async def test_there_is_none_before_the_first_row() -> None:
    """Nobody knows how the columns stand."""
    assert enricher().shortcut() is None


@pytest.mark.parametrize(
    "values",
    [
        {"duration_ms": None, "device": None},
        {"duration_ms": -1},
        {"duration_ms": 10**15},
        {"duration_ms": INT64_MIN},
        {"id": INT64_MAX, "user_id": INT64_MIN},
        {"event_ts": f"{TIME}+00"},
        {"event_ts": f"{TIME}.5+00"},
        {"event_ts": "0001-01-01 00:00:00+00"},
        {"device": '"\\/\b\f\n\r\t\u2028 映 📱', "event_type": ""},
        {"raw_payload": '{"a": [1, 2]}'},
        {"raw_payload": 1.5},
    ],
)
async def test_what_takes_it(values: dict[str, Any]) -> None:
    """Every value that the general way takes without a second look."""
    assert assert_agrees(await shortcut_after(), ordinary(**values))


@pytest.mark.parametrize(
    "payload",
    [
        ordinary(content_id=2),
        *(ordinary(event_ts=text) for text in ("infinity", TIME, f"{TIME}+01", "12026-01-08 14:21:52+00", "", None)),
        *(ordinary(**{name: "7"}) for name in ("id", "content_id", "user_id", "duration_ms")),
        *(ordinary(**{name: 2**63}) for name in ("id", "content_id", "user_id", "duration_ms")),
        *(ordinary(**{name: None}) for name in ("id", "content_id", "user_id", "event_type")),
        *(ordinary(**{name: value}) for name in NAMES for value in (True, 1.0, [1])),
        message(insert()).replace(b'"I"', b'"U"'),
        message(insert()).replace(b'"public"', b'"other"'),
        message(insert()).replace(b'"engagement_events"', b'"content"'),
        message(insert())[:-1] + b',"identity":[{"name":"id","value":1}]}',
        message(insert()).replace(b'{"name":"id",', b"{"),
        message(insert()).replace(b'"device"', b'"gadget"'),
        message(Row("I", "public", "engagement_events", columns_of([*GOOD.items(), ("id", 5)]))),
        message(Row("I", "public", "engagement_events", columns_of([*GOOD.items()][:-1]))),
        message(Row("I", "public", "engagement_events", columns_of([*GOOD.items()][::-1]))),
        ordinary(raw_payload=Decimal("9" * 5_000)),
        ordinary(raw_payload="?").replace(b'"?"', b"1e99999999999999999999"),
        ordinary(raw_payload="?").replace(b'"?"', b'"\xff"'),
        ordinary(raw_payload="?").replace(b'"?"', b"[" * 5_000 + b"]" * 5_000),
        b"",
    ],
)
async def test_what_does_not_take_it(payload: bytes) -> None:
    """Unknown content, other tables and columns, odd values: the general way decides."""
    assert (await shortcut_after())(payload, 5, 1) is None


@given(st.lists(rows() | st.builds(insert, id=st.just(1)), max_size=8))
@example([Row("I", "public", "engagement_events", columns_of([*GOOD.items(), ("id", "x")]))])
@example([Row("I", "public", "engagement_events", columns_of([("id", 1), *GOOD.items()]))])
@example([insert(id=True), insert(id=1)])
async def test_any_rows(batch: list[Row]) -> None:
    """Whatever the rows before were: the shortcut agrees with the general way about each."""
    payloads = [message(row) for row in batch]
    made = await taught(*batch)
    for row, payload in zip(batch, payloads, strict=True):
        if shortcut := made.shortcut():
            made._contents[0].known.clear()  # noqa: SLF001  of what the batch has made of it
            made._contents[0].known[1] = ("video", 300)  # noqa: SLF001
            assert_agrees(shortcut, payload)
        await made.enrich([row])


@given(st.permutations([*GOOD, "added", "more"]), st.dictionaries(st.sampled_from(["added", "more"]), VALUES))
async def test_any_order_of_columns(names: list[str], values: dict[str, Any]) -> None:
    """Also with columns that are not ours, whatever is in them."""
    shown = [(name, (GOOD | values).get(name)) for name in names]
    row = Row("I", "public", "engagement_events", columns_of(shown))
    payload = message(row)
    assume(general(payload))
    longest = max((len(str(value)) for value in values.values() if type(value) in {Decimal, int}), default=0)
    assert assert_agrees(await shortcut_after(row), payload) or longest > 4_300  # msgspec's limit


async def test_a_damaged_message_is_never_another_event() -> None:
    """As many as there is time for; the seed and the message bring it again."""
    seed = int(os.environ.get("REPLICATOR_FUZZ_SEED", random.randrange(10**9)))  # noqa: S311  not a secret
    print(f"REPLICATOR_FUZZ_SEED={seed}")  # noqa: T201  pytest shows it when the test has failed
    chance = random.Random(seed)  # noqa: S311
    shortcut = await shortcut_after()
    seeds = [ordinary(), ordinary(raw_payload='{"a": 1.5}', duration_ms=None), ordinary(device="ä\\u00e4\n", id=-5)]
    tried = took = 0
    end = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end:
        for _ in range(100):
            took += assert_agrees(shortcut, mutate(chance, chance.choice(seeds), seeds))
            tried += 1
    print(f"{tried} messages, {took} of them took it")  # noqa: T201
    assert took
    assert took < tried


KEYS = st.sampled_from(
    [b'"action":"I"', b'"action":"D"', b'"schema":"public"', b'"schema":"other"', b'"table":"engagement_events"',
     b'"table":"content"', b'"columns":[]', b'"columns":null', b'"identity":[]', b'"identity":null', b'"extra":{"a":1}',
     b'"act\\u0069on":"I"', b'"lsn":5', ordinary(id=99)[1:-1]]
)  # fmt: skip


@given(st.lists(KEYS, max_size=3), st.booleans(), st.sampled_from([b"", b" ", b"\n\t", b"\x00", b"\xc2\xa0"]))
async def test_keys_in_any_order_and_number(keys: list[bytes], first: bool, space: bytes) -> None:
    """Twice, missing, unknown, escaped, with white space between."""
    whole = ordinary()[1:-1]
    payload = b"{" + (space + b"," + space).join([*keys, whole] if first else [whole, *keys]) + space + b"}"
    assert_agrees(await shortcut_after(), payload)


async def test_every_truncation() -> None:
    """Cut off anywhere, it is nothing."""
    shortcut = await shortcut_after()
    assert not any(shortcut(ordinary()[:size], 5, 1) for size in range(len(ordinary())))


@pytest.mark.parametrize(
    "renamed",
    [
        {"device": "dev", "user_id": "who"},
        {"device": "event_type", "event_type": "device"},
        {"device": "dev", "event_type": "device"},
        {"event_type": "device", "device": "dev"},
    ],
    ids=["renamed", "swapped", "chain", "chain in the other order"],
)
async def test_renamed_columns(renamed: dict[str, str]) -> None:
    """REPLICATOR_COLUMNS: both ways take them under their names, given once or again; a former name is not ours."""
    pairs = [*((renamed.get(name, name), value) for name, value in GOOD.items())]
    pairs += [(name, "not this one") for name in renamed.keys() - set(renamed.values())]
    row = Row("I", "public", "engagement_events", columns_of(pairs), commit_lsn=5, ordinal=1)
    expected = general(ordinary())
    subject = enricher()
    subject._tables = Tables(EVENT, {"engagement_events": renamed})  # noqa: SLF001  as the setting would have it
    made = await taught(row, made=subject)
    shortcut = made.shortcut()
    assert shortcut
    assert [expected] == (await made.enrich([row])).events
    assert expected == shortcut(message(row), 5, 1)


async def test_parts_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the guard knows in the schema of the last row; nothing of another table."""
    made = enricher()
    parts = [("public", "engagement_events"), ("parts", "p1"), ("parts", "p2")]
    monkeypatch.setattr(made._guard, "_names", dict.fromkeys(parts, "engagement_events") | {("parts", "c"): "content"})  # noqa: SLF001
    made._shortcuts.begin(made._guard.names("engagement_events"))  # noqa: SLF001

    def of(schema: str, table: str) -> Row:
        return Row("I", schema, table, columns_of([*GOOD.items()]))

    async def taking(schema: str, table: str) -> list[tuple[str, str]]:
        await taught(of(schema, table), made=made)
        shortcut = made.shortcut()
        assert shortcut
        return [name for name in (*parts, ("parts", "c"), ("public", "p1")) if shortcut(message(of(*name)), 5, 1)]

    assert [("parts", "p1"), ("parts", "p2")] == await taking("parts", "p1")
    shortcut = made.shortcut()
    assert shortcut
    assert general(ordinary()) == shortcut(message(of("parts", "p2")), 5, 1)
    assert [("public", "engagement_events")] == await taking("public", "engagement_events")


async def test_tables_that_are_looked_at_again_begin_without() -> None:
    """What was learned of the columns may be about another table."""
    made = await taught()
    made._shortcuts.begin([("public", "engagement_events")])  # noqa: SLF001
    assert made.shortcut() is None


async def test_no_content_is_kept_no_shortcut() -> None:
    """Contents that the stream does not show in full are looked up for every event."""
    made = await taught()
    assert made.shortcut()
    made._contents[0].shown = False  # noqa: SLF001
    assert made.shortcut() is None


async def test_contents_that_are_forgotten() -> None:
    """Nothing is made of a content that the enricher does not know now."""
    shortcut = (made := await taught()).shortcut()
    assert shortcut
    assert shortcut(ordinary(), 5, 1)
    await made.enrich([Row("U", "public", "content", columns_of([("content_id", "x")]))])  # which one has changed?
    assert shortcut(ordinary(), 5, 1) is None


async def test_layouts_are_bounded() -> None:
    """A table whose every row has other columns does not make types for ever."""
    made = await taught()
    for number in range(2 * MOST_LAYOUTS):
        await made.enrich([Row("I", "public", "engagement_events", columns_of([*GOOD.items(), (f"x{number}", 1)]))])
    assert len(made._shortcuts._made) == MOST_LAYOUTS  # noqa: SLF001
    await made.enrich([insert()])
    assert assert_agrees(made.shortcut() or (lambda *_: None), ordinary())


async def test_the_highest_id_is_that_of_any_way() -> None:
    """The record of the tables needs it."""
    made = await taught(insert(id=3))
    await made.enrich([], [Event(5, 1, 8, 1, 0, b"{}")])
    assert made._guard.highest_id == 8  # noqa: SLF001


# -- streams -------------------------------------------------------------------------------------------------------

CONTENT_IDS = st.integers(1, 3)


def content(action: str, content_id: int, length: int) -> Row:
    """A row of the content table."""
    columns = columns_of([("content_id", content_id), ("content_type", "video"), ("length_seconds", length)])
    return Row(action, "public", "content", columns if action in "IU" else [], columns[:1] if action in "UD" else [])


ROWS = st.one_of(
    st.builds(lambda content_id, user_id: insert(content_id=content_id, user_id=user_id), CONTENT_IDS, CONTENT_IDS),
    st.builds(lambda content_id: insert(content_id=content_id, event_ts="infinity"), CONTENT_IDS),
    st.builds(content, st.sampled_from("IUDT"), CONTENT_IDS, st.integers(1, 400)),
    st.just(insert(event_type=None)),
    st.just(Row("D", "public", "engagement_events", [], columns_of([("id", 1)]))),
    st.just(Row("U", "public", "content", columns_of([("content_id", 1)]), columns_of([("content_id", 1)]))),
)


class Catalog:
    """Answers every look-up with the same contents."""

    async def rows(self, _: str, parameters: Mapping[str, Any]) -> list[tuple[int, str, int]]:
        """As `enrichment.database.Database`."""
        return [(content_id, "looked up", content_id) for content_id in parameters["ids"] if content_id < 3]


async def stream(stretches: Sequence[Sequence[bytes]], *, quick: bool) -> tuple[list[list[Any]], int]:
    """What becomes of each stretch, and how many events took the shortcut."""
    made, decoder = enricher(), StreamDecoder()
    made._contents[0]._database = Catalog()  # type: ignore[assignment]  # noqa: SLF001  no server needed
    decoder.feed(BEGIN)
    became: list[list[Any]] = []
    took = 0
    for stretch in stretches:
        decoder.shortcut = made.shortcut() if quick else None
        for payload in stretch:
            decoder.feed(payload)
        chunk: DecodedChunk = decoder.take()
        assert len(stretch) == len(chunk.events) + len(chunk.rows)
        took += len(chunk.events)
        became.append([chunk.mark, *await made.enrich(chunk.rows, chunk.events), dict(made.ignored)])
        became[-1].append(dict(made._contents[0].known))  # noqa: SLF001
    return became, took


@given(st.lists(st.lists(ROWS, max_size=8), max_size=6))
async def test_a_stream_is_the_same_with_it_and_without(stretches: list[list[Row]]) -> None:
    """Events, refusals, counts and known contents, in order, whatever changes in between."""
    payloads = [[message(row) for row in stretch] for stretch in stretches]
    general_way, none = await stream(payloads, quick=False)
    quick_way, _ = await stream(payloads, quick=True)
    assert general_way == quick_way
    assert none == 0


async def test_a_content_change_in_the_middle_of_a_stretch() -> None:
    """Events before it have the old content, those behind it the new one, although they are ordinary."""
    rows = [insert(id=1), content("U", 1, 50), insert(id=2), insert(id=3)]
    became, took = await stream([[ordinary()], [message(row) for row in rows], [ordinary()]], quick=True)
    lengths = [json.loads(event.json)["length_seconds"] for events in became for event in events[1]]
    assert [1, 1, 50, 50, 50] == lengths
    assert took == 2
