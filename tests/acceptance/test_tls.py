"""TLS with a private authority: the right one works end to end; a wrong one, a wrong name and no TLS at all fail.

Each failure is said and waited out; nothing goes over a connection that was not verified.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from pydantic import SecretStr

from devstack import DevStack
from devstack.postgres import ACCOUNT
from devstack.process import free_port, wait_until
from devstack.proxy import Proxy
from replicator.contracts.errors import SinkMisconfigured, SinkUnavailable
from sinks.redis.client import RedisClient
from tests.support import environment as ground
from tests.support.certificates import Certificate, sign
from tests.support.destinations import Destinations, expected
from tests.support.program import Program, assert_clean

HOST = "localhost"
SINKS = ("clickhouse", "redis", "http")
INSERT = (
    "INSERT INTO engagement_events (content_id, user_id, event_type) SELECT 1, n, 'play' FROM generate_series(1, 9) n"
)
UNENCRYPTED = """
SELECT count(*) FILTER (WHERE ssl), count(*) FILTER (WHERE NOT ssl)
FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'replicator'
"""


class Secured(NamedTuple):
    """Servers that show a certificate, and where."""

    stack: DevStack
    certificate: Certificate
    other: Certificate
    """Of an authority that has signed nothing here."""
    clickhouse_port: int
    redis_port: int
    http_port: int

    def settings(self, authority: Path, host: str = HOST, *, plain: bool = False) -> dict[str, str]:
        """Of the sinks, by TLS. `plain`: at the ports where the servers speak without."""
        stack = self.stack
        ports = (self.clickhouse_port, self.redis_port, self.http_port)
        clickhouse, redis, http = (stack.clickhouse.port, stack.redis.port, stack.api.port) if plain else ports
        return {
            "REPLICATOR_CLICKHOUSE_URL": f"https://default@{host}:{clickhouse}/engagement",
            "REPLICATOR_CLICKHOUSE_CA_FILE": str(authority),
            "REPLICATOR_REDIS_URL": f"rediss://{host}:{redis}/0?ssl_ca_certs={authority}",
            "REPLICATOR_HTTP_URL": f"https://{host}:{http}/events",
            "REPLICATOR_HTTP_CA_FILE": str(authority),
        }

    def dsn(self, plain_dsn: str, authority: Path, host: str = HOST) -> str:
        """The source, by TLS."""
        url = plain_dsn.replace("@127.0.0.1:", f"@{host}:")
        return f"{url}?sslmode=verify-full&sslrootcert={authority}"


@pytest.fixture(scope="module")
def secured() -> Iterator[Secured]:
    """PostgreSQL and Redis with TLS of their own, ClickHouse and the API behind something that ends it."""
    with ExitStack() as open_until_the_end:
        folder = Path(open_until_the_end.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)  # PostgreSQL runs as another user
        right, other = sign(folder / "right", HOST), sign(folder / "other", HOST)
        key = folder / "postgres.key"
        shutil.copy(right.key, key)
        key.chmod(0o600)
        if os.geteuid() == 0:
            shutil.chown(key, ACCOUNT)
        redis_port = free_port()
        stack = open_until_the_end.enter_context(
            DevStack(
                *DevStack.SERVICES,
                postgres_settings={"ssl": "on", "ssl_cert_file": str(right.certificate), "ssl_key_file": str(key)},
                redis_settings={
                    "tls-port": str(redis_port),
                    "tls-cert-file": str(right.certificate),
                    "tls-key-file": str(right.key),
                    "tls-ca-cert-file": str(right.authority),
                    "tls-auth-clients": "no",
                },
            )
        )
        context = right.context()
        fronts = [
            open_until_the_end.enter_context(Proxy(port, context)) for port in (stack.clickhouse.port, stack.api.port)
        ]
        yield Secured(stack, right, other, fronts[0].port, redis_port, fronts[1].port)


@pytest.fixture
def source_dsn(secured: Secured) -> Iterator[str]:
    """A superuser's, of a new database."""
    with ground.fresh_database(secured.stack) as dsn:
        yield dsn


@pytest.fixture
def program(secured: Secured, source_dsn: str, tmp_path: Path) -> Iterator[Program]:
    """With everything by TLS and verified."""
    plain_dsn = ground.plain_role(secured.stack, source_dsn)
    stack = secured.stack
    urls = ground.empty_clickhouse(stack), ground.empty_redis(stack), ground.empty_api(stack)
    environment = ground.environment(plain_dsn, *urls, folder=tmp_path)
    environment["REPLICATOR_RETRY_MAX_SECONDS"] = "0.2"
    environment["REPLICATOR_POSTGRES_DSN"] = secured.dsn(plain_dsn, secured.certificate.authority)
    environment |= secured.settings(secured.certificate.authority)
    program = Program(environment, source_dsn, tmp_path / "replicator.log")
    yield program
    program.end()
    print(program.log)  # noqa: T201  pytest shows it when the test has failed


@pytest.fixture
def arrived(secured: Secured) -> Iterator[Destinations]:
    """What has come, by ways of the test's own."""
    destinations = Destinations(secured.stack)
    yield destinations
    destinations.redis.close()


def insert(dsn: str) -> None:
    """Some events."""
    with psycopg.connect(dsn) as connection:
        connection.execute(INSERT)


