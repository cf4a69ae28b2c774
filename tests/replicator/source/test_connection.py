"""Every session has its guards, whatever role, DSN and environment ask for; every refusal has words and a cure."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo

from devstack import DevStack
from enrichment.database import Database
from replicator.contracts.errors import SourceError, SourceUnavailable, SourceUnusable
from replicator.source import connection as connections
from replicator.source.connection import SESSION, SINCE, answering, connect
from replicator.source.refusals import allow_plugin, translated
from replicator.source.slot import look
from tests.support.network import blackhole

FOREIGN = {
    "statement_timeout": "1s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "3s",
    "idle_session_timeout": "4s",
    "DateStyle": "German",
    "TimeZone": "Asia/Kathmandu",
    "IntervalStyle": "iso_8601",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "client_encoding": "LATIN1",
    "synchronous_commit": "remote_apply",
    "default_transaction_isolation": "serializable",
    "row_security": "on",
}
"""What a database administrator may set for the role."""


async def _session(dsn: str, **parameters: str) -> dict[str, str]:
    async with await connect(dsn, "test", **parameters) as connection:
        found = await connection.execute("SELECT name, setting FROM pg_settings")
        return dict(await found.fetchall())


@pytest.mark.parametrize("replication", [{}, {"replication": "database"}], ids=["plain", "replication"])
async def test_what_the_role_is_set_to_does_not_matter(database: str, replication: dict[str, str]) -> None:
    """Each guard is as ours, on the replication connection, too."""
    with psycopg.connect(database, autocommit=True) as admin:
        newer = {"transaction_timeout": "5s"} if admin.info.server_version >= SINCE["transaction_timeout"] else {}
        for name, value in (FOREIGN | newer).items():
            statement = sql.SQL("ALTER DATABASE {} SET {} = {}")
            admin.execute(statement.format(sql.Identifier(admin.info.dbname), sql.Identifier(name), sql.Literal(value)))
    found = await _session(database, **replication)
    assert {name: value for name, value in SESSION.items() if name in found} == {
        name: found[name].partition(",")[0] for name in SESSION if name in found
    }


async def test_nor_does_the_environment(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGOPTIONS, PGCLIENTENCODING and a target that must be writable."""
    monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=1s -c DateStyle=German")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "read-write")
    found = await _session(database)
    assert ("0", "ISO", "UTF8") == (
        found["statement_timeout"],
        found["DateStyle"].partition(",")[0],
        found["client_encoding"],
    )


async def test_nor_does_a_dsn_that_is_meant_for_the_slot(database: str) -> None:
    """`replication=database` in it makes no replication connection of one that asks for rows."""
    async with await connect(f"{database}?replication=database", "test") as connection:
        assert (7,) == await (await connection.execute("SELECT %s::int", [7])).fetchone()


