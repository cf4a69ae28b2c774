"""`--help` of every command: complete, plain, 80 columns, and fast because it imports nothing that it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from replicator import __version__
from replicator.cli.main import app, main

ROOT = Path(__file__).parents[3]
SLOW = {"aiohttp", "clickhouse_connect", "httpx", "psycopg", "pydantic", "redis", "rich", "sqlalchemy"}
IMPORTED = """
import sys
from replicator.cli.main import main
main(sys.argv[1:])
print("imported", *{name.partition(".")[0] for name in sys.modules})
"""


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command of the program, and every group."""
    yield path
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


ALL = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """A description, an example and the exit codes, within 80 columns, without colours."""
    assert 0 == main([*path, "--help"])
    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: replicator {' '.join(path)}".rstrip())
    assert not [line for line in out.splitlines() if len(line) > 80 or not line.isprintable()]
    assert not err
    if path in {("dead-letters",), ("config",), ("notify",)}:
        assert "Commands:" in out
    else:
        assert "Example: replicator" in out
        assert "Exit codes: 0 " in out
    short = [line for line in out.partition("Commands:")[2].splitlines() if line.endswith("...")]
    assert not short, "the first sentence of a command is too long for the list"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["backfill", "--help"], ["config", "check", "--help"]]
)
def test_help_imports_no_library_of_the_work(arguments: list[str]) -> None:
    """That is most of a second of CPU, for a page of text. Only typer uses pydantic, for options of a command."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.splitlines()[-1].split())
    assert "typer" in imported
    assert not imported & (SLOW if arguments[0].startswith("--") else SLOW - {"pydantic"})


def test_only_configured_sinks_are_imported(tmp_path: Path) -> None:
    """Each brings a client library. Settings of the configured one are known without looking at the others."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path),
        "REPLICATOR_SINKS": "redis",
        "REPLICATOR_REDIS_PREFIX": "shop:",
        "REPLICATOR_REDIS_URL_FILE": str(tmp_path / "url"),
    }
    (tmp_path / "url").write_text("redis://localhost:1", encoding="utf-8")
    script = "import sys; from replicator.app import App; App.load(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[2].partition(".")[0] for name in done.stdout.split() if name.startswith("sinks.")}
    assert (imported, done.stderr) == ({"redis"}, "")


def test_a_start_makes_no_page() -> None:
    """The template engine is imported when somebody looks at the page."""
    script = "import sys, replicator.operations.page.live; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "False\n" == done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Both are named: ours and Python's."""
    assert 0 == main(["--version"])
    assert f"engagement-replicator {__version__} (Python 3." in capsys.readouterr().out


def test_completion_names_commands() -> None:
    """What a shell asks for on the tab key."""
    environment = {
        "_REPLICATOR_COMPLETE": "complete_bash",
        "COMP_WORDS": "replicator dead-letters r",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "replicator"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "replay" == done.stdout.strip()


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "-m", "replicator", "backfill"], [sys.executable, "backfill.py"]],
    ids=["replicator", "backfill.py"],
)
def test_backfill_has_two_doors(command: list[str]) -> None:
    """The same code behind both."""
    done = subprocess.run([*command, "--start", "x"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert 2 == done.returncode
    assert done.stderr.startswith("replicator: --start is unusable: 'x' is not a time.")
