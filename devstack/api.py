"""The demo HTTP API in a process of its own; `api_server` is the program, `process` runs it."""

from __future__ import annotations

from typing import Any

import msgspec

from devstack.api_server import Request, Stats
from devstack.control import fetch
from devstack.process import Service, python


class Api(Service):
    """The API that accepts events. Accepted events survive `stop` and `kill`; the log of requests does not."""

    name = "api"
    sink = "http"

    @property
    def url(self) -> str:
        """Where events are posted."""
        return f"{self._address}/events"

    def events(self) -> list[dict[str, Any]]:
        """Every event it accepted, in order, repeats included."""
        return msgspec.json.decode(self.events_json(), type=list[dict[str, Any]])

    def events_json(self) -> bytes:
        """The same as one JSON array, byte for byte as sent, so that fractions stay exact."""
        return fetch(self.url)

    def event_ids(self) -> list[int]:
        """Only their ids: far less data when there are many."""
        return msgspec.json.decode(fetch(f"{self._address}/event_ids"), type=list[int])

    def requests(self) -> list[Request]:
        """Every POST since it was started, answered or not, in order."""
        return msgspec.json.decode(fetch(f"{self._address}/requests"), type=list[Request])

    def stats(self) -> Stats:
        """How much it accepted."""
        return msgspec.json.decode(fetch(f"{self._address}/stats"), type=Stats)

    def behave(self, **behaviour: object) -> None:
        """From now on misbehave as these fields of `api_server.Behaviour` say; none: behave well."""
        fetch(f"{self._address}/behave", msgspec.json.encode(behaviour))

    def reset(self) -> None:
        """Forget all events and requests, and behave well."""
        fetch(f"{self._address}/reset", b"")

    def command(self) -> list[str]:
        """The program."""
        file = self.folder / "events"
        return [*python("devstack.api_server"), "--port", str(self.port), "--file", str(file)]

    def environment(self) -> dict[str, str]:
        """Its address."""
        return {"REPLICATOR_HTTP_URL": self.url}

    def answers(self) -> bool:
        """Whether it listens."""
        try:
            return bool(fetch(f"{self._address}/healthz"))
        except OSError:
            return False

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self.port}"
