"""Standard streams that are closed, full, or of a small encoding: an exit code and a line, never a traceback."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from replicator.cli.packages import BESIDE

ROOT = Path(__file__).parents[3]


def shell(command: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with `$P` as the program, which knows no server."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("REPLICATOR_")}
    nowhere = {
        "REPLICATOR_POSTGRES_DSN": "postgresql://app@127.0.0.1:1/x",
        "REPLICATOR_REDIS_URL": "redis://127.0.0.1:1/0",
        "REPLICATOR_SINKS": "redis",
    }
    program = f"{shlex.quote(sys.executable)} -W error -m replicator"
    return subprocess.run(
        ["/bin/bash", "-c", command],
        cwd=tmp_path,
        env={**outside, **nowhere, "P": program, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


SIGNALLED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == os.environ["SIGNAL_AT"]:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "module", ["typing", "replicator.contracts.fields", "typer", "replicator.contracts.settings", "enrichment", "sinks"]
)
@pytest.mark.parametrize("arguments", [" status", "_spark backfill --last 1h"])
def test_a_signal_while_it_is_imported_ends_it_in_silence(
    arguments: str, module: str, number: signal.Signals, tmp_path: Path
) -> None:
    """No traceback, whatever was being imported; later imports are a command's, which says that it was stopped."""
    (tmp_path / "sitecustomize.py").write_text(SIGNALLED, encoding="utf-8")
    path = f"{tmp_path}:{ROOT}"
    done = shell(f"exec ${{P}}{arguments}", tmp_path, PYTHONPATH=path, SIGNAL_AT=module, SIGNAL=str(number.value))
    assert done.returncode in {1, 128 + number}
    assert done.stderr in {"", "replicator: stopped before it was done\n"}


HANGS = """
import asyncio, sys, threading
from replicator.cli import main, stream

async def run():
    stopping = asyncio.Event()
    stream.stop_on_signals(stopping.set)
    call = asyncio.create_task(asyncio.to_thread(threading.Event().wait))
    print("runs", flush=True)
    await stopping.wait()
    return 1

stream.run = run
sys.exit(main.main([]))
"""


def test_a_call_that_never_returns_does_not_hold_up_the_end() -> None:
    """A silent database keeps a thread for ever; the program ends all the same, with its exit code."""
    with subprocess.Popen([sys.executable, "-c", HANGS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout
            assert "runs\n" == program.stdout.readline()
            program.terminate()
            assert 1 == program.wait(10)
        finally:
            program.kill()


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("$P config show >&-", 0, ""),
        ("$P --help >&- 2>&- <&-", 0, ""),
        ("$P rebuild-redis --from-empty <&-", 2, "It takes a terminal to ask on, or --yes.\n"),
        ("$P sql roles | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("$P config show >/dev/full", 1, "replicator: Standard output can't be written: No space left on device.\n"),
        ("$P status --json >/dev/full", 1, "replicator: Standard output can't be written: No space left on device.\n"),
    ],
)
def test_a_stream_that_takes_nothing(command: str, code: int, words: str, tmp_path: Path) -> None:
    """Closed: as /dev/null. A pipe whose reader has gone: no more to say. A full disk: it is said."""
    done = shell(command, tmp_path)
    assert (code, "") == (done.returncode, done.stdout)
    assert done.stderr.endswith(words)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_an_encoding_without_our_signs(tmp_path: Path) -> None:
    """They are escaped; JSON is ASCII anyway."""
    checked = shell("$P check", tmp_path, PYTHONIOENCODING="latin-1")
    assert (1, "") == (checked.returncode, checked.stderr)
    assert "\\u2192 `run` retries until it answers" in checked.stdout
    name = "caf\u00e9 \u2192"
    status = shell(
        "$P status --json", tmp_path, PYTHONIOENCODING="ascii", REPLICATOR_CHECKPOINT_URL=f"sqlite:///{name}"
    )
    assert 3 == status.returncode
    assert name in " ".join(json.loads(status.stdout)["reasons"])


@pytest.mark.parametrize("package", BESIDE)
@pytest.mark.parametrize("form", ["{}/__init__.py", "{}.py"])
def test_a_folder_of_the_user_s_that_has_the_name_of_ours(package: str, form: str, tmp_path: Path) -> None:
    """One line that names it. Python looks in the working directory first."""
    theirs = tmp_path / form.format(package)
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("print('theirs')\n", encoding="utf-8")
    named = theirs.parent if theirs.name == "__init__.py" else theirs
    told = f"{named} hides the replicator's own package {package}. Rename it; or if it is in the working directory,"
    done = shell("$P status", tmp_path)
    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith(f"replicator: {told}")
    assert 1 == done.stderr.count("\n")
    imported = shell(f"{sys.executable} -c 'from replicator import Replicator'", tmp_path)
    assert 1 == imported.returncode
    assert f"PackageHidden: {told}" in imported.stderr


def test_the_cures_of_a_hidden_package(tmp_path: Path) -> None:
    """Where Python does not look in the working directory; `backfill.py` has ours beside it."""
    (tmp_path / "sinks.py").touch()
    for command in ("${P/ -m/ -P -m} config check", f"{sys.executable} {ROOT}/backfill.py --help"):
        done = shell(command, tmp_path)
        assert (0, "") == (done.returncode, done.stderr)
    (tmp_path / "sinks.py").rename(tmp_path / "mine.py")
    assert 0 == shell("$P config check", tmp_path).returncode


def test_a_mere_folder_hides_nothing(tmp_path: Path) -> None:
    """Python prefers a package to it."""
    for package in BESIDE:
        (tmp_path / package).mkdir()
    assert 0 == shell("$P config check", tmp_path).returncode
