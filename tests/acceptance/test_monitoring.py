"""The dashboard and the alerts on a real Prometheus that scrapes the real program; the log as programs read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from devstack.process import wait_until
from tests.support.load import insert_many
from tests.support.program import Program
from tests.support.prometheus import Prometheus, prometheus

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana/dashboard.json").read_text(encoding="utf-8"))
EMPTY = {"Slot is lost in"}
"""Panels that have nothing to show while all is well."""


@pytest.fixture
def limited(stack: DevStack) -> Iterator[None]:
    """PostgreSQL keeps no more than so much WAL for a slot."""
    with psycopg.connect(stack.postgres.dsn, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'")
        connection.execute("SELECT pg_reload_conf()")
        yield
        connection.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        connection.execute("SELECT pg_reload_conf()")


@pytest.mark.usefixtures("limited")
def test_every_query_of_the_dashboard_has_data(quick: Program, source: psycopg.Connection) -> None:
    """Of a replicator with all sinks that has written; and no alert fires, and each can be evaluated."""
    quick.start()
    with prometheus(quick.environment["REPLICATOR_ADMIN_LISTEN"]) as server:
        for title, expression in _queries():
            insert_many(source, 10)
            if title in EMPTY:
                server.query(expression)
            else:
                wait_until(partial(_has_data, server, expression), f"data for {title}: {expression}")
        wait_until(lambda: {"ok"} == {rule["health"] for rule in server.rules()}, "the alerts to be evaluated")
        assert [] == [rule["name"] for rule in server.rules() if rule["state"] != "inactive"]


def test_a_fault_is_found_in_the_log_by_its_fields(quick: Program, source: psycopg.Connection, api: Api) -> None:
    """As JSON each line has the slot; a fault has its code and its sink, a dead letter its event and its position."""
    quick.start(log_format="json")
    api.behave(status=401)
    insert_many(source, 20)
    quick.wait_for_log('"code": "R502"')
    api.behave(refuse_event_ids=[1])
    quick.wait_for_log('"code": "R514"')
    assert 0 == quick.stop()
    lines = [json.loads(line) for line in quick.said.splitlines()]
    assert {quick.slot} == {line["slot"] for line in lines}
    [away] = [line for line in lines if line.get("code") == "R502"]
    assert ("error", "http") == (away["level"], away["sink"])
    [letter] = [line for line in lines if line.get("code") == "R514"]
    assert ("http", 1) == (letter["sink"], letter["event_id"])
    assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+#1", letter["lsn"])


def _queries() -> Iterator[tuple[str, str]]:
    """Each with its panel, filled in as Grafana does it."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$slot", ".*").replace("$__rate_interval", "10s")


def _has_data(server: Prometheus, expression: str) -> bool:
    return any(series["value"][1] != "NaN" for series in server.query(expression))
