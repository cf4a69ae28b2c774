"""The page in a real browser, beside the real program on real servers: `make test` writes pictures of it to build/page.

What it does with hostile requests is in `test_admin.py` of the room.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
from playwright.sync_api import Browser

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from tests.support.browser import Viewer, chromium
from tests.support.environment import SECRET
from tests.support.orders import STREAM, create
from tests.support.program import Program

EVENTS = """
INSERT INTO engagement_events (content_id, user_id, event_type, event_ts, device)
SELECT 1 + n %% 3, n, '<script>alert(1)</script>', now(), '<img src=x onerror=alert(1)>' FROM generate_series(1, %s) n
"""
SIZES = {"1280": (1280, 900), "360": (360, 740), "1920": (1920, 1080)}

Look = Callable[..., Viewer]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests here."""
    with chromium() as started:
        yield started


@pytest.fixture
def look(browser: Browser, quick: Program) -> Iterator[Look]:
    """Opens the page; at the end nobody has complained and nothing was asked of anybody else."""
    viewers = []

    def open_page(**context: object) -> Viewer:
        viewers.append(Viewer(browser, quick.environment["REPLICATOR_ADMIN_LISTEN"], **context))
        return viewers[-1]

    yield open_page
    for viewer in viewers:
        viewer.close()
    assert [] == [complaint for viewer in viewers for complaint in viewer.complaints]


def insert(source: psycopg.Connection, events: int = 30) -> None:
    """So many events in one transaction."""
    source.execute(EVENTS, [events])


