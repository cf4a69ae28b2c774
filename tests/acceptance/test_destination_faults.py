"""Everything that can happen to a destination: it goes on, waits and says so, or stops with what mends it.

What a message tells to type is typed here, and afterwards every sink has every event. The table of all this is in
docs/reference/faults.md. What PostgreSQL can do is in `test_source_faults.py`, killed servers in `test_faults.py`.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest
import redis

from devstack import DevStack
from devstack.process import Service, free_port, wait_until
from devstack.proxy import Network, Proxy
from tests.support.destinations import Destinations
from tests.support.environment import PASSWORD, SECRET
from tests.support.exact import assert_exact
from tests.support.load import insert_many
from tests.support.program import Program, assert_clean, succeed

SINKS = ("clickhouse", "redis", "http")
URLS = {sink: f"REPLICATOR_{sink.upper()}_URL" for sink in SINKS}
RIGHT, WRONG, ROTATED = f"{SECRET}-right", f"{SECRET}-wrong", f"{SECRET}-rotated"
DSN = "REPLICATOR_POSTGRES_DSN"
DISK_BYTES = 48_000_000
NOT_ENOUGH_SPACE = "Code: 243. DB::Exception: Cannot reserve 1.00 MiB, not enough space. (NOT_ENOUGH_SPACE)"

Act: TypeAlias = Callable[[], object]


def service(stack: DevStack, sink: str) -> Service:
    """The server behind a sink."""
    return {"clickhouse": stack.clickhouse, "redis": stack.redis, "http": stack.api}[sink]


def trouble(program: Program, sink: str) -> str:
    """What `/status` says of it."""
    return str(program.status()["sinks"][sink]["trouble"])


def written(program: Program) -> dict[str, int]:
    """How many events each sink has taken since the program began."""
    return {sink: lane["events"] for sink, lane in program.status()["sinks"].items()}


def begin(program: Program, source: psycopg.Connection) -> None:
    """It runs, and every sink has taken something: what breaks from here on breaks a lane at work."""
    program.start()
    insert_many(source, 10)
    program.wait_until_caught_up()


def waits(program: Program, source: psycopg.Connection, sink: str, told: str) -> None:
    """New events find the sink broken: it says so in log and status, keeps them, and the others go on."""
    before = written(program)
    insert_many(source, 10)
    wait_until(lambda: told in trouble(program, sink), f"sink {sink} to say {told!r}")
    for other in set(SINKS) - {sink}:
        wait_until(lambda other=other: before[other] + 10 == written(program)[other], f"{other} to go on")  # type: ignore[misc]  # mypy can't type a lambda's default
    assert before[sink] == written(program)[sink]


def endures(program: Program, source: psycopg.Connection, sink: str, told: str, *, break_: Act, mend: Act) -> None:
    """It waits while the sink is broken, and goes on by itself once it is mended."""
    said_before = len(program.log)
    break_()
    try:
        waits(program, source, sink, told)
    finally:
        mend()
    program.wait_until_caught_up()
    said = program.log[said_before:]
    assert told in said
    assert f"sink {sink} takes events again" in said
    assert "" == trouble(program, sink)


def is_exact(program: Program, database: str, destinations: Destinations) -> None:
    """It has everything everywhere, ends in order, and has told no secret."""
    program.wait_until_caught_up()
    assert 0 == program.stop()
    is_clean_and_exact(program, database, destinations)


def is_clean_and_exact(program: Program, database: str, destinations: Destinations) -> None:
    """It has told no secret, and every sink has every event."""
    assert_clean(program.log)
    assert_exact(database, destinations)


# -- the network ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wires(quick: Program, stack: DevStack) -> Iterator[dict[str, Proxy]]:
    """A proxy in front of every destination; the program loses patience soon."""
    quick.environment |= {
        "REPLICATOR_CLICKHOUSE_TIMEOUT_SECONDS": "1",
        "REPLICATOR_REDIS_TIMEOUT_SECONDS": "1",
        "REPLICATOR_HTTP_TIMEOUT_SECONDS": "1",
    }
    with ExitStack() as opened:
        proxies = {sink: opened.enter_context(Proxy(service(stack, sink).port)) for sink in SINKS}
        for sink, proxy in proxies.items():
            here = quick.environment[URLS[sink]]
            quick.environment[URLS[sink]] = here.replace(f":{service(stack, sink).port}/", f":{proxy.port}/")
        yield proxies


# What the lane says of a destination that is to be asked again.
NOT_TAKEN = "did not take the batch"


@pytest.mark.parametrize("network", ["down", "stalled"])
def test_the_network_is_down(  # noqa: PLR0917  fixtures
    quick: Program,
    database: str,
    source: psycopg.Connection,
    destinations: Destinations,
    wires: dict[str, Proxy],
    network: Network,
) -> None:
    """Connections are closed, or nothing comes through any more: that sink waits, the others go on."""
    begin(quick, source)
    for sink, wire in wires.items():
        told = f"Sink {sink} {NOT_TAKEN}"
        endures(quick, source, sink, told, break_=partial(wire.behave, network), mend=partial(wire.behave, "whole"))
    is_exact(quick, database, destinations)


def test_trouble_that_lasts_is_told_everywhere(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, wires: dict[str, Proxy]
) -> None:
    """All of them away: after 10 s /readyz names each, and so do `status` and the metrics; ready again afterwards."""
    begin(quick, source)
    for wire in wires.values():
        wire.behave("down")
    insert_many(source, 10)
    for sink in SINKS:
        told = f"Sink {sink} {NOT_TAKEN}"
        wait_until(lambda told=told: told in quick.admin("/readyz"), "it not to be ready", 20)  # type: ignore[misc]  # mypy can't type a lambda's default
        assert told in quick.log
        assert 1 == quick.metric("sink_troubled", sink=sink)
    status = quick.run("status")
    assert 3 == status.code
    assert "NOT READY" in status.stdout
    assert all(f"Sink {sink} {NOT_TAKEN}" in status.stdout for sink in SINKS)
    for wire in wires.values():
        wire.behave("whole")
    quick.wait_until_caught_up()
    assert "ready\n" == quick.admin("/readyz")
    is_exact(quick, database, destinations)


@pytest.mark.parametrize("network", ["no answers", "mute"])
def test_the_answer_is_lost(  # noqa: PLR0917  fixtures
    quick: Program,
    database: str,
    source: psycopg.Connection,
    stack: DevStack,
    destinations: Destinations,
    wires: dict[str, Proxy],
    network: Network,
) -> None:
    """It has the events, and the answer is cut off or held: they are sent again, and nothing comes of it twice."""
    begin(quick, source)
    for rows, (sink, wire) in zip((20, 30, 40), wires.items(), strict=True):
        has_them = partial(have, stack, destinations, sink, rows)

        def mend(wire: Proxy = wire, has_them: Callable[[], bool] = has_them) -> None:
            wait_until(has_them, "the destination to have what it did not answer for")
            wire.behave("whole")

        told = f"Sink {sink} {NOT_TAKEN}"
        endures(quick, source, sink, told, break_=partial(wire.behave, network), mend=mend)
    is_exact(quick, database, destinations)


def have(stack: DevStack, destinations: Destinations, sink: str, events: int) -> bool:
    """Whether a destination has so many events, asked past the proxy."""
    if sink == "http":
        return events == len(set(stack.api.event_ids()))
    if sink == "redis":
        return events == sum(destinations.counts().values())
    return events == int(stack.clickhouse.query("SELECT uniqExact(event_id) FROM events_enriched"))


def test_the_network_is_slow(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, wires: dict[str, Proxy]
) -> None:
    """Every answer takes its time: that is no trouble, and everything arrives."""
    begin(quick, source)
    for wire in wires.values():
        wire.behave("slow")
    for _ in range(5):
        insert_many(source, 500)
    is_exact(quick, database, destinations)
    assert NOT_TAKEN not in quick.log


# -- it answers, and refuses ---------------------------------------------------------------------------------------


class Hands:
    """What an operator does to the servers; `mend` takes all of it back."""

    def __init__(self, stack: DevStack) -> None:
        self.stack = stack
        self.redis = redis.Redis.from_url(stack.redis.url)
        self._redis_settings = self.redis.config_get("*")

    def mend(self, sink: str | None = None) -> None:
        """Everything as it was, at one of them or at all."""
        if sink in ("clickhouse", None):
            self.stack.clickhouse.behave()
        if sink in ("http", None):
            self.stack.api.behave()
        if sink in ("redis", None):
            self.redis.replicaof("NO", "ONE")
            for name in ("maxmemory", "min-replicas-to-write", "requirepass"):
                self.redis.config_set(name, self._redis_settings[name] or "")

    def password(self, sink: str, word: str) -> None:
        """It asks for this from now on, from who is connected already, too."""
        if sink == "clickhouse":
            self.stack.clickhouse.behave(password=word)
        elif sink == "http":
            self.stack.api.behave(token=word)
        else:
            self.redis.config_set("requirepass", word)
            self.redis.client_kill_filter(_type="normal", skipme=True)


@pytest.fixture
def hands(stack: DevStack, redis_url: str) -> Iterator[Hands]:
    """An operator's, on servers that are as they were afterwards."""
    assert redis_url == stack.redis.url
    hands = Hands(stack)
    yield hands
    hands.mend()
    hands.redis.close()


