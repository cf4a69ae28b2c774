"""One person's data are erased by what docs/how-to/operate/erase.md says, typed as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from devstack import DevStack
from devstack.api import Api
from tests.support.destinations import Destinations
from tests.support.program import ROOT, Program

PAGE = ROOT / "docs" / "how-to" / "operate" / "erase.md"
INSERT = (
    "INSERT INTO engagement_events (content_id, user_id, event_type, device)"
    " SELECT 1 + n % 3, CASE WHEN n % 4 = 0 THEN 42 ELSE 421 END, 'play', 'web' FROM generate_series(1, 40) n"
)
ASK_CLICKHOUSE = "import sys, urllib.request as http; http.urlopen({url!r}, sys.argv[2].encode()).read()"


@pytest.fixture
def typed(stack: DevStack, database: str, quick: Program, tmp_path: Path) -> Callable[[], str]:
    """Types all that the page says, with programs that know these servers; what they print."""
    python = shlex.quote(sys.executable)
    url = stack.clickhouse.url.replace("default@", "").rpartition("/")[0]
    programs = {
        "psql": f'shift 2; exec {_which("psql")} -X -v ON_ERROR_STOP=1 {shlex.quote(database)} "$@"',
        "clickhouse-client": f'exec {python} -c {shlex.quote(ASK_CLICKHOUSE.format(url=url))} "$@"',
        "redis-cli": f'exec {_which("redis-cli")} -p {stack.redis.port} "$@"',
        "python": f'cd {shlex.quote(str(ROOT))}; exec {python} "$@"',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)

    def run() -> str:
        text = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text.replace("engagement_slot", quick.slot)],
            env={"PATH": f"{folder}:/usr/bin:/bin", **quick.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert 0 == done.returncode, done.stdout + done.stderr
        return done.stdout

    return run


def _which(name: str) -> str:
    return subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()


def test_one_person_is_erased_everywhere(
    quick: Program, typed: Callable[[], str], source: psycopg.Connection, api: Api, destinations: Destinations
) -> None:
    """Also what was still in the WAL when it was deleted. Everybody else's data stay."""
    quick.run("init")
    api.behave(refuse_event_ids=[4, 5])
    quick.start()
    source.execute(INSERT)
    quick.wait_until_caught_up()
    assert 2 == quick.run("dead-letters", "list").stdout.count("event_id")
    quick.pause()
    source.execute(INSERT)
    later = threading.Timer(3.0, quick.resume)
    later.start()
    assert "dropped 1 dead letter\n" in typed()
    assert not later.is_alive(), "it has waited for the slot"
    assert 0 == quick.stop()

    assert [(60,)] == source.execute("SELECT count(*) FROM engagement_events").fetchall()
    assert [421] * 60 == [event["user_id"] for event in destinations.clickhouse()]
    assert {421} >= {event["user_id"] for event in destinations.last().values()}
    assert 42 in {event["user_id"] for event in destinations.api()}, "its owner has to"
    folder = Path(quick.environment["REPLICATOR_CHECKPOINT_URL"].removeprefix("sqlite:///")).parent
    left = b"".join(file.read_bytes() for file in folder.glob("checkpoint.db*"))
    assert b'"user_id":421,' in left, "other letters stay"
    assert b'"user_id":42,' not in left
