"""Everything that can happen to PostgreSQL, the slot and the checkpoint: it goes on, or it stops with what mends it.

What a message tells to type is typed here, word for word, and afterwards every sink has every event. The table of all
this is in docs/reference/faults.md.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from devstack.process import free_port, wait_until
from devstack.proxy import Proxy
from tests.support import environment as ground
from tests.support.destinations import Destinations, expected
from tests.support.exact import assert_exact, assert_same
from tests.support.load import Load, insert_many
from tests.support.program import ROOT, Program, Result, assert_clean, succeed

FAULTS = ROOT / "docs/reference/faults.md"
TERMINATE = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s"
STATE_TABLES = "SELECT tablename FROM pg_tables WHERE tablename LIKE 'replicator%'"
DROP = "SELECT pg_drop_replication_slot(%s)"


def _wait(seconds: float) -> None:
    """Let the load go on for a while: time is what this is about, there is no condition."""
    threading.Event().wait(seconds)


def caught_up_and_stopped(program: Program) -> None:
    """Everything that is committed now is in every sink and confirmed, and the program has ended in order."""
    program.wait_until_caught_up()
    assert 0 == program.stop()


def refused(program: Program, *told: str) -> Result:
    """Neither `run` nor `init` goes on over it; each in words."""
    for command in ("init", "run"):
        result = program.run(command)
        assert_clean(result.stdout + result.stderr)
        assert 1 == result.code
        for words in told:
            assert words in result.stderr
    return result


def follow_repairs(program: Program, told: str) -> None:
    """Type each command that is printed for sinks that have more than PostgreSQL."""
    for line in re.findall(r"^ +(python -m replicator .*)$", told, re.MULTILINE):
        typed = program.follow(f"{line}{' --yes' * ('--from-empty' in line)}")
        assert typed.code in (0, 3), "3: it counts too high yet"


def mend(program: Program, *before: str) -> None:
    """Type what the messages say: the gap is accepted, and what is missing is brought by the printed commands."""
    for command in before:
        succeed(program.run(*command.split()))
    accepted = succeed(program.run("init", "--accept-gap"))
    assert "gap accepted: from" in accepted
    commands = re.findall(r"^ +(python -m replicator backfill .*)$", accepted, re.MULTILINE)
    assert 2 == len(commands), "one for the sinks that repeats do no harm, one for the API"
    assert 2 == accepted.count("replicator backfill"), "and none for everything there is"
    for line in commands:
        succeed(program.follow(line))


def assert_mended(program: Program, source: psycopg.Connection, database: str, destinations: Destinations) -> None:
    """It runs again, and every sink has every event there is."""
    program.start()
    insert_many(source, 10)
    caught_up_and_stopped(program)
    assert_exact(database, destinations)


# -- it goes on by itself ------------------------------------------------------------------------------------------


def test_the_walsender_is_terminated(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, chance: random.Random
) -> None:
    """`pg_terminate_backend` again and again: it comes back every time, and repeats nothing at the API."""
    quick.start()
    reading = "SELECT active_pid IS NOT NULL FROM pg_replication_slots WHERE slot_name = %s"
    with Load(database, chance):
        for _ in range(5):
            wait_until(lambda: source.execute(reading, [quick.slot]).fetchone() == (True,), "it to read again")
            _wait(chance.uniform(0.0, 0.5))
            source.execute(TERMINATE, [quick.slot])
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert 0 == assert_exact(database, destinations)


def test_the_walsender_is_terminated_while_a_write_is_held(
    quick: Program, database: str, source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """The stream comes back, repeats what the API has in its hands, and confirms none of it."""
    quick.environment["REPLICATOR_HTTP_TIMEOUT_SECONDS"] = "60"
    quick.start()
    api.behave(hang_seconds=60)
    insert_many(source, 1_000)
    [committed] = source.execute("SELECT pg_current_wal_lsn()::text").fetchone() or ("",)
    wait_until(lambda: 1_000 == sum(destinations.counts().values()), "Redis to have it")
    for times in (2, 3):
        source.execute(TERMINATE, [quick.slot])
        wait_until(lambda times=times: times == quick.log.count(f"reading slot {quick.slot}"), "it to read again")  # type: ignore[misc]  # mypy can't type a lambda's default
    insert_many(source, 10)
    wait_until(lambda: 1_010 == sum(destinations.counts().values()), "what came later to arrive")
    past = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
    assert (False,) == source.execute(past, [committed, quick.slot]).fetchone()
    quick.kill()
    api.behave()
    quick.start()
    caught_up_and_stopped(quick)
    assert 0 == assert_exact(database, destinations)


def test_silent_for_longer_than_wal_sender_timeout(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """A machine that slept: PostgreSQL has cut it off, and it comes back by itself."""
    quick.environment["REPLICATOR_POSTGRES_DSN"] += "?options=-c%20wal_sender_timeout%3D1s"
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    quick.pause()
    insert_many(source, 1_000)
    free = "SELECT active_pid IS NULL FROM pg_replication_slots WHERE slot_name = %s"
    wait_until(lambda: source.execute(free, [quick.slot]).fetchone() == (True,), "PostgreSQL to cut it off")
    quick.resume()
    caught_up_and_stopped(quick)
    assert 0 == assert_exact(database, destinations)


def test_a_connection_that_the_network_forgot(
    quick: Program, database: str, source: psycopg.Connection, stack: DevStack, destinations: Destinations
) -> None:
    """PostgreSQL has given the stream up, and no word of that arrives: it is let go, and read again."""
    with Proxy(stack.postgres.port) as proxy:
        dsn = quick.environment["REPLICATOR_POSTGRES_DSN"].replace(f":{stack.postgres.port}/", f":{proxy.port}/")
        quick.environment["REPLICATOR_POSTGRES_DSN"] = f"{dsn}?options=-c%20wal_sender_timeout%3D1s"
        quick.start()
        insert_many(source, 10)
        quick.wait_until_caught_up()
        proxy.behave("forgotten")
        insert_many(source, 10)
        quick.wait_for_log("R214 replicator.operations.watchdog: The network dropped the stream without a sign")
        caught_up_and_stopped(quick)
    assert 0 == assert_exact(database, destinations)


def test_a_transaction_timeout_of_the_role_ends_no_stream(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """From PostgreSQL 17 on a DBA may set one. A large transaction is decoded in one, and would never arrive."""
    if source.info.server_version < 170_000:
        pytest.skip("PostgreSQL before 17 has no transaction_timeout")
    source.execute("ALTER ROLE replicator SET transaction_timeout = '300ms'")
    try:
        quick.start()
        insert_many(source, 50_000)
        caught_up_and_stopped(quick)
    finally:
        source.execute("ALTER ROLE replicator RESET transaction_timeout")
    assert 1 == quick.log.count(f"reading slot {quick.slot} from"), "and not once more after each timeout"
    assert 0 == assert_exact(database, destinations)


def test_the_table_is_made_again_under_its_name(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Tables are known by name: the new one is read from its first row on; rows moved into it are the same events."""
    quick.start()
    insert_many(source, 10)
    source.execute("""
        BEGIN;
        ALTER TABLE engagement_events RENAME TO engagement_events_old;
        CREATE TABLE engagement_events (LIKE engagement_events_old INCLUDING ALL);
        INSERT INTO engagement_events SELECT * FROM engagement_events_old;
        COMMIT
    """)
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    assert 10 <= assert_exact(database, destinations), "inserted again, sent again"


