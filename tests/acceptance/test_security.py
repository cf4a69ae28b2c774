"""No secret is ever printed: every place that holds one, every command, and servers that refuse, vanish or repeat it.

Each secret is another one and has letters that URLs encode; it is looked for as it is, percent-encoded and in base64.
"""

from __future__ import annotations

import base64
import shlex
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import psycopg
import pytest
import redis

from devstack import DevStack
from devstack.api import Api
from devstack.process import free_port, wait_until
from replicator.cli.main import main
from tests.support import environment as ground
from tests.support.program import Program, Result

PLACES = ("postgres", "clickhouse", "redis", "basic", "bearer", "webhook", "checkpoint", "notify")
SECRETS = {place: f"hush-{place}+=!x" for place in PLACES}
WEBHOOK = base64.b64encode(SECRETS["webhook"].encode()).decode()
FORMS = sorted(
    {
        form
        for place, secret in SECRETS.items()
        for form in (
            secret,
            quote(secret, safe=""),
            secret[:-4],
            base64.b64encode(f"user:{secret}".encode()).decode(),
            base64.b64encode(f"default:{secret}".encode()).decode(),
            base64.b64encode(secret.encode()).decode(),
        )
    }
)
ROLES = {"postgres": "hush_reader", "checkpoint": "hush_keeper"}

COMMANDS = (
    "check", "init", "status", "status --json", "dead-letters list", "dead-letters replay", "dead-letters drop --yes",
)  # fmt: skip
BACKFILL = "python backfill.py --start 2020-01-01 --end 2040-01-01 --sinks clickhouse,redis,http"
BACKFILLS = (BACKFILL, f"{BACKFILL} --dry-run", f"{BACKFILL} --rate nonsense", "python backfill.py --start 2040")
BUG = """
import sys
from replicator.cli import main as __main__
from replicator.source import stream as source
def read(self): raise RuntimeError("a bug of ours")
source.Source.read = read
sys.exit(__main__.main(["run"]))
"""
INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')"


class _Repeating(BaseHTTPRequestHandler):
    """Answers with everything that it was sent, headers included: as reason, as header and as body."""

    status = 500

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        told = " ".join(f"{name}={value}" for name, value in self.headers.items())
        self.send_response(self.status, f"I was told {told}")
        self.send_header("X-Told", told)
        self.send_header("X-ClickHouse-Exception-Code", "999")
        self.end_headers()
        self.wfile.write(f"Code: 999. DB::Exception: I was told {told}".encode())

    do_GET = do_POST = do_OPTIONS = _answer  # noqa: N815  the library's names

    def log_message(self, *_: object) -> None:
        """Not here."""


class _Refusing(_Repeating):
    status = 401


class _OldRedis(socketserver.BaseRequestHandler):
    """Repeats the arguments of a command that it does not know, as Redis did."""

    def handle(self) -> None:
        """Say so as often as it is asked."""
        while data := self.request.recv(65_536):
            words = data.decode(errors="replace").split("\r\n")[2::2]
            told = " ".join(f"`{word}`," for word in words)
            self.request.sendall(f"-ERR unknown command, with args beginning with: {told}\r\n".encode())


@pytest.fixture(scope="module")
def guarded() -> Iterator[DevStack]:
    """Redis and ClickHouse with a password."""
    with DevStack(
        "redis",
        "clickhouse",
        redis_settings={"requirepass": SECRETS["redis"]},
        clickhouse_password=SECRETS["clickhouse"],
    ) as stack:
        yield stack


class Repeaters(NamedTuple):
    """Ports of servers that repeat what they were told."""

    failing: int
    refusing: int
    redis: int


