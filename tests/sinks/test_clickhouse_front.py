"""What stands before ClickHouse and answers wrong: nothing counts without a proof, and no answer does harm."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from msgspec import structs

from devstack import DevStack
from devstack.clickhouse import ClickHouse
from enrichment import EVENT
from replicator.contracts.errors import (
    BatchRefused,
    BatchTooLarge,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    SinkUnusable,
)
from replicator.contracts.events import Event
from replicator.contracts.ledger import EventDigest, Slice
from replicator.contracts.sink import SinkContext
from sinks.clickhouse.sink import ClickHouseSettings, ClickHouseSink
from sinks.clickhouse.table import table_of
from sinks.testing import sample
from tests.support.front import Answer, Asked, Front, Lie, front_end

TABLE = table_of(EVENT)

MEMORY = b"Code: 241. DB::Exception: Memory limit (total) exceeded. (MEMORY_LIMIT_EXCEEDED) (version 26.9.2.1)\n"
PAGE = b"<html><body>We are back in a minute</body></html>"
ALLOWED = {"query", "database", "default_format", "user", "password", "no_cache", "buffer_size"}
"""URL parameters that a front end like chproxy passes on."""


@pytest.fixture
def clickhouse(stack: DevStack) -> ClickHouse:
    """ClickHouse with an empty database."""
    stack.clickhouse.reset()
    return stack.clickhouse


@pytest.fixture
def front(clickhouse: ClickHouse) -> Iterator[Front]:
    """A front end before it."""
    with front_end(clickhouse.port) as made:
        yield made


@pytest.fixture
async def sink(clickhouse: ClickHouse, front: Front) -> AsyncIterator[ClickHouseSink]:
    """A sink behind the front end, open."""
    async with sink_behind(front, clickhouse) as made:
        await made.open()
        yield made


@asynccontextmanager
async def sink_behind(front: Front, clickhouse: ClickHouse, timeout_seconds: int = 30) -> AsyncIterator[ClickHouseSink]:
    """A sink that is given the front end's address, with its table made."""
    given = {"clickhouse_url": front.url(clickhouse.url), "clickhouse_timeout_seconds": timeout_seconds}
    sink = ClickHouseSink(ClickHouseSettings.model_validate(given), SinkContext(EVENT))
    try:
        await sink.create()
        yield sink
    finally:
        await sink.close()


def events(first: int, last: int) -> list[Event]:
    """Events `first` to `last`."""
    return [sample(EVENT, number) for number in range(first, last + 1)]


def ids(clickhouse: ClickHouse) -> list[int]:
    """What is in the table."""
    return [int(line) for line in clickhouse.query(f"SELECT event_id FROM {TABLE} FINAL ORDER BY event_id").split()]  # noqa: S608


def summary(answer: Answer, **change: object) -> Answer:
    """The same with another summary."""
    known = json.loads(answer.headers["X-ClickHouse-Summary"])
    return answer._replace(headers=dict(answer.headers) | {"X-ClickHouse-Summary": json.dumps(known | change)})


def bare(answer: Answer) -> Answer:
    """The same without ClickHouse's headers."""
    return answer._replace(headers={})


def but(answer: Answer, **headers: str) -> Answer:
    """The same with other headers."""
    return answer._replace(
        headers=dict(answer.headers) | {name.replace("_", "-"): text for name, text in headers.items()}
    )


def some(asked: Asked) -> Answer:
    """Seven rows of them all."""
    statement, *lines = asked.body.splitlines(keepends=True)
    return asked.pass_on(body=b"".join([statement, *lines[:7]]))


