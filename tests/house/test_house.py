"""The rules of the house that no reader can check at a glance: layers, lengths, the single confirmation.

`test_documents.py` holds the documents to the program.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prove import failpoints

ROOT = Path(__file__).parents[2]
PACKAGES = ("replicator", "replicator_spark", "enrichment", "sinks", "checkpoint_store")
MAX_FUNCTION_LINES = 45
MAX_MEDIAN_LINES = 7
MAX_P90_LINES = 16
MAX_FILES = 9
MAX_TOP_ENTRIES = 8
MAX_COMMIT_LINES = 29
FOREIGN = tuple(
    name.replace("~", "")  # so that this file does not find itself
    for name in (
        "/wo~rk/",
        "/opt/~pypi",
        "/opt/~wheels",
        "files.~pythonhosted.org",
        "pypi~.org",
        "deb.~debian.org",
        "registry.~npmjs.org",
    )
)


def _sources() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _is_confirmation(node: ast.AST) -> bool:
    """A call of `send_feedback` that carries a position; without one it only repeats what was confirmed."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name == "send_feedback" and bool(node.args or {keyword.arg for keyword in node.keywords} - {"ask"})


def _pinned(lock: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE))


def _required(requirements: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {name[0].lower().replace("_", "-").replace(".", "-") for name in names if name}


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_imports_point_one_way() -> None:
    """The contracts in pyproject.toml hold. A layer that does not exist is a failure."""
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _imported(file: Path) -> set[str]:
    nodes = list(ast.walk(_tree(file)))
    plain = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_no_test_imports_another() -> None:
    """What two tests share is in tests/support."""
    files = [file for file in (ROOT / "tests").rglob("*.py") if file.parent.name not in ("support", "prove")]
    found = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files
        for module in _imported(file)
        if re.match(r"tests\.(?!support|prove)", module)
    ]
    assert not found


def test_backfill_is_a_door() -> None:
    """`backfill.py` has nothing of its own."""
    assert not [name for name in _imported(ROOT / "backfill.py") if name not in {"sys", "replicator.__main__"}]


def test_folders_are_small() -> None:
    """A folder is read at a glance: nine files at most, and eight entries at the top of `replicator/`."""
    folders = {file.parent for file in _sources()}
    marker = "py.typed"  # empty: it says that the package has types
    files = {
        folder: [file for file in folder.iterdir() if file.is_file() and file.name != marker] for folder in folders
    }
    large = [
        f"{folder.relative_to(ROOT)} has {len(found)} files"
        for folder, found in files.items()
        if len(found) > MAX_FILES
    ]
    assert not large
    top = {entry.name for entry in (ROOT / "replicator").iterdir()}
    assert len(top - {"__init__.py", "__main__.py", "__pycache__", "py.typed", "sql"}) <= MAX_TOP_ENTRIES