# -- a new slot waits ----------------------------------------------------------------------------------------------


def test_a_slot_that_waits_for_a_transaction(quick: Program, source: psycopg.Connection, database: str) -> None:
    """It says for which, in the log and at /readyz; killed meanwhile, it leaves nothing behind; then it goes on."""
    source.execute("ALTER ROLE replicator SET lock_timeout = '1s'")
    try:
        with psycopg.connect(database) as old:
            old.execute("INSERT INTO content VALUES (99, 'video', 1)")
            [[transaction]] = old.execute("SELECT txid_current()::text").fetchall()
            holder = f"transaction {transaction} of process {old.info.backend_pid} (pg_stat_activity)"
            quick.spawn()
            quick.wait_for_log(f"Replication slot {quick.slot} is being made: it waits for {holder} to end")
            assert holder in quick.admin("/readyz")
            told = quick.run("status").stdout
            assert "makes the slot, and waits for the transactions that run to end" in told
            assert "0/0" not in told
            assert f"process {_reader(database, quick.slot)} makes it" in quick.run("init").stderr
            quick.process.kill()
            quick.process.wait()
            there = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
            wait_until(lambda: source.execute(there, [quick.slot]).fetchone() == (0,), "the orphan to be gone")
            quick.spawn()
            quick.wait_for_log("is being made")
        quick.wait_for_log("reading slot")
    finally:
        source.execute("ALTER ROLE replicator RESET lock_timeout")
    insert_many(source, 10)
    caught_up_and_stopped(quick)


