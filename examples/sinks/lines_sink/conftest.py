"""How the conformance suite looks at the file, and how it breaks it. Run `pytest --sink lines` in this folder."""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from enrichment import EVENT
from sinks.testing import Destination, decode


class LinesFile(Destination):
    keeps_order = True

    def __init__(self, file: Path) -> None:
        super().__init__(EVENT)
        self.file = file
        self.refused = None  # it can hold every event

    def read(self) -> Iterable[dict[str, Any]]:
        return map(decode, self.file.read_bytes().splitlines()) if self.file.exists() else []

    @contextmanager
    def outage(self) -> Iterator[None]:
        away = self.file.parent.rename(self.file.parent.with_suffix(".away"))
        yield
        away.rename(self.file.parent)

    @contextmanager
    def silence(self) -> Iterator[None]:
        with self.file.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            yield


@pytest.fixture
def destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LinesFile:
    file = tmp_path / "folder" / "events.jsonl"
    file.parent.mkdir()
    monkeypatch.setenv("REPLICATOR_LINES_PATH", str(file))
    return LinesFile(file)
