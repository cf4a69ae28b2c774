"""It installs: sdist and wheel carry everything, and what is installed works from any directory without the checkout.

The dependencies are those of this environment, by a .pth file; the project comes from the wheel alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis

from devstack.process import free_port, wait_until

ROOT = Path(__file__).parents[2]
SETUPTOOLS = "setuptools>=77"  # as in pyproject.toml, [build-system]
BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
PACKAGES = ("replicator", "replicator_spark", "enrichment", "sinks", "checkpoint_store")
LINK = "replicator/sql"
"""To a folder at the top, which is none of the packages."""
INSERT = "INSERT INTO engagement_events (content_id, user_id, event_type, duration_ms) VALUES (1, 999, 'play', 7000)"


def _succeed(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def _tracked(*folders: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, check=True)
    return listed.stdout.decode().strip("\0").split("\0")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with nothing but what builds and installs."""
    folder = tmp_path_factory.mktemp("clean")
    _succeed(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    python = folder / "venv/bin/python"
    _succeed(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", SETUPTOOLS, folder=folder)
    return python


@pytest.fixture(scope="module")
def built(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the tracked files, and the wheel that is built from the sdist alone."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in _tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    _succeed(python, "-c", BUILD, "build_sdist", dist, folder=source)
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(unpacked, filter="data")
    _succeed(python, "-c", BUILD, "build_wheel", dist, folder=next(unpacked.iterdir()))
    return dist


@pytest.fixture(scope="module")
def installed(python: Path, built: Path) -> Path:
    """The console script."""
    wheel = next(built.glob("*.whl"))
    _succeed(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=built)
    packages = Path(
        _succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=built).strip()
    )
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return python.with_name("replicator")


def test_the_wheel_has_everything(built: Path) -> None:
    """Every file of the packages, with SQL, Lua and types; nothing that takes a common name at the top."""
    files = {*_tracked(*PACKAGES), *(f"replicator/{name}" for name in _tracked("sql"))} - {LINK}
    assert {f"{LINK}/roles.sql", "sinks/redis/lua/write.lua"} <= files
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert set() == files - names
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert set(PACKAGES) == top


def test_types_are_published(installed: Path, tmp_path: Path) -> None:
    """The programs of the library's page are typed to the letter, by what the wheel says of its names."""
    page = (ROOT / "docs/streams/library.md").read_text(encoding="utf-8")
    program, beside = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "embedded.py").write_text(f"{program}\n\n{beside}", encoding="utf-8")
    (tmp_path / "wrong.py").write_text("from replicator import Nonsense\n", encoding="utf-8")
    shutil.copy(ROOT / "examples/orders/orders_stream.py", tmp_path)
    python = str(installed.with_name("python"))
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]
    _succeed(*check, "embedded.py", folder=tmp_path)
    with pytest.raises(AssertionError, match='Module "replicator" has no attribute "Nonsense"'):
        _succeed(*check, "wrong.py", folder=tmp_path)


def test_it_is_found_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    """Resources are found where the package is, not in the checkout."""
    where = "import replicator, sys; print(replicator.__file__)"
    assert str(installed.parents[1]) in _succeed(installed.with_name("python"), "-c", where, folder=tmp_path)


@pytest.mark.parametrize(("name", "text"), [("slot-lag", "pg_replication_slots"), ("clickhouse", "ReplacingMergeTree")])
def test_sql_is_printed(installed: Path, tmp_path: Path, name: str, text: str) -> None:
    """From its own files."""
    assert text in _succeed(installed, "sql", name, folder=tmp_path)


TYPED = """
export PATH={here}:$PATH
pytest() {{ python -m pytest -p no:cacheprovider "$@"; }}
set -euxo pipefail
"""
"""Before what the page says. pytest is of this environment, and has to run in the new one."""