def every_sink(
    program: Program, source: psycopg.Connection, hands: Hands, faults: Mapping[str, tuple[Act, str]]
) -> None:
    """One after the other is broken in its way, says what is told there, and is mended."""
    for sink, (break_, told) in faults.items():
        endures(program, source, sink, told, break_=break_, mend=partial(hands.mend, sink))


def test_it_answers_with_errors(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, hands: Hands
) -> None:
    """Overloaded, without its replicas, 503: tried again for ever."""
    begin(quick, source)
    faults: dict[str, tuple[Act, str]] = {
        "clickhouse": (partial(hands.stack.clickhouse.behave, status=500), "error 202 TOO_MANY_SIMULTANEOUS_QUERIES"),
        "redis": (partial(hands.redis.config_set, "min-replicas-to-write", 1), "NOREPLICAS"),
        "http": (partial(hands.stack.api.behave, status=503), "answered 503 Service Unavailable"),
    }
    every_sink(quick, source, hands, faults)
    is_exact(quick, database, destinations)


def test_it_is_read_only(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, hands: Hands
) -> None:
    """A user that may only read, a primary that has become a replica, 403: all of it waits for somebody."""
    begin(quick, source)
    faults: dict[str, tuple[Act, str]] = {
        "clickhouse": (partial(hands.stack.clickhouse.behave, read_only=True), "ClickHouse error 164 READONLY"),
        "redis": (partial(hands.redis.replicaof, "127.0.0.1", str(free_port())), "READONLY"),
        "http": (partial(hands.stack.api.behave, status=403), "answered 403 Forbidden"),
    }
    every_sink(quick, source, hands, faults)
    is_exact(quick, database, destinations)