def test_a_slot_that_waits_for_a_prepared_transaction(
    quick: Program, source: psycopg.Connection, database: str
) -> None:
    """It has no process, so `init` names it; interrupted, it leaves nothing behind."""
    with psycopg.connect(database, autocommit=True) as old:
        old.execute("BEGIN; INSERT INTO content VALUES (99, 'video', 1); PREPARE TRANSACTION 'forgotten'")
    try:
        quick.spawn("init")
        quick.wait_for_log("it waits for prepared transaction 'forgotten'")
        assert "COMMIT PREPARED or ROLLBACK PREPARED" in quick.log
        quick.process.send_signal(signal.SIGINT)
        assert 1 == quick.process.wait(10)
        there = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s"
        wait_until(lambda: source.execute(there, [quick.slot]).fetchone() == (0,), "the slot to be gone")
    finally:
        source.execute("ROLLBACK PREPARED 'forgotten'")


# -- two of them ---------------------------------------------------------------------------------------------------


def test_a_standby_takes_over(
    quick: Program, database: str, destinations: Destinations, chance: random.Random, tmp_path: Path
) -> None:
    """Two on one slot and one checkpoint: the second waits, says so, and goes on where the first was killed."""
    listen = {"REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}"}
    standby = Program(quick.environment | listen, database, tmp_path / "standby.log")
    first, second = quick, standby
    try:
        first.start()
        with Load(database, chance):
            for _ in range(2):
                second.spawn()
                waits = f"slot {quick.slot} is held by process {_reader(database, quick.slot)}"
                wait_until(lambda who=second, what=waits: what in who.log, "the standby to say that it waits")  # type: ignore[misc]  # mypy can't type a lambda's default
                assert waits in second.admin("/readyz")
                wait_until(lambda who=first: "ready\n" == who.admin("/readyz"), "the first to be ready", 10)  # type: ignore[misc]  # as above
                _wait(chance.uniform(0.2, 0.6))
                first.process.kill()
                first.process.wait()
                wait_until(lambda who=second: "ready\n" == who.admin("/readyz"), "the standby to take over", 10)  # type: ignore[misc]  # as above
                first, second = second, first
        first.wait_until_caught_up()
        assert 0 == first.stop()
    finally:
        standby.end()
        print(standby.log)  # noqa: T201  pytest shows it when the test has failed
    assert_exact(database, destinations)


