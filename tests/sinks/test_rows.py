"""Rows that change: whatever comes again, in batches of any cut, and from beside the stream, the last version stays."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import msgspec
import pytest
import redis

from devstack import DevStack
from replicator import BIGINT, DATE, TEXT, TIMESTAMPTZ, UUID, Field, Role, Stream
from replicator.contracts.errors import SinkMisconfigured, SinkUnusable
from replicator.contracts.events import Event, Id, RowChange
from replicator.contracts.settings import load
from replicator.contracts.sink import Mode, Sink, SinkContext
from sinks.clickhouse.sink import YEARS_1900_TO_2299_US, ClickHouseSettings, ClickHouseSink
from sinks.redis.settings import RedisSettings
from sinks.redis.sink import RedisSink

STREAM = Stream(
    "parcels",
    "public.parcels",
    (
        Field("parcel_id", TEXT, role=Role.IDENTITY),
        Field("depot", TEXT, role=Role.KEY),
        Field("at", TIMESTAMPTZ, role=Role.TIME),
        Field("weight", BIGINT.nullable()),
    ),
    updates="upsert",
    deletes="delete",
)
ONCE = Stream(
    "visits",
    "public.visits",
    (
        Field("visit_id", UUID, role=Role.IDENTITY),
        Field("depot", BIGINT, role=Role.KEY),
        Field("at", TIMESTAMPTZ, role=Role.TIME),
    ),
)
NUMBERED = Stream(
    "parcels",
    "public.parcels",
    (
        Field("parcel_id", BIGINT, role=Role.IDENTITY),
        Field("depot", BIGINT, role=Role.KEY),
        Field("at", TIMESTAMPTZ, role=Role.TIME),
    ),
)
LETTERED = replace(STREAM, updates="ignore", deletes="ignore")
PARCELS = [*(f"parcel {number} ü|'\\" for number in range(4)), "ü|'\\", ""]
DUE = [None, "1900-01-01", "2299-12-31"]
DEPOTS = ["north", "süd", "a:b c"]


@pytest.fixture
def chance() -> random.Random:
    """A generator whose seed is shown when the test fails."""
    seed = random.randrange(10**9)  # noqa: S311  not a secret
    print(f"seed {seed}")  # noqa: T201  pytest shows it when the test has failed
    return random.Random(seed)  # noqa: S311


class History:
    """Random changes of a few parcels, and what is there after all of them."""

    def __init__(self, chance: random.Random, changes: int) -> None:
        self.events: list[Event] = []
        self.there: dict[Id, Event] = {}
        self.last: dict[str, Event | None] = {}
        lsn = 100
        for _ in range(changes):
            lsn += chance.randint(0, 1)
            self._change(chance, lsn, ordinal=len(self.events) + 1)

    def _change(self, chance: random.Random, lsn: int, ordinal: int) -> None:
        parcel = chance.choice(PARCELS)
        old = self.there.get(parcel)
        if old is not None and chance.random() < 0.3:
            self._end(parcel)
            json = msgspec.json.encode({"parcel_id": parcel})
            self.events.append(RowChange(lsn, ordinal, parcel, "", None, json, deleted=True))
            return
        was = next((one for one in PARCELS if one in self.there and one != parcel), None)
        if old is not None or chance.random() < 0.7:
            was = None
        for ended in (parcel, was):
            if ended is not None:
                self._end(ended)
        event = upsert(lsn, ordinal, parcel, chance.choice(DEPOTS), weight=ordinal)
        event.was = was
        self.events.append(event)
        self.there[parcel] = self.last[event.key] = event

    def _end(self, parcel: Id) -> None:
        event = self.there.pop(parcel, None)
        for depot, last in self.last.items():
            if last is not None and last is event:
                self.last[depot] = None

    def seen_again(self, chance: random.Random) -> Iterator[Sequence[Event]]:
        """In batches, each perhaps after a restart, which goes back; and from a backfill."""
        at = 0
        while at < len(self.events):
            size = chance.randint(1, 12)
            yield self.events[at : at + size]
            at = max(0, at + size - chance.choice([0, 0, 0, chance.randint(0, 30)]))
        yield [chance.choice(self.events) for _ in range(20)]


def upsert(lsn: int, ordinal: int, parcel: Id, depot: Id, **more: object) -> RowChange:
    """A row that is there."""
    ts_us = int(time.time() * 1e6)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ts_us // 10**6)) + f".{ts_us % 10**6:06}Z"
    names = ("parcel_id", "depot") if isinstance(depot, str) else ("visit_id", "depot")
    json = msgspec.json.encode({names[0]: parcel, names[1]: depot, "at": stamp, **more})
    return RowChange(lsn, ordinal, parcel, depot, ts_us, json)


async def write(sink: Sink, batches: Iterator[Sequence[Event]]) -> None:
    """All of them."""
    await sink.create()
    await sink.open(None, Mode.LIVE)
    try:
        for batch in batches:
            assert not await sink.write(batch)
    finally:
        await sink.close()


async def test_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch, chance: random.Random) -> None:
    """Counts of what is there, the row that was changed last, and the ranking of it."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    history = History(chance, 200)
    sink = RedisSink(load(RedisSettings), SinkContext(STREAM))
    await write(sink, history.seen_again(chance))
    sink = RedisSink(load(RedisSettings), SinkContext(STREAM))
    await sink.open(None, Mode.LIVE)
    await sink.window.slide()
    wanted = Counter(str(event.key) for event in history.there.values())
    assert dict(wanted) == dict(await sink.top(10))
    assert [wanted[depot] for depot in DEPOTS] == await sink.counter().counts(DEPOTS)
    assert [one for one in PARCELS if one not in history.there] == await sink.counter().unseen(PARCELS)
    await sink.close()
    with redis.Redis.from_url(redis_url) as client:
        found = {depot: client.get(f"parcels:last:{depot}") for depot in history.last}
    assert {depot: event and event.json for depot, event in history.last.items()} == found


