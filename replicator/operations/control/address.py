"""Where the socket is, and what goes over it: a request, then answers, each a JSON object on a line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from msgspec import Struct

from replicator.contracts.settings import CoreSettings, state_directory
from replicator.contracts.stores import CheckpointStore

PATH_BYTES = 107
"""What the system takes for a socket's path."""
LINE_BYTES = 1 << 16

Deed = Literal["pause", "resume", "retry", "tail"]


class Request(Struct, frozen=True, kw_only=True):
    """What is to be done with a sink."""

    do: Deed
    sink: str
    """Empty for a `tail` of what comes from the slot."""
    seconds: float | None = None
    """How long it is paused; None: until somebody resumes it."""
    system_identifier: str = ""
    """Of the PostgreSQL cluster that is meant; empty: that is not known."""


class Answer(Struct, frozen=True, kw_only=True, tag="answer"):
    """What was done, or why nothing was."""

    done: bool
    lines: list[str]


def socket_path(settings: CoreSettings, store: CheckpointStore) -> Path:
    """In systemd's directory for what runs, else beside the checkpoint, else in the state directory."""
    of_service = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    beside = [file.parent for file in store.files()]
    folder = Path(of_service) if of_service else [*beside, state_directory()][0]
    return folder.absolute() / f"{settings.slot}.sock"


def too_long(path: Path) -> str:
    """That the system takes no socket there; else empty."""
    size = len(os.fsencode(path))
    return f"its path has {size} bytes, and the system takes {PATH_BYTES}" if size > PATH_BYTES else ""


SHORTER = "Name a directory with a short path in RUNTIME_DIRECTORY, for `run` and for this command"
