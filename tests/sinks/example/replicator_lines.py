"""A sink: a file with one event a line, each event once. `REPLICATOR_SINKS=lines` finds it where it is installed."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from replicator.contracts import errors, events, settings, sink


class LinesSettings(settings.Settings):
    lines_path: Path = Path("events.jsonl")


class LinesSink(sink.Sink):
    name, max_events, settings_class = "lines", 1000, LinesSettings
    settings: LinesSettings

    async def open(self, start: events.SinkPosition | None = None, mode: sink.Mode = sink.Mode.LIVE) -> None:
        self._ids, self._end = set[int](), 0  # of the lines in the first `_end` bytes of the file

    async def check(self) -> list[events.Finding]:
        ok = os.access(self.settings.lines_path.parent, os.W_OK)
        return [events.Finding(ok, f"{self.settings.lines_path}", "" if ok else "Make its folder writable")]

    async def write(self, new: Sequence[events.Event]) -> Sequence[events.Refusal]:
        try:
            with self.settings.lines_path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # a backfill may write beside the replicator
                file.seek(min(self._end, file.tell()))
                *lines, cut_off = file.read().split(b"\n")
                self._ids |= {msgspec.json.decode(line)["event_id"] for line in lines}
                self._end = file.truncate(file.tell() - len(cut_off))  # by a crash: half a line
                file.write(b"".join(event.json + b"\n" for event in new if event.id not in self._ids))
                file.flush()
                os.fsync(file.fileno())  # only now they are durable
        except OSError as exc:
            raise errors.SinkUnavailable(sink=self.name, detail=f"{self.settings.lines_path}: {exc.strerror}") from exc
        return []
