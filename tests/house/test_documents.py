"""README, docs/ and CONTRIBUTING say nothing that the repository does not have: files, settings, tests, commands."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import replicator
from replicator.cli.main import app
from replicator.contracts.settings import Settings, variable
from tests.prove.failpoints import BREACHES
from tests.prove.world.tables import PLAYS
from tests.support.metrics import STATUS, of_status, table

ROOT = Path(__file__).parents[2]
PACKAGES = ("replicator", "replicator_spark", "enrichment", "sinks", "checkpoint_store")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README_WORDS = 1_200
FOLDER_FILES = 9
SETTINGS = ROOT / "docs/reference/settings.md"
COMMANDS = ROOT / "docs/reference/commands.md"
METRICS = ROOT / "docs/reference/metrics.md"
FAULTS = ROOT / "docs/reference/faults.md"
TABLES = ROOT / "docs/reference/tables.md"
RELIABILITY = ROOT / "docs/reliability.md"
OF_SERVERS = (
    "ClickHouse error [0-9]|answered [0-9]|READONLY |OOM |MISCONF |WRONGPASS|NOREPLICAS|Timeout reading|Error"
    "|terminating connection|query would be affected"
)
"""What begins like this is the words of a server or of a driver."""
STABLE = {"replicator", "enrichment", "sinks.testing", "sinks.threads"}
"""The modules of the names that stay, see docs/streams/library.md."""
SHORT = 6  # characters: a part as short as that says nothing

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
QUOTED = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[A-Za-z_.][\w.-]*(/[\w.-]+)*/?")
TOP = (
    "replicator",
    "replicator_spark",
    "enrichment",
    "sinks",
    "checkpoint_store",
    "sql",
    "docs",
    "tests",
    "benchmarks",
    "devstack",
    "docker",
    "deploy",
    "examples",
)

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def _prose(document: Path) -> str:
    """Without its blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _is_path(text: str) -> bool:
    """Whether quoted text names a file or folder of this repository."""
    first, slash, _ = text.partition("/")
    return bool(PATH.fullmatch(text)) and bool(slash) and first in TOP


def _settings_classes() -> list[type[Settings]]:
    """All that the product has: a class is known once its module is imported."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    known = list(Settings.__subclasses__())
    for found in known:
        known.extend(found.__subclasses__())
    return [found for found in known if found.__module__.partition(".")[0] in PACKAGES]


@cache
def _variables() -> set[str]:
    return {variable(field) for settings in _settings_classes() for field in settings.model_fields}


@documents
def test_links_lead_somewhere(document: Path) -> None:
    """Relative links name a file, and a heading in it."""
    broken = []
    for link in LINK.findall(_prose(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        found = target.exists()
        if found and anchor and target.is_file():
            found = anchor in map(_anchor, HEADING.findall(_prose(target)))
        if not found:
            broken.append(link)
    assert not broken


@documents
def test_paths_exist(document: Path) -> None:
    """A path in backquotes, such as `sql/roles.sql`, is one of this repository."""
    quoted = [text.partition("::")[0] for text in QUOTED.findall(_prose(document))]
    assert not [path for path in quoted if _is_path(path) and not (ROOT / path).exists()]


def test_every_page_is_in_the_contents() -> None:
    """`docs/README.md` links every page."""
    contents = ROOT / "docs/README.md"
    linked = {(contents.parent / link.partition("#")[0]).resolve() for link in LINK.findall(_prose(contents))}
    assert not {page for page in (ROOT / "docs").rglob("*.md") if page != contents} - linked


def test_the_readme_is_a_front_door() -> None:
    """Short enough to be read; the rest is in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def test_every_setting_is_documented() -> None:
    """The settings page has a row for each variable, and none for one that is gone."""
    rows = re.findall(r"^\| *`(REPLICATOR_[A-Z0-9_]+)` *\|", SETTINGS.read_text(encoding="utf-8"), re.MULTILINE)
    assert _variables() == set(rows)
    assert len(rows) == len(set(rows))