def test_it_is_full(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, hands: Hands
) -> None:
    """No space, no memory, 507: it goes on when there is room again."""
    quick.start()
    no_space = partial(hands.stack.clickhouse.behave, status=500, exception=NOT_ENOUGH_SPACE)
    faults: dict[str, tuple[Act, str]] = {
        "clickhouse": (no_space, "ClickHouse error 243 NOT_ENOUGH_SPACE"),
        "redis": (partial(hands.redis.config_set, "maxmemory", 1), "OOM command not allowed"),
        "http": (partial(hands.stack.api.behave, status=507), "answered 507 Insufficient Storage"),
    }
    every_sink(quick, source, hands, faults)
    is_exact(quick, database, destinations)


def test_the_password_is_changed(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, hands: Hands
) -> None:
    """Before the start and while it runs: it waits, says where to look, never says the secret, and goes on."""
    variables = quick.environment
    variables["REPLICATOR_CLICKHOUSE_URL"] = variables["REPLICATOR_CLICKHOUSE_URL"].replace("@", f":{RIGHT}@")
    variables["REPLICATOR_REDIS_URL"] = variables["REPLICATOR_REDIS_URL"].replace("//", f"//:{RIGHT}@")
    variables["REPLICATOR_HTTP_BEARER_TOKEN"] = RIGHT
    for sink in SINKS:
        hands.password(sink, WRONG)
    quick.spawn()
    for sink in ("clickhouse", "redis"):  # before it reads; the API is first asked with the first event
        told = f"Sink {sink} turns the replicator away"
        quick.wait_for_log(told)
        wait_until(lambda told=told: told in quick.admin("/readyz"), "it to say so")  # type: ignore[misc]  # mypy can't type a lambda's default
        hands.password(sink, RIGHT)
    hands.password("http", RIGHT)
    quick.wait_for_log("reading slot")
    wait_until(lambda: not any(trouble(quick, sink) for sink in SINKS), "all of them to be let in")
    for sink in SINKS:
        told = f"Sink {sink} turns the replicator away"
        mend = partial(hands.password, sink, RIGHT)
        endures(quick, source, sink, told, break_=partial(hands.password, sink, WRONG), mend=mend)
        assert re.search(rf"{told}: .*Check .*REPLICATOR_{sink.upper()}_", quick.log)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    hands.mend()
    is_clean_and_exact(quick, database, destinations)


