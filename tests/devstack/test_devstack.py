"""The devstack itself: servers start, answer, keep their data over a crash, misbehave on request, and leave nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import clickhouse_connect
import httpx
import psycopg
import pytest
import redis
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError

from devstack import DevStack, DevStackError
from devstack import postgres as postgres_module
from devstack.api import Api
from devstack.process import Service, free_port, wait_until
from devstack.watchdog import tree

ROOT = Path(__file__).parents[2]
PAUSE_SECONDS = 0.3
ANSWER_SECONDS = 30  # far more than it takes
SPARE_SECONDS = 0.05  # two clocks are compared

TABLE = """
CREATE TABLE t (event_id Int64, event_ts DateTime64(6, 'UTC'), device Nullable(String))
ENGINE = ReplacingMergeTree ORDER BY (event_ts, event_id)
SETTINGS non_replicated_deduplication_window = 100
"""
ROW = b'{"event_id": 9007199254740993, "event_ts": "2026-01-08T14:21:52.123456Z", "device": null}\n'


@pytest.fixture
def clickhouse(clickhouse_url: str) -> Iterator[Client]:
    """A client of an empty ClickHouse."""
    client = clickhouse_connect.get_client(dsn=clickhouse_url, query_retries=0)
    client.command(TABLE)
    yield client
    client.close()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A client without a proxy."""
    with httpx.Client(trust_env=False) as client:
        yield client


def test_no_two_processes_are_given_the_same_port() -> None:
    """Each is free when it is looked up; the other process listens on it a moment later."""
    looked_up = "print(*[free_port() for _ in range(1000)], flush=True)"
    source = f"import sys; from devstack.process import free_port; {looked_up}; sys.stdin.read()"
    others = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", source],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    given = [{free_port() for _ in range(1000)}]
    for other in others:
        assert other.stdout is not None
        given.append({int(port) for port in other.stdout.readline().split()})
    for other in others:
        other.communicate()
        assert 0 == other.returncode
    assert all(given)
    assert sum(map(len, given)) == len(set[int]().union(*given))


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and " Z " not in stat.read_text(encoding="utf-8")


def _crash(service: Service) -> None:
    service.kill()
    service.start()


# The stack


def test_environment_names_every_server(stack: DevStack) -> None:
    """The replicator's settings lead to this stack."""
    environment = stack.environment()
    assert environment["REPLICATOR_POSTGRES_DSN"] == stack.postgres.dsn
    assert environment["REPLICATOR_CLICKHOUSE_URL"] == stack.clickhouse.url
    assert environment["REPLICATOR_REDIS_URL"] == stack.redis.url
    assert environment["REPLICATOR_HTTP_URL"] == stack.api.url
    assert set(environment["REPLICATOR_SINKS"].split(",")) == {"clickhouse", "redis", "http"}


def test_nothing_is_left() -> None:
    """Leaving the stack ends its servers and removes its folder, after an exception, too."""
    stack = DevStack("postgres", "redis")
    pids: list[int] = []
    with pytest.raises(ZeroDivisionError):
        _divide_inside(stack, pids)
    assert len(pids) > 2
    assert not any(map(_alive, pids))
    assert not stack.folder.exists()


def _divide_inside(stack: DevStack, pids: list[int]) -> None:
    with stack:
        pids.extend(pid for service in (stack.postgres, stack.redis) for pid in tree(service.pid))
        raise ZeroDivisionError


