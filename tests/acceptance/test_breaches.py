"""Breaking the rule on purpose: what proves the promise has to notice, else it proves nothing.

`pytest --breach NAME` breaks it for a whole session.
"""

from __future__ import annotations

import contextlib
import random

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from tests.prove.matrix import Case, play
from tests.support.destinations import Destinations, expected
from tests.support.exact import assert_exact, compare, first_views
from tests.support.load import insert_many
from tests.support.orders import STREAM, Shop, assert_every_write, create
from tests.support.orders import assert_exact as assert_orders
from tests.support.program import Program, succeed

FOUND_BY = [
    ("confirm-before-checkpoint", "after-confirm/single", "is not continuous with the checkpoint"),
    ("checkpoint-before-sink", "after-save/ten-thousand", ""),
    ("row-lsn", "enriched/interleaved", ""),
]
SEED = 7
REPLY = """
SELECT reply_time FROM pg_stat_replication JOIN pg_replication_slots ON pid = active_pid WHERE slot_name = %s
"""


@pytest.mark.parametrize(("breach", "name", "trouble"), FOUND_BY)
def test_the_crash_matrix_finds(stack: DevStack, breach: str, name: str, trouble: str) -> None:
    """One case of the matrix: good as the program is, and not when it breaks the rule."""
    case = Case.named(name, SEED)
    assert play(stack, case).good
    outcome = play(stack, case, "--breach", breach)
    assert not outcome.good
    assert trouble in outcome.trouble
    assert trouble or any(outcome.lost.values()), "told by what is lost"


OF_ORDERS = ("update-lost", "older-version-wins", "delete-ignored", "former-identity-kept", "customer-of-later")


@pytest.mark.parametrize("breach", ["", *OF_ORDERS])
def test_what_compares_orders_finds(
    quick: Program, source: psycopg.Connection, stack: DevStack, destinations: Destinations, breach: str
) -> None:
    """They are exact as the program is, and not when it takes a change for something else."""
    create(source)
    quick.environment["REPLICATOR_STREAM"] = STREAM
    quick.altered = ("--breach", breach) if breach else quick.altered
    succeed(quick.run("init"))
    shop = Shop(source, random.Random(SEED))  # noqa: S311  not a secret
    shop.trade(20)
    with source.transaction():
        shop.trade(20)
        shop.customers()
    quick.start()
    quick.wait_until_caught_up()
    with pytest.raises(AssertionError, match="orders") if breach else contextlib.nullcontext():
        assert_orders(source, stack, destinations)
    at_the_api = breach and breach != "older-version-wins"  # its objects have their version another way
    with pytest.raises(AssertionError, match=r"writes of|came again") if at_the_api else contextlib.nullcontext():
        assert_every_write(source, stack)


SWAP = """
CREATE TABLE green (LIKE content INCLUDING ALL);
INSERT INTO green SELECT content_id, 'other', 600 FROM content;
GRANT SELECT ON green TO replicator;
BEGIN; ALTER TABLE content RENAME TO blue; ALTER TABLE green RENAME TO content; COMMIT
"""


@pytest.mark.parametrize("altered", [(), ("--breach", "verified-ignored")], ids=["as it is", "verified-ignored"])
def test_a_content_is_swapped(
    quick: Program, database: str, source: psycopg.Connection, destinations: Destinations, altered: tuple[str, ...]
) -> None:
    """What was sent with the old one comes again, unless that counted before anybody had looked."""
    source.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    quick.altered = altered or quick.altered
    quick.start()
    wait_until(lambda: "0/0" != quick.status()["replicator"]["verified_lsn"], "the first look")
    source.execute(SWAP.encode())
    insert_many(source, 3)
    quick.wait_for_log("The tables have changed")
    wait_until(lambda: 2 == quick.log.count("reading slot"), "the stream to begin again")
    insert_many(source, 1)
    quick.wait_until_caught_up()
    assert 0 == quick.stop()
    wrong = compare(expected(database), destinations.clickhouse()).wrong
    assert (3 if altered else 0) == len(wrong)


TRAP = [((), 0), (("--breach", "psycopg2-keepalive"), 0), (("--breach", "markers-off"), 20)]


@pytest.mark.parametrize(("altered", "lost"), TRAP, ids=["as it is", "psycopg2-keepalive", "markers-off"])
def test_the_trap_of_psycopg2(  # noqa: PLR0917  fixtures
    quick: Program,
    database: str,
    source: psycopg.Connection,
    api: Api,
    destinations: Destinations,
    altered: tuple[str, ...],
    lost: int,
) -> None:
    """Begun first, committed last, keepalives while the API holds it, a kill (docs/decisions.md says why).

    A reader without transaction markers knows a row by its own LSN, here one that was confirmed long ago; psycopg2 then
    confirms the next keepalive by itself, and the transaction is gone. With markers even that rule does no harm.
    """
    quick.altered = altered or quick.altered
    quick.start()
    with psycopg.connect(database) as long:
        insert_many(long, 10, "long")
        insert_many(source, 1)
        quick.wait_until_caught_up()
        insert_many(long, 10, "long")
        insert_many(source, 1)
        quick.wait_until_caught_up()
        api.behave(hang_seconds=60)
        long.commit()
    [committed] = source.execute("SELECT pg_current_wal_lsn()").fetchone() or ("",)
    wait_until(lambda: 22 == sum(destinations.counts().values()), "Redis to have it")
    source.execute("SELECT pg_switch_wal()")  # the server goes on: keepalives say so
    for _ in range(5):
        _see_feedback(source, quick.slot)
    past = "SELECT confirmed_flush_lsn >= %s FROM pg_replication_slots WHERE slot_name = %s"
    assert (lost > 0,) == source.execute(past, [committed, quick.slot]).fetchone()
    quick.kill()
    api.behave()
    assert 2 == len(api.events())
    quick.start()
    quick.wait_until_caught_up()
    if not lost:
        assert 0 == assert_exact(database, destinations)
    distinct, _ = first_views(destinations.api())
    assert lost == len(compare(expected(database), distinct).missing)


def _see_feedback(source: psycopg.Connection, slot: str) -> None:
    """Return when PostgreSQL has had feedback once more; it is answered with a keepalive."""
    before = source.execute(REPLY, [slot]).fetchone()
    wait_until(lambda: source.execute(REPLY, [slot]).fetchone() != before, "feedback")
