"""Pages of history without a server: what their rows become, and where the next page begins."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from enrichment.events.codec import stored_row
from enrichment.history import pages
from enrichment.history.pages import RangeHistory
from replicator.contracts.events import Position
from tests.support.rows import CODEC, EVENT_TABLES

NINE = datetime(2026, 1, 8, 9, tzinfo=UTC)
LATEST_ID = 2**63 - 1
TS = "2026-01-08 09:00:00.5+00"


def found(
    event_id: int, *, user_id: int | None = 1, wanted: bool = True, lsn: str = "0/64", ts: str = TS
) -> tuple[object, ...]:
    """A row as the page's query gives it."""
    return (lsn, wanted, user_id is not None, event_id, 1, user_id, "play", ts, 7000, "web", "video", 300)


def test_a_page_is_after_the_one_before() -> None:
    """Even if the WAL's end went back: a server that was failed over."""
    page = pages.make_page(CODEC, [found(1), found(2, wanted=False), found(3)], Position(0x63, 5), "")
    assert [(0x64, 6, 1), (0x64, 7, 3)] == [(e.commit_lsn, e.ordinal, e.id) for e in page.enriched.events]
    assert Position(0x64, 7) == page.position
    later = pages.make_page(CODEC, [found(4, lsn="0/10")], page.position, "")
    assert Position(0x64, 8) == later.position


def test_a_row_without_what_an_event_needs_is_refused_as_in_the_stream() -> None:
    """In the reader's words, with the row; a replay puts it before every commit when the letter has no position."""
    page = pages.make_page(CODEC, [found(1), found(2, user_id=None)], Position(0, 0), "")
    [letter] = page.enriched.refused
    expected = (None, 2, "public.engagement_events.user_id is NULL, not a 64-bit integer")
    assert expected == (letter.sink, letter.event_id, letter.reason)
    row = stored_row(msgspec.structs.replace(letter, position=None, id=12))
    assert (0, 12) == (row.commit_lsn, row.ordinal)


@pytest.mark.parametrize("ts", ["infinity", "-infinity", "12026-01-08 14:21:52.5+00", "0044-03-15 12:00:00+00 BC"])
def test_an_event_at_a_time_that_no_calendar_has(ts: str) -> None:
    """It is not left out: as in the stream, each sink says what becomes of it."""
    [event] = pages.make_page(CODEC, [found(1, ts=ts)], Position(0, 0), "").enriched.events
    assert event.ts_us is None
    assert ts == msgspec.json.decode(event.json)["event_ts"]


def test_the_next_place_is_right_after_a_row() -> None:
    """Also after the largest id, where only time is left to go on."""
    here = pages._Place(order="event_ts", ts="2026-01-08T09:00:00+00:00", id=0, last_id=LATEST_ID)  # noqa: SLF001  pure
    after = here.after(*pages.last_event(CODEC, [found(5)]))
    assert (TS, 6) == (after.ts, after.id)
    after = here.after(LATEST_ID, TS)
    assert ("2026-01-08T09:00:00.500001+00:00", -(2**63)) == (after.ts, after.id)
    by_id = msgspec.structs.replace(here, order="id")
    assert LATEST_ID + 1 == by_id.after(LATEST_ID, TS).id
    assert msgspec.structs.replace(by_id, id=8) == by_id.after(7, "")


async def test_after_the_last_id_there_is_nothing() -> None:
    """No query is made: the number would not fit."""
    past = RangeHistory("host=/nonexistent", NINE, NINE.replace(hour=10), tables=EVENT_TABLES)
    place = '{"order":"id","ts":"","id":9223372036854775808,"last_id":9223372036854775807}'
    assert await past.read(place, Position(0, 0), 10) is None