NOT_INSERTED: dict[str, Lie] = {
    "an exception after the status line": lambda _: Answer(200, {}, MEMORY),
    "an exception after headers": lambda _: but(Answer(200, {}, MEMORY), X_ClickHouse_Summary='{"written_rows":"10"}'),
    "the code of an exception as a header": lambda _: Answer(200, {"X-ClickHouse-Exception-Code": "241"}, MEMORY),
    "the code alone": lambda _: Answer(200, {"X-ClickHouse-Exception-Code": "241"}),
    "an error without its header": lambda _: Answer(500, {}, MEMORY),
    "a page": lambda _: Answer(200, {"Content-Type": "text/html"}, PAGE),
    "nothing": lambda _: Answer(),
    "no content": lambda _: Answer(204),
    "accepted": lambda _: Answer(202, {}, b"{}"),
    "no rows": lambda asked: summary(asked.pass_on(body=asked.body.splitlines()[0])),
    "no rows, and it says so nowhere": lambda asked: bare(asked.pass_on(body=asked.body.splitlines()[0])),
    "fewer rows": some,
    "a summary that is none": lambda _: Answer(200, {"X-ClickHouse-Summary": "[" * 5000}),
    "a summary of another kind": lambda _: Answer(200, {"X-ClickHouse-Summary": '{"written_rows":{"a":1}}'}),
    "a summary without bounds": lambda _: Answer(200, {"X-ClickHouse-Summary": '{"written_rows":1e999}'}),
}


class TestProof:
    """An insert counts when its answer proves it, or the table."""

    @pytest.mark.parametrize("name", NOT_INSERTED)
    async def test_nothing_counts_that_is_not_there(
        self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink, name: str
    ) -> None:
        """It is tried again, and arrives once the front end is mended."""
        front.tell(NOT_INSERTED[name])
        for _ in range(2):
            with pytest.raises((SinkUnavailable, SinkMisconfigured, BatchTooLarge)):
                await sink.write(events(1, 10))
        front.behave()
        assert not await sink.write(events(1, 10))
        assert ids(clickhouse) == [*range(1, 11)]

    async def test_an_answer_out_of_a_cache(self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink) -> None:
        """As good as ClickHouse's own, but to another insert."""
        kept: list[Answer] = []

        def cache(asked: Asked) -> Answer:
            kept.append(kept[0] if kept else asked.pass_on())
            return kept[0]

        front.tell(cache)
        assert not await sink.write(events(1, 10))
        with pytest.raises(SinkMisconfigured, match="not to this request, and the rows are not in the table"):
            await sink.write(events(11, 20))
        front.behave()
        assert not await sink.write(events(11, 20))
        assert ids(clickhouse) == [*range(1, 21)]

    @pytest.mark.parametrize(
        "change",
        [
            bare,
            lambda answer: but(answer, X_ClickHouse_Query_Id="chproxy-1"),
            lambda answer: summary(answer, written_rows="0"),
            lambda answer: answer._replace(body=b"\n"),
            lambda answer: but(answer, X_Policy="x" * 9_000),
        ],
        ids=["no headers", "ids of its own", "it did not count", "a newline", "a long header"],
    )
    async def test_the_table_is_asked(
        self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink, change: Callable[[Answer], Answer]
    ) -> None:
        """A front end that drops ClickHouse's headers is no reason to wait for ever: the rows are the proof."""
        front.tell(lambda asked: change(asked.pass_on()))
        for _ in range(2):
            assert not await sink.write(events(1, 100))
        later = [structs.replace(event, commit_lsn=50) for event in events(1, 10)]
        assert not await sink.write(later), "a newer view is there"
        assert ids(clickhouse) == [*range(1, 101)]

    async def test_an_older_view_is_no_proof(self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink) -> None:
        """The same events with other values, of the same commit: their content was corrected."""
        assert not await sink.write(events(1, 10))
        corrected = [structs.replace(event, json=_article(event)) for event in events(1, 10)]
        front.tell(lambda _: Answer())
        with pytest.raises(SinkMisconfigured, match="the rows are not in the table"):
            await sink.write(corrected)
        front.tell(lambda asked: bare(asked.pass_on()))
        assert not await sink.write(corrected)
        found = clickhouse.query(f"SELECT DISTINCT content_type FROM {TABLE} FINAL")  # noqa: S608
        assert found == "article\n"

    async def test_nothing_goes_into_a_table_that_is_wrong(
        self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink
    ) -> None:
        """One insert finds it out. Repaired between a later one and the look after it, its cut rows would count."""
        clickhouse.query(f"ALTER TABLE {TABLE} MODIFY COLUMN user_id Int32")
        for _ in range(3):
            with pytest.raises(SinkUnusable, match="user_id as Int32"):
                await sink.write(events(1, 10))
        assert len([asked for asked in front.asked if asked.inserts]) == 1
        clickhouse.query(f"ALTER TABLE {TABLE} MODIFY COLUMN user_id Int64")
        assert not await sink.write(events(1, 10))
        assert ids(clickhouse) == [*range(1, 11)]

    async def test_rows_of_views_are_counted_too(
        self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink
    ) -> None:
        """More rows than were sent are right where the table has a view, and only there."""
        front.tell(lambda asked: summary(asked.pass_on(), written_rows="20"))
        assert not await sink.write(events(1, 5))
        asked = len(front.asked)
        assert not await sink.write(events(6, 10))
        assert len(front.asked) == asked + 3, "insert, look, and the rows"
        clickhouse.query(f"CREATE MATERIALIZED VIEW twice ENGINE = Null AS SELECT * FROM {TABLE}")  # noqa: S608
        assert not await sink.write(events(11, 20))
        assert len(front.asked) == asked + 5
        assert ids(clickhouse) == [*range(1, 21)]


