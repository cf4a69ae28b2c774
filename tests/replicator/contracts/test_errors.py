"""Commands in messages can be pasted where they are printed: a checkout, an installation, a container."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from replicator.contracts.errors import ReplicatorError, SinkRefusesAll, network_words

ROOT = Path(__file__).parents[3]
PYTHON = str(Path(sys.executable))
SCRIPT = f"""#!{PYTHON}
import sys
sys.path.insert(0, {str(ROOT)!r})
from replicator.cli.main import main
sys.exit(main())
"""


def cure(command: list[str], folder: Path, **variables: str) -> str:
    """What a message tells to type: SlotMissing's, printed by a program that is called like this."""
    (folder / "sitecustomize.py").write_text(PRINTS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


PRINTS = """
import atexit
def show():
    from replicator.contracts.errors import command
    print(command("init"))
atexit.register(show)
"""


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("the slot is gone", "The slot is gone."),
        ("public.content can't be read", "public.content can't be read."),
        ("wal_level = replica", "wal_level = replica."),
        ("stop", "Stop."),
    ],
)
def test_a_name_keeps_its_letters(problem: str, told: str) -> None:
    """A sentence begins with a capital letter, unless it begins with a name."""
    assert told == str(ReplicatorError(problem))


def test_from_a_checkout(tmp_path: Path) -> None:
    """The same Python, whatever its options were; `backfill.py` by its path needs the modules beside it."""
    assert f"`{PYTHON} -m replicator init`" == cure([PYTHON, "-m", "replicator", "--version"], tmp_path)
    assert f"`{PYTHON} -m replicator init`" == cure([PYTHON, "-W", "error", "-m", "replicator", "--version"], tmp_path)
    elsewhere = cure([PYTHON, str(ROOT / "backfill.py"), "--help"], tmp_path)
    assert f"`env PYTHONPATH={ROOT} {PYTHON} -m replicator init`" == elsewhere


@pytest.mark.parametrize("is_in_path", [True, False])
def test_installed(tmp_path: Path, *, is_in_path: bool) -> None:
    """By its name where the shell finds it, else by its path."""
    script = tmp_path / "replicator"
    script.write_text(SCRIPT, encoding="utf-8")
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}" if is_in_path else os.environ["PATH"]
    expected = "replicator" if is_in_path else str(script)
    assert f"`{expected} init`" == cure([str(script), "--version"], tmp_path, PATH=path)


def test_in_a_container(tmp_path: Path) -> None:
    """The image says how it is run from outside."""
    outside = "docker compose run --rm replicator"
    found = cure([PYTHON, "-m", "replicator", "--version"], tmp_path, REPLICATOR_PROGRAM=outside)
    assert f"`{outside} init`" == found


def test_a_sink_of_several_streams_has_its_settings() -> None:
    """They are the sink's, whatever stream it gets."""
    assert "REPLICATOR_CLICKHOUSE_… are right" in str(SinkRefusesAll(sink="clickhouse/orders", detail="400"))


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('10.0.0.7', 8123)"), "Connection refused"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "TLS: SSLError"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_the_network_did(failure: Exception, words: str) -> None:
    """The system's words from under a library's error, without an address. OpenSSL's 1 is not the system's EPERM."""
    error = RuntimeError("it failed at http://user:hunter2@10.0.0.7")
    error.__cause__ = failure
    assert words == network_words(error)
