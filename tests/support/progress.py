"""How far a backfill is, as its checkpoint database has it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from replicator.delivery.backfill import BackfillProgress

HISTORY = "SELECT progress FROM replicator_tasks WHERE task LIKE '%backfill %' OR task LIKE 'rebuild-%'"
"""Of a backfill or a rebuild: the stream keeps its own notes beside it."""


def saved_progress(checkpoint: Path) -> BackfillProgress | None:
    """What an interrupted backfill has saved; None when there is none."""
    with closing(sqlite3.connect(checkpoint)) as connection:
        row = connection.execute(HISTORY).fetchone()
    return row and msgspec.json.decode(row[0], type=BackfillProgress)


def events_before(checkpoint: Path) -> int:
    """How many events `--resume` would skip."""
    progress = saved_progress(checkpoint)
    return progress.events if progress else 0