def test_secrets_are_rotated(
    quick: Program,
    database: str,
    source: psycopg.Connection,
    *,
    destinations: Destinations,
    hands: Hands,
    tmp_path: Path,
) -> None:
    """In their files, while it runs: PostgreSQL's password and every sink's. It takes the new ones by itself."""
    files = _secrets_in_files(quick, hands, tmp_path)
    begin(quick, source)
    quick.wait_until_caught_up()
    for sink in SINKS:
        hands.password(sink, ROTATED)
    source.execute(f"ALTER ROLE replicator PASSWORD '{ROTATED}'")
    terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'replicator'"
    source.execute(terminate)
    try:
        quick.wait_for_log("PostgreSQL refuses the connection")
        wait_until(lambda: "refuses the connection" in quick.admin("/readyz"), "it to say so")
        assert "authentication failed" in quick.run("check").stdout
        insert_many(source, 100)
        for file in files:
            file.write_text(file.read_text().replace(RIGHT, ROTATED).replace(PASSWORD, ROTATED))
        wait_until(lambda: "ready\n" == quick.admin("/readyz"), "it to be ready by itself")
        quick.wait_until_caught_up()
        assert 0 == quick.stop()
    finally:
        source.execute(f"ALTER ROLE replicator PASSWORD '{PASSWORD}'")
    hands.mend()
    is_clean_and_exact(quick, database, destinations)


def _secrets_in_files(quick: Program, hands: Hands, folder: Path) -> list[Path]:
    """The same settings, each in a file, and every destination with a password."""
    variables = quick.environment
    variables["REPLICATOR_CLICKHOUSE_URL"] = variables["REPLICATOR_CLICKHOUSE_URL"].replace("@", f":{RIGHT}@")
    variables["REPLICATOR_REDIS_URL"] = variables["REPLICATOR_REDIS_URL"].replace("//", f"//:{RIGHT}@")
    variables["REPLICATOR_HTTP_BEARER_TOKEN"] = RIGHT
    files = []
    for name in (*(URLS[sink] for sink in ("clickhouse", "redis")), "REPLICATOR_HTTP_BEARER_TOKEN", DSN):
        files.append(folder / name)
        files[-1].write_text(variables.pop(name))
        variables[f"{name}_FILE"] = str(files[-1])
    for sink in SINKS:
        hands.password(sink, RIGHT)
    return files


# -- a disk that is full -------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of its own on this folder; yields what to write to fill it."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=777", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder / "ballast"
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(ballast: Path) -> None:
    """Leave no room beside it."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@contextmanager
def moved_to(server: Service, folder: Path) -> Iterator[Path]:
    """The server, on a small disk; yields what fills it."""
    server.stop()
    folder.mkdir(exist_ok=True)
    with small_disk(folder) as ballast:
        server.start()
        try:
            yield ballast
        finally:
            ballast.unlink(missing_ok=True)
            server.kill()
    server.start()


@pytest.mark.parametrize("sink", ["clickhouse", "redis"])
def test_its_disk_is_full(  # noqa: PLR0917  fixtures
    quick: Program, database: str, source: psycopg.Connection, stack: DevStack, destinations: Destinations, sink: str
) -> None:
    """A real disk without room: the server's own words, and it goes on once something is deleted."""
    server = service(stack, sink)

    def break_() -> None:
        fill(ballast)
        if sink == "redis":  # it answers before it knows that its log can't be written
            told_by_redis = partial(destinations.redis.info, "persistence")
            wait_until(lambda: told_by_redis()["aof_last_write_status"] == "err", "Redis to notice")

    settings = dict(stack.redis.settings)
    stack.redis.settings |= {"appendonly": "yes", "appendfsync": "everysec"} if sink == "redis" else {}
    folder = server.folder / "data" if sink == "clickhouse" else server.folder
    told = "ClickHouse error" if sink == "clickhouse" else "MISCONF"
    try:
        with moved_to(server, folder) as ballast:
            begin(quick, source)
            endures(quick, source, sink, told, break_=break_, mend=ballast.unlink)
            is_exact(quick, database, destinations)
    finally:
        stack.redis.settings.clear()
        stack.redis.settings |= settings


