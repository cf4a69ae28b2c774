"""The real program, altered in memory: it dies at a named place, or breaks the rule on purpose.

    python -m tests.prove.failpoints --die enriched --after 4711 -- run
    python -m tests.prove.failpoints --breach markers-off -- run

The program itself has no code for this. What is altered is looked up by name: a renamed function is an error here, not
a place that is never reached.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import runpy
import select
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec
from msgspec import structs

from checkpoint_store import SqlCheckpointStore
from enrichment.streams.enricher import StreamEnricher
from replicator.contracts.enricher import Enriched
from replicator.contracts.errors import DecodeError
from replicator.contracts.events import Event, Lsn, Refusal, Row, SinkPosition, parse_lsn
from replicator.delivery.fan_out import FanOut
from replicator.delivery.tables.verification import Verification
from replicator.delivery.writer import Suspect, Writer
from replicator.pipeline import Pipeline
from replicator.source import slot, wal2json
from replicator.source import stream as source
from replicator.source.stream import Source
from replicator.source.wal2json import DecodedChunk, StreamDecoder
from sinks.clickhouse import sink as clickhouse

SINKS = ("clickhouse", "redis", "http")
PLACES: Mapping[str, str] = {
    "received": "rows were read from the slot",
    "enriched": "their events were made",
    **{f"sent-{sink}": f"events were given to the socket of {sink}" for sink in SINKS},
    **{f"answered-{sink}": f"{sink} has them, its answer is at the socket and not read" for sink in SINKS},
    "before-save": "a checkpoint is about to be stored",
    "after-save": "it is on disk",
    "before-confirm": "it is about to be confirmed to PostgreSQL",
    "after-confirm": "it was confirmed",
}
"""The named places between slot and confirmation."""

EVENTS = (b'"event_id":', b'"order_id":')
"""Everything sent to a sink contains one of these texts, and nothing else does: of engagement, of examples/orders."""
ANSWER_SECONDS = 60.0


def alter(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute by `make(attribute)`. Raises AttributeError if there is none."""
    setattr(owner, name, make(getattr(owner, name)))


# -- dying at a place ----------------------------------------------------------------------------------------------


