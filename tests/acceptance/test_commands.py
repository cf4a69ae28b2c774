"""What an operator types and sees: every command, its exit code, its words; never a traceback, never a secret."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql

from devstack import DevStack
from devstack.process import Service, free_port
from replicator.cli.main import main
from tests.support.environment import SECRET
from tests.support.load import insert_many
from tests.support.pgbouncer import pgbouncer
from tests.support.program import Program, assert_clean, succeed


def test_init_twice_is_harmless_and_says_what_a_backfill_brings(
    program: Program, source: psycopg.Connection, stack: DevStack
) -> None:
    """Old rows are counted; the second time nothing is made and nothing lost."""
    source.execute(
        """INSERT INTO engagement_events (content_id, user_id, event_type, event_ts) VALUES
           (1, 1, 'play', '2026-01-08 09:00:00+00'), (2, 1, 'play', '2026-01-08 09:59:59.999999+00'),
           (3, 1, 'play', '2026-01-08 09:30:00+00')"""
    )
    hint = (
        "public.engagement_events holds 3 rows; those from before the slot do not come through it. "
        "To bring all of them: python -m replicator backfill --start 2026-01-08T09:00:00 --end 2026-01-08T10:00:00\n"
    )
    first = program.run("init")
    assert succeed(first).endswith(hint)
    assert f"made replication slot {program.slot}" in first.stdout
    position = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s"
    before = source.execute(position, [program.slot]).fetchone()
    second = program.run("init")
    assert succeed(second).endswith(hint)
    assert "made" not in second.stdout + second.stderr
    assert before == source.execute(position, [program.slot]).fetchone()
    stack.clickhouse.query("DROP TABLE events_enriched SYNC")
    told = succeed(program.run("init"))
    assert "3 rows; what clickhouse needs was only made now" in told
    assert told.endswith("--end 2026-01-08T10:00:00 --sinks clickhouse\n")


def test_what_was_done_before_a_failure_is_said(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is a file here, so it is buffered: the end of the program must not drop it."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    result = program.run("init", clickhouse_url="http://default@127.0.0.1:1/engagement")
    assert result.code == 1
    assert "checkpoint" in result.stdout
    assert "clickhouse" in result.stderr
    assert_clean(result.stdout + result.stderr)


class Trouble(NamedTuple):
    """Something that is not as it has to be."""

    name: str
    said: dict[str, str]
    """What `check` says of it, and the cure that it names after that."""
    statement: str = ""
    """In the source database, as a superuser."""
    settings: dict[str, str] = {}  # noqa: RUF012  a NamedTuple's default, never changed


CLOSED = f"127.0.0.1:{free_port()}"

NO_SINKS = {
    "redis_url": f"redis://:{SECRET}@{CLOSED}/0",
    "clickhouse_url": f"http://default:{SECRET}@{CLOSED}/engagement",
    "http_url": f"http://user:{SECRET}@{CLOSED}/events",
}
TROUBLES = [
    Trouble(
        "no REPLICATION",
        {"role replicator may not replicate": 'ALTER ROLE "replicator" REPLICATION'},
        "ALTER ROLE replicator NOREPLICATION",
    ),
    Trouble(
        "no rights",
        {"content: may not be read": "GRANT SELECT ON public.content TO replicator"},
        "REVOKE SELECT ON content FROM replicator",
    ),
    Trouble("no table", {"engagement_events: does not exist": "source_schema.sql"}, "DROP TABLE engagement_events"),
    Trouble("no column", {"has no column length_seconds": "Rename it back"}, "ALTER TABLE content DROP length_seconds"),
    Trouble(
        "no plugin", {"wal2json: ": "wal2json"}, "ALTER DATABASE {database} SET dynamic_library_path = '/nonexistent'"
    ),
    Trouble(
        "no sinks",
        {
            f"Redis at {CLOSED}": "Start Redis",
            f"ClickHouse: no answer from http://{CLOSED} (Connection refused)": "Check that it is up",
            f"FAIL  HTTP API: no answer from http://{CLOSED} (Connection refused)": "Start the API",
        },
        settings=NO_SINKS,
    ),
    Trouble(
        "no PostgreSQL",
        {"PostgreSQL is not reachable": "REPLICATOR_POSTGRES_DSN"},
        settings={"postgres_dsn": f"postgresql://replicator:{SECRET}@{CLOSED}/engagement"},
    ),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_check_finds(program: Program, source: psycopg.Connection, database: str, trouble: Trouble) -> None:
    """Exit 1, a line with what is wrong and one with the cure; whatever else is fine is said to be."""
    if trouble.statement:
        name = sql.Identifier(database.rpartition("/")[2])
        source.execute(sql.SQL(trouble.statement).format(database=name))
    result = program.run("check", **trouble.settings)
    assert 1 == result.code
    assert_clean(result.stdout + result.stderr)
    lines = result.stdout.splitlines()
    for what, cure in trouble.said.items():
        found = [at for at, line in enumerate(lines) if line.startswith("FAIL") and what in line]
        assert 1 == len(found), what
        assert cure in lines[found[0] + 1]
    assert any(line.startswith("ok") for line in lines)
    assert not result.stderr


SILENT = {
    "api": "sink http: its check has not ended within 10 s",
    "clickhouse": "sink clickhouse: its check has not ended within 10 s",
    "redis": "Timeout reading from",
    "postgres": "PostgreSQL is not reachable: connection timeout expired",
}


def test_check_and_status_with_servers_that_are_silent(program: Program, stack: DevStack) -> None:
    """They take the connection and answer nothing: each is named, and all of them are waited for together."""
    succeed(program.run("init"))
    services: list[Service] = [getattr(stack, name) for name in SILENT]
    for service in services:
        service.pause()
    try:
        began = time.monotonic()
        checked = program.run("check")
        seconds = time.monotonic() - began
        asked = program.run("status")
    finally:
        for service in services:
            service.resume()
    assert 1 == checked.code
    failed = [line for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert len(SILENT) == len(failed)
    assert all(any(said in line for line in failed) for said in SILENT.values()), checked.stdout
    assert "Check whether what REPLICATOR_CLICKHOUSE_URL leads to answers at all" in checked.stdout
    assert_clean(checked.stdout + checked.stderr)
    assert seconds < 20, f"10 s for the slowest, and the start; it took {seconds:.1f} s"
    assert (3, True) == (asked.code, "connection timeout expired" in asked.stdout)


def test_commands_with_a_checkpoint_database_that_is_silent(program: Program, stack: DevStack, database: str) -> None:
    """Without a word from it for 10 s they say so, and nothing waits for it for ever."""
    with pgbouncer(stack) as pooler:
        url = "postgresql+psycopg://" + pooler.dsn_for(database).partition("://")[2]
        program.environment |= {"REPLICATOR_CHECKPOINT_URL": f"{url}?connect_timeout=60"}
        succeed(program.run("init"))
        pooler.pause()
        try:
            checked, asked = program.run("check"), program.run("status")
            listed = program.run("dead-letters", "list")
        finally:
            pooler.resume()
    assert (1, 3, 1) == (checked.code, asked.code, listed.code)
    assert "FAIL  checkpoint database: its check has not ended within 10 s" in checked.stdout
    assert "REPLICATOR_CHECKPOINT_URL" in checked.stdout
    assert f"replication slot {program.slot}" not in checked.stdout, "it is not asked again"
    assert "has the right shape and takes inserts" in checked.stdout
    assert "The checkpoint database fails: no answer in 10 s" in " ".join(asked.stdout.split())
    assert "The checkpoint database fails: no answer in 10 s" in listed.stderr
    assert_clean(checked.stderr + asked.stderr + listed.stderr)


def test_check_passes_before_init_and_while_it_runs(
    program: Program, source: psycopg.Connection, tmp_path: Path
) -> None:
    """On a machine that is prepared nothing is missing but what `init` makes; a healthy replicator is healthy."""
    told = succeed(program.run("check"))
    assert "checkpoint database: empty" in told
    assert f"replication slot {program.slot}: not there yet" in told
    assert not (tmp_path / "checkpoint.db").exists(), "it changes nothing"
    succeed(program.run("init"))
    succeed(program.run("check"))
    program.start()
    insert_many(source, 10)
    program.wait_until_caught_up()
    told = succeed(program.run("check"))
    assert "the running replicator is ready" in told
    assert 0 == program.stop()


def test_check_compares_settings(program: Program, source: psycopg.Connection) -> None:
    """What the running replicator writes is not where these commands would look."""
    program.start()
    insert_many(source, 10)
    program.wait_until_caught_up()
    told = "REPLICATOR_REDIS_PREFIX is '' in the running replicator and 'other:' here"
    checked = program.run("check", redis_prefix="other:")
    assert (1, True) == (checked.code, f"FAIL  {told}" in checked.stdout)
    asked = program.run("status", redis_prefix="other:")
    assert (3, True) == (asked.code, told in " ".join(asked.stdout.split()))
    assert 0 == program.stop()


def test_check_finds_no_room(program: Program, source: psycopg.Connection, stack: DevStack) -> None:
    """All slots are taken: before there is ours it can't be made, afterwards all is well."""
    [count] = source.execute(
        "SELECT current_setting('max_replication_slots')::int - count(*) FROM pg_replication_slots"
    ).fetchone() or (0,)
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        names = [f"taken_{number}" for number in range(count)]
        for name in names:
            admin.execute("SELECT pg_create_physical_replication_slot(%s)", [name])
        try:
            result = program.run("check")
            assert 1 == result.code
            assert f"FAIL  max_replication_slots = {count}, {count} in use" in result.stdout
            assert "Raise max_replication_slots and restart PostgreSQL" in result.stdout
            admin.execute("SELECT pg_drop_replication_slot(%s)", [names.pop()])
            succeed(program.run("init"))
            succeed(program.run("check"))
        finally:
            for name in names:
                admin.execute("SELECT pg_drop_replication_slot(%s)", [name])