# -- what it has does not fit any more -----------------------------------------------------------------------------


def holds(program: Program, source: psycopg.Connection, sink: str, *told: str) -> None:
    """It waits alone, at once not ready, says why and what to do, and the others go on."""
    assert "ready\n" != program.admin("/readyz")
    insert_many(source, 10)
    for other in set(SINKS) - {sink}:
        lane = partial(lambda other: program.status()["sinks"][other], other)
        wait_until(lambda lane=lane: 0 == lane()["waiting"] and lane()["events"] > 0, f"{other} to go on")  # type: ignore[misc]  # mypy can't type a lambda's default
    assert program.running
    for words in told:
        assert words in program.log
        assert words in program.admin("/readyz")
        assert words in program.run("status").stdout


def bring_back(program: Program, sink: str) -> None:
    """What `init` prints, for one sink."""
    [command] = re.findall(r"python -m replicator backfill .*", succeed(program.run("init")))
    succeed(program.follow(f"{command} --sinks {sink}"))


BROKEN_TABLES = {
    "dropped": ("DROP TABLE events_enriched SYNC", "table engagement.events_enriched does not exist"),
    "a column dropped": ("ALTER TABLE events_enriched DROP COLUMN device", "no column device LowCardinality(Nul"),
}


@pytest.mark.parametrize("broken", BROKEN_TABLES)
def test_the_clickhouse_table_is_broken(  # noqa: PLR0917  fixtures
    quick: Program, database: str, source: psycopg.Connection, stack: DevStack, destinations: Destinations, broken: str
) -> None:
    """Waits and says what is wrong; as the cure says, `init` makes the table and the backfill fills it."""
    statement, told = BROKEN_TABLES[broken]
    quick.start()
    insert_many(source, 100)
    quick.wait_until_caught_up()
    stack.clickhouse.query(statement)
    insert_many(source, 10)
    quick.wait_for_log(told)
    holds(quick, source, "clickhouse", told, "`python -m replicator init`", "prints the backfill command")
    if broken != "dropped":
        stack.clickhouse.query("RENAME TABLE events_enriched TO events_broken")
    bring_back(quick, "clickhouse")
    is_exact(quick, database, destinations)


NARROWER = {
    "user_id": ("Int32", "Int64"),
    "event_type": ("FixedString(40)", "LowCardinality(String)"),
    "duration_ms": ("Nullable(Int16)", "Nullable(Int64)"),
    "engagement_seconds": ("Nullable(Decimal(18, 1))", "Nullable(Decimal(18, 3))"),
}


@pytest.mark.parametrize("column", NARROWER)
def test_a_clickhouse_column_became_narrower(  # noqa: PLR0917  fixtures
    quick: Program, database: str, source: psycopg.Connection, stack: DevStack, destinations: Destinations, column: str
) -> None:
    """ClickHouse would cut what does not fit and say nothing; it waits, and writes the cut rows again afterwards."""
    narrow, wide = NARROWER[column]
    values = "SELECT 1, 9000000000 + n, 'play', 70001 + n FROM generate_series(1, 10) AS n"
    insert = "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms)"
    begin(quick, source)
    stack.clickhouse.query(f"ALTER TABLE events_enriched MODIFY COLUMN {column} {narrow}")
    source.execute(f"{insert} {values}".encode())
    told = f"has column {column} as {narrow} and not {wide}"
    quick.wait_for_log(told)
    holds(quick, source, "clickhouse", told, "ALTER it to match what `python -m")
    stack.clickhouse.query(f"ALTER TABLE events_enriched MODIFY COLUMN {column} {wide}")
    quick.wait_until_caught_up()
    if column in {"duration_ms", "engagement_seconds"}:  # ALTER itself has cut what was there before
        bring_back(quick, "clickhouse")
    is_exact(quick, database, destinations)


