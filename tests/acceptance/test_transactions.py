"""Every way in which rows are committed or not: all that should arrives once, nothing else does, nothing stops.

An event's type says whether it should arrive; what it should look like is captured before anything takes it away.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg
import pytest

from devstack.process import wait_until
from tests.support.destinations import Destinations, Event, expected
from tests.support.exact import assert_same, first_views
from tests.support.program import Program, assert_clean

COLUMNS = "content_id, user_id, event_type, duration_ms"
INSERT = f"INSERT INTO engagement_events ({COLUMNS}) VALUES (%s, 1, %s, 7000)"  # noqa: S608  ours
YES, NO = "arrives", "never committed"


class Rows:
    """Inserts events and keeps what should arrive of them."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._wanted: dict[int, Event] = {}
        self.connection = psycopg.connect(dsn, autocommit=True)

    def insert(self, event_type: str = YES, content: int = 1, connection: psycopg.Connection | None = None) -> None:
        """One event."""
        (connection or self.connection).execute(INSERT, [content, event_type])

    @contextmanager
    def another(self) -> Iterator[psycopg.Connection]:
        """A connection with a transaction open, which is committed at the end unless it is ended before."""
        with psycopg.connect(self._dsn) as connection:
            yield connection

    def capture(self) -> None:
        """Note how the events look that are in the table now and were not there before."""
        for event in expected(self._dsn):
            self._wanted.setdefault(event["event_id"], event)

    def wanted(self) -> list[Event]:
        """What should have arrived."""
        self.capture()
        return [event for _, event in sorted(self._wanted.items())]


@pytest.fixture
def rows(database: str) -> Iterator[Rows]:
    """For the test's database."""
    rows = Rows(database)
    yield rows
    rows.connection.close()


def assert_arrived(rows: Rows, destinations: Destinations, *, repeats: bool = False) -> None:
    """In every sink, every field; at the API once, unless it may have been repeated."""
    wanted = rows.wanted()
    assert wanted
    assert NO not in {event["event_type"] for event in wanted}
    taken, again = first_views(destinations.api())
    assert repeats or not again
    assert_same(wanted, taken, "the API")
    assert_same(wanted, destinations.clickhouse(), "ClickHouse")
    counts = Counter(event["content_id"] for event in wanted)
    assert counts == destinations.counts()
    wait_until(lambda: counts == destinations.top(), "the window")


def test_rolled_back_and_empty(program: Program, rows: Rows, destinations: Destinations) -> None:
    """Rollbacks, savepoints, transactions of nothing, of other tables and of tables of the same name."""
    program.start()
    connection = rows.connection
    connection.execute("CREATE SCHEMA other")
    connection.execute("CREATE TABLE other.engagement_events (LIKE engagement_events)")
    connection.execute("CREATE TABLE other.content (LIKE content)")
    rows.insert()
    with connection.transaction(force_rollback=True):
        for _ in range(500):
            rows.insert(NO)
    with connection.transaction():
        rows.insert()
        with connection.transaction(force_rollback=True):  # a savepoint
            rows.insert(NO)
            with connection.transaction():
                rows.insert(NO)
        with connection.transaction():
            rows.insert()
            with connection.transaction(force_rollback=True):
                rows.insert(NO)
        rows.insert()
    with connection.transaction():
        connection.execute("SELECT txid_current()")
    with connection.transaction():
        connection.execute("INSERT INTO other.content SELECT content_id, 'other', 1 FROM content")
        connection.execute("INSERT INTO other.engagement_events SELECT * FROM engagement_events")
        connection.execute("SELECT pg_logical_emit_message(true, 'other', 'message')")
    connection.execute("SELECT pg_logical_emit_message(false, 'other', 'message')")
    with connection.transaction(force_rollback=True):
        connection.execute("TRUNCATE engagement_events")
        rows.insert(NO)
    rows.insert()
    program.wait_until_caught_up()
    assert 5 == len(rows.wanted())
    assert_arrived(rows, destinations)


def test_interleaved(program: Program, rows: Rows, destinations: Destinations) -> None:
    """Long transactions from several connections, ended in another order than begun, over a restart and a kill."""
    seed = random.randrange(2**32)  # noqa: S311  test data
    print(f"seed {seed}")  # noqa: T201  to run it again
    chance = random.Random(seed)  # noqa: S311  test data
    program.start()
    with ExitStack() as stack:
        doomed, *others = [stack.enter_context(rows.another()) for _ in range(6)]
        for step in range(600):
            at = chance.randrange(len(others) + 1)
            rows.insert(*((NO, 2, doomed) if at == len(others) else (YES, 1 + step % 3, others[at])))
            if step % 50 == 0:
                rows.insert()  # short ones in between move the slot past where the long ones began
            if step == 200:
                program.wait_until_caught_up()
                assert 0 == program.stop()
                program.start()
            if step in (100, 300, 500):
                others.pop(chance.randrange(len(others))).commit()
        program.wait_until_caught_up()
        assert_arrived(rows, destinations)
        program.kill()  # everything is confirmed: nothing comes again
        doomed.rollback()
        chance.shuffle(others)
        for other in others:
            other.commit()
    program.start()
    program.wait_until_caught_up()
    assert_arrived(rows, destinations)


