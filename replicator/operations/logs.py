"""The form of the log: one line a record, for people or for programs."""

from __future__ import annotations

import logging
import sys
import time
from typing import Literal

import msgspec


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(level: str, form: Literal["text", "json"]) -> None:
    """Log to standard error, times in UTC. `level` is ours: below WARNING, libraries log URLs and bodies."""
    pattern = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    formatter = _Json() if form == "json" else logging.Formatter(pattern)
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # They log each failed attempt; the lane logs the problem once. clickhouse_connect sets urllib3's level later.
    for chatty in ("urllib3.connectionpool", "clickhouse_connect"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for ours in ("replicator", "enrichment", "sinks", "checkpoint_store"):
        logging.getLogger(ours).setLevel(level.upper())
