"""A private Redis that writes nothing to disk while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import redis

from devstack.process import Service, find_program
from devstack.watchdog import Watchdog

SETTINGS = {
    "save": "",
    "appendonly": "no",
}


class Redis(Service):
    """Redis. Its data survives `stop`; it survives `kill` only with the setting `appendonly: yes`."""

    name = "redis"
    sink = "redis"

    def __init__(self, folder: Path, watchdog: Watchdog, settings: Mapping[str, str]) -> None:
        super().__init__(folder, watchdog)
        self._program = find_program("redis-server", "redis-server")
        self.settings = {**SETTINGS, **settings}
        """Read at every start."""

    @property
    def url(self) -> str:
        """Database 0; with the password if `requirepass` is set."""
        password = self.settings.get("requirepass")
        return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """The server, its settings as arguments."""
        where = {"bind": "127.0.0.1", "port": str(self.port), "dir": str(self.folder)}
        settings = {**self.settings, **where}
        return [self._program, *(word for name, value in settings.items() for word in (f"--{name}", value))]

    def environment(self) -> dict[str, str]:
        """Its address."""
        return {"REPLICATOR_REDIS_URL": self.url}

    def answers(self) -> bool:
        """Whether it has loaded its data."""
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.ConnectionError:  # BusyLoadingError included
            return False

    def ask_to_stop(self) -> None:
        """Write the data to disk and exit."""
        with redis.Redis.from_url(self.url) as client:
            client.shutdown(save=True)