@pytest.fixture(scope="module")
def repeaters() -> Iterator[Repeaters]:
    """They run as long as the module."""
    with ExitStack() as running:
        ports = []
        for server in (
            ThreadingHTTPServer(("127.0.0.1", 0), _Repeating),
            ThreadingHTTPServer(("127.0.0.1", 0), _Refusing),
            socketserver.ThreadingTCPServer(("127.0.0.1", 0), _OldRedis),
        ):
            server.daemon_threads = True
            server.block_on_close = False
            running.enter_context(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            running.callback(server.shutdown)
            ports.append(int(server.server_address[1]))
        yield Repeaters(*ports)


@pytest.fixture
def roles(stack: DevStack, database: str) -> dict[str, str]:
    """DSNs of a reader and of one that keeps the checkpoint, each with its password."""
    dsns = {place: ground.plain_role(stack, database, role, SECRETS[place]) for place, role in ROLES.items()}
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("GRANT CREATE ON SCHEMA public TO hush_keeper")
    return dsns


@pytest.fixture
def guarded_program(
    program: Program, guarded: DevStack, roles: dict[str, str], api: Api, repeaters: Repeaters
) -> Program:
    """With a secret in every place."""
    told = quote(SECRETS["notify"], safe="")
    guarded.clickhouse.reset()
    with redis.Redis.from_url(guarded.redis.url) as client:
        client.flushall()
    api.behave(token=SECRETS["bearer"])
    program.environment |= {
        "REPLICATOR_POSTGRES_DSN": roles["postgres"],
        "REPLICATOR_CHECKPOINT_URL": roles["checkpoint"],
        "REPLICATOR_CLICKHOUSE_URL": guarded.clickhouse.url,
        "REPLICATOR_REDIS_URL": guarded.redis.url,
        "REPLICATOR_HTTP_BEARER_TOKEN": SECRETS["bearer"],
        "REPLICATOR_HTTP_WEBHOOK_SECRET": f"whsec_{WEBHOOK}",
        "REPLICATOR_NOTIFY_URL": f"http://user:{told}@127.0.0.1:{repeaters.failing}/{told}?token={told}",
        "REPLICATOR_HEARTBEAT_URL": f"http://127.0.0.1:{repeaters.refusing}/{told}",
        "REPLICATOR_LOG_LEVEL": "debug",
        "REPLICATOR_RETRY_MAX_SECONDS": "0.2",
        "REPLICATOR_DRAIN_TIMEOUT_SECONDS": "1",
        "REPLICATOR_HTTP_TIMEOUT_SECONDS": "2",
    }
    return program


def assert_hushed(text: str) -> None:
    """None of the secrets in any form."""
    said = [form for form in (*FORMS, WEBHOOK) if form.casefold() in text.casefold()]
    assert not said, [
        text[max(0, at - 200) : at + 60] for at in (text.casefold().find(form.casefold()) for form in said)
    ]


@pytest.mark.parametrize("form", [*FORMS, WEBHOOK])
def test_a_leak_is_found(form: str) -> None:
    """The search below finds what it looks for."""
    with pytest.raises(AssertionError):
        assert_hushed(f"2026 ERROR can't connect to {form}: no")


def test_whoever_is_told_repeats_it(guarded_program: Program) -> None:
    """What `notify test` and `config show` print of the address, and why it was not taken."""
    tried = guarded_program.run("notify", "test")
    assert (1, True) == (tried.code, "answered 500 Internal Server Error" in tried.stderr)
    assert_hushed(tried.stdout + tried.stderr + guarded_program.run("config", "show").stdout)


def run_all(program: Program, commands: tuple[str, ...], backfills: tuple[str, ...] = ()) -> list[Result]:
    """What each left."""
    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(lambda command: program.run(*command.split()), commands)]
        return [*results, *pool.map(program.follow, backfills)]


def run_until(program: Program, *said: str) -> None:
    """`run` until it has said all of this or ended; what it tells on its endpoints; SIGTERM."""
    before = len(program.log)
    program.spawn()
    wait_until(
        lambda: not program.running or all(words in program.log[before:].lower() for words in said), f"it to say {said}"
    )
    wait_until(lambda: _tells(program) or not program.running, "it to tell, or to end")
    if program.running:
        program.stop()
    assert_hushed(program.log)


