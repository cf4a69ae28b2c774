"""A sink in 30 lines: a file with an event a line. `REPLICATOR_SINKS=lines` finds it where it is installed."""

import os
from collections.abc import Sequence
from pathlib import Path

from replicator.contracts import errors, events, settings, sink


class LinesSettings(settings.Settings):
    lines_path: Path = Path("events.jsonl")


class LinesSink(sink.Sink):
    name, max_events, settings_class = "lines", 1000, LinesSettings
    settings: LinesSettings

    async def check(self) -> list[events.Finding]:
        ok = os.access(self.settings.lines_path.parent, os.W_OK)
        return [events.Finding(ok, f"{self.settings.lines_path}", "" if ok else "Make its folder writable")]

    async def write(self, new: Sequence[events.Event]) -> Sequence[events.Refusal]:
        path, lines = self.settings.lines_path, [event.json for event in new]
        try:
            old = path.read_bytes().splitlines() if path.exists() else []
            path.with_suffix(".new").write_bytes(b"\n".join(dict.fromkeys([*old, *lines])))
            path.with_suffix(".new").replace(path)
        except OSError as exc:
            raise errors.SinkUnavailable(sink=self.name, detail=f"{path}: {exc.strerror}") from exc
        return []
