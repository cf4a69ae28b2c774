"""The demo HTTP API: accepts events, shows what it accepted, and misbehaves on request.

`python -m devstack.api_server` runs it. It needs only aiohttp, msgspec and this folder. `api` starts it for the stack,
and the compose file runs it as `external-api`. It prints a line per request.

    POST /events      a JSON array of events, or one event
    GET  /events      every event it accepted, in order, repeats included
    GET  /event_ids   the same, their `event_id` alone
    GET  /requests    every POST /events: method, headers, status
    GET  /stats       how much it accepted
    POST /behave      misbehave from now on: a `Behaviour` as JSON, {} for none
    POST /reset       forget everything, behave well
    GET  /healthz     200
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from aiohttp import web

from devstack.faults import Fault, Faults, Refused, refusal, strike_after, strike_before

MAX_BODY_BYTES = 1 << 30  # more than any sink sends; tests use `Behaviour.max_body_bytes`
SHUTDOWN_SECONDS = 0.5  # for requests in flight; those that hang on purpose are cut off then
CHUNK_BODIES = 1_000  # of GET /events, so that a long answer is not one long string


class Behaviour(Fault, frozen=True, kw_only=True):
    """How it misbehaves: a fault that hits some requests, and rules for all of them."""

    refuse_event_ids: frozenset[int] = frozenset()
    """422 for a request that has one of these events."""
    max_body_bytes: int | None = None
    """413 for a larger request."""
    token: str | None = None
    """401 without `Authorization: Bearer` this."""
    trusting: bool = False
    """Read nothing but the events' ids, and keep nothing else: for benchmarks, whose machine it shares."""


NORMAL = Behaviour()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One POST /events."""

    time: float
    """Unix time of its arrival, seconds."""
    method: str
    headers: dict[str, str]
    """Names in lower case."""
    status: int
    """0 if it got no answer."""
    events: int
    """How many were accepted."""
    body_bytes: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """How much it accepted."""

    requests: int
    """Requests since the start, answered or not."""
    events: int
    """Accepted, repeats included."""
    last_event_id: int | None


class Taken(NamedTuple):
    """A request's events."""

    body: bytes
    """As sent, without line breaks: one line of the file."""
    event_ids: array[int]


class _EventId(msgspec.Struct):
    event_id: int = 0  # of another stream than engagement, whose identity has another name


_decode_array = msgspec.json.Decoder(list[_EventId]).decode
_decode_one = msgspec.json.Decoder(_EventId).decode


_EVENT_ID = re.compile(rb'"event_id":([0-9]+)')  # not in a string: there the quotes are escaped


def trust(body: bytes) -> Taken:
    """For `Behaviour.trusting`."""
    return Taken(b"", array("q", map(int, _EVENT_ID.findall(body))))


def read(body: bytes) -> Taken:
    """Raises msgspec.DecodeError unless every event has an id."""
    if b"\n" in body or b"\r" in body:  # only between tokens: strings have them escaped
        body = body.replace(b"\r", b" ").replace(b"\n", b" ")
    events = _decode_array(body) if body.lstrip()[:1] == b"[" else [_decode_one(body)]
    return Taken(body, array("q", [event.event_id for event in events]))


class Store:
    """The accepted events: in memory, and in a file so that they survive a crash."""

    def __init__(self, path: Path | None, keep: int | None) -> None:
        self.taken: deque[Taken] = deque(maxlen=keep)
        self.events = 0
        self.last_event_id: int | None = None
        self._file = path.open("ab+", buffering=0) if path else None
        if path:
            with path.open("r+b") as lines:  # its own: an unbuffered file is read byte by byte
                size = 0
                for line in lines:
                    if line.endswith(b"\n"):  # otherwise it crashed before it answered
                        self._remember(read(line))
                        size += len(line)
                lines.truncate(size)

    def add(self, taken: Taken) -> None:
        """Keep it. On return the operating system has it."""
        if self._file and taken.body:
            self._file.write(taken.body + b"\n")
        self._remember(taken)

    def clear(self) -> None:
        """Forget everything."""
        if self._file:
            self._file.truncate(0)
        self.taken.clear()
        self.events, self.last_event_id = 0, None

    def _remember(self, taken: Taken) -> None:
        self.taken.append(taken)
        self.events += len(taken.event_ids)
        if taken.event_ids:
            self.last_event_id = taken.event_ids[-1]


OK = 200
NOTHING = Taken(b"", array("q"))


