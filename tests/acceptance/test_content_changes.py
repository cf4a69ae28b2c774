"""A change of content takes effect for the events committed after it, and for no other; in all sinks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from decimal import Decimal

import psycopg
import pytest

from checkpoint_store import SqlCheckpointStore
from devstack.api import Api
from devstack.process import wait_until
from tests.support.destinations import Destinations
from tests.support.program import Program

INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms) VALUES (%s, 1, %s, 60000)"


def play(source: psycopg.Connection, content: int, event_type: str) -> None:
    """One event of a minute."""
    source.execute(INSERT, [content, event_type])


def assert_enriched(destinations: Destinations, wanted: Iterable[tuple[str, str | None, int | None, object]]) -> None:
    """Event type, content type, length and percentage of every event; the same in all sinks."""
    taken = destinations.api()
    assert list(wanted) == [
        (event["event_type"], event["content_type"], event["length_seconds"], event["engagement_pct"])
        for event in sorted(taken, key=lambda event: int(event["event_id"]))
    ]
    assert sorted(taken, key=lambda event: int(event["event_id"])) == destinations.clickhouse()
    newest = {event["content_id"]: event for event in destinations.clickhouse()}  # every insert is later
    assert newest == destinations.last()


def test_changes_while_it_runs(program: Program, source: psycopg.Connection, destinations: Destinations) -> None:
    """Updated, inserted, deleted, renamed, truncated: what was committed before an event counts for it."""
    source.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    program.start()
    play(source, 1, "before the update")
    source.execute("UPDATE content SET content_type = 'film', length_seconds = 120 WHERE content_id = 1")
    play(source, 1, "after the update")
    with source.transaction():
        play(source, 1, "before the update in its transaction")
        source.execute("UPDATE content SET length_seconds = 60 WHERE content_id = 1")
        play(source, 1, "after the update in its transaction")
    with source.transaction(force_rollback=True):
        source.execute("UPDATE content SET length_seconds = 1 WHERE content_id = 1")
    play(source, 1, "after an update that was rolled back")

    play(source, 50, "before the insert")
    source.execute("INSERT INTO content VALUES (50, 'podcast', 600)")
    play(source, 50, "after the insert")
    source.execute("DELETE FROM content WHERE content_id = 50")
    play(source, 50, "after the delete")
    source.execute("INSERT INTO content VALUES (50, 'podcast', 0)")
    play(source, 50, "after the second insert")

    source.execute("UPDATE content SET content_id = 20 WHERE content_id = 2")
    play(source, 2, "old number")
    play(source, 20, "new number")
    source.execute("TRUNCATE content")
    play(source, 3, "after the truncate")

    program.wait_until_caught_up()
    assert_enriched(
        destinations,
        [
            ("before the update", "video", 300, Decimal("0.2")),
            ("after the update", "film", 120, Decimal("0.5")),
            ("before the update in its transaction", "film", 120, Decimal("0.5")),
            ("after the update in its transaction", "film", 60, 1),
            ("after an update that was rolled back", "film", 60, 1),
            ("before the insert", None, None, None),
            ("after the insert", "podcast", 600, Decimal("0.1")),
            ("after the delete", None, None, None),
            ("after the second insert", "podcast", 0, None),
            ("old number", None, None, None),
            ("new number", "video", 120, Decimal("0.5")),
            ("after the truncate", None, None, None),
        ],
    )


def test_changes_over_a_restart(program: Program, source: psycopg.Connection, destinations: Destinations) -> None:
    """What changed while it was away holds for the events after it; so does what changed before that."""
    program.start()
    play(source, 1, "first")
    program.wait_until_caught_up()
    source.execute("UPDATE content SET length_seconds = 120 WHERE content_id = 1")
    program.wait_until_caught_up()
    assert 0 == program.stop()
    source.execute("UPDATE content SET length_seconds = 600 WHERE content_id = 2")
    play(source, 2, "while it was away")
    program.start()
    play(source, 1, "changed before")
    play(source, 2, "changed while it was away")
    source.execute("UPDATE content SET length_seconds = 60 WHERE content_id = 2")
    play(source, 2, "changed after")
    program.wait_until_caught_up()
    assert_enriched(
        destinations,
        [
            ("first", "video", 300, Decimal("0.2")),
            ("while it was away", "video", 600, Decimal("0.1")),
            ("changed before", "video", 120, Decimal("0.5")),
            ("changed while it was away", "video", 600, Decimal("0.1")),
            ("changed after", "video", 60, 1),
        ],
    )


@pytest.mark.parametrize("cached", [1, 1000])
def test_events_that_are_read_again_have_the_content_of_their_commit(
    quick: Program, source: psycopg.Connection, destinations: Destinations, api: Api, cached: int
) -> None:
    """Read before it was killed, or committed before the first start and while it was down: changed ever since."""
    source.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    quick.environment["REPLICATOR_CONTENT_CACHE_SIZE"] = str(cached)
    assert 0 == quick.run("init").code
    play(source, 1, "before the first start")
    source.execute("UPDATE content SET length_seconds = 150 WHERE content_id = 1")
    quick.start()
    quick.wait_until_caught_up()
    api.behave(status=503)
    play(source, 1, "read")
    source.execute("UPDATE content SET length_seconds = 120 WHERE content_id = 1")
    play(source, 1, "read after a change")
    source.execute("DELETE FROM content WHERE content_id = 2")
    wait_until(lambda: len(destinations.clickhouse()) == 3, "ClickHouse to have what the API lacks")
    quick.kill()
    play(source, 2, "while it was down")
    play(source, 3, "article")
    source.execute("UPDATE content SET content_type = 'film', length_seconds = 600 WHERE content_id IN (1, 3)")
    source.execute("INSERT INTO content VALUES (2, 'podcast', 60)")
    play(source, 1, "film")
    play(source, 2, "inserted again")
    source.execute("UPDATE content SET length_seconds = 1")
    api.behave()
    quick.start()
    quick.wait_until_caught_up()
    quick.kill()
    source.execute("DELETE FROM content WHERE content_id = 1")
    quick.start()
    play(source, 1, "gone")
    quick.wait_until_caught_up()
    assert_enriched(
        destinations,
        [
            ("before the first start", "video", 300, Decimal("0.2")),
            ("read", "video", 150, Decimal("0.4")),
            ("read after a change", "video", 120, Decimal("0.5")),
            ("while it was down", None, None, None),
            ("article", "article", None, None),
            ("film", "film", 600, Decimal("0.1")),
            ("inserted again", "podcast", 60, 1),
            ("gone", None, None, None),
        ],
    )


def test_a_table_that_was_truncated_before_a_kill(
    program: Program, source: psycopg.Connection, destinations: Destinations
) -> None:
    """The copy is of the table as it is since then, and has to have what changed while nothing ran."""
    source.execute("ALTER TABLE engagement_events DROP CONSTRAINT engagement_events_content_id_fkey")
    store = SqlCheckpointStore(program.environment["REPLICATOR_CHECKPOINT_URL"])

    def copied() -> str:
        checkpoint = store.load(program.slot)
        return ((checkpoint and checkpoint.contents) or "").partition(" ")[0]

    with closing(store):
        program.start()
        play(source, 1, "before")
        program.wait_until_caught_up()
        wait_until(lambda: copied() != "", "a copy to be saved")
        before = copied()
        source.execute("TRUNCATE content")
        source.execute("INSERT INTO content VALUES (1, 'made again', 100)")
        wait_until(lambda: copied() not in ("", before), "the copy to be of the new table")
        program.wait_until_caught_up()
        program.kill()
    play(source, 1, "while it is down")
    source.execute("UPDATE content SET content_type = 'changed', length_seconds = 200 WHERE content_id = 1")
    play(source, 1, "after the change")
    program.start()
    program.wait_until_caught_up()
    wanted = [("before", "video", 300, Decimal("0.2")), ("while it is down", "made again", 100, Decimal("0.6"))]
    assert_enriched(destinations, [*wanted, ("after the change", "changed", 200, Decimal("0.3"))])
