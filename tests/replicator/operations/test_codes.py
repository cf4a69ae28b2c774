"""The codes: one each, in the code and on the faults page."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from replicator.operations.notices.ring import CODES
from tests.support.codes import PAGE, classes, codes, listed, notices, written

ROOT = Path(__file__).parents[3]
PACKAGES = ("replicator", "replicator_spark", "enrichment", "sinks", "checkpoint_store")
ERRORS = ROOT / "replicator/contracts/errors.py"
LEVELS = {"warning", "error", "exception", "critical"}


def _trees() -> dict[Path, ast.Module]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def test_no_code_has_two_meanings() -> None:
    """Each error has one of its own, and no other place tells it."""
    found = Counter([*(error.__dict__.get("code", error.__name__) for error in classes()), *_told()])
    assert len(found) > 50
    assert not [code for code, count in found.items() if count > 1]
    assert not [code for code in found if not re.fullmatch(r"R[1-7]\d\d", code)]


def _told() -> set[str]:
    """The codes that some module tells, beside those of errors."""
    constants = (
        str(node.value)
        for file, tree in _trees().items()
        for node in ast.walk(tree)
        if file != ERRORS and isinstance(node, ast.Constant)
    )
    return {value for value in constants if re.fullmatch(r"R\d{3}", value)}


def test_the_page_is_what_is_told() -> None:
    """Every code that some module tells is on it, and every notice on it is told somewhere."""
    assert notices() == _told()
    assert notices() >= set(CODES.values())


def _calls(tree: ast.Module) -> list[ast.Call]:
    """What is logged as a warning or worse."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in LEVELS
        and ast.unparse(call.func.value) in {"log", "_log"}
    ]


def _fields(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """What is given to names: a line's fields may be put together before."""
    given: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, []).append(node.value)
    return given


def _coded(fields: ast.expr, given: dict[str, list[ast.expr]]) -> bool:
    """Whether a code is among them."""
    if isinstance(fields, ast.Name):
        values = given.get(fields.id, [])
        return bool(values) and all(_coded(value, {}) for value in values)
    return isinstance(fields, ast.Dict) and "code" in [ast.literal_eval(key) for key in fields.keys if key]


def test_every_warning_of_the_log_has_a_code() -> None:
    """Of an error that it tells, or one that it is given."""
    told = [(file, call, _fields(tree)) for file, tree in _trees().items() for call in _calls(tree)]
    assert told
    without = [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for file, call, given in told
        if not any(keyword.arg == "extra" and _coded(keyword.value, given) for keyword in call.keywords)
        and not any(isinstance(argument, ast.Name) and argument.id in {"exc", "failure"} for argument in call.args)
    ]
    assert not without


def test_the_page_has_each() -> None:
    """If not: `python -m tests.support.codes` writes them."""
    assert listed() == written(PAGE.read_text(encoding="utf-8"))
    assert not [code for code, sentence in codes().items() if not sentence[0].isupper()]