def test_a_redis_key_is_somebody_else_s(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Of another type: it is left alone, and nothing of the batch is written until it is out of the way."""
    destinations.redis.lpush("content:count:2", "theirs")
    quick.start()
    insert_many(source, 10)
    quick.wait_for_log("WRONGTYPE")
    holds(quick, source, "redis", "WRONGTYPE", "rename or delete it", "REPLICATOR_REDIS_URL")
    assert ["theirs"] == destinations.redis.lrange("content:count:2", 0, -1)
    destinations.redis.rename("content:count:2", "theirs")
    is_exact(quick, database, destinations)


# -- it comes back without its data --------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", SINKS)
def test_its_data_is_gone(  # noqa: PLR0917  fixtures
    quick: Program, database: str, source: psycopg.Connection, stack: DevStack, destinations: Destinations, sink: str
) -> None:
    """An empty destination takes what comes; of the API it is not said. The backfill brings the rest, at any time."""
    quick.start()
    insert_many(source, 100)
    quick.wait_until_caught_up()
    if sink == "redis":
        wait_until(lambda: bool(destinations.redis.exists("engagement:seen:generation")), "Redis to be known")
    lose: dict[str, Act] = {
        "clickhouse": partial(stack.clickhouse.query, "TRUNCATE TABLE events_enriched SYNC"),
        "redis": destinations.redis.flushall,
        "http": stack.api.reset,
    }
    lose[sink]()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    assert have(stack, destinations, sink, 10)
    if sink == "redis":
        quick.wait_for_log("was emptied, or came back without its keys: counts began again at 0")
        holds(quick, source, "redis", "`python -m replicator rebuild-redis`")
        assert 0 == quick.stop()
        quick.start()
        wait_until(lambda: "was emptied" in quick.admin("/readyz"), "it to be told after a restart, too")
        succeed(quick.run("rebuild-redis"))
        wait_until(lambda: quick.admin("/readyz") == "ready\n", "it to be over")
    if sink == "clickhouse":
        told = "events_enriched was emptied, or another one has taken its place"
        holds(quick, source, "clickhouse", told, "`python -m replicator init`", "prints the backfill command")
        succeed(quick.run("pause", "clickhouse"))
        assert told in quick.admin("/readyz")
        succeed(quick.run("resume", "clickhouse"))
        quick.wait_until_caught_up()
        wait_until(lambda: told in quick.admin("/readyz"), "it to be told after the pause, too")
        bring_back(quick, sink)
        wait_until(lambda: quick.admin("/readyz") == "ready\n", "it to be over")
        lose[sink]()
        is_known_to_be_lost(quick, told, source)
    bring_back(quick, sink)
    wait_until(lambda: quick.admin("/readyz") == "ready\n", "it to be over")
    is_exact(quick, database, destinations)


def is_known_to_be_lost(program: Program, told: str, source: psycopg.Connection) -> None:
    """Over every restart, with events that have come since, and while the sink is paused; until that is accepted."""
    insert_many(source, 10)
    program.wait_until_caught_up()
    program.kill()
    assert told in program.run("check").stdout
    program.start()
    wait_until(lambda: told in program.admin("/readyz"), "it to be told after a kill")
    succeed(program.run("pause", "clickhouse"))
    assert 0 == program.stop()
    program.start()
    wait_until(lambda: told in program.admin("/readyz"), "it to be told of a sink that is paused")
    assert 3 == program.run("status").code
    succeed(program.run("resume", "clickhouse"))
    assert 0 == program.stop()
    succeed(program.run("drop-slot", "--yes"))
    accepted = succeed(program.run("init", "--accept-gap"))
    assert "gap accepted" in accepted
    assert "lacks what it lost" not in accepted, "the gap's command brings less than that"
    program.start()
    wait_until(lambda: told in program.admin("/readyz"), "it to be told after a gap")
    assert "is accepted only while it is stopped" in succeed(program.run("init", "--accept-gap"))
    assert 0 == program.stop()
    assert "accepted that sink clickhouse lacks what it lost" in succeed(program.run("init", "--accept-gap"))
    program.start()
    program.wait_until_caught_up()
    assert "ready\n" == program.admin("/readyz")
