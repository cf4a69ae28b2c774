"""Every sink keeps the contract of `Sink`: ours on real servers, and the fake that other tests stand on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from devstack import DevStack
from devstack.process import Service
from devstack.proxy import Proxy
from enrichment import EVENT
from replicator.contracts.events import Event, Id
from replicator.contracts.fields import Stream
from replicator.contracts.settings import Settings
from replicator.contracts.sink import Sink
from sinks.clickhouse.sink import ClickHouseSettings, ClickHouseSink
from sinks.clickhouse.table import table_of
from sinks.http.settings import HttpSettings
from sinks.http.sink import HttpSink
from sinks.redis.settings import RedisSettings
from sinks.redis.sink import RedisSink
from sinks.stdout.sink import StdoutSink
from sinks.testing import Destination, MemorySink, SinkConformance, decode, sample
from tests.support.destinations import Destinations
from tests.support.warehouse import Warehouse

ROWS = """
SELECT {fields} FROM {table} FINAL
SETTINGS date_time_output_format = 'iso', output_format_json_quote_64bit_integers = 0,
         output_format_json_quote_decimals = 0
FORMAT JSONEachRow
"""


def kept(changes: Iterable[dict[str, Any]], stream: Stream) -> list[dict[str, Any]]:
    """What a receiver of changes keeps: the highest version of each row, unless that is a delete."""
    name = stream.identity.name
    last: dict[Id, dict[str, Any]] = {}
    for change in changes:
        former = (
            {name: change["_was"], "_operation": "delete", "_version": change["_version"]} if "_was" in change else {}
        )
        for one in filter(None, (former, change)):
            if one[name] not in last or last[one[name]]["_version"] <= one["_version"]:
                last[one[name]] = one
    rows = [change for change in last.values() if change["_operation"] == "upsert"]
    return [{field.name: row[field.name] for field in stream.fields} for row in rows]


class Wired(Destination):
    """One of the stack's servers, behind a proxy that can go away."""

    def __init__(self, stack: DevStack, service: Service, proxy: Proxy) -> None:
        super().__init__(EVENT)
        self.destinations = Destinations(stack)
        self._service = service
        self._proxy = proxy

    def url(self, url: str) -> SecretStr:
        """The same, through the proxy."""
        return SecretStr(url.replace(f":{self._service.port}/", f":{self._proxy.port}/"))

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Connections are closed, new ones too."""
        self._proxy.behave("down")
        yield
        self._proxy.behave("whole")

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Connections stay open, nothing moves."""
        self._proxy.behave("stalled")
        yield
        self._proxy.behave("whole")


class TestClickHouse(SinkConformance):
    """On the embedded engine behind HTTP."""

    @pytest.fixture
    def destination(self, stack: DevStack) -> Iterator[Destination]:
        """Its table."""

        class Table(Wired):
            def sink(self) -> Sink:
                given = {"clickhouse_url": self.url(stack.clickhouse.url), "clickhouse_max_events": 500}
                return ClickHouseSink(ClickHouseSettings.model_validate(given), self.context)

            def read(self) -> Iterable[dict[str, Any]]:
                fields = ", ".join(field.name for field in self.stream.fields)
                rows = stack.clickhouse.query(ROWS.format(fields=fields, table=table_of(self.stream)))
                return map(decode, rows.splitlines())

        stack.clickhouse.reset()
        with Proxy(stack.clickhouse.port) as proxy:
            yield Table(stack, stack.clickhouse, proxy)


class TestRedis(SinkConformance):
    """Each sample is the only one of its content, so Redis has all of it: as the last event, as often as it counted."""

    @pytest.fixture
    def destination(self, stack: DevStack, redis_url: str) -> Iterator[Destination]:
        """Its keys."""

        class Keys(Wired):
            def sink(self) -> Sink:
                return RedisSink(RedisSettings.model_validate({"redis_url": self.url(redis_url)}), self.context)

            def read(self) -> Iterable[dict[str, Any]]:
                noun = self.stream.redis_name or self.stream.name
                counts, lasts = self._values(f"{noun}:count:"), self._values(f"{noun}:last:")
                assert {key for key, count in counts.items() if int(count)} == {*lasts}
                return [decode(lasts[key]) for key, count in counts.items() for _ in range(int(count))]

            def _values(self, prefix: str) -> dict[str, str]:
                client = self.destinations.redis
                return {key.removeprefix(prefix): str(client.get(key)) for key in client.scan_iter(f"{prefix}*")}

        with Proxy(stack.redis.port) as proxy:
            yield Keys(stack, stack.redis, proxy)