def test_check_as_json(program: Program) -> None:
    """One object, whatever it finds; docs/reference/commands.md has its fields."""
    succeed(program.run("init"))
    found = json.loads(succeed(program.run("check", "--json")))
    assert found.pop("ok") is True
    assert ["findings"] == list(found)
    assert all(["ok", "what", "cure"] == list(finding) for finding in found["findings"])
    failed = program.run("check", "--json", postgres_dsn=f"postgresql://replicator@{CLOSED}/engagement")
    assert (1, False) == (failed.code, json.loads(failed.stdout)["ok"])


def test_check_finds_a_server_without_logical_decoding(program: Program) -> None:
    """wal_level is said first: nothing works without it, and it takes a restart."""
    with DevStack("postgres", postgres_settings={"wal_level": "replica"}) as other:
        result = program.run("check", postgres_dsn=other.postgres.dsn)
    assert 1 == result.code
    assert "FAIL  wal_level = replica\n      → ALTER SYSTEM SET wal_level = logical" in result.stdout
    assert_clean(result.stdout + result.stderr)


UNUSABLE = {
    "POSTGRES_DSN": f"host=a {SECRET}",
    "POSTGRES_DSN_FILE": "/nonexistent",
    "SLOT": "Bad-Slot",
    "SINKS": "clickhouse,kafka",
    "CLICKHOUSE_URL": f"ftp://default:{SECRET}@localhost/engagement",
    "REDIS_URL": f"redis://:12/{SECRET}@localhost",
    "HTTP_URL": f"http://u:12/{SECRET}@127.0.0.1/events",
    "HTTP_BATCH_SIZE": "0",
    "CHECKPOINT_URL": f"postgresql://app:p@{SECRET}@127.0.0.1:1/engagement",
    "ADMIN_LISTEN": "8080",
    "MEMORY_LIMIT_MB": "1.5",
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.usefixtures("empty_directory")
def test_unusable_settings(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 before anything is done; the message names the variable and what it takes, never a secret."""
    monkeypatch.setenv(f"REPLICATOR_{name}", UNUSABLE[name])
    assert 2 == main([])
    out, err = capsys.readouterr()
    assert err.startswith(f"replicator: REPLICATOR_{name} is unusable: ")
    assert "It takes " in err
    assert not out
    assert_clean(err)


def test_an_unusable_setting_ends_the_program(program: Program) -> None:
    """The same from outside."""
    result = program.run(slot=UNUSABLE["SLOT"])
    assert (2, "") == (result.code, result.stdout)
    assert result.stderr.startswith("replicator: REPLICATOR_SLOT is unusable: ")
    assert_clean(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--help"], 0, "replicator init"),
        (["replicate"], 2, "No such command 'replicate'"),
        (["init", "--bogus"], 2, "No such option: --bogus"),
        (["dead-letters"], 2, "Missing command, one of list, replay, drop"),
        (["dead-letters", "list", "--id", "x"], 2, "--id is unusable: 'x' is not a whole number"),
        (["dead-letters", "list", "--sink", "bogus"], 2, "--sink is unusable: 'bogus' is not the name of a sink"),
    ],
    ids=["help", "command", "option", "action", "number", "sink"],
)
def test_arguments(arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help is no failure; what can't be understood is 2."""
    assert code == main(arguments)
    out, err = capsys.readouterr()
    assert told in out + err
    assert err.count("\n") == int(code > 0), "one line"
    assert_clean(out + err)


def test_drop_slot(program: Program, source: psycopg.Connection) -> None:
    """Asks first, which without a terminal is an unusable argument; with --yes the slot is gone."""
    succeed(program.run("init"))
    slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
    asked = program.run("drop-slot")
    assert 2 == asked.code
    assert "--yes" in asked.stderr
    assert (1,) == source.execute(slots, [program.slot]).fetchone()
    succeed(program.run("drop-slot", "--yes"))
    assert (0,) == source.execute(slots, [program.slot]).fetchone()