def test_statements(program: Program, rows: Rows, destinations: Destinations) -> None:
    """COPY, many rows at once, ON CONFLICT; updates and deletes of events change nothing that has arrived."""
    program.start()
    connection = rows.connection
    with connection.cursor() as cursor, cursor.copy(f"COPY engagement_events ({COLUMNS}) FROM STDIN") as copy:
        for number in range(1_500):
            copy.write_row([1 + number % 3, number, YES, number])
    connection.execute(
        f"INSERT INTO engagement_events ({COLUMNS}) SELECT 1 + n %% 3, n, %s, n FROM generate_series(1, 1500) n",  # noqa: S608  ours
        [YES],
    )
    rows.capture()
    upsert = "INSERT INTO engagement_events (id, content_id, user_id, event_type) "
    upsert += "VALUES (1, 1, 1, %s), (9001, 1, 1, %s) "
    connection.execute(upsert + "ON CONFLICT (id) DO NOTHING", [NO, YES])
    upsert = upsert.replace("9001", "9002")
    connection.execute(upsert + "ON CONFLICT (id) DO UPDATE SET event_type = EXCLUDED.event_type", [NO, YES])
    rows.capture()
    connection.execute("UPDATE engagement_events SET duration_ms = 1, event_ts = now(), content_id = 2 WHERE id < 100")
    connection.execute("DELETE FROM engagement_events WHERE id BETWEEN 50 AND 150")
    with connection.transaction():
        rows.insert()
        rows.insert()
        connection.execute("UPDATE engagement_events SET event_ts = event_ts - interval '1 day' WHERE id < 10")
    rows.capture()
    connection.execute("TRUNCATE engagement_events")
    rows.insert()
    program.wait_until_caught_up()
    assert 3_005 == len(rows.wanted())
    assert_arrived(rows, destinations)


def test_columns_come_and_go(program: Program, rows: Rows, destinations: Destinations) -> None:
    """Added, dropped, moved, widened in the middle of the stream, also inside a transaction; big values beside."""
    program.start()
    connection = rows.connection
    rows.insert()
    connection.execute("ALTER TABLE engagement_events ADD COLUMN region text DEFAULT 'here'")
    rows.insert()
    with connection.transaction():
        rows.insert()
        connection.execute("ALTER TABLE engagement_events ADD COLUMN extra numeric DEFAULT 1.5")
        rows.insert()
        connection.execute("ALTER TABLE content ADD COLUMN title text DEFAULT 'none'")
        connection.execute("UPDATE content SET length_seconds = 600, title = repeat('x', 100000) WHERE content_id = 3")
        rows.insert(content=3)
    connection.execute("ALTER TABLE engagement_events DROP COLUMN raw_payload")
    rows.insert()
    connection.execute("ALTER TABLE engagement_events ADD COLUMN raw_payload jsonb")
    connection.execute(
        f"""INSERT INTO engagement_events ({COLUMNS}, raw_payload)
            SELECT 1, 1, %s, 1, jsonb_build_object('big', string_agg(md5(n::text), ''))
            FROM generate_series(1, 60000) n""",  # noqa: S608  ours
        [YES],
    )
    rows.capture()
    connection.execute("ALTER TABLE engagement_events ALTER COLUMN duration_ms TYPE bigint")
    program.wait_until_caught_up()  # what comes again after a change of the table comes as it is then
    connection.execute("UPDATE engagement_events SET device = 'web' WHERE id % 2 = 0")  # the big value untold
    program.wait_until_caught_up()
    connection.execute("ALTER TABLE engagement_events DROP COLUMN device, ADD COLUMN device text DEFAULT 'moved'")
    rows.insert()
    connection.execute(INSERT.replace("7000", "9007199254740993"), [1, YES])
    rows.insert()
    program.wait_until_caught_up()
    assert 10 == len(rows.wanted())
    assert_arrived(rows, destinations, repeats=True)
    assert_clean(program.log)


def test_two_phases(program: Program, rows: Rows, destinations: Destinations) -> None:
    """A prepared transaction arrives when it is committed, also after a restart; rolled back it never does."""
    program.start()
    for name, event_type in (("first", YES), ("second", NO), ("third", YES)):
        rows.connection.execute("BEGIN")
        rows.insert(event_type)
        rows.connection.execute(f"PREPARE TRANSACTION '{name}'")
    rows.insert()
    rows.connection.execute("COMMIT PREPARED 'first'")
    program.wait_until_caught_up()
    assert_arrived(rows, destinations)
    assert 0 == program.stop()
    program.start()
    rows.connection.execute("ROLLBACK PREPARED 'second'")
    rows.connection.execute("COMMIT PREPARED 'third'")
    program.wait_until_caught_up()
    assert 3 == len(rows.wanted())
    assert_arrived(rows, destinations)