class TestHttp(SinkConformance):
    """What the API took, repeats included."""

    @pytest.fixture
    def destination(self, stack: DevStack) -> Iterator[Destination]:
        """The API."""

        class TheApi(Wired):
            keeps_repeats = True

            def sink(self) -> Sink:
                return HttpSink(HttpSettings.model_validate({"http_url": self.url(stack.api.url)}), self.context)

            def read(self) -> Iterable[dict[str, Any]]:
                taken = self.destinations.api()
                return kept(taken, self.stream) if self.stream.follows else taken

            def refusal(self, event: Event) -> AbstractContextManager[None] | None:
                return None if self.stream.follows else self._refusing(event.id)  # it knows numbers

            @contextmanager
            def _refusing(self, event_id: int) -> Iterator[None]:
                stack.api.behave(refuse_event_ids=[event_id])
                yield
                stack.api.behave()

        stack.api.reset()
        with Proxy(stack.api.port) as proxy:
            yield TheApi(stack, stack.api, proxy)


class TestWarehouse(SinkConformance):
    """An example that is not part of the package: another PostgreSQL database, as a role with the least rights."""

    @pytest.fixture
    def destination(self, stack: DevStack, warehouse: Warehouse) -> Iterator[Destination]:
        """Its table."""

        class Rows(Wired):
            def sink(self) -> Sink:
                return warehouse.sink(self.url(warehouse.plain_dsn))

            def read(self) -> Iterable[dict[str, Any]]:
                return warehouse.read()

            @contextmanager
            def refusal(self, event: Event) -> Iterator[None]:
                warehouse.execute(f"ALTER TABLE events ADD CONSTRAINT no CHECK (event_id <> {event.id})")
                yield
                warehouse.execute("ALTER TABLE events DROP CONSTRAINT no")

        with Proxy(stack.postgres.port) as proxy:
            rows = Rows(stack, stack.postgres, proxy)
            rows.samples.append(sample(EVENT, -100, None))  # infinity is a time there
            rows.refused = None
            yield rows


class Printed(Destination):
    """What was printed, into a file."""

    keeps_repeats = True
    keeps_order = True

    def __init__(self, file: Path) -> None:
        super().__init__(EVENT)
        self.refused = None
        self._file = file
        self._output = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def sink(self) -> Sink:
        """It prints where a program's standard output would be."""
        return StdoutSink(Settings(), self.context, output=self._output)

    def read(self) -> Iterable[dict[str, Any]]:
        """Its lines; of changes what their reader keeps."""
        lines = map(decode, self._file.read_bytes().splitlines())
        return kept(lines, self.stream) if self.stream.follows else lines

    @contextmanager
    def outage(self) -> Iterator[None]:
        """The descriptor is closed."""
        os.close(self._output)
        yield
        assert self._output == os.open(self._file, os.O_WRONLY | os.O_APPEND)


class TestStdout(SinkConformance):
    """Its destination is a file, as after `> events.jsonl`."""

    @pytest.fixture
    def destination(self, tmp_path: Path) -> Destination:
        """A file."""
        return Printed(tmp_path / "events.jsonl")


class Memory(Destination):
    """What all its sinks have."""

    def __init__(self) -> None:
        super().__init__(EVENT)
        self.events: dict[Id, Event] = {}
        self.sinks: list[MemorySink] = []

    def sink(self) -> Sink:
        """It shares the events of the others."""
        sink = MemorySink(context=self.context, unfit=[event.id] if (event := self.refused) else [])
        sink.events = self.events
        self.sinks.append(sink)
        return sink

    def read(self) -> Iterable[dict[str, Any]]:
        """One of each."""
        return [decode(event.json) for event in self.events.values() if not event.deleted]

    @contextmanager
    def refusal(self, event: Event) -> Iterator[None]:
        """By all of them."""
        for sink in self.sinks:
            sink.refused.add(event.id)
        yield
        for sink in self.sinks:
            sink.refused.clear()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Of all of them."""
        for sink in self.sinks:
            sink.down = True
        yield
        for sink in self.sinks:
            sink.down = False


class TestMemory(SinkConformance):
    """The fake is a sink like any other."""

    @pytest.fixture
    def destination(self) -> Destination:
        """Memory."""
        return Memory()