def _tells(program: Program) -> bool:
    try:
        told = "".join(program.admin(path) for path in ("/", "/status", "/history", "/metrics", "/readyz", "/healthz"))
    except OSError:  # it starts, or is about to end
        return False
    assert "replicator_ready" in told
    assert_hushed(told)
    return True


@pytest.mark.parametrize(("place", "form"), [("value", "text"), ("file", "json")])
def test_where_all_is_well(
    guarded_program: Program, source: psycopg.Connection, tmp_path: Path, form: str, place: str
) -> None:
    """Every command, at level debug, secrets in variables and in files; everything is let in with them."""
    program = guarded_program
    program.environment["REPLICATOR_LOG_FORMAT"] = form
    if place == "file":
        for name in ("POSTGRES_DSN", "CHECKPOINT_URL", "CLICKHOUSE_URL", "REDIS_URL", "HTTP_BEARER_TOKEN",
                     "HTTP_WEBHOOK_SECRET"):  # fmt: skip
            file = tmp_path / name
            file.write_text(program.environment.pop(f"REPLICATOR_{name}") + "\n")
            program.environment[f"REPLICATOR_{name}_FILE"] = str(file)
    program.start()
    source.execute(INSERT)
    program.wait_until_caught_up()
    for path in ("/", "/status", "/history", "/metrics", "/readyz", "/healthz"):
        assert_hushed(program.admin(path))
    assert 0 == program.stop()
    results = run_all(program, COMMANDS, BACKFILLS)
    codes = [result.code for result in results]
    assert [0, 0, 3, 3, 0, 0, 0, 0, 0, 2, 2] == codes, program.log  # it does not run, so it is not ready
    assert 0 == program.run("drop-slot", "--yes").code
    assert 2 == program.run("no-such-command").code
    assert_hushed(program.log)


class Trouble(NamedTuple):
    """What is wrong with which servers, as settings, and what `run` says of it."""

    name: str
    said: tuple[str, ...]
    settings: dict[str, str]


def troubles(roles: dict[str, str], guarded: DevStack, repeaters: Repeaters) -> list[Trouble]:
    """Each has the secrets in its settings."""
    closed = free_port()
    encoded = {place: quote(secret, safe="") for place, secret in SECRETS.items()}

    def sinks(clickhouse: int, redis: int, http: int) -> dict[str, str]:
        return {
            "REPLICATOR_CLICKHOUSE_URL": f"http://default:{encoded['clickhouse']}@127.0.0.1:{clickhouse}/d",
            "REPLICATOR_REDIS_URL": f"redis://:{encoded['redis']}@127.0.0.1:{redis}/0",
            "REPLICATOR_HTTP_URL": f"http://user:{encoded['basic']}@127.0.0.1:{http}/events",
            "REPLICATOR_HTTP_BEARER_TOKEN": "",
        }

    all_sinks = ("sink clickhouse", "sink redis", "sink http")
    wrong = "wrong-"
    return [
        Trouble("down", all_sinks, sinks(closed, closed, closed)),
        Trouble("repeat", all_sinks, sinks(repeaters.failing, repeaters.redis, repeaters.failing)),
        Trouble("repeat refusing", all_sinks, sinks(repeaters.refusing, repeaters.redis, repeaters.refusing)),
        Trouble("garbage", all_sinks, sinks(repeaters.redis, repeaters.failing, repeaters.redis)),
        Trouble(
            "refuse",
            all_sinks,
            {
                "REPLICATOR_CLICKHOUSE_URL": guarded.clickhouse.url.replace("hush", wrong + "hush"),
                "REPLICATOR_REDIS_URL": guarded.redis.url.replace("hush", wrong + "hush"),
                "REPLICATOR_HTTP_BEARER_TOKEN": wrong + SECRETS["bearer"],
            },
        ),
        *(
            Trouble(f"{setting} {what}", (said,), {setting: url})
            for setting, dsn, refused, broken in (
                (
                    "REPLICATOR_POSTGRES_DSN",
                    roles["postgres"],
                    "postgresql refuses the connection",
                    "postgresql is not reachable",
                ),
                ("REPLICATOR_CHECKPOINT_URL", roles["checkpoint"], "checkpoint database", "checkpoint database"),
            )
            for what, url, said in (
                ("refuses", dsn.replace("hush-", "wrong-hush-"), refused),
                ("down", dsn.replace(f":{_port(dsn)}/", f":{closed}/"), broken),
                ("garbage", dsn.replace(f":{_port(dsn)}/", f":{repeaters.redis}/"), broken),
            )
        ),
    ]