async def test_clickhouse(
    stack: DevStack, clickhouse_url: str, monkeypatch: pytest.MonkeyPatch, chance: random.Random
) -> None:
    """Under FINAL, each row that is there once."""
    monkeypatch.setenv("REPLICATOR_CLICKHOUSE_URL", clickhouse_url)
    history = History(chance, 200)
    await write(ClickHouseSink(load(ClickHouseSettings), SinkContext(STREAM)), history.seen_again(chance))
    found = stack.clickhouse.query(
        "SELECT parcel_id, depot, weight FROM parcels FINAL ORDER BY 1 FORMAT JSONCompactEachRow"
        " SETTINGS output_format_json_quote_64bit_integers = 0"
    )
    wanted = [msgspec.json.decode(event.json) for _, event in sorted(history.there.items())]
    assert [[row["parcel_id"], row["depot"], row["weight"]] for row in wanted] == [
        msgspec.json.decode(line) for line in found.splitlines()
    ]


@pytest.mark.parametrize("text", ["0999-12-31", "9999-12-31", "20000-01-01", "infinity", "0044-03-15 BC"])
async def test_a_date_that_an_older_clickhouse_would_change(
    clickhouse_url: str, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """It takes the nearest that it holds, and says nothing: such a row is refused."""
    monkeypatch.setenv("REPLICATOR_CLICKHOUSE_URL", clickhouse_url)
    dated = replace(STREAM, fields=(*STREAM.fields, Field("due", DATE.nullable())))
    sink = ClickHouseSink(load(ClickHouseSettings), SinkContext(dated))
    await sink.create()
    await sink.open(None, Mode.LIVE)
    sink._range_us = YEARS_1900_TO_2299_US  # noqa: SLF001  what an older one answers
    good = [
        upsert(100, number, parcel, "north", due=due)
        for number, (parcel, due) in enumerate(zip(PARCELS, DUE, strict=False), 1)
    ]
    [refusal] = await sink.write([*good, upsert(101, 1, PARCELS[3], "north", due=text)])
    assert (PARCELS[3], True) == (refusal.event.id, "1900 to 2299" in refusal.reason)
    await sink.close()


async def test_rows_that_come_once(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of identities that are no numbers: each is counted once, and the newest by time is the last."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    events = [upsert(100, number, f"00000000-0000-0000-0000-{number:012}", number % 3) for number in range(1, 100)]
    sink = RedisSink(load(RedisSettings), SinkContext(ONCE))
    await write(sink, iter([events[50:], events[:60], events[::-1], events]))
    assert 99 == sink.new_events
    with redis.Redis.from_url(redis_url) as client:
        assert [33, 33, 33] == [int(client.get(f"visits:count:{depot}") or 0) for depot in range(3)]
        newest = [
            max((event for event in events if event.key == depot), key=lambda e: e.ts_us or 0) for depot in range(3)
        ]
        assert [event.json for event in newest] == [client.get(f"visits:last:{depot}") for depot in range(3)]


NAMED = replace(NUMBERED, redis_name="depots")


@pytest.mark.parametrize("stream", [STREAM, ONCE, NAMED], ids=["they change", "once", "numbers"])
async def test_another_program_s_key_is_called_as_the_stream_s(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, stream: Stream
) -> None:
    """Of another type, and of another kind of value. No word of content, which the stream has not."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    monkeypatch.setenv("REPLICATOR_REDIS_PREFIX", "shop:")
    noun = stream.redis_name or stream.name
    told = f"Another program uses a key shop:{noun}:*, shop:top:{noun}:* or shop:{stream.name}:seen:*: rename or delete"
    parcel: Id = 1 if stream is NAMED else PARCELS[0] if stream is STREAM else "00000000-0000-0000-0000-000000000001"
    sink = RedisSink(load(RedisSettings), SinkContext(stream))
    with redis.Redis.from_url(redis_url) as client:
        for spoil in ("RPUSH", "SET"):
            client.flushall()
            client.execute_command(spoil, f"shop:{noun}:count:7", "theirs")
            with pytest.raises(SinkUnusable, match="Another program uses a key") as caught:
                await sink.write([Event(100, 1, parcel, 7, int(time.time()) * 1_000_000, b"{}")])
            assert told in str(caught.value)
            assert "content" not in str(caught.value)
        with pytest.raises(SinkUnusable) as counted:
            await sink.counter().counts([7])
        assert told in str(counted.value)
        client.flushall()
    await sink.close()


@pytest.mark.parametrize("stream", [LETTERED, STREAM], ids=["inserted", "changing"])
async def test_a_row_without_a_time_is_refused(redis_url: str, monkeypatch: pytest.MonkeyPatch, stream: Stream) -> None:
    """As inserted numbers are. It is not counted, and what it was before counts no longer; it may get a time again."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    sink = RedisSink(load(RedisSettings), SinkContext(stream))
    await sink.open(None, Mode.LIVE)
    [refusal] = await sink.write([untimed := endless(100, 1), upsert(100, 2, "b", "north")])
    assert (untimed, True) == (refusal.event, "infinite" in refusal.reason)
    assert (1, [1], ["a"]) == (
        sink.new_events,
        await sink.counter().counts(["north"]),
        await sink.counter().unseen(["a"]),
    )
    assert not await sink.write([upsert(101, 1, "a", "north")])
    assert [2] == await sink.counter().counts(["north"])
    for _ in range(2):
        assert [endless(102, 1)] == [refusal.event for refusal in await sink.write([endless(102, 1)])]
        assert not await sink.write([upsert(101, 1, "a", "north")])
        assert [1] == await sink.counter().counts(["north"])
    with redis.Redis.from_url(redis_url) as client:
        assert client.get("parcels:last:north") in {None, upsert(100, 2, "b", "north").json}
    await sink.close()


def endless(lsn: int, ordinal: int) -> RowChange:
    """Row `a`, whose time is infinite."""
    return RowChange(lsn, ordinal, "a", "north", None, b'{"parcel_id":"a","depot":"north","at":"infinity"}')


async def test_the_keys_that_have_counts(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, whatever is in their names; none of another stream, and nothing of another program."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    depots = [*DEPOTS, "a*?[b]\\", "", *(f"depot {number}" for number in range(3_000))]
    rows = [upsert(100, number, f"{number}", depot) for number, depot in enumerate(depots, 1)]
    made = {STREAM: rows, NUMBERED: [upsert(100, 1, 1, 7), upsert(100, 2, 2, -7)]}
    for stream, changes in made.items():
        monkeypatch.setenv("REPLICATOR_REDIS_PREFIX", f"{stream is STREAM}:")
        sink = RedisSink(load(RedisSettings), SinkContext(stream))
        await sink.open(None, Mode.BACKFILL)
        for at in range(0, len(changes), sink.max_events):
            assert not await sink.write(changes[at : at + sink.max_events])
        with redis.Redis.from_url(redis_url) as client:
            for other in ("False:parcels:count:007", "False:parcels:count:all", "parcels:count:x"):
                client.set(other, 1)
        pages = sink.counter().keys()
        assert {*(change.key for change in changes)} == {key async for page in pages for key in page}
        await sink.close()


@pytest.fixture
def writer(redis_url: str) -> Iterator[Any]:
    """A connection that may give rights to the user `writer`."""
    client: Any = redis.Redis.from_url(redis_url)
    with client:
        yield client
        client.execute_command("ACL", "DELUSER", "writer")


async def test_a_right_that_is_lost_while_it_writes(
    redis_url: str, writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rights that the cure names suffice; a batch is counted whole, once a lost one is back."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url.replace("://", "://writer:secret@"))
    sink = RedisSink(load(RedisSettings), SinkContext(STREAM))
    rights = sink._redis.rights.split()  # noqa: SLF001  what a message names
    writer.execute_command("ACL", "SETUSER", "writer", "on", ">secret", *rights)
    await sink.open(None, Mode.LIVE)
    assert all(finding.ok for finding in await sink.check())
    await sink.write([upsert(100, 1, PARCELS[0], "north")])
    changes = [upsert(101, 1, PARCELS[0], "süd"), upsert(101, 2, PARCELS[1], "süd")]
    for lost in ("hset", "incrby", "zincrby", "expire", "setex", "hmget", "zcard"):
        writer.execute_command("ACL", "SETUSER", "writer", f"-{lost}")
        with pytest.raises(SinkMisconfigured, match="parcels:"):
            await sink.write(changes)
        writer.execute_command("ACL", "SETUSER", "writer", f"+{lost}")
        assert [1, 0, 0] == await sink.counter().counts(DEPOTS)
        assert PARCELS[1:] == await sink.counter().unseen(PARCELS)
    await sink.write(changes)
    await sink.window.slide()
    assert [0, 2, 0] == await sink.counter().counts(DEPOTS)
    assert [("süd", 2)] == await sink.top(10)
    await sink.close()


async def ours() -> str:
    """Where events come from."""
    return "ours"


def sink_of(stream: Stream) -> RedisSink:
    """Not open yet."""
    return RedisSink(load(RedisSettings), SinkContext(stream, origin=ours))


def numbered(stream: Stream, number: int) -> RowChange:
    """A row as this stream has it."""
    return upsert(100, number, number, 1) if stream is NUMBERED else upsert(100, number, f"{number}", "1")


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("before", "after"), [*permutations([NUMBERED, LETTERED, STREAM], 2)])
async def test_keys_that_were_made_for_other_rows(
    before: Stream, after: Stream, mode: Mode, *, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they have counted would be counted again. Emptied they are anybody's."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    first, again, sink = sink_of(before), sink_of(before), sink_of(after)
    await first.open(None, mode)
    await first.write([numbered(before, 1), numbered(before, 2)])
    await first.close()
    await again.open(None, Mode.LIVE)
    await again.write([numbered(before, 2)])
    assert [2] == await again.counter().counts([1])
    for refused in (sink.open(), sink.generation(), sink.counter().counts([1]), sink.counter().trace(1, None)):
        with pytest.raises(SinkUnusable, match=r"now declared with .*rebuild-redis --from-empty"):
            await refused
    [finding] = await sink.check()
    assert (False, True) == (finding.ok, "were made for" in finding.what)
    with redis.Redis.from_url(redis_url) as client:
        assert (before is NUMBERED) == (client.get("parcels:seen:form") is None), "older releases wrote none"
    assert await sink.empty()
    await sink.generation()
    await sink.open()
    await sink.write([numbered(after, 1), numbered(after, 2), numbered(after, 3)])
    assert [3] == await sink.counter().counts([1])
    assert all(finding.ok for finding in await sink.check())
    await sink.close()
    if before is NUMBERED:  # one that still runs must not count beside it
        await again._look()  # noqa: SLF001  once a second else
        with pytest.raises(SinkUnusable, match="were made for"):
            await again.write([numbered(before, 3)])
    await again.close()


async def test_a_check_does_not_say_what_keys_are_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it leave anything."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    sink = sink_of(STREAM)
    assert all(finding.ok for finding in await sink.check())
    await sink.close()
    with redis.Redis.from_url(redis_url) as client:
        assert [] == client.keys("*")


async def test_a_redis_that_was_emptied_is_still_for_the_same_rows(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of the other markers is written first."""
    monkeypatch.setenv("REPLICATOR_REDIS_URL", redis_url)
    sink = sink_of(STREAM)
    await sink.open(None, Mode.BACKFILL)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        client.set("parcels:seen:generation", "another lost")
        await sink._look()  # noqa: SLF001  once a second else
        await sink.write([upsert(100, 1, "1", "1")])
        assert b"rows that change" == client.get("parcels:seen:form")
    await sink.close()
