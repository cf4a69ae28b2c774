"""Programs that the tests' launcher starts are as new interpreters are, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launcher import PYTHON, ROOT, Launched, Launcher

MIRROR = [*PYTHON, "-m", "tests.support.mirror"]
SCRIPT = [*PYTHON, "tests/support/mirror.py"]


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    """One that has started nothing."""
    with Launcher() as launcher:
        yield launcher


def _start(launcher: Launcher, command: list[str], environment: dict[str, str], folder: Path) -> Launched:
    assert launcher.can_start(command, ROOT, environment)
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        return launcher.start(command, environment, stdout, stderr)


@pytest.mark.parametrize("program", [MIRROR, SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize("code", [0, 200, -signal.SIGKILL, -signal.SIGTERM])
def test_it_is_as_python_starts_it(launcher: Launcher, tmp_path: Path, program: list[str], code: int) -> None:
    """Arguments, path, warnings, folder, environment, streams, exit code; nothing of ours is loaded or open."""
    command = [*program, "a", "--b"]
    environment = {**os.environ, "REPLICATOR_CODE": str(code), "PYTHONPATH": f"{tmp_path}:{tmp_path}/b"}
    new = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert code == new.returncode == _start(launcher, command, environment, tmp_path).wait(60)
    assert new.stdout == (tmp_path / "stdout").read_bytes()
    assert new.stderr == (tmp_path / "stderr").read_bytes()


def test_signals_reach_it(launcher: Launcher, tmp_path: Path) -> None:
    """Two at once; each has its own process id and exit code."""
    command, environment = [*PYTHON, "-m", "http.server", "--bind", "127.0.0.1", "0"], dict(os.environ)
    first = _start(launcher, command, environment, tmp_path)
    second = _start(launcher, command, environment, tmp_path)
    assert first.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.01)
    second.terminate()
    assert (-signal.SIGTERM, None) == (second.wait(10), first.poll())
    first.kill()
    assert -signal.SIGKILL == first.wait(10) == first.poll()
    first.kill()


def test_it_ends_with_the_tests(tmp_path: Path) -> None:
    """A worker of pytest that dies leaves no replicator behind."""
    with Launcher() as launcher:
        program = _start(
            launcher, [*PYTHON, "-m", "http.server", "--bind", "127.0.0.1", "0"], dict(os.environ), tmp_path
        )
        assert program.poll() is None
    assert -signal.SIGKILL == program.poll()


@pytest.mark.parametrize(
    ("command", "folder", "environment"),
    [
        (["python", "-m", "replicator"], ROOT, {}),
        (MIRROR, ROOT / "docs", {}),
        (MIRROR, ROOT, {"PYTHONUTF8": "1"}),
    ],
    ids=["other options", "another folder", "another environment"],
)
def test_what_needs_an_interpreter_of_its_own(
    launcher: Launcher, command: list[str], folder: Path, environment: dict[str, str]
) -> None:
    """It is not the launcher's."""
    assert not launcher.can_start(command, folder, {**os.environ, **environment})
