"""Every code with its meaning, and the list of them in docs/reference/faults.md.

`python -m tests.support.codes` writes that list into the page.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from replicator.contracts.errors import ReplicatorError

UNCODED = re.compile(
    r"^\S+Z (?:WARNING|ERROR|CRITICAL) +(?:replicator|enrichment|sinks|checkpoint_store)[.:].*", re.MULTILINE
)
"""A line of the log with a warning or an error of ours that has no code."""
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"


def classes(of: type[ReplicatorError] = ReplicatorError) -> Iterator[type[ReplicatorError]]:
    """Every error of ours."""
    if of.__module__ == ReplicatorError.__module__:
        yield of
        for below in of.__subclasses__():
            yield from classes(below)


def codes() -> dict[str, str]:
    """Code to sentence; an error's is the first of its docstring, a notice's stands on the page alone."""
    page = dict(re.findall(r"^- `(R\d{3})` (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    errors = {error.code: (inspect.getdoc(error) or "").partition(". ")[0].partition("\n")[0] for error in classes()}
    return dict(sorted((page | errors).items()))


def notices() -> set[str]:
    """The codes of what is no error, at the place that has the code."""
    return codes().keys() - {error.code for error in classes()}


def listed() -> str:
    """A line a code."""
    return "".join(f"- `{code}` {sentence.rstrip('.')}.\n" for code, sentence in codes().items())


def written(page: str) -> str:
    """The page's own list."""
    return "".join(re.findall(r"^- `R\d{3}` .*\n", page, re.MULTILINE))


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(written(text), listed()), encoding="utf-8")
