"""`examples/sinks/postgres_sink`: what PostgreSQL's errors mean, and which view of an event stays."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from enrichment import EVENT
from replicator.contracts.errors import BatchRefused, SinkError, SinkMisconfigured, SinkUnavailable, SinkUnusable
from replicator.contracts.events import Position, SinkPosition
from replicator.contracts.sink import Mode
from sinks.testing import decode, sample
from tests.support.environment import SECRET
from tests.support.warehouse import PASSWORD, Warehouse

RAISES = """
CREATE FUNCTION raises() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no, not %', NEW.event_type; END $$;
CREATE TRIGGER raises BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION raises()
"""
DAMAGE: list[tuple[str, type[SinkError], str]] = [
    ("REVOKE INSERT ON events FROM warehouse", SinkMisconfigured, "42501 permission denied for table events"),
    ("REVOKE UPDATE ON events_position FROM warehouse", SinkMisconfigured, "42501 permission denied"),
    ("DROP TABLE events", SinkMisconfigured, '42P01 relation "events" does not exist'),
    ("ALTER TABLE events DROP COLUMN device", SinkMisconfigured, '42703 column "device" of relation "events"'),
    ("DELETE FROM events_position", SinkUnusable, "its row"),
    ("ALTER TABLE events ALTER COLUMN user_id TYPE smallint", BatchRefused, "PostgreSQL error 22003"),
    ("ALTER TABLE events ADD CHECK (device IS NULL)", BatchRefused, "PostgreSQL error 23514"),
    (RAISES, BatchRefused, "PostgreSQL error P0001"),
    ("DROP OWNED BY warehouse; ALTER ROLE warehouse NOLOGIN", SinkMisconfigured, "is not permitted to log in"),
]


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGE, ids=[words for _, _, words in DAMAGE])
async def test_what_an_error_means(warehouse: Warehouse, damage: str, error: type[SinkError], words: str) -> None:
    """Whether an event is at fault, or the tables, or the role. No value of a row is in the message."""
    warehouse.execute(damage)
    sink = warehouse.sink(SecretStr(warehouse.plain_dsn))
    try:
        with pytest.raises(error, match=words) as caught:
            await sink.write([sample(EVENT, 2)])
        assert error is type(caught.value)
        assert not [text for text in ("日本", SECRET) if text in str(caught.value)]
        if error is not BatchRefused:
            [finding] = await sink.check()
            assert not finding.ok
            assert finding.cure
    finally:
        await sink.close()
        warehouse.execute("ALTER ROLE warehouse LOGIN")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (f"{PASSWORD}@", f"{SECRET}-wrong@", SinkMisconfigured),
        ("/test_", "/nowhere_", SinkMisconfigured),
        ("127.0.0.1:", "127.0.0.1:1", SinkUnavailable),
    ],
)
async def test_a_way_that_leads_nowhere(warehouse: Warehouse, old: str, new: str, error: type[SinkError]) -> None:
    """Its password, its database, its port; no secret is in the message."""
    sink = warehouse.sink(SecretStr(warehouse.plain_dsn.replace(old, new)))
    with pytest.raises(error) as caught:
        await sink.open()
    assert SECRET not in str(caught.value)


async def test_the_latest_view_stays(warehouse: Warehouse) -> None:
    """A backfill may bring an event with newer content than the stream did, or an older one later. One write may."""
    sink = warehouse.sink(SecretStr(warehouse.plain_dsn))

    def view(lsn: int, content_type: str) -> Any:
        event = sample(EVENT, 2)
        event.commit_lsn = lsn
        event.json = event.json.replace(b'"content_type":"', b'"content_type":"%b' % content_type.encode())
        return event

    old, middle, new = view(100, "old"), view(200, "middle"), view(300, "new")
    await sink.open(None, Mode.BACKFILL)
    for batch, expected in (([middle, old], middle), ([new], new), ([middle], new)):
        assert not await sink.write(batch)
        assert [decode(expected.json)] == warehouse.read()
    assert (300, 0) == warehouse.ends(), "a backfill does not move the position"
    await sink.open(SinkPosition(position=Position(100, 1), end_lsn=101), Mode.LIVE)
    for batch in ([new], [old]):
        await sink.write(batch)
        assert (300, 300) == warehouse.ends(), "it only moves forward"
    await sink.close()
