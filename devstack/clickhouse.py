"""ClickHouse as a child process: the embedded engine behind HTTP. `clickhouse_server` is the program.

Debian's ClickHouse server is years too old for clickhouse-connect; the chdb package has the current engine.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import msgspec

from devstack.control import fetch
from devstack.process import DevStackError, Service, python
from devstack.watchdog import Watchdog

DATABASE = "engagement"


class ClickHouse(Service):
    """ClickHouse with database `engagement` and user `default`. Its data survives `stop` and `kill`."""

    name = "clickhouse"
    sink = "clickhouse"

    def __init__(self, folder: Path, watchdog: Watchdog, password: str = "") -> None:
        super().__init__(folder, watchdog)
        if find_spec("chdb") is None:
            raise DevStackError("chdb is missing: pip install 'engagement-replicator[chdb]'")
        self._password = password

    @property
    def url(self) -> str:
        """For database `engagement`, with user and password."""
        password = f":{self._password}" if self._password else ""
        return f"http://default{password}@127.0.0.1:{self.port}/{DATABASE}"

    def count(self) -> int:
        """Rows of the events' table, 0 before there is one: the replicator's lane makes it."""
        there = self.query("EXISTS TABLE events_enriched").strip() == "1"
        return int(self.query("SELECT count() FROM events_enriched")) if there else 0

    def query(self, sql: str) -> str:
        """Run a statement in database `engagement`. Returns what ClickHouse prints (TabSeparated by default)."""
        return self._post(sql, DATABASE)

    def behave(self, **behaviour: object) -> None:
        """From now on misbehave as these fields of `clickhouse_server.Behaviour` say; none: behave well."""
        fetch(f"{self._address}/behave", msgspec.json.encode(behaviour))

    def reset(self) -> None:
        """Behave well, and start with an empty database."""
        self.behave()
        self._post(f"DROP DATABASE {DATABASE} SYNC", "default")
        self._post(f"CREATE DATABASE {DATABASE}", "default")

    def command(self) -> list[str]:
        """The program."""
        where = ["--port", str(self.port), "--folder", str(self.folder / "data"), "--database", DATABASE]
        return [*python("devstack.clickhouse_server"), *where, "--password", self._password]

    def environment(self) -> dict[str, str]:
        """Its address."""
        return {"REPLICATOR_CLICKHOUSE_URL": self.url}

    def answers(self) -> bool:
        """Whether it listens, which it does once the engine has loaded its tables."""
        try:
            return bool(fetch(f"{self._address}/ping"))
        except OSError:
            return False

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _post(self, sql: str, database: str) -> str:
        key = {"X-ClickHouse-User": "default", "X-ClickHouse-Key": self._password}
        return fetch(f"{self._address}/?database={database}", sql.encode(), key).decode()
