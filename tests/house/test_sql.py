"""The files in `sql/`, run with psql as operators do, as a superuser and as the replicator's plain role."""

from __future__ import annotations

import asyncio
import csv
import io
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from devstack import DevStack
from devstack.process import free_port, wait_until
from replicator.source import slot as slots

SQL = Path(__file__).parents[2] / "sql"
PASSWORD = "it's \\ a % secret"  # noqa: S105  everything that quoting can get wrong
MEGABYTE = 1024**2

SOURCE_COLUMNS = [
    ("content", "content_id", "bigint", "NO"),
    ("content", "content_type", "text", "NO"),
    ("content", "length_seconds", "integer", "YES"),
    ("engagement_events", "id", "bigint", "NO"),
    ("engagement_events", "content_id", "bigint", "NO"),
    ("engagement_events", "user_id", "bigint", "NO"),
    ("engagement_events", "event_type", "text", "NO"),
    ("engagement_events", "event_ts", "timestamp with time zone", "NO"),
    ("engagement_events", "duration_ms", "integer", "YES"),
    ("engagement_events", "device", "text", "YES"),
    ("engagement_events", "raw_payload", "jsonb", "YES"),
]
SAMPLE_CONTENT = [(1, "video", 300), (2, "video", 120), (3, "article", None)]


def run_psql(dsn: str, file: str, *arguments: str) -> str:
    """Output of `psql -f sql/FILE`. A failed statement fails the test."""
    return _psql(dsn, file, *arguments).stdout


def run_psql_told(dsn: str, file: str, *arguments: str) -> str:
    """What it warns of."""
    return _psql(dsn, file, *arguments).stderr