def _article(event: Event) -> bytes:
    return re.sub(rb'"content_type":("(\\.|[^"\\])*"|null)', b'"content_type":"article"', event.json)


class TestErrors:
    """Of front ends, and of ClickHouse in places where nobody expects them."""

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_is_not_followed(
        self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink, status: int
    ) -> None:
        """No row and no password goes to another host."""
        with front_end(clickhouse.port) as thief:
            front.tell(lambda _: Answer(status, {"Location": f"http://127.0.0.1:{thief.port}/"}))
            with pytest.raises(SinkMisconfigured, match=f"status {status}.*redirects are not followed"):
                await sink.write(events(1, 10))
            front.tell(front.lie, only_inserts=False)
            assert not (await sink.check())[-1].ok
            assert thief.asked == []
        assert ids(clickhouse) == []

    async def test_no_proxy_of_the_environment(
        self, clickhouse: ClickHouse, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would get rows and password."""
        with front_end(clickhouse.port) as proxy:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            async with sink_behind(front, clickhouse) as sink:
                assert not await sink.write(events(1, 10))
                assert proxy.asked == []

    @pytest.mark.parametrize(
        "code", [1, 6, 27, 47, 49, 53, 60, 62, 81, 115, 117, 159, 164, 192, 201, 241, 349, 395, 516, 691, 743, 99999]
    )
    async def test_any_code_anywhere(self, front: Front, sink: ClickHouseSink, code: int) -> None:
        """An error that the lane and the commands know, never a traceback."""
        text = f'Code: {code}. DB::Exception: \x1b[31m{{"device": 1}}. (SOME_NAME) (version 26.9)'.encode()
        front.tell(lambda _: Answer(500, {"X-ClickHouse-Exception-Code": str(code)}, text), only_inserts=False)
        await _assert_all_fail(sink, f"ClickHouse error {code} SOME_NAME")

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(200, {}, PAGE),
            Answer(200),
            Answer(200, {}, b"[]\n"),
            Answer(200, {}, b'["\\u001b[31m","b","c"]\n' * 3),
            Answer(200, {}, b'{"a":1}\n'),
            Answer(200, {}, b"[" * 60_000),
            Answer(200, {}, b"[NaN]\n"),
            Answer(200, {}, b"\xff\xfe"),
            Answer(200, {}, b"[1,2]\n[3"),
            Answer(200, {"Content-Encoding": "gzip"}, gzip.compress(PAGE, mtime=0)),
            Answer(400, {}, b"The plain HTTP request was sent to HTTPS port"),
            Answer(401),
            Answer(403, {}, PAGE),
            Answer(404),
            Answer(408),
            Answer(418, {"X-ClickHouse-Exception-Code": "many"}),
            Answer(429),
            Answer(502, {}, PAGE),
        ],
        ids=repr,
    )
    async def test_any_answer_anywhere(self, front: Front, sink: ClickHouseSink, answer: Answer) -> None:
        """The same for what is not ClickHouse's."""
        front.tell(lambda _: answer, only_inserts=False)
        await _assert_all_fail(sink, f"http://127.0.0.1:{front.port} answers")

    @pytest.mark.parametrize(
        "answer",
        [Answer(413, {}, PAGE), Answer(413), Answer(500, {"X-ClickHouse-Exception-Code": "241"}, MEMORY)],
        ids=["413 with a page", "413", "241"],
    )
    async def test_too_large(self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink, answer: Answer) -> None:
        """The lane makes its writes smaller. A server that is short of memory says nothing about a single event."""
        front.tell(lambda asked: answer if asked.body.count(b"\n") > 6 else asked.pass_on())
        with pytest.raises(BatchTooLarge):
            await sink.write(events(1, 10))
        assert not await sink.write(events(1, 5))
        assert ids(clickhouse) == [1, 2, 3, 4, 5]
        front.tell(lambda _: answer)
        with pytest.raises(BatchTooLarge if answer.status == 413 else SinkUnavailable):
            await sink.write(events(6, 6))

    async def test_a_large_insert_is_never_answered(self, clickhouse: ClickHouse, front: Front) -> None:
        """Three times in a row, while questions are: it is taken for too large."""
        async with sink_behind(front, clickhouse, timeout_seconds=1) as sink:

            def hangs(asked: Asked) -> Answer:
                time.sleep(1.5 if asked.body.count(b"\n") > 6 else 0)
                return asked.pass_on()

            front.tell(hangs)
            for _ in range(2):
                with pytest.raises(SinkUnavailable, match="no answer from"):
                    await sink.write(events(1, 10))
            with pytest.raises(BatchTooLarge, match=r"no answer from .* to 3 inserts, while questions are answered"):
                await sink.write(events(1, 10))
            assert not await sink.write(events(1, 5))


async def _assert_all_fail(sink: ClickHouseSink, told: str) -> None:
    """Whatever is called."""
    found = [finding for finding in await sink.check() if not finding.ok]
    assert len(found) == 1
    assert told in found[0].what
    assert found[0].cure
    assert found[0].what.isprintable()
    ledger = sink.ledger(with_content=True)
    part = Slice(0, 10, (0, 1))
    for call in (
        sink.open,
        sink.create,
        lambda: sink.write(events(1, 3)),
        lambda: sink.hours(0, 10),
        lambda: ledger.span(0, 10),
        lambda: ledger.digests(part),
        lambda: ledger.events(part),
        lambda: ledger.find([1], 0, 10),
        lambda: ledger.delete([EventDigest(1, 2, 3, 4)]),
    ):
        with pytest.raises(SinkError) as caught:
            await call()
        assert not isinstance(caught.value, BatchRefused | BatchTooLarge), "the table can't be looked at"


class TestSettings:
    """Parameters of the URL that are dropped, or that a profile overrides."""

    @pytest.mark.parametrize(
        "dropped", [None, "date_time_input_format", "async_insert", "max_partitions_per_insert_block"]
    )
    async def test_are_read_back(
        self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink, dropped: str | None
    ) -> None:
        """`check` names them, and nothing counts that was inserted without."""

        def strip(asked: Asked) -> Answer:
            parts = urlsplit(asked.path)
            passed = [
                (name, text)
                for name, text in parse_qsl(parts.query)
                if name in ALLOWED or (dropped and name != dropped)
            ]
            old = {"date_time_input_format": "basic", "async_insert": "1"}  # the defaults of another version
            return asked.pass_on(path=f"/?{urlencode({**old, **dict(passed)})}")

        front.tell(strip, only_inserts=False)
        found = (await sink.check())[-1]
        assert not found.ok
        assert "do not arrive" in found.what
        assert (dropped or "date_time_input_format = basic") in found.what
        assert "chproxy" in found.cure
        with pytest.raises(SinkMisconfigured, match="do not arrive"):
            await sink.open()
        for _ in range(2):
            with pytest.raises(SinkMisconfigured, match="do not arrive"):
                await sink.write(events(1, 10))
        front.behave()
        assert not await sink.write(events(1, 10))
        assert ids(clickhouse) == [*range(1, 11)]

    async def test_one_that_it_does_not_know(self, front: Front, sink: ClickHouseSink) -> None:
        """Its version is older than the setting: comparing the table would not help."""
        front.tell(lambda asked: asked.pass_on(path=f"{asked.path}&of_a_newer_one=1"), only_inserts=False)
        found = (await sink.check())[-1]
        assert not found.ok
        assert "UNKNOWN_SETTING" in found.what
        assert "23.10" in found.cure
        with pytest.raises(SinkMisconfigured, match=r"UNKNOWN_SETTING.*Upgrade ClickHouse"):
            await sink.write(events(1, 10))


class TestViews:
    """Each insert also goes to the materialized views of the table."""

    @pytest.mark.parametrize("many", [1, 10])
    async def test_a_broken_one_is_named(self, clickhouse: ClickHouse, sink: ClickHouseSink, many: int) -> None:
        """The events are as good as ever: none is refused, whatever code the view fails with."""
        views = {
            "gone": "1",
            "cast": "toInt32(event_type)",
            "thrown": "throwIf(event_id > 0)",
        }
        for name, number in views.items():
            clickhouse.query("CREATE TABLE target (event_id Int64, number Int32) ENGINE = MergeTree ORDER BY event_id")
            select = f"SELECT event_id, {number} AS number FROM {TABLE}"  # noqa: S608  our own names
            clickhouse.query(f"CREATE MATERIALIZED VIEW {name} TO target AS {select}")
            if name == "gone":
                clickhouse.query("DROP TABLE target SYNC")
            with pytest.raises(SinkMisconfigured, match=rf"the table is in order.*engagement\.{name}") as caught:
                await sink.write(events(1, many))
            assert "Repair or drop the view" in caught.value.cure
            clickhouse.query(f"DROP TABLE {name} SYNC")
            clickhouse.query("DROP TABLE IF EXISTS target SYNC")
        assert not await sink.write(events(1, many))
        assert ids(clickhouse) == [*range(1, many + 1)]


def _endless(chunk: bytes, pause: float = 0.0) -> Iterator[bytes]:
    while True:
        yield chunk
        time.sleep(pause)


class TestBounds:
    """No answer is read for ever, or into memory without end."""

    @pytest.mark.parametrize("status", [200, 500])
    @pytest.mark.parametrize("only_inserts", [True, False])
    async def test_an_endless_answer(
        self, clickhouse: ClickHouse, front: Front, status: int, *, only_inserts: bool
    ) -> None:
        """It is cut off."""
        async with sink_behind(front, clickhouse) as sink:
            front.tell(lambda _: Answer(status, {}, _endless(b"x" * 65_536)), only_inserts=only_inserts)
            began = time.monotonic()
            with pytest.raises(SinkError):
                await sink.write(events(1, 10))
            assert time.monotonic() - began < 5
            assert front.sent_bytes < 40_000_000, "the network's buffers included"

    async def test_not_compressed(self, clickhouse: ClickHouse, front: Front, sink: ClickHouseSink) -> None:
        """It may be written with a capital."""
        front.tell(lambda asked: but(asked.pass_on(), Content_Encoding="Identity"), only_inserts=False)
        await sink.write(events(1, 3))
        assert [1, 2, 3] == ids(clickhouse)

    async def test_a_bomb(self, front: Front, sink: ClickHouseSink) -> None:
        """Nothing is unpacked."""
        bomb = gzip.compress(bytes(50_000_000))
        front.tell(lambda _: Answer(200, {"Content-Encoding": "gzip"}, bomb), only_inserts=False)
        with pytest.raises(SinkMisconfigured, match="its answer is compressed"):
            await sink.write(events(1, 10))

    @pytest.mark.parametrize("only_inserts", [True, False])
    async def test_one_that_trickles(self, clickhouse: ClickHouse, front: Front, *, only_inserts: bool) -> None:
        """The time is for the whole answer, not for each byte."""
        async with sink_behind(front, clickhouse, timeout_seconds=1) as sink:
            front.tell(lambda _: Answer(200, {}, itertools.islice(_endless(b"[", 0.1), 50)), only_inserts=only_inserts)
            began = time.monotonic()
            with pytest.raises(SinkUnavailable, match=r"no answer .* \(TimeoutError\)"):
                await sink.write(events(1, 10))
            assert time.monotonic() - began < 3


SECURITY = Path("docs/reference/security.md").read_text(encoding="utf-8")

RIGHTS = {
    r"SELECT toUInt8\(getSetting\('readonly'\)\)": "",
    r"CHECK GRANT CREATE DATABASE, CREATE TABLE ON `engagement`\.\*": "",
    r"SELECT version\(\)": "",
    r"SELECT toUnixTimestamp64Micro\(parseDateTime64\w+\('[^']+', 6, 'UTC'\)\), .*'UTC'\)\)": "",
    r"SELECT .* FROM system\.tables WHERE .*": "",
    r"SELECT .* FROM `engagement`\.events_enriched FINAL WHERE .*": "SELECT",
    r"INSERT INTO `engagement`\.events_enriched \(.*\)": "INSERT",
    r"EXISTS (database `engagement`|table `engagement`\.events_enriched)": "",
    r"CREATE DATABASE IF NOT EXISTS `engagement`": "CREATE DATABASE",
    r"CREATE TABLE IF NOT EXISTS `engagement`\.events_enriched .*": "CREATE TABLE",
    r"DELETE FROM `engagement`\.events_enriched WHERE .*": "ALTER DELETE",
}
"""Every statement, and the right it needs. What a user may see of `system.tables` goes by its rights to the tables."""


async def test_rights(clickhouse: ClickHouse, front: Front) -> None:
    """Each method needs what docs/reference/security.md grants for the commands that call it, and no more."""

    def needed() -> set[str]:
        statements = [" ".join(re.sub(rb"(?m)--.*$", b"", asked.body).decode().split()) for asked in front.asked]
        front.asked.clear()
        heads = [statement.partition(" FORMAT ")[0] for statement in statements]
        return {next(right for known, right in RIGHTS.items() if re.fullmatch(known, head)) for head in heads} - {""}

    clickhouse.query("DROP DATABASE engagement SYNC")
    async with sink_behind(front, clickhouse) as sink:
        assert needed() == {"CREATE DATABASE", "CREATE TABLE"}
        clickhouse.query("DROP DATABASE engagement SYNC")
        assert [finding.made_by_init for finding in await sink.check()] == [False, True]
        assert needed() == set()
        await sink.create()
        assert needed() == {"CREATE DATABASE", "CREATE TABLE"}
        await sink.open()
        front.tell(lambda asked: bare(asked.pass_on()))
        assert not await sink.write(events(1, 10))
        assert all(finding.ok for finding in await sink.check())
        await sink.hours(0, 10)
        ledger = sink.ledger(with_content=True)
        found = await ledger.find([1], 0, 2**60)
        assert needed() == {"SELECT", "INSERT"}
        await ledger.delete(found)
        assert needed() == {"SELECT", "ALTER DELETE"}
    assert re.findall(r"GRANT ([A-Z, ]+) ON", SECURITY) == [
        "SELECT, INSERT",
        "CREATE DATABASE, CREATE TABLE",
        "ALTER DELETE",
    ]
