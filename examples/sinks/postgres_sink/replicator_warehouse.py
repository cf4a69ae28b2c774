"""A sink: a table in another PostgreSQL database, an event a row, written in one transaction with its position."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import psycopg
from pydantic import Field

from replicator import (
    BatchRefused,
    BatchTooLarge,
    Event,
    Finding,
    Mode,
    PostgresDsn,
    Refusal,
    Settings,
    Sink,
    SinkContext,
    SinkError,
    SinkMisconfigured,
    SinkPosition,
    SinkUnavailable,
    SinkUnusable,
    cited,
    format_lsn,
)

ANSWER_SECONDS, UNDEFINED_TABLE = 30, "42P01"
CURE = "Check REPLICATOR_WAREHOUSE_DSN, the two tables, and what the role may do (README.md of replicator-warehouse)"
REFUSED = {"22": BatchRefused, "23": BatchRefused, "P0": BatchRefused, "54": BatchTooLarge}
"""By the SQLSTATE's class: a value, a constraint, a trigger; a limit of PostgreSQL."""
TURNED_AWAY = ("28", "3D", "3F", "42")  # who we are, the database, the schema, a table or our rights in it
DURABLE = "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
POSITION = """CREATE TABLE events_position (one boolean PRIMARY KEY CHECK (one), commit_lsn pg_lsn, ordinal bigint);
    INSERT INTO events_position VALUES (true, '0/0', 0)"""
MOVE = """UPDATE events_position SET (commit_lsn, ordinal) = (
    SELECT * FROM (VALUES (commit_lsn, ordinal), (%s::pg_lsn, %s)) AS places ORDER BY 1 DESC, 2 DESC LIMIT 1)"""


class WarehouseSettings(Settings):
    warehouse_dsn: PostgresDsn = Field(
        description="a postgresql:// URL or libpq keywords of the database to write to, sslmode and the like included"
    )


class WarehouseSink(Sink):
    name, max_events, linger_seconds, settings_class = "warehouse", 5000, 0.2, WarehouseSettings
    settings: WarehouseSettings
    _connection: psycopg.AsyncConnection | None = None
    _live = False

    def __init__(self, given: WarehouseSettings, context: SinkContext) -> None:
        super().__init__(given, context)
        fields, key = self.stream.fields, self.stream.identity.name
        names = [*(field.name for field in fields), "_lsn"]
        columns = ", ".join([*(f"{field.name} {field.type.postgres}" for field in fields), "_lsn bigint"])
        self._tables = {"events": f"CREATE TABLE events ({columns}, PRIMARY KEY ({key}))", "events_position": POSITION}
        # A backfill may bring a newer view of an event than the stream did, or an older one.
        self._upsert = f"""INSERT INTO events ({", ".join(names)})
            SELECT DISTINCT ON ({key}) {", ".join(names)} FROM json_to_recordset(%s::json) AS new ({columns})
            ORDER BY {key}, _lsn DESC
            ON CONFLICT ({key}) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in names)}
            WHERE events._lsn <= excluded._lsn"""  # noqa: S608  the declaration's names

    async def create(self) -> list[str]:
        async with self._transaction() as connection:
            looks = {table: await connection.execute("SELECT to_regclass(%s)", [table]) for table in self._tables}
            missing = [table for table, look in looks.items() if await look.fetchone() == (None,)]
            for table in missing:
                await connection.execute(self._tables[table])
        return [f"PostgreSQL: made table {table}" for table in missing]

    async def check(self) -> list[Finding]:
        try:
            await self.write([])
        except SinkError as exc:
            return [Finding(False, exc.problem, exc.cure or CURE, made_by_init=UNDEFINED_TABLE in exc.detail)]
        return [Finding(True, f"sink {self.name}: PostgreSQL takes events")]

    async def open(self, start: SinkPosition | None = None, mode: Mode = Mode.LIVE) -> None:
        self._live = mode is Mode.LIVE
        await self.write([])

    async def write(self, new: Sequence[Event]) -> Sequence[Refusal]:
        rows = b",".join(b'%b,"_lsn":%d}' % (event.json[:-1], event.commit_lsn) for event in new)
        last = (format_lsn(new[-1].commit_lsn), new[-1].ordinal) if new and self._live else ("0/0", 0)
        async with self._transaction() as connection:
            await connection.execute(self._upsert, [f"[{rows.decode()}]"])
            moved = await connection.execute(MOVE, last)
        if not moved.rowcount:
            raise SinkUnusable(sink=self.name, detail="events_position has lost its row", cure=CURE)
        return []

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[psycopg.AsyncConnection]:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if self._connection is None:
                    dsn = self.settings.warehouse_dsn.get_secret_value()
                    self._connection = await psycopg.AsyncConnection.connect(dsn, prepare_threshold=None)
                async with self._connection.transaction():
                    await self._connection.execute(DURABLE)
                    yield self._connection
        except BaseException as exc:
            await self.close()  # whatever state it is in
            if isinstance(exc, psycopg.Error | TimeoutError):
                raise self._meaning(exc) from exc
            raise

    async def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()

    def _meaning(self, exc: psycopg.Error | TimeoutError) -> SinkError:
        """What PostgreSQL says may quote the row: only a dead letter has it."""
        state = getattr(exc, "sqlstate", None) or ""
        if refused := REFUSED.get(state[:2]):
            return refused(sink=self.name, detail=f"PostgreSQL error {state}", reason=cited(str(exc)))
        words = cited(str(exc)) or f"no answer for {ANSWER_SECONDS} s"
        if state.startswith(TURNED_AWAY) or "FATAL:  " in str(exc):  # without a state libpq speaks, of a connection
            return SinkMisconfigured(sink=self.name, detail=f"{state} {words}".strip(), cure=CURE)
        return SinkUnavailable(sink=self.name, detail=f"PostgreSQL error {state}" if state else words)