class ApiServer:
    """The endpoints."""

    def __init__(self, store: Store, keep: int | None) -> None:
        self._store = store
        self._requests: deque[Request] = deque(maxlen=keep)
        self._arrived = 0
        self._behaviour = NORMAL
        self._faults = Faults(NORMAL)

    def application(self) -> web.Application:
        """For aiohttp to run."""
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.add_routes(
            [
                web.post("/events", self.post_events),
                web.get("/events", self.get_events),
                web.get("/event_ids", self.get_event_ids),
                web.get("/requests", self.get_requests),
                web.get("/stats", self.get_stats),
                web.post("/behave", self.post_behave),
                web.post("/reset", self.post_reset),
                web.get("/healthz", self.get_healthz),
            ]
        )
        return application

    async def post_events(self, request: web.Request) -> web.Response:
        """Accept events, or misbehave."""
        arrived_at = time.time()
        self._arrived += 1
        body = await request.read()
        fault = self._faults.next()
        taken = NOTHING
        try:
            await strike_before(fault, request)
            taken = self._take(request, body)
            await strike_after(fault)
        except Refused as refused:
            self._log(arrived_at, request, refused.status, len(body), taken)
            return refusal(request, refused)
        self._log(arrived_at, request, OK, len(body), taken)
        return _json({"taken": len(taken.event_ids)})

    async def get_events(self, request: web.Request) -> web.StreamResponse:
        """All events as one JSON array."""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for chunk in _array_chunks([taken.body for taken in self._store.taken]):
            await response.write(chunk)
        await response.write_eof()
        return response

    async def get_event_ids(self, _: web.Request) -> web.Response:
        """All ids as one JSON array."""
        return _json([event_id for taken in self._store.taken for event_id in taken.event_ids])

    async def get_requests(self, _: web.Request) -> web.Response:
        """All requests as one JSON array."""
        return _json(list(self._requests))

    async def get_stats(self, _: web.Request) -> web.Response:
        """How much it accepted."""
        store = self._store
        return _json(Stats(requests=self._arrived, events=store.events, last_event_id=store.last_event_id))

    async def post_behave(self, request: web.Request) -> web.Response:
        """Change how it misbehaves from now on."""
        try:
            self._behave(msgspec.json.decode(await request.read(), type=Behaviour))
        except msgspec.DecodeError as exc:
            return web.Response(status=400, text=f"{exc}\n")
        return _json({})

    async def post_reset(self, _: web.Request) -> web.Response:
        """Forget everything."""
        self._store.clear()
        self._requests.clear()
        self._arrived = 0
        self._behave(NORMAL)
        return _json({})

    async def get_healthz(self, _: web.Request) -> web.Response:
        """It listens."""
        return web.Response(text="ok\n")

    def _behave(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._faults = Faults(behaviour)

    def _take(self, request: web.Request, body: bytes) -> Taken:
        rules = self._behaviour
        if rules.token is not None and request.headers.get("Authorization") != f"Bearer {rules.token}":
            raise Refused(401, "the bearer token is missing or wrong")
        if rules.max_body_bytes is not None and len(body) > rules.max_body_bytes:
            raise Refused(413, f"the body has more than {rules.max_body_bytes} bytes")
        taken = trust(body) if rules.trusting else _parse(body)
        if refused := rules.refuse_event_ids.intersection(taken.event_ids):
            raise Refused(422, f"event {min(refused)} is refused")
        self._store.add(taken)
        return taken

    def _log(self, arrived_at: float, request: web.Request, status: int, body_bytes: int, taken: Taken) -> None:
        events = len(taken.event_ids)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in request.raw_headers}
        self._requests.append(
            Request(
                time=arrived_at,
                method=request.method,
                headers=headers,
                status=status,
                events=events,
                body_bytes=body_bytes,
            )
        )
        clock = time.strftime("%H:%M:%S", time.gmtime(arrived_at))
        last = f", last event_id {taken.event_ids[-1]}" if events else ""
        sys.stdout.write(f"{clock} POST /events {status or 'no answer'}: {events} events taken{last}\n")
        sys.stdout.flush()


def _parse(body: bytes) -> Taken:
    try:
        return read(body)
    except (msgspec.DecodeError, OverflowError) as exc:
        raise Refused(400, f"not events: {exc}") from exc


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _array_chunks(bodies: list[bytes]) -> Iterator[bytes]:
    """The events of all bodies, arrays and single objects, as one JSON array."""
    inner = [events for body in bodies if (events := body.strip().removeprefix(b"[").removesuffix(b"]").strip())]
    yield b"["
    for first in range(0, len(inner), CHUNK_BODIES):
        yield (b"," if first else b"") + b",".join(inner[first : first + CHUNK_BODIES])
    yield b"]"


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="The demo HTTP API; every option is also an environment variable.")
    environ = os.environ
    parser.add_argument("--host", default=environ.get("API_HOST", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=environ.get("API_PORT", "8000"))
    parser.add_argument(
        "--file", type=Path, default=environ.get("API_FILE"), help="keeps what was taken over a restart"
    )
    parser.add_argument("--keep", type=int, default=environ.get("API_KEEP"), help="how many requests to remember (all)")
    arguments = parser.parse_args()
    server = ApiServer(Store(arguments.file, arguments.keep), arguments.keep)
    web.run_app(
        server.application(),
        host=arguments.host,
        port=arguments.port,
        print=None,
        access_log=None,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )


if __name__ == "__main__":
    main()