def _port(dsn: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(dsn)["port"])


TROUBLES = (
    "down", "repeat", "repeat refusing", "garbage", "refuse",
    *(f"REPLICATOR_POSTGRES_DSN {what}" for what in ("refuses", "down", "garbage")),
    *(f"REPLICATOR_CHECKPOINT_URL {what}" for what in ("refuses", "down", "garbage")),
)  # fmt: skip


@pytest.mark.parametrize("name", TROUBLES)
def test_in_trouble(  # noqa: PLR0917  fixtures
    guarded_program: Program,
    source: psycopg.Connection,
    roles: dict[str, str],
    guarded: DevStack,
    repeaters: Repeaters,
    name: str,
) -> None:
    """Passwords are refused, servers are down, or answer with what they were told: every command fails in silence."""
    [trouble] = [trouble for trouble in troubles(roles, guarded, repeaters) if trouble.name == name]
    program = guarded_program
    assert 0 == program.run("init").code, program.log
    source.execute(INSERT)
    program.environment |= trouble.settings
    before = len(program.log)
    results = run_all(program, ("check", "init", "status --json", "dead-letters replay"), BACKFILLS[1:2])
    assert 1 == results[0].code or name.endswith("CHECKPOINT_URL"), program.log
    assert "Traceback" not in program.log
    run_until(program, *trouble.said)
    assert "Traceback" not in program.log[before:]


MALFORMED = {
    "POSTGRES_DSN": ["postgresql://u:a@{}/b@h/d", "host=h password={} nonsense"],
    "CHECKPOINT_URL": ["postgresql://u:{}@h:port/d", "nosuch://u:{}@h/d", "{}"],
    "CLICKHOUSE_URL": ["http://u:{}@h:port/d", "http://u:{}@h/", "ftp://u:{}@h/d", "http://u:a/{}@h/d"],
    "REDIS_URL": ["redis://:{}@h:port/0", "redis://:{}@h/0?nonsense=1", "http://:{}@h", "redis://:a/{}@h:1/0"],
    "HTTP_URL": ["http://u:{}@h:port/", "http://u:{}@/", "{}", "http://u:a/{}@h/"],
    "HTTP_WEBHOOK_SECRET": ["{}", "whsec_{}"],
    "HTTP_BEARER_TOKEN": ["{} x", "{}é"],
}


@pytest.mark.parametrize(("setting", "value"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
@pytest.mark.usefixtures("empty_directory")
def test_malformed(
    setting: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 and the setting's name, where a secret is not as it has to be; what stands there is not repeated."""
    monkeypatch.setenv(f"REPLICATOR_{setting}", value.format(SECRETS["basic"]))
    code = main(["status"])
    out, err = capsys.readouterr()
    assert_hushed(out + err)
    assert (2, True) == (code, f"REPLICATOR_{setting} is unusable" in err), err


def test_a_bug(guarded_program: Program) -> None:
    """A traceback of ours shows lines of the program, not what is in its variables."""
    result = guarded_program.follow(shlex.join(["python", "-c", BUG]))
    assert 1 == result.code
    assert "in read" in result.stderr
    assert "RuntimeError" in result.stderr
    assert_hushed(result.stdout + result.stderr)
