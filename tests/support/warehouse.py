"""Another database, for `examples/sinks/postgres_sink`: its tables, the role that writes to them, and what is there."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import psycopg
from pydantic import SecretStr

from devstack import DevStack
from enrichment import EVENT
from examples.sinks.postgres_sink.replicator_warehouse import WarehouseSettings, WarehouseSink
from replicator.contracts.sink import SinkContext
from sinks.testing import decode
from tests.support.environment import SECRET
from tests.support.plugin import WAREHOUSE

ROLE, PASSWORD = "warehouse", f"{SECRET}-warehouse"
TIME = """CASE WHEN isfinite(event_ts) THEN to_char(event_ts AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
    ELSE event_ts::text END AS event_ts"""
FIELDS = ", ".join(TIME if field.name == "event_ts" else field.name for field in EVENT.fields)


class Warehouse:
    """`owner_dsn` may do anything there, `plain_dsn` what the sink needs."""

    def __init__(self, stack: DevStack, owner_dsn: str) -> None:
        self.owner_dsn = owner_dsn
        database = owner_dsn.rpartition("/")[2]
        self.plain_dsn = stack.postgres.dsn_for(database=database, user=ROLE, password=PASSWORD)

    def sink(self, dsn: SecretStr) -> WarehouseSink:
        """One that logs in there."""
        return WarehouseSink(WarehouseSettings(warehouse_dsn=dsn), SinkContext(EVENT))

    def make(self) -> None:
        """The tables, as `init` makes them, and the rights."""
        asyncio.run(self._create())
        self.execute(
            "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'warehouse') THEN CREATE ROLE warehouse"
            f" LOGIN PASSWORD '{PASSWORD}'; END IF; END $$"
        )
        self.grant()

    def grant(self) -> None:
        """The example's own script."""
        psql = ["psql", "-X", "-q", self.owner_dsn, "-v", f"role={ROLE}", "-f", str(WAREHOUSE / "grants.sql")]
        subprocess.run(psql, check=True, timeout=60)

    async def _create(self) -> None:
        sink = self.sink(SecretStr(self.owner_dsn))
        assert ["PostgreSQL: made table events", "PostgreSQL: made table events_position"] == await sink.create()
        await sink.close()

    def execute(self, statement: str) -> None:
        """As the owner."""
        with psycopg.connect(self.owner_dsn, autocommit=True) as connection:
            connection.execute(statement.encode())

    def read(self) -> list[dict[str, Any]]:
        """The events by id, in the form of the other destinations."""
        query = f"SELECT row_to_json(there)::text FROM (SELECT {FIELDS} FROM events ORDER BY event_id) AS there"  # noqa: S608
        with psycopg.connect(self.owner_dsn) as connection:
            return [decode(text) for (text,) in connection.execute(query.encode())]

    def count(self) -> int:
        """Of the events."""
        with psycopg.connect(self.owner_dsn) as connection:
            [count] = connection.execute(b"SELECT count(*) FROM events").fetchone() or (0,)
        return int(count)

    def ends(self) -> tuple[int, int]:
        """The newest commit of which there is an event, and that of the position, at one moment."""
        query = b"SELECT coalesce(max(_lsn), 0), (SELECT commit_lsn - '0/0' FROM events_position) FROM events"
        with psycopg.connect(self.owner_dsn) as connection:
            [newest, position] = connection.execute(query).fetchone() or (0, 0)
        return int(newest), int(position)