def test_the_page_on_sinks_can_be_typed(built: Path, database: str, tmp_path: Path) -> None:
    """Line by line in an empty folder: from the environment to an event in the file."""
    page = (ROOT / "docs/how-to/sink.md").read_text(encoding="utf-8")
    for name in ("replicator_lines.py", "pyproject.toml", "conftest.py"):
        typed = (ROOT / "examples/sinks/lines_sink" / name).read_text(encoding="utf-8")
        assert typed in page
        (tmp_path / name).write_text(typed, encoding="utf-8")
    environment, *others = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    create, install = environment.splitlines()
    known = f"echo {sysconfig.get_path('purelib')} > $(echo .venv/lib/python*/site-packages)/dependencies.pth"
    install = install.replace("path/to/engagement-replicator", str(next(built.glob("*.whl"))))
    script = "\n".join([TYPED.format(here=Path(sys.executable).parent), create, known, install, *others])
    settings = {
        "PIP_QUIET": "1",
        "REPLICATOR_POSTGRES_DSN": database,
        "REPLICATOR_ADMIN_LISTEN": "",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("REPLICATOR_", "PYT"))}
    done = subprocess.run(
        ["timeout", "240", "bash", "-c", script],
        cwd=tmp_path,
        env={**outside, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)  # noqa: T201  shown when the test fails
    assert 0 == done.returncode
    for said in ("REPLICATOR_LINES_PATH = events.jsonl  (default)", " passed", "all checks passed"):
        assert said in done.stdout
    [event] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event_id":1,')]
    assert 999 == event["user_id"]
    assert "Traceback" not in done.stderr


class Installed:
    """The program in a directory of its own."""

    def __init__(self, script: Path, folder: Path, settings: dict[str, str]) -> None:
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("REPLICATOR_", "PYTHON"))}
        self.environment = {**outside, "XDG_STATE_HOME": str(folder / "state"), **settings}
        self.script, self.folder = script, folder

    def succeed(self, *arguments: str) -> str:
        """One command."""
        done = subprocess.run(
            [self.script, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == done.returncode, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def running(self) -> Iterator[Path]:
        """`run`; its log."""
        log = self.folder / "log"
        with log.open("wb") as file:
            process = subprocess.Popen([self.script], cwd=self.folder, env=self.environment, stderr=file)
        try:
            yield log
            process.send_signal(signal.SIGTERM)
            assert 0 == process.wait(60)
        finally:
            process.kill()
            process.wait()
            print(log.read_text(encoding="utf-8"))  # noqa: T201  shown when the test fails


def test_from_another_directory(installed: Path, database: str, redis_url: str, tmp_path: Path) -> None:
    """init, run, one event through to Redis, backfill, reconcile; the checkpoint is in the state directory."""
    slot = database.rpartition("/")[2]
    settings = {
        "REPLICATOR_POSTGRES_DSN": database,
        "REPLICATOR_SLOT": slot,
        "REPLICATOR_SINKS": "redis",
        "REPLICATOR_REDIS_URL": redis_url,
        "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{free_port()}",
    }
    program = Installed(installed, tmp_path, settings)
    assert program.succeed("--version").startswith("engagement-replicator ")
    assert f"made replication slot {slot}" in program.succeed("init")
    destination = redis.Redis.from_url(redis_url, decode_responses=True)
    with program.running() as log, psycopg.connect(database, autocommit=True) as source:
        wait_until(lambda: f"reading slot {slot}" in log.read_text(encoding="utf-8"), "the stream")
        source.execute(INSERT)
        wait_until(lambda: destination.get("content:count:1") == "1", "the event")
        assert 999 == json.loads(str(destination.get("content:last:1")))["user_id"]
    assert "read        1 event of 1" in program.succeed("backfill", "--last", "1h", "--sinks", "redis")
    compared = json.loads(program.succeed("reconcile", "--last", "1h", "--sinks", "redis", "--wait", "1", "--json"))
    assert "equal" == compared["outcome"]
    assert (tmp_path / "state/engagement-replicator/checkpoint.db").is_file()
    assert not list(tmp_path.glob("*.db"))
