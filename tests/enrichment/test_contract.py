"""The declaration: what it says today, and that a new column is one more line in it and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psycopg
import pytest

from devstack import DevStack
from enrichment import EVENT, EnrichmentSettings
from tests.support import environment as ground
from tests.support.destinations import Destinations
from tests.support.program import ROOT, Program, succeed

PRODUCT = ("replicator", "enrichment", "sinks", "checkpoint_store", "sql")
DEVICE = '    Field("device", TEXT.nullable().low_cardinality(), column="device"),\n'
REFERRER = '    Field("referrer", TEXT.nullable().low_cardinality(), column="referrer"),\n'
RANGE = ("--start", "2026-01-08", "--end", "2026-01-09")
INSERT = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device, referrer)
VALUES (%s, 1, 'play', '2026-01-08 09:00:00+00', 7000, 'web', %s)
"""


def test_the_contract() -> None:
    """Names, order, types and roles that users depend on."""
    expected = {
        "event_id": "Int64",
        "content_id": "Int64",
        "user_id": "Int64",
        "event_type": "LowCardinality(String)",
        "event_ts": "DateTime64(6, 'UTC')",
        "duration_ms": "Nullable(Int64)",
        "device": "LowCardinality(Nullable(String))",
        "content_type": "LowCardinality(Nullable(String))",
        "length_seconds": "Nullable(Int64)",
        "engagement_seconds": "Nullable(Decimal(18, 3))",
        "engagement_pct": "Nullable(Decimal(18, 2))",
    }
    assert list(expected.items()) == [(field.name, field.type.clickhouse) for field in EVENT.fields]
    assert ["event_id", "content_id", "event_ts"] == [field.name for field in (EVENT.identity, EVENT.key, EVENT.time)]


def test_what_a_checksum_is_made_of() -> None:
    """Without the content: no field that is another one once the content has changed."""
    names = [field.name for field in EVENT.fields]
    assert names == [field.name for field in EVENT.compared(with_joined=True)]
    of_content = {"content_type", "length_seconds", "engagement_pct"}
    assert [n for n in names if n not in of_content] == [f.name for f in EVENT.compared(with_joined=False)]


@pytest.fixture
def source(database: str) -> Iterator[psycopg.Connection]:
    """The superuser's connection to the source database, each statement a transaction."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def program(stack: DevStack, database: str, tmp_path: Path) -> Iterator[Program]:
    """A copy of the product with one line more in contract.py."""
    checkout = tmp_path / "checkout"
    for name in PRODUCT:
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    contract = checkout / "enrichment" / "contract.py"
    text = contract.read_text(encoding="utf-8")
    assert 1 == text.count(DEVICE)
    contract.write_text(text.replace(DEVICE, DEVICE + REFERRER), encoding="utf-8")
    urls = ground.empty_clickhouse(stack), ground.empty_redis(stack), ground.empty_api(stack)
    settings = ground.environment(ground.plain_role(stack, database), *urls, folder=tmp_path)
    program = Program(settings, database, tmp_path / "replicator.log")
    program.root = checkout
    yield program
    program.end()
    print(program.log)  # noqa: T201  pytest shows it when the test has failed


def test_a_new_column_is_one_line(program: Program, stack: DevStack, source: psycopg.Connection) -> None:
    """The column is checked, read, backfilled, stored, sent and compared."""
    lacking = program.run("check")
    assert "has no column referrer (text)" in lacking.stdout
    assert "ALTER TABLE public.engagement_events ADD COLUMN referrer text" in lacking.stdout
    source.execute("ALTER TABLE engagement_events ADD COLUMN referrer text")
    source.execute(INSERT, [1, "before the slot"])
    succeed(program.run("init"))
    succeed(program.run("check"))
    program.start()
    referrers = ["newsletter", None, "größe|~", ""]
    for referrer in referrers:
        source.execute(INSERT, [2, referrer])
    program.wait_until_caught_up()
    assert 0 == program.stop()
    succeed(program.run("backfill", *RANGE))
    found = stack.clickhouse.query(
        "SELECT referrer FROM events_enriched FINAL ORDER BY event_id FORMAT JSONCompactColumns"
    )
    assert [["before the slot", *referrers]] == msgspec.json.decode(found)
    sent = Destinations(stack)
    with sent.redis:
        last = list(sent.last()[2].items())
    assert [("device", "web"), ("referrer", ""), ("content_type", "video")] == last[6:9]
    assert referrers == [event["referrer"] for event in sent.api()]
    assert "equal" in succeed(program.run("reconcile", *RANGE, "--with-content"))
    other = "SELECT * REPLACE ('other' AS referrer) FROM events_enriched FINAL WHERE event_id = 3"
    stack.clickhouse.query(f"INSERT INTO events_enriched {other}")
    different = program.run("reconcile", *RANGE)
    assert (3, True) == (different.code, "different 1: 3" in different.stdout)


def test_the_table_is_printed_with_it(program: Program) -> None:
    """For people who create it themselves."""
    assert "    `referrer` LowCardinality(Nullable(String)),\n" in succeed(program.run("sql", "clickhouse"))


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (
            "device=event_type",
            "event_type of engagement_events would be 2 columns at once; a swap is two pairs",
        ),
        ("device=x,user_id=x", "x of engagement_events would be 2 columns at once"),
        ("device=a,device=b", "device has two names, a and b"),
        ("content.length_seconds=content_type", "content_type of content would be 2 columns at once"),
        ("colour=x", "events have no column colour; they are made of id, content_id, user_id, event_type"),
        ("content.id=x", "content.content_type, content.length_seconds"),
    ],
)
def test_names_that_can_not_be(pairs: str, problem: str) -> None:
    """REPLICATOR_COLUMNS gives each column one name, and no two of them the same."""
    with pytest.raises(ValueError, match=re.escape(problem)):
        EnrichmentSettings.model_validate({"columns": pairs})


def test_swapped_names() -> None:
    """Two columns may have each other's."""
    swapped = {"device": "event_type", "event_type": "device"}
    settings = EnrichmentSettings.model_validate({"columns": "device=event_type, event_type=device"})
    assert settings.columns == {"engagement_events": swapped}