def test_no_long_function() -> None:
    """A function longer than a screen is missing a concept."""
    long = [
        f"{file.relative_to(ROOT)}:{function.lineno} {function.name} has {_lines(function)} lines"
        for file in _sources()
        for function in _functions(_tree(file))
        if _lines(function) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_functions_are_short() -> None:
    """Half of them fit into seven lines, nine of ten into sixteen."""
    lengths = [_lines(function) for file in _sources() for function in _functions(_tree(file))]
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES
    assert statistics.quantiles(lengths, n=10)[-1] <= MAX_P90_LINES


def test_the_rule_is_short() -> None:
    """Sinks, then checkpoint, then PostgreSQL: one method, understood at a glance."""
    (commit,) = (found for found in _functions(_tree(ROOT / "replicator/pipeline.py")) if found.name == "commit")
    assert _lines(commit) <= MAX_COMMIT_LINES


def test_one_place_confirms() -> None:
    """`send_feedback` gets a position in `commit` alone."""
    places = [
        f"{file.relative_to(ROOT)} {function.name}"
        for file in [*_sources(), *ROOT.glob("*.py")]
        for function in _functions(_tree(file))
        for node in ast.walk(function)
        if _is_confirmation(node)
    ]
    assert places == ["replicator/pipeline.py commit"]


def test_a_command_for_one_stream_says_which() -> None:
    """Where the slot has several, it could not be pasted as it is printed otherwise."""
    pattern = r"""(?:command\(f?["']|\{PROGRAM\} )(?:backfill|reconcile|rebuild-|trace ).*"""
    files = [file for file in _sources() if file.relative_to(ROOT).parts[0] != "replicator_spark"]
    found = [line for file in files for line in re.findall(pattern, file.read_text(encoding="utf-8"))]
    assert found
    assert [] == [line for line in found if "option" not in line]


def test_what_reads_the_environment_is_known() -> None:
    """A replicator within another program is given its settings and streams, and two of them have different ones."""
    readers = {"load", "examine", "given", "variables", "decisive", "configured", "state_directory"}
    entrances = ("replicator/cli/", "replicator/app/", "replicator_spark/", "replicator/contracts/settings.py")
    places = [
        f"{file.relative_to(ROOT)} {function.name}"
        for file in _sources()
        for function in _functions(_tree(file))
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in readers
    ]
    assert [place for place in places if not place.startswith(entrances)] == [
        "enrichment/tables/declared.py configured",  # for commands that work without an App
        "replicator/operations/control/address.py socket_path",  # of the program's socket
        "replicator/operations/status/collect.py differences",  # for the command `status`
        "sinks/__init__.py _create",  # what was not given by keyword
    ]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("source.send_feedback(flush_lsn=1)", True),
        ("self._source.send_feedback(end_lsn)", True),
        ("send_feedback(1)", True),
        ("source.send_feedback(**what)", True),
        ("source.send_feedback()", False),
        ("source.send_feedback(ask=True)", False),
        ("source.send(1)", False),
    ],
)
def test_confirmation_is_recognised(call: str, *, expected: bool) -> None:
    """The search finds what it looks for, and nothing else."""
    assert expected == any(_is_confirmation(node) for node in ast.walk(ast.parse(call)))


def test_locks_hold_what_pyproject_asks_for() -> None:
    """Run `make lock` after changing dependencies. The runtime lock has no tools and no embedded engine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    runtime, spark = _required(project["dependencies"]), _required(optional.pop("spark"))
    extras = _required([name for extra in optional.values() for name in extra])
    assert not runtime - _pinned("requirements.lock")
    assert not (runtime | spark) - _pinned("requirements-spark.lock")
    assert not (extras - runtime) & _pinned("requirements.lock")
    assert not (runtime | extras) - _pinned("requirements-dev.lock")


def test_all_locks_pin_the_same_versions() -> None:
    """What is tested is what ships."""
    runtime, *others = [
        set(re.findall(r"^[a-z0-9._-]+==\S+", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE))
        for lock in ("requirements.lock", "requirements-dev.lock", "requirements-spark.lock")
    ]
    assert [] == [runtime - pins for pins in others if runtime - pins]


def test_nothing_of_a_workplace_is_tracked() -> None:
    """No file names paths or package servers of a developer's machine."""
    found = [
        f"{file.relative_to(ROOT)}: {foreign}"
        for file in _tracked()
        for foreign in FOREIGN
        if foreign in file.read_text(encoding="utf-8", errors="replace")
    ]
    assert not found


def test_every_module_says_what_it_does() -> None:
    """Every module begins with a docstring."""
    silent = [str(file.relative_to(ROOT)) for file in _sources() if not ast.get_docstring(_tree(file))]
    assert not silent


def test_what_the_proofs_alter_is_there() -> None:
    """They kill and break the program at steps with these names; else only the slow proofs would miss a renamed one."""
    calls = [node for node in ast.walk(_tree(Path(failpoints.__file__))) if isinstance(node, ast.Call)]
    owners_and_names = [call.args for call in calls if ast.unparse(call.func) == "alter"]
    altered = [(ast.unparse(args[0]), args[1].value) for args in owners_and_names if isinstance(args[1], ast.Constant)]
    assert len(altered) > 10
    assert [] == [(owner, name) for owner, name in altered if not hasattr(getattr(failpoints, owner), str(name))]