def _psql(dsn: str, file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["psql", "-X", dsn, "-v", "ON_ERROR_STOP=1", *arguments, "-f", str(SQL / file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done


def slot_lag(dsn: str) -> dict[str, dict[str, str]]:
    """What slot_lag.sql says, by slot."""
    return {row["slot_name"]: row for row in csv.DictReader(io.StringIO(run_psql(dsn, "slot_lag.sql", "--csv")))}


def verdict(dsn: str, slot: str = "lag") -> str:
    """The verdict for one slot."""
    return slot_lag(dsn)[slot]["verdict"]


@pytest.fixture(scope="module")
def stack() -> Iterator[DevStack]:
    """PostgreSQL, once for this module."""
    with DevStack("postgres") as stack:
        yield stack


@pytest.fixture(scope="module")
def plain(stack: DevStack) -> str:
    """DSN of the role that roles.sql makes."""
    run_psql(stack.postgres.dsn, "source_schema.sql")
    run_psql(stack.postgres.dsn, "roles.sql", "-v", f"password={PASSWORD}")
    return dsn_of(stack, "replicator", PASSWORD)


def dsn_of(stack: DevStack, user: str, password: str) -> str:
    """As libpq keywords: any character is fine in a password."""
    return psycopg.conninfo.make_conninfo(
        host="127.0.0.1", port=stack.postgres.port, dbname="engagement", user=user, password=password
    )


@pytest.fixture
def admin(stack: DevStack) -> Iterator[psycopg.Connection]:
    """The superuser's connection. Slots and settings are restored afterwards."""
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        yield connection
        connection.execute("ALTER SYSTEM RESET ALL")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


@pytest.fixture(params=["superuser", "plain role"])
def dsn(request: pytest.FixtureRequest, stack: DevStack, plain: str) -> str:
    """Both roles that may ask."""
    return stack.postgres.dsn if request.param == "superuser" else plain


@pytest.fixture
def slot(admin: psycopg.Connection) -> str:
    """A wal2json slot that nobody reads."""
    admin.execute("SELECT pg_create_logical_replication_slot('lag', 'wal2json')")
    return "lag"


@contextmanager
def reader(stack: DevStack, admin: psycopg.Connection, dsn: str) -> Iterator[subprocess.Popen[bytes]]:
    """pg_recvlogical, connected to the slot and confirming what it gets every second."""
    options = [
        "--start",
        "-f",
        "/dev/null",
        "--status-interval=1",
        "--fsync-interval=1",
        "-o",
        "filter-msg-prefixes=fill",
    ]
    command = [str(stack.postgres.bin_dir / "pg_recvlogical"), "-d", dsn, "-S", "lag", *options]

    def is_active() -> bool:
        return admin.execute("SELECT active FROM pg_replication_slots").fetchone() == (True,)

    with subprocess.Popen(command) as process:
        try:
            wait_until(is_active, "the reader to connect")
            yield process
        finally:
            process.kill()
    wait_until(lambda: not is_active(), "the reader to be gone")


def configure(stack: DevStack, admin: psycopg.Connection, name: str, value: str) -> None:
    """ALTER SYSTEM, and wait until new connections see it."""
    admin.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
    admin.execute("SELECT pg_reload_conf()")

    def is_seen() -> bool:
        with psycopg.connect(stack.postgres.dsn) as connection:
            return connection.execute("SELECT current_setting(%s)", [name]).fetchone() == (value,)

    wait_until(is_seen, f"{name} = {value}")


def write_wal(admin: psycopg.Connection, megabytes: int) -> None:
    """Write that much WAL without a table. The transaction id makes the commit flush it."""
    admin.execute(
        "SELECT pg_current_xact_id(), length(pg_logical_emit_message(false, 'fill', repeat('x', %s))::text)",
        [megabytes * MEGABYTE],
    )


# --- source_schema.sql


@pytest.fixture
def empty_dsn(stack: DevStack) -> Iterator[str]:
    """A database of its own, without tables."""
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as connection:
        connection.execute("CREATE DATABASE fresh")
        yield stack.postgres.dsn_for(database="fresh")
        connection.execute("DROP DATABASE fresh")


def columns_of(connection: psycopg.Connection) -> list[tuple[str, ...]]:
    """What the tables look like."""
    return connection.execute(
        "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns"
        " WHERE table_schema = 'public' ORDER BY table_name, ordinal_position"
    ).fetchall()


def test_the_schema_is_the_contract_s_and_may_be_run_again(empty_dsn: str) -> None:
    """Of two runs the second changes nothing."""
    for _ in range(2):
        run_psql(empty_dsn, "source_schema.sql")
        with psycopg.connect(empty_dsn) as connection:
            assert columns_of(connection) == SOURCE_COLUMNS
            assert connection.execute("SELECT * FROM content ORDER BY content_id").fetchall() == SAMPLE_CONTENT


def test_the_schema_runs_without_psql(empty_dsn: str) -> None:
    """Any client can send the file unchanged."""
    with psycopg.connect(empty_dsn) as connection:
        connection.execute((SQL / "source_schema.sql").read_bytes())
        assert columns_of(connection) == SOURCE_COLUMNS


def test_existing_content_is_left_alone(empty_dsn: str) -> None:
    """On a database in use, no sample rows are added and additional columns stay."""
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE content (content_id bigint PRIMARY KEY, content_type text NOT NULL, length_seconds int,"
            " title text)"
        )
        connection.execute("INSERT INTO content VALUES (77, 'song', 200, 'mine')")
        run_psql(empty_dsn, "source_schema.sql")
        assert connection.execute("SELECT * FROM content").fetchall() == [(77, "song", 200, "mine")]


# --- roles.sql


def attributes(admin: psycopg.Connection, role: str) -> tuple[bool, ...] | None:
    """Login, replication; superuser, createdb, createrole, bypassrls."""
    return admin.execute(
        "SELECT rolcanlogin, rolreplication, rolsuper, rolcreatedb, rolcreaterole, rolbypassrls FROM pg_roles"
        " WHERE rolname = %s",
        [role],
    ).fetchone()


def test_the_role_can_log_in_and_replicate_and_no_more(admin: psycopg.Connection, plain: str) -> None:
    """Two attributes of six. It can read both tables, but not write them or read others."""
    assert attributes(admin, "replicator") == (True, True, False, False, False, False)
    admin.execute("CREATE TABLE IF NOT EXISTS secrets (x int)")
    with psycopg.connect(plain, autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM content").fetchone() == (3,)
        assert connection.execute("SELECT count(*) FROM engagement_events").fetchone() == (0,)
        for statement in ("DELETE FROM content", "DELETE FROM engagement_events", "SELECT * FROM secrets"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_the_role_can_do_the_replicator_s_work(stack: DevStack, admin: psycopg.Connection, plain: str) -> None:
    """Make a slot, stream from it, emit the heartbeat, drop it, even if PUBLIC has no rights."""
    admin.execute("REVOKE CONNECT ON DATABASE engagement FROM PUBLIC")
    admin.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    try:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute("SELECT pg_create_logical_replication_slot('lag', 'wal2json')")
            connection.execute("SELECT pg_logical_emit_message(false, 'heartbeat', '')")
            with reader(stack, admin, plain):
                connection.execute("SELECT count(*) FROM content")
            connection.execute("SELECT pg_drop_replication_slot('lag')")
    finally:
        admin.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
        admin.execute("GRANT CONNECT ON DATABASE engagement TO PUBLIC")


def test_roles_may_be_run_again_and_keeps_the_password(stack: DevStack, admin: psycopg.Connection, plain: str) -> None:
    """Without a password on the command line the old one still works."""
    before = attributes(admin, "replicator")
    run_psql(stack.postgres.dsn, "roles.sql")
    assert before == attributes(admin, "replicator")
    with psycopg.connect(plain) as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("replicator",)


def test_a_role_of_any_name_without_a_password_cannot_log_in(stack: DevStack, admin: psycopg.Connection) -> None:
    """There is no default password; the name is quoted."""
    name = 'My "role"; DROP'
    run_psql(stack.postgres.dsn, "source_schema.sql")
    run_psql(stack.postgres.dsn, "roles.sql", "-v", f"role={name}")
    try:
        assert attributes(admin, name) == (True, True, False, False, False, False)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(dsn_of(stack, name, "replicator"))
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {name}; DROP ROLE {name}").format(name=sql.Identifier(name)))


@pytest.fixture
def administrator(stack: DevStack, admin: psycopg.Connection) -> Iterator[str]:
    """DSN of what a managed service has instead of a superuser: it makes roles, and owns the database."""
    run_psql(stack.postgres.dsn, "source_schema.sql")
    admin.execute("CREATE ROLE master LOGIN CREATEROLE PASSWORD 'master'")
    tables = ("DATABASE engagement", "SCHEMA public", "TABLE content", "TABLE engagement_events")
    for table in tables:
        admin.execute(sql.SQL(f"ALTER {table} OWNER TO master"))
    yield dsn_of(stack, "master", "master")
    for table in tables:
        admin.execute(sql.SQL(f"ALTER {table} OWNER TO app"))
    admin.execute("DROP OWNED BY served; DROP ROLE served; DROP OWNED BY master; DROP ROLE master")


def test_a_service_s_administrator_who_can_not_give_replication(admin: psycopg.Connection, administrator: str) -> None:
    """It says so, with the statement, and does all the rest."""
    told = run_psql_told(administrator, "roles.sql", "-v", "role=served")
    assert "role served may not replicate yet" in told
    assert "ALTER ROLE served REPLICATION" in told
    assert attributes(admin, "served") == (True, False, False, False, False, False)
    readable = "SELECT has_table_privilege('served', 'content', 'SELECT')"
    assert admin.execute(readable).fetchone() == (True,)


def test_on_amazon_rds_the_right_is_a_role(admin: psycopg.Connection, administrator: str) -> None:
    """Its master may grant that, and no attribute."""
    admin.execute("CREATE ROLE rds_replication; GRANT rds_replication TO master WITH ADMIN OPTION")
    try:
        assert "may not replicate" not in run_psql_told(administrator, "roles.sql", "-v", "role=served")
        member = "SELECT pg_has_role('served', 'rds_replication', 'MEMBER')"
        assert admin.execute(member).fetchone() == (True,)
    finally:
        admin.execute("DROP ROLE rds_replication")


# --- slot_lag.sql


@pytest.mark.usefixtures("admin")
def test_no_slot_is_said_aloud(dsn: str) -> None:
    """An empty table would look like good news."""
    assert list(slot_lag(dsn)) == [""]
    assert verdict(dsn, "").startswith("NO SLOT: ")


def test_a_slot_that_nobody_reads(admin: psycopg.Connection, slot: str, dsn: str) -> None:
    """Its figures grow with the WAL, in whole files, and the verdict says how much is kept."""
    write_wal(admin, 20)
    row = slot_lag(dsn)[slot]
    assert row["verdict"].startswith("NOT READ: no reader is connected")
    assert f"{row['retained_wal']} of WAL is kept for it" in row["verdict"]
    assert (row["plugin"], row["database"], row["active"], row["active_pid"]) == ("wal2json", "engagement", "f", "")
    assert 20 * MEGABYTE <= int(row["confirmed_lag_bytes"]) <= int(row["restart_lag_bytes"]) <= 40 * MEGABYTE
    assert int(row["restart_lag_bytes"]) <= int(row["retained_wal_bytes"])
    assert int(row["retained_wal_bytes"]) % (16 * MEGABYTE) == 0
    assert row["confirmed_lag"].endswith(" MB")
    state = asyncio.run(slots.look(dsn, slot, "test"))
    assert state
    assert int(row["retained_wal_bytes"]) == state.retained_bytes, "`status` and the metric say the same"


def test_an_idle_physical_slot(admin: psycopg.Connection, dsn: str) -> None:
    """It keeps nothing before it was read for the first time."""
    admin.execute("SELECT pg_create_physical_replication_slot('copy')")
    row = slot_lag(dsn)["copy"]
    assert (row["plugin"], row["restart_lag_bytes"]) == ("physical", "")
    assert row["verdict"].startswith("NEVER READ: ")


@pytest.mark.usefixtures("slot")
def test_a_reader_that_keeps_up(stack: DevStack, admin: psycopg.Connection, dsn: str, plain: str) -> None:
    """OK, with the process that serves it; afterwards not read."""
    with reader(stack, admin, plain):
        row = slot_lag(dsn)["lag"]
        assert row["verdict"] == "OK"
        assert row["active"] == "t"
        assert int(row["active_pid"]) > 0
    assert verdict(dsn).startswith("NOT READ: ")


@pytest.mark.usefixtures("slot")
def test_the_time_lag_is_for_those_who_may_see_it(stack: DevStack, admin: psycopg.Connection, plain: str) -> None:
    """A plain role sees everything else; with pg_read_all_stats, which roles.sql mentions, it sees this too."""
    with reader(stack, admin, plain):
        wait_until(lambda: slot_lag(stack.postgres.dsn)["lag"]["last_reply"] != "", "the reader's first report")
        assert slot_lag(plain)["lag"]["last_reply"] == ""
        admin.execute("GRANT pg_read_all_stats TO replicator")
        try:
            assert slot_lag(plain)["lag"]["last_reply"] != ""
        finally:
            admin.execute("REVOKE pg_read_all_stats FROM replicator")


@pytest.mark.usefixtures("slot")
def test_a_reader_that_hangs(stack: DevStack, admin: psycopg.Connection, dsn: str, plain: str) -> None:
    """Connected but frozen: BEHIND, until it goes on."""
    with reader(stack, admin, plain) as process:
        process.send_signal(signal.SIGSTOP)
        write_wal(admin, 70)
        assert verdict(dsn).startswith("BEHIND: a reader is connected, but 7")
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: verdict(dsn) == "OK", "the reader to catch up")


@pytest.mark.usefixtures("slot")
def test_a_long_transaction(stack: DevStack, admin: psycopg.Connection, dsn: str, plain: str) -> None:
    """The reader keeps up, but an open transaction of a writer makes PostgreSQL keep more than max_wal_size."""
    configure(stack, admin, "max_wal_size", "32MB")
    with psycopg.connect(stack.postgres.dsn) as forgotten, reader(stack, admin, plain):
        forgotten.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (1, 1, 'play')")
        write_wal(admin, 90)
        wait_until(lambda: verdict(dsn).startswith("HELD BACK: the reader keeps up, yet "), "HELD BACK")
        assert int(slot_lag(dsn)["lag"]["confirmed_lag_bytes"]) < MEGABYTE
        forgotten.rollback()

        def is_ok() -> bool:
            admin.execute("CHECKPOINT")  # logs the running transactions, which lets the slot move
            return verdict(dsn) == "OK"

        wait_until(is_ok, "the slot to move on")


def test_a_slot_on_its_way_to_be_lost(stack: DevStack, admin: psycopg.Connection, slot: str, dsn: str) -> None:
    """Each stage has its verdict. Raising the limit, as it advises, saves the slot; a checkpoint ends it."""
    configure(stack, admin, "max_slot_wal_keep_size", "64MB")
    stages: list[str] = []
    for _ in range(25):
        row = slot_lag(dsn)[slot]
        stages.append(row["verdict"].partition(":")[0])
        if row["wal_status"] == "unreserved":
            break
        write_wal(admin, 4)
    assert list(dict.fromkeys(stages)) == ["NOT READ", "IN DANGER", "NEARLY LOST"]
    configure(stack, admin, "max_slot_wal_keep_size", "1GB")
    assert verdict(dsn).startswith("NOT READ: ")
    configure(stack, admin, "max_slot_wal_keep_size", "64MB")

    def is_lost() -> bool:
        admin.execute("CHECKPOINT")
        return slot_lag(dsn)[slot]["wal_status"] == "lost"

    wait_until(is_lost, "the slot to be lost")
    row = slot_lag(dsn)[slot]
    assert row["verdict"].startswith("LOST: WAL that it needed was removed. It was read up to ")
    assert (row["restart_lag_bytes"], row["retained_wal_bytes"], row["safe_wal_size_bytes"]) == ("", "", "")


def test_a_terminal_gets_a_line_a_column_when_it_is_narrow(stack: DevStack, slot: str) -> None:
    """At 80 columns the verdict is readable, and psql does not report a switch of format."""
    narrow = run_psql(stack.postgres.dsn, "slot_lag.sql", "-P", "columns=80")
    assert narrow.startswith("-[ RECORD 1 ]")
    assert f"| {slot}\nverdict             | NOT READ: " in narrow


@pytest.fixture(scope="module")
def standby(stack: DevStack) -> Iterator[str]:
    """DSN of a hot standby, cloned from the stack's server."""
    home = stack.folder / "standby"
    data, port = home / "data", free_port()
    home.mkdir()
    user = stack.postgres.user  # PostgreSQL refuses to run as root
    if user:
        shutil.chown(home, user)
    bin_dir = stack.postgres.bin_dir
    clone = [str(bin_dir / "pg_basebackup"), "-d", stack.postgres.superuser_dsn, "-D", str(data), "-R", "-c", "fast"]
    subprocess.run(clone, user=user, check=True, cwd="/")
    dsn = stack.postgres.dsn.replace(str(stack.postgres.port), str(port))
    serve = [str(bin_dir / "postgres"), "-D", str(data), "-c", f"port={port}", "-c", f"unix_socket_directories={data}"]
    with (home / "log").open("wb") as log, subprocess.Popen(serve, user=user, cwd="/", stderr=log) as process:
        try:
            wait_until(lambda: answers(dsn), "the standby")
            yield dsn
        finally:
            process.send_signal(signal.SIGQUIT)


def answers(dsn: str) -> bool:
    """Whether a client can log in."""
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def test_a_standby_measures_from_what_it_has_replayed(admin: psycopg.Connection, plain: str, standby: str) -> None:
    """It works on a standby, which has no current WAL position, also for the plain role."""
    with psycopg.connect(standby, autocommit=True) as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('copy', true)")
        write_wal(admin, 20)

        def replayed() -> bool:
            return int(slot_lag(standby)["copy"]["restart_lag_bytes"]) >= 20 * MEGABYTE

        wait_until(replayed, "the standby to replay")
        port = psycopg.conninfo.conninfo_to_dict(standby)["port"]
        row = slot_lag(psycopg.conninfo.make_conninfo(plain, port=port))["copy"]
        assert row["verdict"].startswith("NOT READ: ")
        connection.execute("SELECT pg_drop_replication_slot('copy')")
