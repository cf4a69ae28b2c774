"""`pytest --sink NAME` runs the conformance suite on an installed sink; the suite finds each breach of the contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import faulty
from tests.support.plugin import LINES, install

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A pytest of its own, in this folder."""
    plugin = ("-p", "pytest_asyncio.plugin", "-p", "sinks.testing.plugin")
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *plugin,
            "-p",
            "no:cacheprovider",
            "-c",
            "/dev/null",
            "--rootdir",
            ".",
            *arguments,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder in which the sink `faulty` is installed."""
    (tmp_path / "faulty.py").write_text(Path(faulty.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    install(tmp_path, "faulty", {"faulty": "faulty:FaultySink", "gone": "gone:Sink"})
    return tmp_path


def test_every_breach_of_the_contract_is_found(installed: Path) -> None:
    """By the test that is there for it; a sink that keeps the contract passes them all. Nothing but the suite runs."""
    (installed / "tests").mkdir()
    (installed / "tests/conftest.py").write_text("from faulty import destination\n", encoding="utf-8")
    (installed / "tests/test_other.py").write_text("def test_other(): assert False\n", encoding="utf-8")
    done = run(installed, "--sink", "faulty", "-v", "--tb=no", "--no-summary")  # half of the time goes into telling
    print(done.stdout, done.stderr)  # noqa: T201  shown when the test fails
    outcomes = re.findall(r"^\S+::(test_\w+)\[(\w+)\S* (PASSED|FAILED|ERROR) ", done.stdout, re.MULTILINE)
    failed = {(breach, test) for test, breach, outcome in outcomes if outcome != "PASSED"}
    expected = {(breach.__name__, test) for breach, test in faulty.BREACHES.items()}
    assert set() == expected - failed
    assert "Honest" not in {breach for breach, _ in failed}
    assert set(faulty.BREACHES.values()) <= {test for test, breach, _ in outcomes if breach == "Honest"}
    assert "test_other" not in done.stdout


def test_the_example_keeps_the_contract(tmp_path: Path) -> None:
    """`examples/sinks/lines_sink`, which is not part of the package."""
    install(tmp_path)
    shutil.copy(LINES / "conftest.py", tmp_path)
    done = run(tmp_path, "--sink", "lines", "-q")
    assert 0 == done.returncode, done.stdout
    assert re.search(r"^[12][0-9] passed", done.stdout.splitlines()[-1]), done.stdout


def test_the_example_for_any_stream_keeps_the_contract(tmp_path: Path) -> None:
    """The page on sinks shows it, and its conftest.py. None of the tests of changes is left out."""
    page = (ROOT / "docs/how-to/sink.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for name, word in (("replicator_rows.py", "class RowsSink"), ("conftest.py", "class RowsFile")):
        [text] = [text for text in shown if word in text]
        (tmp_path / name).write_text(text, encoding="utf-8")
    install(tmp_path, "replicator-rows", {"rows": "replicator_rows:RowsSink"})
    done = run(tmp_path, "--sink", "rows", "-q", "-rs")
    assert 0 == done.returncode, done.stdout
    assert "takes no stream whose rows change" not in done.stdout
    assert re.search(r"^3[0-9] passed", done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize(
    ("sink", "conftest", "problem"),
    [
        (
            "faultless",
            "from faulty import destination",
            "there is no sink 'faultless'. It takes one or more of clickhouse,",
        ),
        ("gone", "from faulty import destination", "sink 'gone' can't be loaded"),
        ("faulty", "", "--sink found no conftest.py with a fixture `destination`"),
    ],
)
def test_what_the_suite_can_not_run_on_is_one_line(installed: Path, sink: str, conftest: str, problem: str) -> None:
    """A name that is wrong, a sink that is broken, a destination that nobody describes."""
    (installed / "conftest.py").write_text(conftest, encoding="utf-8")
    done = run(installed, "--sink", sink)
    assert pytest.ExitCode.USAGE_ERROR == done.returncode
    [line] = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    assert problem in line
    assert "Traceback" not in done.stdout + done.stderr


def test_without_the_option_nothing_changes(installed: Path) -> None:
    """The plugin is in every pytest of the environment."""
    (installed / "conftest.py").write_text("from faulty import destination\n", encoding="utf-8")
    (installed / "test_other.py").write_text("def test_other(): pass\n", encoding="utf-8")
    done = run(installed, "-q")
    assert (0, "1 passed") == (done.returncode, done.stdout.splitlines()[-1].partition(" in ")[0])