def test_all_is_well_in_every_size(quick: Program, source: psycopg.Connection, look: Look) -> None:
    """Green, complete, nothing wider than the window, nothing that keeps anybody from using it; dark and light."""
    quick.start()
    insert(source)
    quick.wait_until_caught_up()
    viewers = {name: look(viewport={"width": width, "height": height}) for name, (width, height) in SIZES.items()}
    for name, viewer in viewers.items():
        width = SIZES[name][0]
        viewer.sees_state("well")
        viewer.sees("headline", "All is well")
        viewer.sees("top", "10")
        viewer.sees("top", "content_id")
        assert width >= viewer.page.evaluate("document.documentElement.scrollWidth")
        viewer.shoot(name)
    assert [] == viewers["1280"].violations() + viewers["360"].violations()
    dark = look(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    assert [] == dark.violations()
    dark.shoot("dark")
    for sink in ("clickhouse", "redis", "http"):
        dark.sees("flow", sink)


def test_without_scripts_it_is_a_snapshot(quick: Program, source: psycopg.Connection, look: Look) -> None:
    """Everything is there, and it says that it stands still. Settings open with the keyboard and show no secret."""
    quick.start()
    insert(source)
    quick.wait_until_caught_up()
    wait_until(lambda: bool(quick.status()["ready"]), "a look at the slot since it was made")
    viewer = look(java_script_enabled=False)
    assert "All is well" in viewer.text("headline")
    assert "reload the page" in viewer.page.inner_text("header")
    assert "REPLICATOR_POSTGRES_DSN" not in viewer.page.inner_text("main")
    for _ in ("the id of an event", "Trace", "Settings"):
        viewer.page.keyboard.press("Tab")
    viewer.page.keyboard.press("Enter")
    assert "REPLICATOR_POSTGRES_DSN" in viewer.page.inner_text("main")
    assert SECRET not in viewer.page.content()


def test_a_sink_that_dies_and_comes_back(
    quick: Program, source: psycopg.Connection, stack: DevStack, look: Look
) -> None:
    """Amber within 3 s with the cure, red when `/readyz` is not ready, green again: nobody loads the page again."""
    quick.start()
    viewer = look()
    viewer.sees_state("well")
    stack.clickhouse.kill()
    insert(source)
    viewer.sees_state("trouble", 3)
    assert "clickhouse" in viewer.text("headline")
    assert "The replicator retries until it does" in viewer.text("headline")
    viewer.sees("flow", "in trouble for")
    viewer.sees_state("wrong")
    assert "did not take the batch" in quick.admin("/readyz")
    assert [] == viewer.violations()
    viewer.shoot("wrong")
    stack.clickhouse.start()
    viewer.sees_state("well")
    viewer.sees("notices", "clickhouse")
    viewer.sees_no("notices", "ongoing")


def test_dead_letters_appear(quick: Program, source: psycopg.Connection, api: Api, look: Look) -> None:
    """How many, why, and the commands. Whatever a row holds, the page neither shows nor runs it."""
    api.behave(refuse_event_ids=[3, 5])
    quick.start()
    viewer = look()
    viewer.sees("letters", "None.")
    insert(source)
    viewer.sees("letters", "2 of sink http")
    viewer.sees("letters", "422")
    viewer.sees("headline", "except 2 kept as dead letters")
    assert "dead-letters replay --sink http" in viewer.text("letters")
    assert "alert(1)" not in viewer.page.content()
    viewer.shoot("dead-letters")


def test_one_event_is_followed(quick: Program, source: psycopg.Connection, api: Api, look: Look) -> None:
    """Typed on the page, without scripts too: what became of it at each sink, and nothing of the row is run."""
    api.behave(refuse_event_ids=[3])
    quick.start()
    insert(source)
    quick.wait_until_caught_up()
    viewer = look(java_script_enabled=False)
    viewer.page.keyboard.press("Tab")
    viewer.page.keyboard.type("3")
    viewer.page.keyboard.press("Enter")
    viewer.sees("at-clickhouse", "written")
    viewer.sees("at-redis", "written")
    viewer.sees("at-http", "dead letter 1")
    assert "It has the row. Committed at " in viewer.text("event")
    assert '"event_type":"<script>alert(1)</script>"' in viewer.text("event")
    assert "<script>" not in viewer.page.content()
    viewer.shoot("trace")
    viewer.page.get_by_role("link", name="The page").click()
    assert "All is well" in viewer.text("headline")


def test_one_event_of_two_streams_is_followed(quick: Program, source: psycopg.Connection, look: Look) -> None:
    """Its stream is chosen beside its id, which may be a uuid; events of both may have the same id."""
    create(source)
    quick.environment["REPLICATOR_STREAM"] = f"{STREAM},enrichment.contract:EVENT"
    quick.start()
    insert(source)
    order = source.execute(
        "INSERT INTO shop.orders (customer_id, total, lines) VALUES (1, 1, '[]') RETURNING order_id::text"
    )
    [(order_id,)] = order.fetchall()
    quick.wait_until_caught_up()
    viewer = look()
    for event_id, stream in ((order_id, "orders"), ("3", "engagement")):
        viewer.page.get_by_label("Follow an event").fill(event_id)
        viewer.page.get_by_label("of the stream").select_option(stream)
        viewer.page.get_by_role("button", name="Trace").click()
        viewer.sees(f"at-clickhouse\\/{stream}", "written")
        viewer.sees(f"at-redis\\/{stream}", "written")
        viewer.sees("event", f"Event {event_id} in PostgreSQL")
    assert [] == viewer.violations()
    viewer.shoot("trace-of-a-stream")
    assert "this command works on one stream" in quick.admin("/trace?id=3")


def test_the_bar_of_a_backfill_moves(
    quick: Program, source: psycopg.Connection, look: Look, database: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It runs in another process; when it is done the bar is gone."""
    quick.start()
    insert(source, 1000)
    quick.wait_until_caught_up()
    viewer = look()
    other = Program(quick.environment, database, tmp_path_factory.mktemp("backfill") / "log")
    process = other.spawn("backfill", "--last", "1h", "--sinks", "redis", "--batch-size", "50", "--rate", "120")
    try:
        first = _percent(viewer, 0)
        assert first < _percent(viewer, first) < 100
        viewer.shoot("backfill")
    finally:
        process.terminate()
        process.wait(20)
    assert 1 == process.returncode
    viewer.sees("backfills", " %")
    start, end = re.findall(r"\d{4}-\S+", viewer.text("backfills"))[:2]
    assert 0 == other.run("backfill", "--start", start, "--end", end, "--sinks", "redis", "--resume").code
    viewer.sees("backfills", "None running.")


def _percent(viewer: Viewer, more_than: int) -> int:
    """Where the bar is, as soon as it is further."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = re.search(r"(\d+) %", viewer.text("backfills"))
        if found and int(found[1]) > more_than:
            return int(found[1])
        viewer.page.wait_for_timeout(100)
    raise AssertionError(f"the bar stays at {more_than} %: {viewer.text('backfills')}")


def test_a_process_that_is_silent_is_not_green(quick: Program, look: Look) -> None:
    """It hangs: the page says so within 5 s. It is killed and started again: the page is green again by itself."""
    quick.start()
    viewer = look()
    viewer.sees_state("well")
    quick.pause()
    viewer.sees_state("silent", 5)
    assert "No word from the replicator since" in viewer.text("silence")
    viewer.shoot("silent")
    quick.kill()
    quick.start()
    viewer.sees_state("well")
    assert not viewer.page.locator("#silence").is_visible()
    viewer.complaints = [said for said in viewer.complaints if "net::ERR_" not in said]  # it asks while nobody listens