def test_the_one_that_was_cut_off_becomes_the_standby(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """Taken for dead, it wakes up when another one has gone on: it waits its turn, and begins where that one was."""
    listen = {"REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}"}
    second = Program(quick.environment | listen, database, tmp_path / "second.log")
    try:
        quick.start()
        insert_many(source, 1_000)
        quick.wait_until_caught_up()
        quick.pause()
        source.execute(TERMINATE, [quick.slot])
        second.start()
        insert_many(source, 1_000)
        second.wait_until_caught_up()
        quick.resume()
        quick.wait_for_log(f"slot {quick.slot} is held by process {_reader(database, quick.slot)}")
        second.kill()
        quick.wait_for_log("Another replicator went on from")
        insert_many(source, 1_000)
        caught_up_and_stopped(quick)
    finally:
        second.end()
        print(second.log)  # noqa: T201  pytest shows it when the test has failed
    assert 0 == assert_exact(database, destinations)


def _reader(dsn: str, slot: str) -> int:
    with psycopg.connect(dsn) as connection:
        query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
        [pid] = connection.execute(query, [slot]).fetchone() or (0,)
        return int(pid)


# -- the slot or the checkpoint is gone ----------------------------------------------------------------------------


def test_the_slot_was_dropped(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """It says what is missing from when on and the cure, ends with 1, and the cure works."""
    quick.start()
    insert_many(source, 1_000)
    caught_up_and_stopped(quick)
    source.execute(DROP, [quick.slot])
    insert_many(source, 1_000)
    result = refused(quick, f"Replication slot {quick.slot} does not exist", "`python -m replicator init --accept-gap`")
    assert 1 == quick.run("check").code
    since = re.search(r"committed from (\S+) until there is a new slot", result.stderr)
    assert since
    earlier = "SELECT bool_and(%s::timestamptz <= event_ts) FROM engagement_events WHERE id > 1000"
    assert (True,) == source.execute(earlier, [since[1]]).fetchone(), "what is missing was committed later than that"
    mend(quick)
    assert_mended(quick, source, database, destinations)


def test_the_slot_was_dropped_and_made_again(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """The new slot begins past the checkpoint: what lies between is a gap, and no one goes on over it unasked."""
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    source.execute(DROP, [quick.slot])
    insert_many(source, 1_000)
    source.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [quick.slot])
    refused(quick, "is not continuous with the checkpoint", "past the checkpoint's", "init --accept-gap")
    mend(quick)
    assert_mended(quick, source, database, destinations)


def test_the_slot_was_moved_on_by_somebody_else(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Confirmed past the checkpoint, by another reader or by hand: what went by is a gap."""
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    insert_many(source, 1_000)
    source.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [quick.slot])
    refused(quick, "is not continuous with the checkpoint", "or another program read it", "init --accept-gap")
    mend(quick)
    assert_mended(quick, source, database, destinations)


UNDECODABLE = """
CREATE TYPE odd;
CREATE FUNCTION odd_in(cstring) RETURNS odd LANGUAGE internal IMMUTABLE STRICT AS 'int4in';
CREATE FUNCTION odd_out(odd) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'enum_out';
CREATE TYPE odd (INPUT = odd_in, OUTPUT = odd_out, LIKE = int4);
ALTER TABLE engagement_events ADD COLUMN odd odd
"""
"""Values of this type can be stored, and nobody can print them: wal2json fails, always at the same place."""


def test_what_can_not_be_decoded_is_passed_by_the_steps_of_the_page(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Typed as docs/reference/faults.md has them: everything arrives, the row that could not be decoded as well."""
    [row] = [line for line in FAULTS.read_text(encoding="utf-8").splitlines() if "can't decode slot" in line]
    drop, gap = re.findall(r"`([^`]*)`", row.split(" | ")[3])
    assert "GAP" == gap
    quick.start()
    insert_many(source, 10)
    source.execute(UNDECODABLE)
    quick.wait_until_caught_up()
    source.execute("INSERT INTO engagement_events (content_id, user_id, event_type, odd) VALUES (1, 1, 'play', '7')")
    insert_many(source, 10)
    wait_until(lambda: "can't decode slot" in quick.admin("/readyz"), "it to say so")
    told = quick.admin("/readyz")
    assert re.search(r"at LSN [0-9A-F]+/[0-9A-F]+", told)
    assert "invalid internal value for enum" in told
    insert_many(source, 10)
    assert 0 == quick.stop()
    succeed(quick.follow(f"{drop} --yes"))
    source.execute("ALTER TABLE engagement_events DROP COLUMN odd")
    mend(quick)
    assert_mended(quick, source, database, destinations)


def test_a_gap_is_accepted_only_where_there_is_one(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """The checkpoint stays as it is, byte for byte."""
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    before = _stored(tmp_path)
    accepted = succeed(quick.run("init", "--accept-gap"))
    assert "there is no gap: the slot has everything after the checkpoint, " in accepted
    assert "gap accepted" not in accepted
    assert before == _stored(tmp_path)
    assert_mended(quick, source, database, destinations)


def test_a_gap_is_not_accepted_while_the_slot_is_read(
    quick: Program, source: psycopg.Connection, tmp_path: Path
) -> None:
    """A live replicator's checkpoint is not replaced; here the API is named that it leaves out."""
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    insert_many(source, 10)
    quick.start(sinks="clickhouse,redis")
    quick.wait_until_caught_up()
    before = _stored(tmp_path)
    assert 3 == len(before)
    result = quick.run("init", "--accept-gap")
    assert (1, 1) == (result.code, result.stderr.count("\n"))
    assert f"Replication slot {quick.slot} is held by process" in result.stderr
    assert before[2] == _stored(tmp_path)[2], "where the API is"
    assert 0 == quick.stop()
    refused(quick, "Sink http was left out after")


def _stored(folder: Path) -> list[tuple[object, ...]]:
    """The positions of the sinks, the API's last."""
    with closing(sqlite3.connect(folder / "checkpoint.db")) as checkpoint:
        return checkpoint.execute("SELECT * FROM replicator_sink_positions ORDER BY sink = 'http', sink").fetchall()


def test_the_checkpoint_is_an_older_backup(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """It can't know that the sinks have more than it says, and neither can we."""
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    backup = tmp_path / "backup.db"
    shutil.copy(tmp_path / "checkpoint.db", backup)
    quick.start()
    insert_many(source, 1_000)
    caught_up_and_stopped(quick)
    for file in tmp_path.glob("checkpoint.db*"):
        file.unlink()
    shutil.copy(backup, tmp_path / "checkpoint.db")
    refused(quick, "past the checkpoint's", "init --accept-gap")
    mend(quick)
    assert_mended(quick, source, database, destinations)


def test_an_older_backup_of_the_checkpoint_is_restored_under_it(
    quick: Program, stack: DevStack, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """Else the copy of the contents would lack what has changed since, and dead letters would be gone, unnoticed."""
    source.execute("INSERT INTO content VALUES (4, 'video', 10)")
    with ground.fresh_database(stack) as state:
        quick.environment |= {"REPLICATOR_CHECKPOINT_URL": state, "REPLICATOR_CONTENT_CACHE_SIZE": "1"}
        quick.start()
        insert_many(source, 10)
        quick.wait_until_caught_up()
        with psycopg.connect(state) as admin:
            tables = [name for (name,) in admin.execute(STATE_TABLES)]
            for name in tables:
                admin.execute(f"CREATE TABLE copy_of_{name} AS TABLE {name}".encode())
        source.execute("UPDATE content SET length_seconds = 999 WHERE content_id = 4")
        insert_many(source, 10)
        quick.wait_until_caught_up()
        with psycopg.connect(state) as admin:
            admin.execute(f"TRUNCATE {', '.join(tables)}".encode())
            for name in tables:
                admin.execute(f"INSERT INTO {name} OVERRIDING SYSTEM VALUE TABLE copy_of_{name}".encode())
        insert_many(source, 10)
        assert 1 == quick.process.wait(60)
        assert "CRITICAL R609" in quick.log
        assert "it has lost what was saved: the checkpoint of slot" in quick.log
        refused(quick, "past the checkpoint's", "init --accept-gap")
        mend(quick)
        source.execute("INSERT INTO engagement_events (content_id, user_id, event_type) VALUES (4, 1, 'play')")
        assert_mended(quick, source, database, destinations)


def test_the_slot_is_dropped_while_it_runs(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations
) -> None:
    """It finds no slot when it comes back, and does not make a new one over the gap."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    quick.pause()  # else it is back before the slot can be dropped
    source.execute(TERMINATE, [quick.slot])
    source.execute(DROP, [quick.slot])
    insert_many(source, 10)
    quick.resume()
    assert 1 == quick.process.wait(30)
    assert f"Replication slot {quick.slot} does not exist" in quick.log
    mend(quick)
    assert_mended(quick, source, database, destinations)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_the_slot_lost_its_wal(
    quick: Program, source: psycopg.Connection, database: str, destinations: Destinations, running: bool
) -> None:
    """PostgreSQL threw away what the slot needed (max_slot_wal_keep_size): named, exit 1, and the cure works."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    if running:
        quick.pause()  # it hangs, and its slot stands still
    else:
        assert 0 == quick.stop()
    source.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
    source.execute("SELECT pg_reload_conf()")
    try:
        _lose(source, quick.slot)
        if running:
            quick.resume()
        else:
            quick.spawn()
        assert 1 == quick.process.wait(30)
    finally:
        source.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        source.execute("SELECT pg_reload_conf()")
    refused(quick, "wal_status lost", "python -m replicator drop-slot", "init --accept-gap")
    assert 1 == quick.run("init", "--accept-gap").code  # a lost slot has to go first, as it says
    mend(quick, "drop-slot --yes")
    assert_mended(quick, source, database, destinations)


def _lose(source: psycopg.Connection, slot: str) -> None:
    def lost() -> bool:
        source.execute("SELECT pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()")
        source.execute("CHECKPOINT")
        query = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s"
        return source.execute(query, [slot]).fetchone() == ("lost",)

    wait_until(lost, "the slot to be lost")


def test_the_checkpoint_was_deleted(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """It might be another database than before, so it asks; with the slot still there nothing is lost."""
    quick.start()
    insert_many(source, 1_000)
    quick.wait_until_caught_up()
    quick.kill()
    insert_many(source, 1_000)
    for file in tmp_path.glob("checkpoint.db*"):
        file.unlink()
    refused(
        quick,
        f"database sqlite:///{tmp_path}/checkpoint.db has nothing of replication slot",
        "REPLICATOR_CHECKPOINT_URL",
        "init --accept-gap",
    )
    assert 1 == quick.run("init").code
    assert "comes through the slot" in succeed(quick.run("init", "--accept-gap"))
    quick.start()
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    assert assert_exact(database, destinations) <= 1_000


def test_checkpoint_and_slot_were_deleted(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """Nothing is left that could know of a gap: it begins anew and says so, and how to bring older rows."""
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    for file in tmp_path.glob("checkpoint.db*"):
        file.unlink()
    source.execute(DROP, [quick.slot])
    insert_many(source, 1_000)
    quick.start()
    assert f"made slot {quick.slot}; `python -m replicator init` says how to bring older rows" in quick.log
    told = succeed(quick.run("init"))
    assert "public.engagement_events holds 1010 rows; those from before the slot do not come through it." in told
    [command] = re.findall(r"python -m replicator backfill .*", told)
    succeed(quick.follow(f"{command} --sinks clickhouse,redis,http"))
    caught_up_and_stopped(quick)
    assert_exact(database, destinations)


def test_the_checkpoint_takes_nothing_for_a_while(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, tmp_path: Path
) -> None:
    """A full disk, a database that is down, here one that is locked: sinks go on, nothing is confirmed, it says so."""
    quick.start()
    insert_many(source, 10)
    quick.wait_until_caught_up()
    confirmed = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
    with closing(sqlite3.connect(tmp_path / "checkpoint.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        before = source.execute(confirmed, [quick.slot]).fetchone()
        insert_many(source, 1_000)
        wait_until(lambda: 1_010 == len(destinations.clickhouse()), "ClickHouse to have it")
        quick.wait_for_log("Nothing is confirmed to PostgreSQL until it does")
        assert before == source.execute(confirmed, [quick.slot]).fetchone()
        other.execute("ROLLBACK")
    caught_up_and_stopped(quick)
    assert 0 == assert_exact(database, destinations)


# -- another server ------------------------------------------------------------------------------------------------


@contextmanager
def _cluster(quick: Program) -> Iterator[tuple[DevStack, str]]:
    """A cluster of its own, whose files may be changed, and a database in it that the program reads from."""
    with DevStack("postgres") as own, ground.fresh_database(own) as dsn:
        quick.environment["REPLICATOR_POSTGRES_DSN"] = ground.plain_role(own, dsn)
        yield own, dsn


def _files(own: DevStack) -> Path:
    return own.postgres.folder / "data"


def _run_into(quick: Program, dsn: str) -> None:
    """The program on another cluster: a slot, a checkpoint and some events."""
    quick.move_to(dsn)
    quick.start()
    with psycopg.connect(dsn, autocommit=True) as writer:
        insert_many(writer, 100)
    caught_up_and_stopped(quick)


def test_a_database_that_is_not_utf_8(quick: Program, stack: DevStack, source: psycopg.Connection) -> None:
    """wal2json sends its bytes as they are: a text would be another one, or end the stream. Nothing is read."""
    name = f"{quick.slot}_latin1"
    source.execute(f"CREATE DATABASE {name} ENCODING LATIN1 TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'".encode())
    dsn = stack.postgres.dsn_for(database=name)
    try:
        with psycopg.connect(dsn) as connection:
            connection.execute((ground.SQL / "source_schema.sql").read_bytes())
        quick.environment["REPLICATOR_POSTGRES_DSN"] = ground.plain_role(stack, dsn)
        quick.spawn()
        quick.wait_for_log("R401")
        assert "server_encoding = LATIN1. No slot is made until this is mended" in quick.log
        assert "server_encoding = LATIN1" in quick.admin("/readyz")
        assert [] == source.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", [quick.slot]).fetchall()
        assert 0 == quick.stop()
    finally:
        quick.end()
        source.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_the_wal_was_reset(quick: Program, destinations: Destinations) -> None:
    """`pg_resetwal`, or a lost file: the slot is there, what it has to read is not, and the same steps lead past it."""
    with _cluster(quick) as (own, dsn):
        _run_into(quick, dsn)
        with psycopg.connect(dsn, autocommit=True) as writer:
            insert_many(writer, 100)
        own.postgres.stop()
        own.postgres.run([str(own.postgres.bin_dir / "pg_resetwal"), "-f", str(_files(own))])
        own.postgres.start()
        quick.start()
        wait_until(lambda: "has already been removed" in quick.admin("/readyz"), "it to say so")
        assert "`python -m replicator drop-slot` and `python -m replicator init --accept-gap`" in quick.admin("/readyz")
        assert 0 == quick.stop()
        mend(quick, "drop-slot --yes")
        with psycopg.connect(dsn, autocommit=True) as source:
            assert_mended(quick, source, dsn, destinations)


def test_the_server_is_an_older_backup(quick: Program, destinations: Destinations) -> None:
    """Its WAL ends before the checkpoint: other events will stand where those stood that were read."""
    with _cluster(quick) as (own, dsn):
        _run_into(quick, dsn)
        own.postgres.stop()
        backup = own.postgres.folder / "backup"
        subprocess.run(["cp", "-a", _files(own), backup], check=True)
        own.postgres.start()
        quick.start()
        with psycopg.connect(dsn, autocommit=True) as writer:
            insert_many(writer, 5_000)
        caught_up_and_stopped(quick)
        own.postgres.stop()
        shutil.rmtree(_files(own))
        backup.rename(_files(own))
        own.postgres.start()
        refused(quick, "behind the checkpoint's", "(an older backup)", "init --accept-gap")
        told = succeed(quick.run("init", "--accept-gap"))
        assert "the sinks may have events that PostgreSQL lost" in told
        quick.start()
        with psycopg.connect(dsn, autocommit=True) as writer:
            insert_many(writer, 100)
        quick.wait_until_caught_up()
        follow_repairs(quick, told)
        assert 0 == quick.stop()
        events = expected(dsn)
    assert_same(events, destinations.clickhouse(), "ClickHouse")
    assert Counter(event["content_id"] for event in events) == destinations.counts()


def test_the_server_is_a_standby_and_is_promoted(quick: Program, destinations: Destinations, tmp_path: Path) -> None:
    """A standby is waited for, with a reason; promoted, it has the history that was read: all goes on by itself.

    `init` makes nothing there.
    """
    with _cluster(quick) as (own, dsn):
        _run_into(quick, dsn)
        own.postgres.stop()
        (_files(own) / "standby.signal").touch()
        own.postgres.start()
        quick.spawn()
        quick.wait_for_log("The server is a standby, and the slot is read from the primary")
        assert "is a standby" in quick.admin("/readyz")
        for command in ("init", "check"):
            result = quick.run(command)
            assert (1, True) == (result.code, "is a standby" in (result.stdout + result.stderr).lower())
        nothing = tmp_path / "nothing.db"
        assert 1 == quick.run("init", checkpoint_url=f"sqlite:///{nothing}", slot="another").code
        assert not nothing.exists()
        with psycopg.connect(own.postgres.superuser_dsn, autocommit=True) as admin:
            admin.execute("SELECT pg_promote()")
        quick.wait_for_log("timeline 2 of PostgreSQL continues 1 from ")
        with psycopg.connect(dsn, autocommit=True) as writer:
            insert_many(writer, 100)
        caught_up_and_stopped(quick)
        assert 0 == assert_exact(dsn, destinations)
        quick.start()
        assert "continues" not in quick.said, "the checkpoint is of the new timeline"
        caught_up_and_stopped(quick)


def test_the_server_is_another_system(quick: Program, source: psycopg.Connection) -> None:
    """Its positions mean nothing here, slot or no slot; the checkpoint stays as it is."""
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    here = quick.environment["REPLICATOR_POSTGRES_DSN"]
    with _cluster(quick) as (_, dsn):
        refused(quick, "the server is system", "the checkpoint is of", "init --accept-gap")
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [quick.slot])
        refused(quick, "the server is system", "the checkpoint is of", "init --accept-gap")
    quick.environment["REPLICATOR_POSTGRES_DSN"] = here
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)


# -- a server or a slot that can't be used -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the slot", "with a slot"])
def test_wal2json_is_missing(quick: Program, source: psycopg.Connection, when: str) -> None:
    """It names the package, before there is a slot and when it was there once; back again, all goes on."""
    if when == "with a slot":
        quick.start()
        insert_many(source, 10)
        caught_up_and_stopped(quick)
    source.execute("ALTER SYSTEM SET dynamic_library_path = '/nowhere'")
    source.execute("SELECT pg_reload_conf()")
    try:
        result = quick.run("run")
    finally:
        source.execute("ALTER SYSTEM RESET dynamic_library_path")
        source.execute("SELECT pg_reload_conf()")
    assert 1 == result.code
    assert "Install wal2json for this version of PostgreSQL" in result.stderr
    quick.start()
    insert_many(source, 10)
    caught_up_and_stopped(quick)


MISFITS = {
    "physical": ("SELECT pg_create_physical_replication_slot(%s)", "a physical slot"),
    "plugin": ("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", "for plugin test_decoding"),
    "two_phase": ("SELECT pg_create_logical_replication_slot(%s, 'wal2json', false, true)", "two_phase = true"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_slot_of_another_kind(quick: Program, source: psycopg.Connection, kind: str) -> None:
    """Named, with the way out, before anything is read from it."""
    create, told = MISFITS[kind]
    source.execute(create.encode(), [quick.slot])
    refused(quick, told, "Drop it, or name another one in REPLICATOR_SLOT")
    source.execute(DROP, [quick.slot])  # the fixture drops only those of its database


def test_a_slot_of_another_database(quick: Program, stack: DevStack) -> None:
    """Slots belong to a database, and their names to the cluster."""
    with psycopg.connect(stack.postgres.superuser_dsn, autocommit=True) as admin:
        admin.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", [quick.slot])
        refused(quick, "in database postgres", "name another one in REPLICATOR_SLOT")
        admin.execute(DROP, [quick.slot])


def test_no_slot_is_left(quick: Program, source: psycopg.Connection) -> None:
    """max_replication_slots: the cure is named."""
    free = "SELECT current_setting('max_replication_slots')::int - count(*) FROM pg_replication_slots"
    [count] = source.execute(free).fetchone() or (0,)
    taken = [f"taken_{number}" for number in range(count)]
    for name in taken:
        source.execute("SELECT pg_create_physical_replication_slot(%s)", [name])
    try:
        result = quick.run("run")
    finally:
        for name in taken:
            source.execute(DROP, [name])
    assert 1 == result.code
    assert "Raise max_replication_slots" in result.stderr


def test_the_role_may_not_replicate(quick: Program, stack: DevStack, source: psycopg.Connection) -> None:
    """It waits, says why, and goes on once it may: rights are given back as quickly as taken."""
    source.execute("ALTER ROLE replicator NOREPLICATION")
    try:
        quick.spawn()
        quick.wait_for_log("PostgreSQL refuses the connection")
        wait_until(lambda: "GRANT rds_replication" in quick.admin("/readyz"), "it to say why")
    finally:
        source.execute("ALTER ROLE replicator REPLICATION")
    quick.wait_for_log("reading slot")
    insert_many(source, 10)
    caught_up_and_stopped(quick)
    assert stack.postgres.running