class Death:
    """Ends the process at one place, at the first passage after so many rows were received."""

    def __init__(self, place: str, after_rows: int) -> None:
        self._place = place
        self._after_rows = after_rows
        self._rows = 0
        self._asked: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._ports = {_port(f"REPLICATOR_{sink.upper()}_URL"): sink for sink in SINKS}

    @property
    def _armed(self) -> bool:
        return self._rows >= self._after_rows

    def _pass(self, place: str) -> None:
        if place == self._place and self._armed:
            os.kill(os.getpid(), signal.SIGKILL)

    def alter(self) -> None:
        """Install the places."""
        alter(Source, "read", self._read)
        alter(Pipeline, "_enrich", self._enrich)
        alter(SqlCheckpointStore, "save", self._save)
        alter(Source, "send_feedback", self._confirm)
        for name in ("send", "sendall", "sendmsg"):
            alter(socket.socket, name, self._send)
        for name in ("recv", "recv_into"):
            alter(socket.socket, name, self._receive)

    def _read(self, original: Callable[[Source], Any]) -> Callable[[Source], Any]:
        async def read(source: Source) -> DecodedChunk:
            chunk: DecodedChunk = await original(source)
            rows = len(chunk.events) + len(chunk.rows)
            self._rows += rows
            if rows:
                self._pass("received")
            return chunk

        return read

    def _enrich(self, original: Callable[[Pipeline, DecodedChunk], Any]) -> Callable[[Pipeline, DecodedChunk], Any]:
        async def enrich(pipeline: Pipeline, chunk: DecodedChunk) -> Enriched:
            enriched: Enriched = await original(pipeline, chunk)
            if enriched.events:
                self._pass("enriched")
            return enriched

        return enrich

    def _save(self, original: Callable[..., None]) -> Callable[..., None]:
        def save(*args: object) -> None:
            self._pass("before-save")
            original(*args)
            self._pass("after-save")

        return save

    def _confirm(self, original: Callable[..., None]) -> Callable[..., None]:
        def send_feedback(source: Source, flush_lsn: Lsn | None = None, *, ask: bool = False) -> None:
            moves = flush_lsn is not None and flush_lsn > source.confirmed
            if moves:
                self._pass("before-confirm")
            original(source, flush_lsn, ask=ask)
            if moves:
                self._pass("after-confirm")

        return send_feedback

    def _send(self, original: Callable[..., int | None]) -> Callable[..., int | None]:
        def send(sock: socket.socket, data: Any, *args: Any) -> int | None:
            sent = original(sock, data, *args)
            parts = [memoryview(part) for part in data] if isinstance(data, list | tuple) else [memoryview(data)]
            whole = sent is None or sent == sum(part.nbytes for part in parts)
            if whole and any(event in bytes(part) for part in parts for event in EVENTS):
                self._pass(f"sent-{self._sink(sock)}")
                if self._armed:
                    self._asked.add(sock)
            return sent

        return send

    def _receive(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def receive(sock: socket.socket, *args: Any) -> Any:
            if sock in self._asked:
                readable, _, _ = select.select([sock], [], [], ANSWER_SECONDS)
                if readable:
                    self._pass(f"answered-{self._sink(sock)}")
            return original(sock, *args)

        return receive

    def _sink(self, sock: socket.socket) -> str:
        return self._ports.get(sock.getpeername()[1], "nobody")


def _port(name: str) -> int:
    port = urlsplit(os.environ[name]).port
    if port is None:
        raise SystemExit(f"{name} names no port")
    return port


# -- breaking the rule ---------------------------------------------------------------------------------------------


def confirm_before_checkpoint() -> None:
    """Confirm before the checkpoint is on disk."""

    def make(original: Callable[[Pipeline], Any]) -> Callable[[Pipeline], Any]:
        async def commit(pipeline: Pipeline) -> None:
            if pipeline.checkpoint is not None:
                written = (lane.mark.end_lsn for lane in pipeline.fan_out.lanes)
                pipeline.source.send_feedback(flush_lsn=min(pipeline.source.received, *written))
            await original(pipeline)

        return commit

    alter(Pipeline, "commit", make)


def checkpoint_before_sink() -> None:
    """Count what a lane has taken as written."""

    def make(_: object) -> Callable[[Any], Any]:
        async def commit(pipeline: Any) -> None:
            if pipeline.checkpoint is None:
                return
            end_lsn = pipeline.source.received
            taken = {
                lane.name: SinkPosition(position=lane.queue.end.position, end_lsn=end_lsn)
                for lane in pipeline.fan_out.lanes
            }
            checkpoint = structs.replace(pipeline.checkpoint, end_lsn=end_lsn, sinks=taken)
            await asyncio.to_thread(pipeline._store.save, checkpoint)  # noqa: SLF001
            pipeline.checkpoint = checkpoint
            pipeline.fan_out.saved(taken)
            pipeline.source.send_feedback(flush_lsn=end_lsn)

        return commit

    alter(Pipeline, "commit", make)


def row_lsn() -> None:
    """Count what has a lower LSN than one already seen as seen (debezium#7531, flink-cdc#4323)."""
    lsns: dict[int, Lsn] = {}
    newest = 0

    def feed(original: Callable[..., None]) -> Callable[..., None]:
        def feed_row(decoder: StreamDecoder, payload: memoryview | bytes, action: int) -> None:
            decoder.shortcut = None
            original(decoder, payload, action)
            lsns[id(decoder.rows[-1])] = own_lsn(payload)

        return feed_row

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def enrich(pipeline: Pipeline, chunk: DecodedChunk) -> Enriched:
            nonlocal newest
            fresh = []
            for row in chunk.rows:
                lsn = lsns.pop(id(row))
                if lsn > newest:
                    fresh.append(row)
                    newest = lsn
            enriched: Enriched = await original(pipeline, chunk._replace(rows=fresh))
            return enriched

        return enrich

    alter(StreamDecoder, "_feed_row", feed)
    alter(Pipeline, "_enrich", make)


def own_lsn(payload: memoryview | bytes) -> Lsn:
    """The LSN of the change, or of the end of the commit: the message's `data_start`."""
    message: dict[str, str] = msgspec.json.decode(payload)
    return parse_lsn(message.get("nextlsn", message["lsn"]))


def psycopg2_keepalive() -> None:
    """psycopg2's rule: confirm a keepalive once the newest message's start counts as flushed."""
    started = 0  # last_msg_data_start

    def feed(original: Callable[..., None]) -> Callable[..., None]:
        def fed(decoder: StreamDecoder, payload: memoryview | bytes) -> None:
            nonlocal started
            started = own_lsn(payload)
            original(decoder, payload)

        return fed

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def keepalive(source: Source, data: memoryview) -> None:
            original(source, data)
            wal_end = int.from_bytes(data[1:9], "big")
            if source.confirmed >= started and wal_end > source.confirmed:
                setattr(source, "_received", max(source.received, wal_end))  # noqa: B010  not ours to set
                source.send_feedback(flush_lsn=wal_end)

        return keepalive

    def forward(original: Callable[..., None]) -> Callable[..., None]:
        def send_feedback(source: Source, flush_lsn: Lsn | None = None, *, ask: bool = False) -> None:
            original(source, max(flush_lsn or 0, source.confirmed), ask=ask)

        return send_feedback

    alter(StreamDecoder, "feed", feed)
    alter(Source, "_keepalive", make)
    alter(Source, "send_feedback", forward)
    # Such a reader has no checkpoint to compare with.
    alter(slot, "_gap", lambda _: lambda *_: "")


def markers_off() -> None:
    """Without `B` and `C` only a row's own LSN is known. Combined with psycopg2's rule, which needs them."""
    psycopg2_keepalive()
    alter(wal2json, "OPTIONS", lambda options: {**options, "include-transaction": "false"})
    alter(source, "OPTIONS", lambda _: wal2json.OPTIONS)

    def feed(_: Callable[..., None]) -> Callable[..., None]:
        def fed(decoder: Any, payload: memoryview | bytes) -> None:
            row = msgspec.json.decode(payload, type=Row)
            if row.action not in "IUD":
                raise DecodeError(lsn="", problem=f"action {row.action} without markers")
            decoder._commit_lsn = decoder._end_lsn = max(decoder._commit_lsn, own_lsn(payload))  # noqa: SLF001
            decoder._ordinal += 1  # noqa: SLF001
            row.commit_lsn, row.ordinal = decoder._commit_lsn, decoder._ordinal  # noqa: SLF001
            decoder.rows.append(row)

        return fed

    alter(StreamDecoder, "_feed", feed)


def written_rows_ignored() -> None:
    """Whatever ClickHouse, or what stands before it, answers to an insert counts as written."""
    alter(clickhouse, "_proves", lambda _: lambda *_: True)


def evidence_ignored() -> None:
    """What is refused once is a dead letter, whatever else the destination takes or refuses."""

    def make(_: object) -> Callable[..., Any]:
        async def examine(_writer: Writer, suspects: list[Suspect], _write: object) -> list[Refusal]:
            return [Refusal(suspect.event, suspect.refused.reason, suspect.refused.detail) for suspect in suspects]

        return examine

    alter(Writer, "_examine", make)


def verified_ignored() -> None:
    """Count what a sink holds, whatever became of the tables meanwhile."""
    alter(Verification, "covers", lambda _: lambda *_: True)


def pause_forgotten() -> None:
    """Confirm what the sinks have that run, whatever a paused one lacks."""
    alter(FanOut, "every", lambda _: property(lambda fan_out: [*fan_out.lanes]))


# -- breaking it where rows change ----------------------------------------------------------------------------------


def update_lost() -> None:
    """Take some updates for nothing new."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def enrich(enricher: StreamEnricher, rows: list[Row]) -> Enriched:
            kept = [row for row in rows if row.action != "U" or row.ordinal % 3]
            enriched: Enriched = await original(enricher, kept) if kept else Enriched([], [])
            return enriched

        return enrich

    alter(StreamEnricher, "_enrich", make)


def older_version_wins() -> None:
    """Number versions downwards: what comes last counts as the oldest."""
    alter(Event, "version", lambda _: property(lambda event: (2**64 - event.commit_lsn << 64) - event.ordinal))


def delete_ignored() -> None:
    """Leave a row that is gone where it is."""
    alter(StreamEnricher, "_remove", lambda _: lambda *_: None)


def former_identity_kept() -> None:
    """Leave a row under the identity that it had."""
    alter(StreamEnricher, "_note_identity", lambda _: lambda *_: None)


def customer_of_later() -> None:
    """Apply what changes in a dimension before the events that were committed before it."""

    def make(original: Callable[..., list[Event]]) -> Callable[..., list[Event]]:
        def carry_out(enricher: StreamEnricher, plan: Any, today: Any) -> list[Event]:
            first = [(0, at, change) for _, at, change in plan.changes if not isinstance(change, Event)]
            plan.changes = first + [one for one in plan.changes if isinstance(one[-1], Event)]
            return original(enricher, plan, today)

        return carry_out

    alter(StreamEnricher, "_carry_out", make)


BREACHES: Mapping[str, Callable[[], None]] = {
    "confirm-before-checkpoint": confirm_before_checkpoint,
    "checkpoint-before-sink": checkpoint_before_sink,
    "row-lsn": row_lsn,
    "verified-ignored": verified_ignored,
    "markers-off": markers_off,
    "psycopg2-keepalive": psycopg2_keepalive,
    "written-rows-ignored": written_rows_ignored,
    "evidence-ignored": evidence_ignored,
    "pause-forgotten": pause_forgotten,
    "update-lost": update_lost,
    "older-version-wins": older_version_wins,
    "delete-ignored": delete_ignored,
    "former-identity-kept": former_identity_kept,
    "customer-of-later": customer_of_later,
}
"""Ways to break the rule. `psycopg2-keepalive` alone does not, thanks to the markers."""


def run_altered(
    program: str, places: Collection[str], death: type[Death], breaches: Mapping[str, Callable[[], None]]
) -> NoReturn:
    """Run this package as the arguments say."""
    parser = argparse.ArgumentParser(description=f"Run {program}, altered in memory.")
    parser.add_argument("--die", choices=places, help="end here, without warning")
    parser.add_argument("--after", type=int, default=1, metavar="ROWS", help="once so many rows were received (1)")
    parser.add_argument("--breach", choices=breaches, help="break the rule like this")
    parser.add_argument("arguments", nargs="*", help="the program's own, after --")
    args = parser.parse_args()
    if args.breach:
        breaches[args.breach]()
    if args.die:
        death(args.die, args.after).alter()
    sys.argv = [program, *args.arguments]
    runpy.run_module(program, run_name="__main__", alter_sys=True)
    raise SystemExit(f"{program} returned")


if __name__ == "__main__":
    run_altered("replicator", PLACES, Death, BREACHES)