async def test_a_guard_that_does_not_stay_is_an_error(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a pooler that gives each statement another session."""
    lasting = connections.guards

    def passing(settings: dict[str, str], version: int) -> sql.Composed:
        return lasting(settings, version, local=True)

    monkeypatch.setattr(connections, "guards", passing)
    monkeypatch.setattr(connections, "SESSION", {"statement_timeout": "7s"})
    with pytest.raises(SourceUnusable, match=r"do not stay as they were set \(statement_timeout\).*not to a pooler"):
        await connect(database, "test")


@pytest.mark.parametrize("query", ["SHOW statement_timeout", "SHOW lock_timeout"])
async def test_queries_have_time_outs_of_their_own(database: str, query: str) -> None:
    """The role's are not theirs."""
    ours = Database(f"{database}?options=-c%20statement_timeout%3D9s%20-c%20lock_timeout%3D9s", timeout_seconds=7)
    assert [("7s" if "statement" in query else "0",)] == await ours.rows(query)
    await ours.close()


async def test_queries_are_their_own_transactions(database: str) -> None:
    """Read committed and read only, whatever the default is: each sees what was committed before it."""
    ours = Database(f"{database}?options=-c%20default_transaction_isolation%3Dserializable")
    assert [("read committed", "on")] == await ours.rows(
        "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')"
    )
    await ours.close()


@pytest.mark.parametrize("attributes", ["read-write", "primary", "any"])
async def test_several_hosts_of_which_one_is_dead(database: str, attributes: str) -> None:
    """The DSN may ask for a writable server: we can only read there by our own doing."""
    port = int(str(psycopg.conninfo.conninfo_to_dict(database)["port"]))
    dsn = make_conninfo(
        database, host="127.0.0.1,127.0.0.1", port=f"1,{port}", target_session_attrs=attributes, connect_timeout=5
    )
    ours = Database(dsn)
    assert [(1,)] == await ours.rows("SELECT 1")
    await ours.close()
    assert await _session(dsn, replication="database")


async def test_a_host_that_is_switched_off(database: str) -> None:
    """It costs one time-out, within which the watchdog still sees the slot, and not one at each connection."""
    host, port = (str(psycopg.conninfo.conninfo_to_dict(database)[name]) for name in ("host", "port"))
    with blackhole() as dead:
        dsn = make_conninfo(database, host=f"127.0.0.1,{host}", port=f"{dead},{port}")
        assert None is await look(dsn, "none", "test")
        async with asyncio.timeout(1):
            assert None is await look(dsn, "none", "test")
            assert await _session(dsn, replication="database")


async def test_the_order_of_hosts_is_the_user_s_where_a_standby_does(database: str) -> None:
    """The one that is named first is asked first, whichever answered before."""
    port = psycopg.conninfo.conninfo_to_dict(database)["port"]
    await _session(database)
    dsn = make_conninfo(database, host="127.0.0.1,127.0.0.1", port=f"1,{port}", target_session_attrs="any")
    given = connections.parts(dsn)
    assert given == connections._living_first(given)  # noqa: SLF001
    given = connections.parts(dsn) | {"target_session_attrs": "primary"}
    assert f"{port},1" == connections._living_first(given)["port"]  # noqa: SLF001


# -- refusals ------------------------------------------------------------------------------------------------------


async def _refused(dsn: str, **parameters: str) -> SourceError:
    with pytest.raises(SourceError) as refused:
        async with answering("s", None):
            await connect(dsn, "test", **parameters)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize(
    ("wrong", "said", "cure"),
    [
        ({"port": "1"}, "PostgreSQL is not reachable: connection to server at", "REPLICATOR_POSTGRES_DSN"),
        ({"host": "127.0.0.1,127.0.0.1", "port": "1,2"}, "port 1 failed: Connection refused; connection", "until it"),
        ({"password": "wrong!"}, "PostgreSQL refuses the connection: password authentication", "user, password"),
        ({"user": "nobody"}, "PostgreSQL refuses the connection: password authentication", "user, password"),
        ({"dbname": "no_such"}, 'refuses the connection: database "no_such" does not', "the database's name"),
    ],
)
async def test_each_refusal_has_its_words(database: str, wrong: dict[str, str], said: str, cure: str) -> None:
    """Not reachable is only what does not answer."""
    refused = await _refused(make_conninfo(database, **wrong))
    assert isinstance(refused, SourceUnavailable)
    assert said in str(refused)
    assert cure in refused.cure
    assert "wrong!" not in str(refused)


@pytest.mark.parametrize(
    ("statement", "parameters", "told"),
    [
        ("CONNECTION LIMIT 0", {}, ("too many connections for role", "role may log in")),
        ("NOLOGIN", {}, ("is not permitted to log in", "role may log in")),
        ("NOREPLICATION", {"replication": "database"}, ("replication", "GRANT rds_replication")),
    ],
)
async def test_what_a_role_lacks(
    stack: DevStack, database: str, statement: str, parameters: dict[str, str], told: tuple[str, str]
) -> None:
    """Named, with what to give it."""
    role = "lacking_" + database.rpartition("/")[2]
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD 'p'").format(sql.Identifier(role)))
        admin.execute(sql.SQL(f"ALTER ROLE {{}} {statement}").format(sql.Identifier(role)))
        try:
            dsn = stack.postgres.dsn_for(database=database.rpartition("/")[2], user=role, password="p")  # noqa: S106
            refused = await _refused(dsn, **parameters)
        finally:
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert str(refused).startswith("PostgreSQL refuses the connection: ")
    assert told[0] in str(refused)
    assert told[1] in refused.cure


REFUSAL = 'connection failed: connection to server at "127.0.0.1", port 5432 failed: '


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("FATAL:  authentification par mot de passe échouée pour l'utilisateur « replicator »", "refuses"),
        ('ВАЖНО:  база данных "engagement" не существует', "refuses"),
        ("FATAL:  le système de bases de données s'arrête", "refuses"),
        ("FATAL:  aucune entrée dans pg_hba.conf pour l'hôte « 10.0.0.1 »", "refuses"),
        ("Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?", "reachable"),
        ("timeout expired", "reachable"),
    ],
)
def test_who_speaks_is_seen_in_every_language(text: str, said: str) -> None:
    """PostgreSQL's own words have their severity before them; libpq's have none."""
    assert said in translated(errors.OperationalError(REFUSAL + text)).problem


@pytest.mark.parametrize(
    ("current", "wanted"),
    [
        ("pgoutput, test_decoding", "'pgoutput', 'test_decoding', 'wal2json'"),
        ('"pgoutput, test_decoding, wal2json"', "'pgoutput', 'test_decoding', 'wal2json'"),
        ("", "'pgoutput', 'test_decoding', 'wal2json'"),
    ],
)
def test_the_list_of_plugins_is_extended(current: str, wanted: str) -> None:
    """Never replaced: other replication would end."""
    assert f"output_plugin_libraries = {wanted}; SELECT pg_reload_conf();" in allow_plugin(current)
