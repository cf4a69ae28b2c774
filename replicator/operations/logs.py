"""One line a record, for people or for machines. What is logged where is the other modules' business."""

from __future__ import annotations

import logging
import sys
import time
from typing import Literal

import msgspec


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(level: str, form: Literal["text", "json"]) -> None:
    """Log to standard error, times in UTC. Libraries speak from warning up: they log URLs and bodies below that."""
    pattern = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    formatter = _Json() if form == "json" else logging.Formatter(pattern)
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # A line for each failed try; the lane tells the story once. clickhouse_connect sets urllib3's own level, later.
    for chatty in ("urllib3.connectionpool", "clickhouse_connect"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for ours in ("replicator", "enrichment", "sinks", "checkpoint_store"):
        logging.getLogger(ours).setLevel(level.upper())
