"""Several servers in one temporary folder, as a context manager. Each server has its own module."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar

from devstack.api import Api
from devstack.clickhouse import ClickHouse
from devstack.postgres import Postgres
from devstack.process import DevStackError, Service, free_port
from devstack.redis import Redis
from devstack.replicator import Replicator
from devstack.spark import SparkCluster, cluster
from devstack.standby import Standby
from devstack.watchdog import Watchdog

NO_SETTINGS: Mapping[str, str] = MappingProxyType({})

S = TypeVar("S", bound=Service)


class DevStack:
    """`with DevStack("postgres", "redis", "clickhouse", "api") as stack:` starts these, and ends them in any case.

    Every server has a free port and its own folder, and keeps both while the stack exists.
    """

    SERVICES = ("postgres", "redis", "clickhouse", "api")

    def __init__(
        self,
        *services: str,
        postgres_settings: Mapping[str, str] = NO_SETTINGS,
        redis_settings: Mapping[str, str] = NO_SETTINGS,
        clickhouse_password: str = "",
    ) -> None:
        if unknown := set(services).difference(self.SERVICES):
            raise DevStackError(f"no such service: {', '.join(sorted(unknown))}; there are {', '.join(self.SERVICES)}")
        self._names = services
        self._make: dict[str, Callable[[Path, Watchdog], Service]] = {
            "postgres": lambda folder, watchdog: Postgres(folder, watchdog, postgres_settings),
            "redis": lambda folder, watchdog: Redis(folder, watchdog, redis_settings),
            "clickhouse": lambda folder, watchdog: ClickHouse(folder, watchdog, clickhouse_password),
            "api": Api,
        }
        self._services: dict[str, Service] = {}
        self._replicators: list[Replicator] = []
        self._watchdog: Watchdog | None = None
        self._admin_port = free_port()

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="devstack-"))
        self.folder.chmod(0o711)  # PostgreSQL runs as another user and needs access
        self._watchdog = Watchdog(self.folder)
        try:
            for name in self._names:
                self._services[name] = self._make[name](self.folder, self._watchdog)
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def postgres(self) -> Postgres:
        """PostgreSQL with wal2json."""
        return self._service("postgres", Postgres)

    @property
    def redis(self) -> Redis:
        """Redis."""
        return self._service("redis", Redis)

    @property
    def clickhouse(self) -> ClickHouse:
        """ClickHouse."""
        return self._service("clickhouse", ClickHouse)

    @property
    def api(self) -> Api:
        """The demo HTTP API."""
        return self._service("api", Api)

    def environment(self) -> dict[str, str]:
        """The settings of a replicator on this stack, including checkpoint and admin port."""
        variables = {
            "REPLICATOR_SINKS": ",".join(service.sink for service in self._services.values() if service.sink),
            "REPLICATOR_CHECKPOINT_URL": f"sqlite:///{self.folder}/checkpoint.db",
            "REPLICATOR_ADMIN_LISTEN": f"127.0.0.1:{self._admin_port}",
        }
        for service in self._services.values():
            variables.update(service.environment())
        return variables

    def replicator(self, slot: str = "engagement_slot", **settings: str) -> Replicator:
        """A replicator on this stack with its own checkpoint, not started yet. It ends with the stack.

        `settings` are additional variables, such as REPLICATOR_HTTP_BATCH_SIZE="500".
        """
        if self._watchdog is None:
            raise DevStackError("the stack isn't running: with DevStack(...) as stack")
        folder = self.folder / slot
        folder.mkdir()
        made = Replicator(folder, self._watchdog, {**self.environment(), "REPLICATOR_SLOT": slot, **settings})
        self._replicators.append(made)
        return made

    def standby(self) -> Standby:
        """A standby of PostgreSQL, not started yet. It ends with the stack."""
        if self._watchdog is None:
            raise DevStackError("the stack isn't running: with DevStack(...) as stack")
        made = Standby(self.folder, self._watchdog, self.postgres)
        self._services[made.name] = made
        return made

    def spark(self, **settings: str) -> AbstractContextManager[SparkCluster]:
        """A Spark cluster whose two nodes have the settings of a replicator on this stack."""
        if self._watchdog is None:
            raise DevStackError("the stack isn't running: with DevStack(...) as stack")
        return cluster(self.folder / "spark", self._watchdog, {**self.environment(), **settings})

    def close(self) -> None:
        """Kill everything and remove the folder."""
        if self._watchdog is None:
            return
        try:
            for service in (*self._replicators, *self._services.values()):
                service.kill()
        finally:
            self._watchdog.close()
            self._watchdog = None

    def _start_all(self) -> None:
        with ThreadPoolExecutor(max(1, len(self._services))) as threads:
            starts = [threads.submit(service.start) for service in self._services.values()]
        for start in starts:
            start.result()

    def _service(self, name: str, kind: type[S]) -> S:
        service = self._services.get(name)
        if not isinstance(service, kind):
            raise DevStackError(f"{name} is not part of this stack: DevStack({name!r}, ...)")
        return service
