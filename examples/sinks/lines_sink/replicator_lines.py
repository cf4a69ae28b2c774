"""A sink: a file with one event a line, each event once. `REPLICATOR_SINKS=lines` finds it where it is installed."""

import fcntl
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
from pydantic import Field

from replicator import Event, Finding, Refusal, Settings, Sink, SinkContext, SinkUnavailable
from sinks.threads import BlockingCalls


class LinesSettings(Settings):
    lines_path: Path = Field(Path("events.jsonl"), description="the path of the file")


class LinesSink(Sink):
    name = "lines"
    max_events = 1000
    settings_class = LinesSettings
    settings: LinesSettings

    def __init__(self, given: LinesSettings, context: SinkContext) -> None:
        super().__init__(given, context)
        self._calls = BlockingCalls("lines")
        self._ids, self._end = set[int](), 0  # of the lines in the first `_end` bytes of the file

    async def check(self) -> list[Finding]:
        path = self.settings.lines_path
        ok = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
        return [Finding(ok, f"sink {self.name}: {path}", "" if ok else "Name a file that can be written to")]

    async def write(self, new: Sequence[Event]) -> Sequence[Refusal]:
        try:
            await self._calls.run(partial(self._append, new), seconds=15)
        except OSError as exc:  # a TimeoutError is one, too
            detail = f"{self.settings.lines_path}: {exc.strerror or 'no answer for 15 s'}"
            raise SinkUnavailable(sink=self.name, detail=detail) from exc
        return []

    def _append(self, new: Sequence[Event]) -> None:
        with self.settings.lines_path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a backfill may write beside the replicator
            if file.tell() < self._end:  # it is another file
                self._ids, self._end = set(), 0
            file.seek(self._end)
            *lines, cut_off = file.read().split(b"\n")
            self._ids |= {msgspec.json.decode(line)["event_id"] for line in lines}
            self._end = file.truncate(file.tell() - len(cut_off))  # by a crash: half a line
            file.write(b"".join(event.json + b"\n" for event in new if event.id not in self._ids))
            file.flush()
            os.fsync(file.fileno())  # only now they are durable