def test_owner_killed_leaves_nothing() -> None:
    """When the program that owns the stack is killed with no chance to clean up, the watchdog does."""
    code = (
        "import devstack, time\n"
        "with devstack.DevStack('postgres', 'redis') as stack:\n"
        "    print(stack.folder, stack.postgres.pid, stack.redis.pid, flush=True)\n"
        "    stack.postgres.pause()\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        folder, *pids = owner.stdout.readline().split()
        owner.kill()
    wait_until(lambda: not Path(folder).exists(), "the watchdog")
    assert not any(_alive(int(pid)) for pid in pids)


def test_command_runs_until_interrupted() -> None:
    """`python -m devstack redis` prints the settings, and ends in order on Ctrl-C."""
    command = [sys.executable, "-m", "devstack", "redis"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as program:
        assert program.stdout is not None
        lines = [program.stdout.readline() for _ in range(5)]
        (url,) = [line.partition("=")[2].strip("'\n") for line in lines if "REPLICATOR_REDIS_URL" in line]
        with redis.Redis.from_url(url) as client:
            assert client.ping()
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 0


def test_unknown_service() -> None:
    """A wrong name says which there are."""
    with pytest.raises(DevStackError, match="no such service: mysql; there are postgres, redis, clickhouse, api"):
        DevStack("mysql")


def test_failed_start_shows_the_log() -> None:
    """A server that ends at once is not waited for; the error carries what it said."""
    start = time.monotonic()
    with pytest.raises(DevStackError, match=r"redis ended with status 1(.|\n)*FATAL CONFIG FILE ERROR"):
        DevStack("redis", redis_settings={"no-such-setting": "1"}).__enter__()
    assert time.monotonic() - start < 10


def test_missing_wal2json_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without wal2json the error is one line that cures it."""
    bin_dir = tmp_path / "17" / "bin"
    bin_dir.mkdir(parents=True)
    monkeypatch.setattr(postgres_module, "_bin_dirs", lambda: iter([bin_dir]))
    with pytest.raises(DevStackError, match=r"apt-get install postgresql-17-wal2json$"):
        postgres_module.find_bin_dir()


def test_api_program_needs_no_driver() -> None:
    """The compose file's image runs `devstack.api_server` with aiohttp and msgspec alone."""
    code = "import sys, devstack.api_server; print({'psycopg', 'redis', 'chdb'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "set()\n"


# PostgreSQL


def test_postgres_decodes_with_wal2json(database: str) -> None:
    """A slot with wal2json gives what is committed after it."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('devstack_test', 'wal2json')")
        connection.execute("INSERT INTO content (content_id, content_type) VALUES (4711, 'video')")
        query = "SELECT data FROM pg_logical_slot_get_changes('devstack_test', NULL, NULL, 'format-version', '2')"
        actions = [json.loads(row[0])["action"] for row in connection.execute(query)]
    assert actions == ["B", "I", "C"]


def test_postgres_checks_passwords(stack: DevStack) -> None:
    """A wrong password is refused."""
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(stack.postgres.dsn_for(password="wrong"))  # noqa: S106  wrong on purpose


def test_postgres_survives_a_crash(stack: DevStack, database: str) -> None:
    """What was committed is there after an immediate shutdown."""
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO content (content_id, content_type) VALUES (4711, 'video')")
    _crash(stack.postgres)
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT content_type FROM content WHERE content_id = 4711").fetchall()
    assert rows == [("video",)]


def test_postgres_pauses_with_its_backends(stack: DevStack, database: str) -> None:
    """A paused server keeps its connections and answers nothing until it goes on."""
    with psycopg.connect(database) as connection, ThreadPoolExecutor(1) as thread:
        stack.postgres.pause()
        query = thread.submit(connection.execute, "SELECT 1")
        try:
            with pytest.raises(TimeoutError):
                query.result(PAUSE_SECONDS)
        finally:
            stack.postgres.resume()
        assert query.result(ANSWER_SECONDS).fetchall() == [(1,)]


# Redis


def test_redis_keeps_data_over_a_stop_only(stack: DevStack, redis_url: str) -> None:
    """Nothing is written while it runs: an orderly stop keeps the data, a crash loses it."""
    with redis.Redis.from_url(redis_url) as client:
        client.set("key", "value")
        stack.redis.restart()
        assert client.get("key") == b"value"
        client.set("key", "newer")
        _crash(stack.redis)
        assert client.get("key") == b"value"


# ClickHouse


def test_clickhouse_takes_json_rows(clickhouse: Client) -> None:
    """raw_insert with the settings that the sink uses; every value comes back exactly."""
    settings = {"date_time_input_format": "best_effort", "insert_deduplication_token": "a"}
    summary = clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow", settings=settings)
    assert summary.written_rows == 1
    rows = clickhouse.query("SELECT event_id, event_ts, device FROM t").result_rows
    moment = datetime(2026, 1, 8, 14, 21, 52, 123456, tzinfo=UTC)
    assert [(2**53 + 1, moment, None)] == [(event_id, ts.replace(tzinfo=UTC), device) for event_id, ts, device in rows]


def test_clickhouse_takes_the_query_apart_from_the_rows(
    stack: DevStack, clickhouse: Client, http: httpx.Client
) -> None:
    """In the URL, as it is or cut anywhere between its words."""
    whole, cut = ("INSERT INTO t FORMAT JSONEachRow", ""), ("INSERT INTO t", "FORMAT JSONEachRow\n")
    for event_id, (query, body) in enumerate([whole, cut]):
        rows = f'{body}{{"event_id": {event_id}}}'
        url = f"http://127.0.0.1:{stack.clickhouse.port}/"
        answer = http.post(url, params={"query": query, "database": "engagement"}, content=rows)
        assert (answer.status_code, answer.text) == (200, "")
    assert clickhouse.query("SELECT count() FROM t").result_rows == [(2,)]


def test_clickhouse_deduplicates(clickhouse: Client) -> None:
    """One token is one insert; without it the ReplacingMergeTree still makes one row of two under FINAL."""
    for token in ("a", "a", "b"):
        clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow", settings={"insert_deduplication_token": token})
    assert clickhouse.command("SELECT count() FROM t") == 2
    assert clickhouse.command("SELECT count() FROM t FINAL") == 1


@pytest.mark.parametrize("compression", ["gzip", "lz4", "zstd"])
def test_clickhouse_takes_compressed_native_rows(clickhouse_url: str, clickhouse: Client, compression: str) -> None:
    """The client's own column format, in every compression it has; binary data, parameters and an empty result."""
    client = clickhouse_connect.get_client(dsn=clickhouse_url, compress=compression)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    client.insert("t", [(1, moment, "a\0b"), (2, moment, None)], column_names=["event_id", "event_ts", "device"])
    query = "SELECT device FROM t WHERE event_id = {id:Int64}"
    assert client.query(query, parameters={"id": 1}).result_rows == [("a\0b",)]
    assert client.query(query, parameters={"id": 3}).result_rows == []
    assert clickhouse.query("SELECT * FROM t LIMIT 0").column_names == ("event_id", "event_ts", "device")
    client.close()


def test_clickhouse_takes_forms(clickhouse_url: str) -> None:
    """A query with parameters too long for a URL goes as a form."""
    client = clickhouse_connect.get_client(dsn=clickhouse_url, form_encode_query_params=True)
    text = "ä" * 100_000
    assert client.query("SELECT lengthUTF8({text:String})", parameters={"text": text}).result_rows == [(100_000,)]
    client.close()


@pytest.mark.parametrize(
    ("statement", "code", "status"),
    [
        ("SELECT nope", 47, 404),
        ("SELECT * FROM nope", 60, 404),
        ("SELECT * FROM nope.t", 81, 404),
        ("SELECT FROM WHERE", 62, 400),
        ('INSERT INTO t FORMAT JSONEachRow {"event_id": "x"}', 27, 400),
        ("SELECT 1 SETTINGS nope = 1", 115, 404),
    ],
)
def test_clickhouse_errors(clickhouse_url: str, clickhouse: Client, statement: str, code: int, status: int) -> None:
    """Errors have ClickHouse's code, status and wording, in the client and for curl."""
    with pytest.raises(DatabaseError, match=rf"Code: {code}\. DB::Exception: ") as raised:
        clickhouse.command(statement)
    assert raised.value.code == code
    server = httpx.URL(clickhouse_url).copy_with(path="/")
    answer = httpx.post(server, params={"database": "engagement"}, content=statement, trust_env=False)
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (status, str(code))


def test_clickhouse_get_is_read_only(clickhouse_url: str, clickhouse: Client, http: httpx.Client) -> None:
    """Curl's `?query=` reads; a GET never writes."""
    server = httpx.URL(clickhouse_url).copy_with(path="/", userinfo=b"")
    assert http.get(server, params={"query": "SELECT 1, 'a' FORMAT CSV"}).text == '1,"a"\n'
    assert http.get(server, params={"query": "DROP TABLE engagement.t"}).headers["X-ClickHouse-Exception-Code"] == "164"
    assert clickhouse.command("EXISTS TABLE t") == 1


def test_clickhouse_checks_passwords() -> None:
    """With a password, only who has it gets in; code 516 otherwise."""
    with DevStack("clickhouse", clickhouse_password="secret") as stack:  # noqa: S106  a test's
        client = clickhouse_connect.get_client(dsn=stack.clickhouse.url)
        assert client.command("SELECT 1") == 1
        client.close()
        with pytest.raises(DatabaseError) as raised:
            clickhouse_connect.get_client(dsn=stack.clickhouse.url.replace("secret", "wrong"))
    assert raised.value.code == 516


def test_clickhouse_survives_a_crash(stack: DevStack, clickhouse: Client) -> None:
    """What was inserted is there after a SIGKILL."""
    clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow")
    _crash(stack.clickhouse)
    assert clickhouse.command("SELECT count() FROM t") == 1


def test_clickhouse_refuses_when_told(stack: DevStack, clickhouse: Client) -> None:
    """A refused insert leaves nothing behind, the queries beside it go on, and after so many requests it is over."""
    stack.clickhouse.behave(status=503, requests=1)
    with pytest.raises(OperationalError) as raised:
        clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow")
    assert raised.value.code == 202
    assert clickhouse.command("SELECT count() FROM t") == 0
    clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow")
    assert clickhouse.command("SELECT count() FROM t") == 1


def test_clickhouse_applies_and_drops_the_answer(stack: DevStack, clickhouse: Client) -> None:
    """The rows are there though the client got no answer; clickhouse-connect repeats an insert once by itself."""
    stack.clickhouse.behave(close="after")
    with pytest.raises(OperationalError):
        clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow", settings={"insert_deduplication_token": "a"})
    assert clickhouse.command("SELECT count() FROM t") == 1


def test_clickhouse_read_only(stack: DevStack, clickhouse: Client) -> None:
    """It reads, and refuses to write with code 164."""
    stack.clickhouse.behave(read_only=True)
    with pytest.raises(DatabaseError) as raised:
        clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow")
    assert raised.value.code == 164
    assert clickhouse.command("SELECT count() FROM t") == 0


def test_clickhouse_answers_slowly(stack: DevStack, clickhouse: Client) -> None:
    """The insert is done long before its answer comes."""
    stack.clickhouse.behave(delay_seconds=PAUSE_SECONDS)
    started = time.monotonic()
    clickhouse.raw_insert("t", insert_block=ROW, fmt="JSONEachRow")
    assert time.monotonic() - started >= PAUSE_SECONDS - SPARE_SECONDS


# The HTTP API


def test_api_takes_arrays_and_single_events(api: Api, http: httpx.Client) -> None:
    """Both forms, in order, repeats included; a crash loses none of what was answered."""
    for body in (b'[{"event_id": 1}, {"event_id": 2}]', b'{"event_id": 3}', b'[\n{"event_id": 1}\n]', b"[]"):
        assert http.post(api.url, content=body).status_code == 200
    assert api.events() == [{"event_id": 1}, {"event_id": 2}, {"event_id": 3}, {"event_id": 1}]
    _crash(api)
    assert api.event_ids() == [1, 2, 3, 1]
    assert api.stats().events == 4


def test_api_takes_events_of_any_stream(api: Api, http: httpx.Client) -> None:
    """Their identity has a name of its own."""
    assert http.post(api.url, content=b'{"order_id": "a"}').status_code == 200
    assert api.events() == [{"order_id": "a"}]


@pytest.mark.parametrize("body", [b"", b"nope", b"[1]", b'[{"event_id": "1"}]', b'{"event_id": 1} x'])
def test_api_refuses_what_is_no_event(api: Api, http: httpx.Client, body: bytes) -> None:
    """400, and nothing taken."""
    assert http.post(api.url, content=body).status_code == 400
    assert api.events() == []


def test_api_crashed_within_a_write(stack: DevStack, api: Api, http: httpx.Client) -> None:
    """What it had not finished writing was not answered; it is gone, and spoils nothing that comes later."""
    http.post(api.url, content=b'{"event_id": 1}')
    with (api.folder / "events").open("ab") as events:
        events.write(b'{"event_')
    _crash(stack.api)
    http.post(api.url, content=b'{"event_id": 2}')
    _crash(stack.api)
    assert [1, 2] == api.event_ids()


def test_api_remembers_requests(api: Api, http: httpx.Client) -> None:
    """Method, headers, status and number of events of each request; one line each in the log."""
    http.post(api.url, content=b'[{"event_id": 8}, {"event_id": 9}]', headers={"Idempotency-Key": "k"})
    (request,) = api.requests()
    assert (request.method, request.headers["idempotency-key"], request.status, request.events) == ("POST", "k", 200, 2)
    assert api.log.read_text(encoding="utf-8").endswith(" POST /events 200: 2 events taken, last event_id 9\n")


def test_api_status_for_so_many_requests(api: Api, http: httpx.Client) -> None:
    """503 with Retry-After twice, then it is over."""
    api.behave(status=503, retry_after="7", requests=2)
    answers = [http.post(api.url, content=b'{"event_id": 1}') for _ in range(3)]
    assert [(a.status_code, a.headers.get("Retry-After")) for a in answers] == [(503, "7"), (503, "7"), (200, None)]
    assert api.event_ids() == [1]


def test_api_status_with_probability(api: Api, http: httpx.Client) -> None:
    """Some requests fail, others pass; the seed makes it the same each time."""
    outcomes = []
    for _ in range(2):
        api.behave(status=500, probability=0.5, seed=1)
        outcomes.append([http.post(api.url, content=b'{"event_id": 1}').status_code for _ in range(20)])
    assert set(outcomes[0]) == {200, 500}
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(("close", "taken"), [("before", []), ("after", [1])])
def test_api_closes_without_an_answer(api: Api, http: httpx.Client, close: str, taken: list[int]) -> None:
    """The connection ends; the events were taken or not, as told."""
    api.behave(close=close, requests=1)
    with pytest.raises(httpx.RemoteProtocolError):
        http.post(api.url, content=b'{"event_id": 1}')
    assert api.event_ids() == taken
    assert [request.status for request in api.requests()] == [0]


def test_api_hangs(api: Api, http: httpx.Client) -> None:
    """A client that gives up is not answered, and its events are not taken afterwards."""
    api.behave(hang_seconds=PAUSE_SECONDS)
    with pytest.raises(httpx.ReadTimeout):
        http.post(api.url, content=b'{"event_id": 1}', timeout=PAUSE_SECONDS / 3)
    wait_until(lambda: [request.status for request in api.requests()] == [0], "the request to end")
    assert api.event_ids() == []


def test_api_answers_slowly(api: Api, http: httpx.Client) -> None:
    """The events are taken at once; a client that gives up does not know."""
    api.behave(delay_seconds=PAUSE_SECONDS)
    with pytest.raises(httpx.ReadTimeout):
        http.post(api.url, content=b'{"event_id": 1}', timeout=PAUSE_SECONDS / 3)
    assert api.event_ids() == [1]


def test_api_rules(api: Api, http: httpx.Client) -> None:
    """Events, sizes and strangers that it refuses: 422, 413, 401."""
    api.behave(refuse_event_ids={2}, max_body_bytes=40, token="t")  # noqa: S106  a test's
    known = {"Authorization": "Bearer t"}
    statuses = [
        http.post(api.url, content=b'[{"event_id": 1}, {"event_id": 2}]', headers=known).status_code,
        http.post(api.url, content=b" " * 41, headers=known).status_code,
        http.post(api.url, content=b'{"event_id": 1}').status_code,
        http.post(api.url, content=b'{"event_id": 1}', headers=known).status_code,
    ]
    assert statuses == [422, 413, 401, 200]
    assert api.event_ids() == [1]


def test_api_trusts(api: Api, http: httpx.Client) -> None:
    """For benchmarks: it counts what the replicator sends, reads no further and keeps no bodies."""
    api.behave(trusting=True)
    body = rb'[{"event_id":1,"content_id":7,"device":"\"event_id\":9"},{"event_id":2}]'
    assert http.post(api.url, content=body).json() == {"taken": 2}
    assert (api.event_ids(), api.stats().events, api.events()) == ([1, 2], 2, [])


def test_unknown_behaviour(api: Api) -> None:
    """A misspelt field is an error, not a well-behaved server."""
    with pytest.raises(DevStackError, match=r"400: .*stauts"):
        api.behave(stauts=500)