def test_the_right_authority_and_name(program: Program, source_dsn: str, arrived: Destinations) -> None:
    """Every command and the stream; all connections to PostgreSQL are encrypted, and the events arrive exact."""
    assert 0 == program.run("init").code
    assert 0 == program.run("check").code
    program.start()
    insert(source_dsn)
    program.wait_until_caught_up()
    with psycopg.connect(source_dsn) as connection:
        encrypted, plain = connection.execute(UNENCRYPTED).fetchone() or (0, 0)
    assert encrypted
    assert not plain
    assert 0 == program.stop()
    wanted = expected(source_dsn)
    assert wanted == arrived.clickhouse()
    assert wanted == sorted(arrived.api(), key=lambda event: int(event["event_id"]))
    assert {1: 9} == arrived.counts()
    assert_clean(program.log)


WRONG = ("authority", "name", "no TLS")


@pytest.mark.parametrize("wrong", WRONG)
def test_sinks_that_can_not_be_trusted(
    program: Program, secured: Secured, source_dsn: str, arrived: Destinations, wrong: str
) -> None:
    """`check` names each with the cure; `run` says so and waits; nothing arrives, until the settings are right."""
    assert 0 == program.run("init").code
    insert(source_dsn)
    right = dict(program.environment)
    authority = secured.other.authority if wrong == "authority" else secured.certificate.authority
    host = "127.0.0.1" if wrong == "name" else HOST
    program.environment |= secured.settings(authority, host, plain=wrong == "no TLS")
    result = program.run("check")
    assert 1 == result.code
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert len(SINKS) == len(failed)
    if wrong != "no TLS":
        assert all("certificate" in line.lower() for line in failed)
        assert 3 == result.stdout.count("names the host in REPLICATOR_")
    program.spawn()
    for sink in SINKS:
        program.wait_for_log(f"ink {sink} ")
    assert program.running
    assert not secured.stack.api.events()
    assert {} == arrived.counts()
    assert [] == arrived.clickhouse()
    program.stop()
    program.environment = right
    program.start()
    program.wait_until_caught_up()
    assert expected(source_dsn) == arrived.clickhouse()
    assert_clean(program.log)


def test_an_authority_is_replaced(
    program: Program, secured: Secured, source_dsn: str, arrived: Destinations, tmp_path: Path
) -> None:
    """The servers have certificates of a new one, then its file is put where the old one was: it goes on by itself."""
    authority, stack = tmp_path / "authority.pem", secured.stack
    shutil.copy(secured.certificate.authority, authority)
    context = secured.certificate.context()
    with ExitStack() as fronts:
        ports = [fronts.enter_context(Proxy(its.port, context)) for its in (stack.clickhouse, stack.redis, stack.api)]
        at = secured._replace(clickhouse_port=ports[0].port, redis_port=ports[1].port, http_port=ports[2].port)
        program.environment |= at.settings(authority)
        program.start()
        insert(source_dsn)
        program.wait_until_caught_up()
        context.load_cert_chain(secured.other.certificate, secured.other.key)
        for front in ports:
            front.behave("reset")
            front.behave("whole")
        insert(source_dsn)
        for sink in SINKS:
            wait_until(partial(told, program, sink), f"{sink} to refuse the certificate")
        shutil.copy(secured.other.authority, authority)
        program.wait_until_caught_up()
        assert 0 == program.stop()
    assert expected(source_dsn) == arrived.clickhouse()
    assert {1: 18} == arrived.counts()
    assert_clean(program.log)


async def test_redis_connections_that_were_made_before(secured: Secured, tmp_path: Path) -> None:
    """They read the authority's file again, too, not only those that are made after it was replaced."""
    authority, context = tmp_path / "authority.pem", secured.certificate.context()
    shutil.copy(secured.certificate.authority, authority)
    with Proxy(secured.stack.redis.port, context) as front:
        url = SecretStr(f"rediss://{HOST}:{front.port}/0?ssl_ca_certs={authority}")
        client = RedisClient("redis", url, 5.0, str)
        try:
            await client.generation()
            context.load_cert_chain(secured.other.certificate, secured.other.key)
            front.behave("reset")
            front.behave("whole")
            with pytest.raises(SinkUnavailable):
                await client.generation()
            with pytest.raises(SinkMisconfigured, match="certificate"):
                await client.generation()
            shutil.copy(secured.other.authority, authority)
            await client.generation()
        finally:
            await client.close()


def told(program: Program, sink: str) -> bool:
    """It says that it does not trust the server's certificate."""
    return "certificate" in program.status()["sinks"][sink]["trouble"].lower()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_source_that_can_not_be_trusted(
    program: Program, secured: Secured, stack: DevStack, source_dsn: str, wrong: str
) -> None:
    """`check` fails, `run` says why and waits; the server, which would do without TLS, is not asked to."""
    plain_dsn = ground.plain_role(secured.stack, source_dsn)
    authority = secured.other.authority if wrong == "authority" else secured.certificate.authority
    dsn = secured.dsn(plain_dsn, authority, "127.0.0.1" if wrong == "name" else HOST)
    if wrong == "no TLS":
        dsn = dsn.replace(f":{secured.stack.postgres.port}/", f":{stack.postgres.port}/")
    program.environment["REPLICATOR_POSTGRES_DSN"] = dsn
    said = {
        "authority": "certificate verify failed",
        "name": 'does not match host name "127.0.0.1"',
        "no TLS": "server does not support SSL, but SSL was required",
    }[wrong]
    result = program.run("check")
    assert 1 == result.code
    assert any(line.startswith("FAIL") and said in line for line in result.stdout.splitlines()), result.stdout
    program.spawn()
    program.wait_for_log("PostgreSQL is not reachable: connection to server at")
    assert said in program.log
    assert program.running
    assert_clean(program.log)