@documents
def test_named_settings_exist(document: Path) -> None:
    """No document names a variable that nothing reads."""
    named = set(re.findall(r"\bREPLICATOR_[A-Z0-9_]*[A-Z0-9]\b", _prose(document)))
    assert not named - _variables() - {f"{name}_FILE" for name in _variables()}


def test_env_example_names_real_settings() -> None:
    """`.env.example` can be copied as it is: no variable in it is misspelt."""
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    named = re.findall(r"^#?(REPLICATOR_[A-Z0-9_]+)=", text, re.MULTILINE)
    assert named
    assert not set(named) - _variables() - {f"{name}_FILE" for name in _variables()}


def test_metrics_exist() -> None:
    """Every metric on the metrics page, in the text below its table too, is one that the program has."""
    named = set(re.findall(r"replicator_\w+", METRICS.read_text(encoding="utf-8")))
    assert named
    assert not named - set(re.findall(r"replicator_\w+", table(of_status(STATUS))))


def test_the_example_sink_is_the_tested_one() -> None:
    """The page on sinks shows the files that the conformance suite runs on."""
    page = (ROOT / "docs/how-to/sink.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```(?:python|toml)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    files = sorted((ROOT / "examples/sinks/lines_sink").glob("*.[pt]*"))
    assert files
    assert not [file.name for file in files if file.read_text(encoding="utf-8") not in shown]


def test_every_stable_name_is_on_the_page_of_the_library() -> None:
    """And no other: what stays, and what other programs are given."""
    section = (ROOT / "docs/streams/library.md").read_text(encoding="utf-8").partition("\n## Names")[2]
    first_column = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    assert sorted(replicator.__all__) == sorted(name for cell in first_column for name in QUOTED.findall(cell))


def test_what_is_shown_uses_stable_names() -> None:
    """The examples, and the programs in the documents, import nothing of ours that may change in any version."""
    shown = {str(file): file.read_text(encoding="utf-8") for file in (ROOT / "examples").rglob("*.py")}
    for page in DOCUMENTS:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        shown |= {f"{page} {number}": text for number, text in enumerate(blocks)}
    used = {name: {*re.findall(r"^(?:from|import) ([\w.]+)", text, re.MULTILINE)} for name, text in shown.items()}
    assert {"replicator", "sinks.threads"} <= set().union(*used.values())
    ours = {name: {one for one in modules if one.split(".")[0] in PACKAGES} for name, modules in used.items()}
    assert not {name: others for name, modules in ours.items() if (others := modules - STABLE)}


def test_faults_name_real_tests() -> None:
    """Each row of the faults page is a test: its last column names it."""
    rows = re.findall(r"^\|(.+)\|$", FAULTS.read_text(encoding="utf-8"), re.MULTILINE)
    last = [row.rpartition("|")[2].strip() for row in rows]
    named = [cell for cell in last if not re.fullmatch("test|-+", cell)]
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    tests = {f"`{name}`" for source in sources for name in re.findall(r"def (test_\w+)", source)}
    assert named
    assert not [cell for cell in named if not set(cell.split(", ")) <= tests]


def test_every_breach_has_its_row() -> None:
    """What breaks the rule on purpose, and what finds it."""
    section = RELIABILITY.read_text(encoding="utf-8").partition("## Breaking the rule on purpose")[2]
    assert set(BREACHES) == set(re.findall(r"^\| `([a-z0-9-]+)` \|", section, re.MULTILINE))


def test_what_ddl_does_is_played() -> None:
    """Each row on what DDL does names the faults of the environment matrix that do it, and none of them is left out."""
    cells = re.findall(r"^\|.*\|([^|]*)\|$", TABLES.read_text(encoding="utf-8"), re.MULTILINE)
    named = [name for cell in cells for name in QUOTED.findall(cell)]
    assert sorted(named) == PLAYS
    assert ["play", *["none"] * 3, "play", "none"] == [
        text for cell in cells if re.fullmatch(r"\w+", text := cell.strip())
    ]


def _texts(node: ast.AST) -> Iterator[str]:
    """Every text in the source, with `…` for what is filled in."""
    for found in ast.walk(node):
        if isinstance(found, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in found.values)
        elif isinstance(found, ast.Constant) and isinstance(found.value, str | bytes):
            text = found.value.decode(errors="replace") if isinstance(found.value, bytes) else found.value
            yield re.sub(r"%s|%d|\{\w*\}", "…", text)


def test_faults_quote_the_program() -> None:
    """What the faults page says that the program says: each part between `…` is a text of it, or of a server."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    texts = "\n".join(text for file in files for text in _texts(ast.parse(file.read_text(encoding="utf-8"))))
    cells = re.findall(r"^\|[^|]*\|([^|]*)\|[^|]*\|[^|]*\|[^|]*\|$", FAULTS.read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [text for cell in cells for text in QUOTED.findall(cell) if not re.match(r"replicator_|/|python ", text)]
    parts = [part.strip(" .:;") for text in quoted for part in re.split("…|SINK", text)]
    ours = [part for part in parts if len(part) > SHORT and not re.match(OF_SERVERS, part)]
    assert ours
    assert not [part for part in ours if part not in texts and part[0].lower() + part[1:] not in texts]


def test_tests_named_in_commands_exist() -> None:
    """`make test ARGS="-k NAME"` finds something."""
    tests = "\n".join(f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in (ROOT / "tests").rglob("*.py"))
    named = {name for document in DOCUMENTS for name in re.findall(r"\btest_\w+", document.read_text(encoding="utf-8"))}
    assert not [name for name in named if name not in tests]


def test_no_folder_of_documents_is_crowded() -> None:
    """As for code: what does not fit into a glance is divided."""
    listed = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = [str(Path(name).parent) for name in listed.stdout.split()]
    assert not [folder for folder in set(folders) if folders.count(folder) > FOLDER_FILES]


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the program by its words, groups included."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, (*path, name))


@cache
def _options() -> dict[tuple[str, ...], set[str]]:
    """The options of every command."""
    found = _commands(typer.main.get_command(app))
    return {path: {"--help", *(name for option in command.params for name in option.opts)} for path, command in found}


def _code(document: Path) -> Iterator[str]:
    """Every line of its blocks of code, continued ones joined, and everything in backquotes."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from QUOTED.findall(_prose(document))


def _calls(code: str) -> Iterator[list[str]]:
    """The words after the program's name: command and options."""
    for call in re.findall(r"(?:python -m|run --rm|^) ?replicator(?= |$)([^|#;&]*)", code):
        yield call.split()
    for call in re.findall(r"python backfill\.py([^|#;&]*)", code):
        yield ["backfill", *call.split()]


@documents
def test_commands_exist(document: Path) -> None:
    """Every command that is printed is one of the program, and so is each of its options."""
    unknown = []
    for words in (words for code in _code(document) for words in _calls(code)):
        length = max(n for n in range(len(words) + 1) if tuple(words[:n]) in _options())
        rest = [word.rstrip(",:") for word in words[length:]]
        options = _options()[tuple(words[:length])]
        is_command = length or not rest or rest[0].startswith("-")
        if not is_command or [word for word in rest if word.startswith("--") and word not in options]:
            unknown.append(" ".join(words))
    assert not unknown


def test_every_command_is_documented() -> None:
    """The commands page has each, and its table of exit codes those that there are."""
    rows = "\n".join(re.findall(r"^\| *`.*", COMMANDS.read_text(encoding="utf-8"), re.MULTILINE))
    missing = [
        path for path, command in _commands(typer.main.get_command(app)) if path and not hasattr(command, "commands")
    ]
    assert not [path for path in missing if f"`{' '.join(path)}`" not in rows]
